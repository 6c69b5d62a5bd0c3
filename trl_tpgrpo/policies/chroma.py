"""Chroma."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step
from .flux import FluxPolicy


class ChromaPolicy(FlowPolicy):
    """Chroma: FLUX.1 with T5 text only, an attention mask, and classifier-free guidance."""

    pipeline_class = ChromaPipeline
    lora_target_modules = FluxPolicy.lora_target_modules
    default_length = 512
    default_guidance = {"guidance_scale": 5.0}

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            texts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.text_length, self.pipeline.transformer.config.joint_attention_dim)
        return {"prompt_embeds": shape, "prompt_attention_mask": (self.text_length,)}

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        number, device, embeds = len(latents), latents.device, texts.tensors["prompt_embeds"]
        mask = texts.tensors["prompt_attention_mask"]  # float mask that diffusers adds to the attention logits
        mask = torch.cat([mask, mask.new_ones(number, latents.shape[1])], dim=1)
        with _recomputing_with(mask, self.pipeline.transformer):
            return model(
                hidden_states=latents,
                timestep=step.timestep.to(device).expand(number).to(latents.dtype) / 1000,
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=embeds.dtype),
                img_ids=self.pipeline._prepare_latent_image_ids(number, *self.token_grid, device, latents.dtype),
                attention_mask=mask,
                joint_attention_kwargs={},
                return_dict=False,
            )[0]

    def vae_latents(self, latents: Tensor) -> Tensor:
        size, factor = self.guidance, self.pipeline.vae_scale_factor
        return super().vae_latents(self.pipeline._unpack_latents(latents, size.height, size.width, factor))


@contextmanager
def _recomputing_with(mask: Tensor, transformer: ChromaTransformer2DModel) -> Iterator[None]:
    """Pass the mask to the single blocks; diffusers leaves it out if activations are recomputed."""
    checkpoint = transformer._gradient_checkpointing_func

    def with_mask(block: nn.Module, *inputs: Tensor) -> Tensor:
        is_left_out = isinstance(block, ChromaSingleTransformerBlock) and len(inputs) == 3
        return checkpoint(block, *inputs, mask) if is_left_out else checkpoint(block, *inputs)

    transformer._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = checkpoint
