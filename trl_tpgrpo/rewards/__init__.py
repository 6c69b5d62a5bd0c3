"""Reward functions: callables `(images, prompts, **columns) -> list[float | None]`."""

from .jpeg import jpeg_compressibility, jpeg_incompressibility
from .scoring import RewardError, RewardFunc


__all__ = ["RewardError", "RewardFunc", "jpeg_compressibility", "jpeg_incompressibility"]
