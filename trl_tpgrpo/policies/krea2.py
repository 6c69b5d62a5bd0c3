"""Krea 2."""

import torch
from diffusers import Krea2Pipeline
from PIL import Image
from torch import Tensor, nn

from .base import FlowPolicy, Texts
from .conditioning import Conditioning, Step


class Krea2Policy(FlowPolicy):
    """Krea 2: hidden states of several layers as texts, with a mask; the VAE of Qwen-Image; guidance is off at 0."""

    pipeline_class = Krea2Pipeline
    lora_target_modules = [
        "img_in", "time_embed.linear_1", "time_embed.linear_2", "time_mod_proj", "text_fusion.projector",
        "txt_in.linear_1", "txt_in.linear_2", "to_q", "to_k", "to_v", "to_gate", "to_out.0", "ff.up", "ff.down",
        "final_layer.linear",
    ]  # fmt: skip
    default_length = 512
    default_guidance = {"guidance_scale": 4.5}
    least_guidance = 0.0
    decoding = 2042

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    @property
    def tile_side(self) -> int:
        return self.pipeline.vae.tile_sample_min_height

    @property
    def num_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels // self.pipeline.patch_size**2

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        options = {"device": self.device, "max_sequence_length": self.text_length}
        embeds, mask = self.pipeline.encode_prompt(texts, **options)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        shape = (self.text_length, config.num_text_layers, config.text_hidden_dim)
        return {"prompt_embeds": shape, "prompt_embeds_mask": (self.text_length,)}

    def shift(self, num_inference_steps: int) -> float:
        return 1.15 if self.pipeline.config.is_distilled else super().shift(num_inference_steps)

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        number, device, embeds = len(latents), latents.device, texts.tensors["prompt_embeds"]
        return model(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            timestep=(step.timestep.to(device) / 1000).expand(number).to(latents.dtype),
            position_ids=self.pipeline.prepare_position_ids(embeds.shape[1], *self.token_grid, device),
            encoder_attention_mask=texts.tensors["prompt_embeds_mask"].bool(),  # the padding is within the text
            attention_kwargs=None,
            return_dict=False,
        )[0]

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return conditional + self.scales["guidance_scale"] * (conditional - unconditional)

    def vae_latents(self, latents: Tensor) -> Tensor:
        vae, size = self.pipeline.vae, self.guidance
        frames = self.pipeline._unpack_latents(latents, size.height, size.width).to(vae.dtype)  # (N, C, 1, H, W)
        mean, deviation = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[:, :, None, None, None]
        return frames / (1.0 / deviation.to(frames)) + mean.to(frames)
