"""Reward functions: callables `(images, prompts, **columns) -> list[float | None]`.

Those with a model are classes, to be created with the model's name, device and the like; what they need beyond this package
is imported when they are.
"""

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
