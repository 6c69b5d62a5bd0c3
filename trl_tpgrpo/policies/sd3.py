"""Stable Diffusion 3 and 3.5."""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from .base import Conditioning, FlowPolicy


class SD3Policy(FlowPolicy):
    """SD3 and SD3.5, with classifier-free guidance inside `velocity` when `guidance_scale` is above 1."""

    pipeline_class = StableDiffusion3Pipeline
    repeated_blocks = ("JointTransformerBlock",)
    default_t5_length = 256

    @property
    def uses_negative_prompt(self) -> bool:
        return self.guidance.guidance_scale > 1

    @property
    def _token_side(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    def _check_guidance(self) -> None:
        super()._check_guidance()
        guidance = self.guidance
        if guidance.true_cfg_scale != 1:
            raise ValueError("true_cfg_scale is for FLUX; with this model classifier-free guidance is guidance_scale.")
        if guidance.negative_prompt is not None and not self.uses_negative_prompt:
            scale = guidance.guidance_scale
            raise ValueError(f"negative_prompt has no effect without guidance: guidance_scale {scale} is not above 1.")
        limit = self.pipeline.transformer.config.pos_embed_max_size * self._token_side
        for name, size in {"height": guidance.height, "width": guidance.width}.items():
            if size > limit:
                reason = "whose position embeddings end there"
                raise ValueError(f"{name} must be at most {limit} for this pipeline, {reason}, got {size}.")

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        options = {"device": self.device, "max_sequence_length": self.t5_length, "do_classifier_free_guidance": False}
        embeds, _, pooled, _ = self.pipeline.encode_prompt(texts, prompt_2=None, prompt_3=None, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().text_shapes()
        num_t5_tokens, width = shapes["prompt_embeds"]  # which come after CLIP's
        clip = self.pipeline.text_encoder
        num_clip_tokens = self.pipeline.tokenizer_max_length if clip is None else clip.config.max_position_embeddings
        return shapes | {"prompt_embeds": (num_clip_tokens + num_t5_tokens, width)}

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        size, channels = self.guidance, self.pipeline.transformer.config.in_channels
        return self.pipeline.prepare_latents(
            len(generators), channels, size.height, size.width, self.dtype, self.device, generators
        )

    def velocity(self, model: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        latents = latents.to(self.dtype)
        texts = conditioning.tensors
        if conditioning.negative is not None:
            latents = torch.cat([latents, latents])
            texts = {name: torch.cat([value, texts[name]]) for name, value in conditioning.negative.tensors.items()}
        predicted = model(
            hidden_states=latents,
            timestep=timestep.to(latents.device).expand(len(latents)),
            encoder_hidden_states=texts["prompt_embeds"],
            pooled_projections=texts["pooled_prompt_embeds"],
            return_dict=False,
        )[0].to(self.dtype)
        if conditioning.negative is None:
            return predicted
        unconditional, conditional = predicted.chunk(2)
        return unconditional + self.guidance.guidance_scale * (conditional - unconditional)
