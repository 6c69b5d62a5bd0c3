"""Reward functions: callables `(images, prompts, **columns) -> list[float | None]`.

Rewards with a model are classes, created with the model's name, device and other options. Their dependencies are
imported when they are.
"""

import importlib
from typing import Any


# For type checkers and the documentation, the same names are in `__init__.pyi`.
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
    "brightness": "pixels",
    "colourfulness": "pixels",
    "jpeg_compressibility": "pixels",
    "jpeg_incompressibility": "pixels",
}
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    """Import a reward on access: `rewards.serving` runs without the packages of other rewards."""
    if name in MODULES:
        return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
