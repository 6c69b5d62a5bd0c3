"""Stable Diffusion 3 and 3.5."""

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from torch import Tensor

from .base import Conditioning, FlowPolicy, Schedule


class SD3Policy(FlowPolicy):
    """SD3 and SD3.5, with classifier-free guidance inside `velocity` when `guidance_scale` is above 1."""

    pipeline: StableDiffusion3Pipeline
    pipeline_class = StableDiffusion3Pipeline
    lora_target_modules = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ]  # fmt: skip
    repeated_blocks = ("JointTransformerBlock",)

    @property
    def uses_negative_prompt(self) -> bool:
        return self.guidance.guidance_scale > 1

    def _check_guidance(self) -> None:
        super()._check_guidance()
        self._check_size()
        if self.guidance.true_cfg_scale != 1:
            raise ValueError("true_cfg_scale is for FLUX; with this model classifier-free guidance is guidance_scale.")
        if self.guidance.negative_prompt is not None and not self.uses_negative_prompt:
            raise ValueError(
                f"negative_prompt has no effect without guidance: guidance_scale is {self.guidance.guidance_scale}, must be "
                "above 1."
            )

    def _check_size(self) -> None:
        transformer = self.pipeline.transformer.config
        largest = transformer.pos_embed_max_size * transformer.patch_size * self.pipeline.vae_scale_factor
        for name in ("height", "width"):
            size = getattr(self.guidance, name)
            if size > largest:
                raise ValueError(
                    f"{name} must be at most {largest} for this pipeline, whose position embeddings end there, got {size}."
                )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        length = self.guidance.max_sequence_length
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            negative_prompt=None
            if self.guidance.negative_prompt is None
            else [self.guidance.negative_prompt] * len(prompts),
            do_classifier_free_guidance=self.uses_negative_prompt,
            max_sequence_length=256 if length is None else length,
        )
        negative = Conditioning(negative_embeds, negative_pooled) if self.uses_negative_prompt else None
        return Conditioning(embeds, pooled, negative).to(self.dtype)

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        return self.pipeline.prepare_latents(
            len(generators),
            self.pipeline.transformer.config.in_channels,
            self.guidance.height,
            self.guidance.width,
            self.dtype,
            self.device,
            generators,
        )

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler, extra = self.pipeline.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting", None):
            side = self.pipeline.vae_scale_factor * self.pipeline.patch_size
            num_tokens = (self.guidance.height // side) * (self.guidance.width // side)
            extra["mu"] = self._resolution_shift(num_tokens, default_max_shift=1.16)
        timesteps, _ = retrieve_timesteps(scheduler, num_inference_steps, "cpu", **extra)
        return Schedule(scheduler.sigmas.cpu().clone(), timesteps.clone())

    def velocity(
        self, model: torch.nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        latents = latents.to(self.dtype)
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        negative = conditioning.negative
        if negative is not None:
            latents = torch.cat([latents, latents])
            embeds = torch.cat([negative.prompt_embeds, embeds])
            pooled = torch.cat([negative.pooled_prompt_embeds, pooled])
        predicted = model(
            hidden_states=latents,
            timestep=timestep.to(latents.device).expand(len(latents)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0].to(self.dtype)
        if negative is None:
            return predicted
        unconditional, conditional = predicted.chunk(2)
        return unconditional + self.guidance.guidance_scale * (conditional - unconditional)

    def unpack(self, latents: Tensor) -> Tensor:
        return latents
