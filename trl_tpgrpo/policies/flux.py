"""FLUX.1."""

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step


class FluxPolicy(FlowPolicy):
    """FLUX.1: packed latents, sigmas shifted by the resolution, guidance as an input of the model.

    Classifier-free guidance ("true CFG", with `true_cfg_scale` and a negative prompt) needs a second pass.
    """

    pipeline_class = FluxPipeline
    lora_target_modules = [
        *FlowPolicy.lora_target_modules, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ]  # fmt: skip
    default_length = 512
    guidance_option = "true_cfg_scale"
    needs_negative_prompt = True

    @property
    def default_guidance(self) -> dict[str, float]:  # type: ignore[override]
        embedded = {"guidance_scale": 3.5} if self.pipeline.transformer.config.guidance_embeds else {}
        return {**embedded, "true_cfg_scale": 1.0}

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        options = {"device": self.device, "max_sequence_length": self.text_length}
        embeds, pooled, _ = self.pipeline.encode_prompt(texts, prompt_2=None, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        shape = (self.text_length, config.joint_attention_dim)
        return {"prompt_embeds": shape, "pooled_prompt_embeds": (config.pooled_projection_dim,)}

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        number, device, embeds = len(latents), latents.device, texts.tensors["prompt_embeds"]
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([1], self.scales["guidance_scale"], device=device).expand(number)
        return model(
            hidden_states=latents,
            timestep=step.timestep.to(device).expand(number).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=texts.tensors["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=embeds.dtype),
            img_ids=self.token_positions(latents),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]

    def token_positions(self, latents: Tensor) -> Tensor:
        """Return the positions of the tokens of `latents`: (tokens, 3)."""
        return self.pipeline._prepare_latent_image_ids(len(latents), *self.token_grid, latents.device, latents.dtype)

    def vae_latents(self, latents: Tensor) -> Tensor:
        size, factor = self.guidance, self.pipeline.vae_scale_factor
        return super().vae_latents(self.pipeline._unpack_latents(latents, size.height, size.width, factor))
