"""Reward functions: callables `(images, prompts, **columns) -> list[float | None]`.

Those with a model are classes, to be created with the model's name, device and the like; what they need beyond this
package is imported when they are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .aesthetic_score import AestheticScore
    from .clip_score import CLIPScore
    from .colour import brightness, colourfulness
    from .contract import RewardError, RewardFunc, RewardUnavailable
    from .geneval import GenEval
    from .hps_v2 import HPSv2
    from .image_reward import ImageReward
    from .jpeg import jpeg_compressibility, jpeg_incompressibility
    from .ocr import OCRReward
    from .pick_score import PickScore


MODULES = {
    "AestheticScore": "aesthetic_score",
    "CLIPScore": "clip_score",
    "GenEval": "geneval",
    "HPSv2": "hps_v2",
    "ImageReward": "image_reward",
    "OCRReward": "ocr",
    "PickScore": "pick_score",
    "RewardError": "contract",
    "RewardFunc": "contract",
    "RewardUnavailable": "contract",
    "brightness": "colour",
    "colourfulness": "colour",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
}
__all__ = [
    "AestheticScore",
    "CLIPScore",
    "GenEval",
    "HPSv2",
    "ImageReward",
    "OCRReward",
    "PickScore",
    "RewardError",
    "RewardFunc",
    "RewardUnavailable",
    "brightness",
    "colourfulness",
    "jpeg_compressibility",
    "jpeg_incompressibility",
]


def __getattr__(name: str) -> object:
    """Import a reward when it is asked for: `rewards.serving` runs where the packages of the others are missing."""
    if name in MODULES:
        return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
