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
        if self.guidance.true_cfg_scale != 1:
            raise ValueError("true_cfg_scale is for FLUX; with this model classifier-free guidance is guidance_scale.")
        if self.guidance.negative_prompt is not None and not self.uses_negative_prompt:
            raise ValueError(
                f"negative_prompt has no effect without guidance: guidance_scale is {self.guidance.guidance_scale}, "
                "must be above 1."
            )
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
        negative_prompt = self.guidance.negative_prompt
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            do_classifier_free_guidance=self.uses_negative_prompt,
            max_sequence_length=self._t5_length,
        )
        encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        negative = {"prompt_embeds": negative_embeds, "pooled_prompt_embeds": negative_pooled}
        return Conditioning(encoded, Conditioning(negative) if self.uses_negative_prompt else None).to(self.dtype)

    @property
    def _t5_length(self) -> int:
        length = self.guidance.max_sequence_length
        return 256 if length is None else length

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        clip = self.pipeline.text_encoder
        clip_length = self.pipeline.tokenizer_max_length if clip is None else clip.config.max_position_embeddings
        num_tokens = clip_length + self._t5_length  # of CLIP and T5, in a row
        return {
            "prompt_embeds": (num_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

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

    def vae_latents(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor
