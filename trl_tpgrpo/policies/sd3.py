"""Stable Diffusion 3 and 3.5."""

import numpy as np
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step


class SD3Policy(FlowPolicy):
    """SD3 and SD3.5: latents as images, sigmas of the scheduler, classifier-free guidance in one pass."""

    pipeline_class = StableDiffusion3Pipeline
    repeated_blocks = ("JointTransformerBlock",)  # which diffusers does not name
    default_length = 256
    default_guidance = {"guidance_scale": 4.5}  # the paper's; the pipeline's own is 7
    guides_in_one_pass = True

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    @property
    def largest_size(self) -> int:  # type: ignore[override]
        return self.pipeline.transformer.config.pos_embed_max_size * self.size_multiple

    @property
    def num_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )  # fmt: skip
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.pipeline.transformer.config, self.pipeline.text_encoder
        num_clip_tokens = self.pipeline.tokenizer_max_length if clip is None else clip.config.max_position_embeddings
        shape = (num_clip_tokens + self.text_length, config.joint_attention_dim)  # CLIP's tokens, then T5's
        return {"prompt_embeds": shape, "pooled_prompt_embeds": (config.pooled_projection_dim,)}

    def sigmas(self, num_inference_steps: int) -> np.ndarray | None:
        return None

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        return model(
            hidden_states=latents,
            timestep=step.timestep.to(latents.device).expand(len(latents)),
            encoder_hidden_states=texts.tensors["prompt_embeds"],
            pooled_projections=texts.tensors["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
