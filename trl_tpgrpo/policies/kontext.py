"""FLUX.1 Kontext."""

import math
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor, nn

from .base import Texts
from .conditioning import Conditioning, Step
from .flux import FluxPolicy


class KontextPolicy(FluxPolicy):
    """FLUX.1 Kontext: FLUX.1 with the latents of an image as tokens after those of the noise.

    An image is resized to the size of the output.
    """

    pipeline_class = FluxKontextPipeline
    lora_target_modules = [*FluxPolicy.lora_target_modules, "proj_mlp"]
    takes_image = True

    @property
    def image_options(self) -> dict[str, Any]:
        return {"_auto_resize": False, "max_area": self.guidance.height * self.guidance.width}

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        assert images is not None
        pixels = self.pipeline.image_processor.preprocess(images, self.guidance.height, self.guidance.width)
        one_by_one = [None] * len(images)  # generators, which are not used
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.dtype), one_by_one)
        packed = self.pipeline._pack_latents(latents, *latents.shape)
        return {**super().encode_texts(texts, images), "image_latents": packed}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        image = (math.prod(self.token_grid), self.pipeline.transformer.config.in_channels)
        return {**super().text_shapes(), "image_latents": image}

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        size, number = self.guidance, len(generators)
        options = (self.num_channels, size.height, size.width, self.dtype, self.device, generators)
        return self.pipeline.prepare_latents(None, number, *options)[0]

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        with_image = torch.cat([latents, texts.tensors["image_latents"]], dim=1)
        return super().predict(model, with_image, step, texts)[:, : latents.shape[1]]

    def token_positions(self, latents: Tensor) -> Tensor:
        noise = super().token_positions(latents)
        image = noise.clone()
        image[:, 0] = 1
        return torch.cat([noise, image])
