"""Qwen-Image."""

import torch
from diffusers import QwenImagePipeline
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step


class QwenImagePolicy(FlowPolicy):
    """Qwen-Image: packed latents, texts of any length with a mask, classifier-free guidance that keeps each norm.

    The embedded guidance option of the config is not supported, because diffusers' model cannot run with it.
    """

    pipeline_class = QwenImagePipeline
    lora_target_modules = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
    default_length = 512
    default_guidance = {"true_cfg_scale": 4.0}
    guidance_option = "true_cfg_scale"
    needs_negative_prompt = True
    decoding = 2042

    @property
    def tile_side(self) -> int:
        return self.pipeline.vae.tile_sample_min_height

    @property
    def token_grids(self) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the tokens of each input of the model."""
        return [(1, *self.token_grid)]

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        options = {"device": self.device, "max_sequence_length": self.text_length}
        return {"prompt_embeds": own_tokens(*self.pipeline.encode_prompt(texts, **options))}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.pipeline.transformer.config.joint_attention_dim)}

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        number = len(latents)
        return model(
            hidden_states=latents,
            timestep=step.timestep.to(latents.device).expand(number).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=texts.mask(),
            encoder_hidden_states=texts.tensors["prompt_embeds"],
            img_shapes=[self.token_grids] * number,
            attention_kwargs={},
            return_dict=False,
        )[0]

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        guided = super().guide(conditional, unconditional)
        norm = torch.norm(conditional, dim=-1, keepdim=True)  # of each token
        return guided * (norm / torch.norm(guided, dim=-1, keepdim=True))

    def vae_latents(self, latents: Tensor) -> Tensor:
        size, vae = self.guidance, self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(latents, size.height, size.width, self.pipeline.vae_scale_factor)
        unpacked = unpacked.to(vae.dtype)  # (N, C, 1, H, W)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(unpacked)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return unpacked / (1.0 / std) + mean  # the pipeline's own rounding


def own_tokens(embeds: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return the texts (N, S, C) without their padding."""
    return list(embeds) if mask is None else [text[own.bool()] for text, own in zip(embeds, mask, strict=True)]
