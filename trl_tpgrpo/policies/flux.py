"""FLUX.1."""

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from .base import Conditioning, FlowPolicy, Schedule


class FluxPolicy(FlowPolicy):
    """FLUX.1: packed latents, sigmas shifted by the resolution, guidance as an input of the model.

    Classifier-free guidance proper ("true CFG", with `true_cfg_scale` and a negative prompt) is a second pass.
    """

    pipeline_class = FluxPipeline
    lora_target_modules = [
        *FlowPolicy.lora_target_modules, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ]  # fmt: skip
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    default_t5_length = 512

    @property
    def uses_negative_prompt(self) -> bool:
        return self.guidance.negative_prompt is not None

    def _check_guidance(self) -> None:
        super()._check_guidance()
        scale, prompt = self.guidance.true_cfg_scale, self.guidance.negative_prompt
        if (scale > 1) != self.uses_negative_prompt:
            got = f"true_cfg_scale={scale}, negative_prompt={prompt!r}"
            raise ValueError(f"true_cfg_scale above 1 and a negative_prompt have an effect only together; got {got}.")

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        options = {"device": self.device, "max_sequence_length": self.t5_length}
        embeds, pooled, _ = self.pipeline.encode_prompt(texts, prompt_2=None, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        size, channels = self.guidance, self.pipeline.transformer.config.in_channels // 4
        latents, _ = self.pipeline.prepare_latents(
            len(generators), channels, size.height, size.width, self.dtype, self.device, generators
        )
        return latents

    def schedule(self, num_inference_steps: int, sigmas: np.ndarray | None = None) -> Schedule:
        if not self.pipeline.scheduler.config.get("use_flow_sigmas", False):
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return super().schedule(num_inference_steps, sigmas)

    def velocity(self, model: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        latents = latents.to(self.dtype)
        predicted = self._predict(model, latents, timestep, conditioning.tensors)
        if conditioning.negative is None:
            return predicted
        negative = self._predict(model, latents, timestep, conditioning.negative.tensors)
        return negative + self.guidance.true_cfg_scale * (predicted - negative)

    def _predict(self, model: nn.Module, latents: Tensor, timestep: Tensor, texts: dict[str, Tensor]) -> Tensor:
        number, device, embeds = len(latents), latents.device, texts["prompt_embeds"]
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([1], self.guidance.guidance_scale, device=device, dtype=torch.float32).expand(number)
        return model(
            hidden_states=latents,
            timestep=timestep.to(device).expand(number).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=texts["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=embeds.dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(number, *self._token_grid, device, latents.dtype),
            joint_attention_kwargs={},
            return_dict=False,
        )[0].to(self.dtype)

    def vae_latents(self, latents: Tensor) -> Tensor:
        size, factor = self.guidance, self.pipeline.vae_scale_factor
        return super().vae_latents(self.pipeline._unpack_latents(latents, size.height, size.width, factor))
