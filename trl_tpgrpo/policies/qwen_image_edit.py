"""Qwen-Image-Edit."""

import math

import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor, nn

from .base import Texts
from .conditioning import Conditioning, Step
from .qwen_image import QwenImagePolicy, own_tokens


PATCH = 28  # pixels along the side of a token that the text encoder makes of an image


class QwenImageEditPolicy(QwenImagePolicy):
    """Qwen-Image-Edit: the text encoder reads the image, and its latents are tokens after those of the noise.

    An image is resized to about 1 megapixel, as in the pipeline, in about the aspect ratio of the output: to a size
    that the pipeline does not change further. Texts are never truncated.
    """

    pipeline_class = QwenImageEditPipeline
    takes_image = True

    def _check_guidance(self) -> None:
        super()._check_guidance()
        if self.guidance.max_sequence_length is not None:
            reason = "which never truncates texts: leave it out"
            raise ValueError(f"max_sequence_length has no effect on this {self._name}, {reason}.")

    @property
    def input_size(self) -> tuple[int, int]:
        size, before = (self.guidance.height, self.guidance.width), None
        while size != before:
            before = size
            width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, size[1] / size[0])
            size = height, width
        return size

    @property
    def token_grids(self) -> list[tuple[int, int, int]]:
        rows, columns = (size // self.size_multiple for size in self.input_size)
        return [*super().token_grids, (1, rows, columns)]

    def encode_texts(self, texts: list[str], images: list[Image.Image] | None) -> Texts:
        assert images is not None
        processor = self.pipeline.image_processor
        resized = [processor.resize(image, *self.input_size) for image in images]
        embeds = own_tokens(*self.pipeline.encode_prompt(texts, resized, device=self.device))
        pixels = processor.preprocess(resized, *self.input_size).unsqueeze(2).to(self.device, self.dtype)
        generators = [None] * len(images)  # as a list, images are encoded one by one; no noise
        latents = self.pipeline._encode_vae_image(pixels, generators)
        packed = self.pipeline._pack_latents(latents, len(images), self.num_channels, *latents.shape[3:])
        return {"prompt_embeds": embeds, "image_latents": packed}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config, (_, rows, columns) = self.pipeline.transformer.config, self.token_grids[1]
        longest = self.text_length + math.prod(round(size / PATCH) for size in self.input_size)
        return {
            "prompt_embeds": (longest, config.joint_attention_dim),
            "image_latents": (rows * columns, config.in_channels),
        }

    def initial_noise(self, generators: list[torch.Generator]) -> Tensor:
        size = self.guidance
        noise, _ = self.pipeline.prepare_latents(
            None, len(generators), self.num_channels, size.height, size.width, self.dtype, self.device, generators
        )
        return noise

    def predict(self, model: nn.Module, latents: Tensor, step: Step, texts: Conditioning) -> Tensor:
        with_image = torch.cat([latents, texts.tensors["image_latents"]], dim=1)
        return super().predict(model, with_image, step, texts)[:, : latents.shape[1]]
