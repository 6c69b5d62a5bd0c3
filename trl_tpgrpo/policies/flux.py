"""FLUX.1."""

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from torch import Tensor

from .base import Conditioning, FlowPolicy, Schedule


class FluxPolicy(FlowPolicy):
    """FLUX.1: packed latents, sigmas shifted by the resolution, guidance as an input of the model.

    Classifier-free guidance proper ("true CFG") is a second pass of the model, taken when `true_cfg_scale` is above 1 and
    there is a negative prompt, as in the pipeline.
    """

    pipeline: FluxPipeline
    pipeline_class = FluxPipeline
    lora_target_modules = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ]  # fmt: skip
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    @property
    def uses_negative_prompt(self) -> bool:
        return self.guidance.negative_prompt is not None

    def _check_guidance(self) -> None:
        super()._check_guidance()
        if (self.guidance.true_cfg_scale > 1) != (self.guidance.negative_prompt is not None):
            raise ValueError(
                "true_cfg_scale above 1 and a negative_prompt have an effect only together; got "
                f"true_cfg_scale={self.guidance.true_cfg_scale}, negative_prompt={self.guidance.negative_prompt!r}."
            )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        negative_prompt = self.guidance.negative_prompt
        negative = None if negative_prompt is None else Conditioning(self._encode([negative_prompt] * len(prompts)))
        return Conditioning(self._encode(prompts), negative).to(self.dtype)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self._t5_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @property
    def _t5_length(self) -> int:
        length = self.guidance.max_sequence_length
        return 512 if length is None else length

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        return {
            "prompt_embeds": (self._t5_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        latents, _ = self.pipeline.prepare_latents(
            len(generators),
            self.pipeline.transformer.config.in_channels // 4,
            self.guidance.height,
            self.guidance.width,
            self.dtype,
            self.device,
            generators,
        )
        return latents

    def schedule(self, num_inference_steps: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        mu = self._resolution_shift(self._latent_height * self._latent_width, default_max_shift=1.15)
        even = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        sigmas = None if scheduler.config.get("use_flow_sigmas", False) else even
        timesteps, _ = retrieve_timesteps(scheduler, num_inference_steps, "cpu", sigmas=sigmas, mu=mu)
        return Schedule(scheduler.sigmas.cpu().clone(), timesteps.clone())

    @property
    def _latent_height(self) -> int:
        return self.guidance.height // (self.pipeline.vae_scale_factor * 2)

    @property
    def _latent_width(self) -> int:
        return self.guidance.width // (self.pipeline.vae_scale_factor * 2)

    def velocity(
        self, model: torch.nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        latents = latents.to(self.dtype)
        predicted = self._predict(model, latents, timestep, conditioning.tensors)
        if conditioning.negative is None:
            return predicted
        negative = self._predict(model, latents, timestep, conditioning.negative.tensors)
        return negative + self.guidance.true_cfg_scale * (predicted - negative)

    def _predict(self, model: torch.nn.Module, latents: Tensor, timestep: Tensor, texts: dict[str, Tensor]) -> Tensor:
        number, device, embeds = len(latents), latents.device, texts["prompt_embeds"]
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([1], self.guidance.guidance_scale, device=device, dtype=torch.float32).expand(number)
        image_ids = self.pipeline._prepare_latent_image_ids(
            number, self._latent_height, self._latent_width, device, latents.dtype
        )
        return model(
            hidden_states=latents,
            timestep=timestep.to(device).expand(number).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=texts["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=embeds.dtype),
            img_ids=image_ids,
            joint_attention_kwargs={},
            return_dict=False,
        )[0].to(self.dtype)

    def vae_latents(self, latents: Tensor) -> Tensor:
        pipeline, config = self.pipeline, self.pipeline.vae.config
        unpacked = pipeline._unpack_latents(
            latents, self.guidance.height, self.guidance.width, pipeline.vae_scale_factor
        )
        return unpacked / config.scaling_factor + config.shift_factor
