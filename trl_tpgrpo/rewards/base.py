"""Base of rewards with a model: device, batches, and preprocessing of images on the device."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ModelReward:
    """Reward function with a model, which receives images as tensors on the device.

    Subclasses implement `score`, which returns one number per image. The model is frozen and in eval mode. It is on
    `device` until the trainer moves it, computes in `dtype`, and receives `batch_size` images at once.
    """

    image_type = "pt"

    def __init__(
        self, model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype, batch_size: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model: Any = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.device, self.dtype, self.batch_size = torch.device(device), dtype, batch_size

    def to(self, device: str | torch.device) -> Self:
        """Move the model."""
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        """Score images (N, 3, H, W) in [0, 1]."""
        check_images(images)
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores += self.score(eight_bits(images[batch].to(self.device)), prompts[batch]).float().tolist()
        return scores

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return scores (B,) of images (B, 3, H, W), float32 in [0, 1] with 256 levels, on the model's device."""
        raise NotImplementedError


def check_images(images: Tensor) -> None:
    """Raise a `ValueError` unless `images` is a tensor of shape (B, 3, H, W) of a floating type."""
    is_tensor = isinstance(images, Tensor)
    if not is_tensor or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{images.dtype} of {tuple(images.shape)}" if is_tensor else type(images).__name__
        raise ValueError(f"images must be a float tensor of shape (B, 3, H, W) in [0, 1], got {found}.")


def eight_bits(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 256 levels as float32, so that scores are those of saved images."""
    return (images.float() * 255).round().clamp(0, 255) / 255


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Resize the shorter edge to `size`, bicubic and antialiased, then crop the centre, as CLIP's processor does.

    Like Pillow, it resizes rows, then columns, with 8 bits in between; results are within one grey level of Pillow's.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    new_height, new_width = int(size * height / shorter), int(size * width / shorter)
    for new_size in ((height, new_width), (new_height, new_width)):
        if new_size != images.shape[-2:]:
            images = eight_bits(torch.nn.functional.interpolate(images, new_size, mode="bicubic", antialias=True))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return images[..., top : top + size, left : left + size]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std by channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def linear_head(width: int) -> torch.nn.Sequential:
    """Build the five linear layers, without activations, of LAION's aesthetic predictor and of ImageReward.

    Dropout has no effect in eval mode, but is part of the numbering of the saved weights.
    """
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    layers = [linear(width, 1024), dropout(), linear(1024, 128), dropout(), linear(128, 64), dropout()]
    return torch.nn.Sequential(*layers, linear(64, 16), linear(16, 1))


def renamed(weights: dict[str, Tensor], patterns: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace regular expressions in the names of weights, one after the other."""
    for pattern, replacement in patterns:
        weights = {re.sub(pattern, replacement, name): weight for name, weight in weights.items()}
    return weights


def hub_file(repository: str, filename: str) -> Path:
    """Return the path of a file of a local folder or, downloaded, of a repository on the Hub."""
    from huggingface_hub import hf_hub_download

    local = Path(repository) / filename
    return local if local.exists() else Path(hf_hub_download(repository, filename))
