"""CLIP score: how well an image matches the prompt. Other CLIP rewards are derived from it."""

from typing import Any

import torch
from torch import Tensor

from .base import ModelReward, normalize, resize_and_crop


class CLIPScore(ModelReward):
    """100 times the cosine between CLIP's embeddings of image and prompt (arXiv 2103.00020, 2104.08718).

    In [-100, 100]; real pairs of image and caption score about 20 to 35. Unlike in the CLIPScore paper, the score is
    not clamped at 0 and not multiplied by 2.5, which only changes the scale. Prompts are truncated to 77 tokens.
    Weights of the default: MIT (openai/CLIP).

    Known ways to hack it: text of the prompt written into the image; the subject repeated over the whole image;
    saturated images of poor quality. Wrong counts and positions cost almost nothing, because CLIP barely sees them.

    `model` is CLIP in transformers' format, on the Hub or on disk. `processor` has the tokenizer and image processor;
    `None`: those of `model`. The other arguments are those of `ModelReward`.
    """

    __name__ = "clip_score"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        super().__init__(self.load(model), device, dtype, batch_size)
        self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        # Only the sizes, means and deviations are used; the processor on tensors would need torchvision.
        self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(processor or model)

    def load(self, model: str) -> torch.nn.Module:
        """Load the CLIP model of this name or path."""
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(model)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * self.cosines(images, prompts)

    def cosines(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Compute the cosines (B,) of images (B, 3, H, W) with their prompts; equal prompts are encoded once."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.encode_texts(list(distinct))[[distinct[prompt] for prompt in prompts]]
        return (self.encode_images(images) * texts).sum(-1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return float32 embeddings (B, D) of length 1."""
        settings = self.image_processor
        pixels = resize_and_crop(images, settings.size["shortest_edge"])
        pixels = normalize(pixels, settings.image_mean, settings.image_std)
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return float32 embeddings (B, D) of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _unit(features.pooler_output)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
