"""Reward functions by name: built in, from a user's module, or by URL."""

from typing import Any

from ..rewards.serving.functions import dotted, find_function
from .options import near


BUILT_IN_REWARDS = {
    "aesthetic_score": "trl_tpgrpo.rewards.AestheticScore",
    "brightness": "trl_tpgrpo.rewards.brightness",
    "clip_score": "trl_tpgrpo.rewards.CLIPScore",
    "colourfulness": "trl_tpgrpo.rewards.colourfulness",
    "geneval": "trl_tpgrpo.rewards.GenEval",
    "graded_reward": "trl_tpgrpo.testbed.checker.graded_reward",
    "hps_v2": "trl_tpgrpo.rewards.HPSv2",
    "image_reward": "trl_tpgrpo.rewards.ImageReward",
    "jpeg_compressibility": "trl_tpgrpo.rewards.jpeg_compressibility",
    "jpeg_incompressibility": "trl_tpgrpo.rewards.jpeg_incompressibility",
    "ocr": "trl_tpgrpo.rewards.OCRReward",
    "pick_score": "trl_tpgrpo.rewards.PickScore",
    "shapes_reward": "trl_tpgrpo.testbed.checker.shapes_reward",
    "strict_reward": "trl_tpgrpo.testbed.checker.strict_reward",
}


def load_reward(name: str) -> Any:
    """Return the reward of a built-in name, import path or URL, or raise ValueError; a class is instantiated."""
    if name.startswith(("http://", "https://")):
        from ..rewards.remote import remote_reward_from_url  # imports torch

        return remote_reward_from_url(name)
    found = find_reward(name)
    return found() if isinstance(found, type) else found


def find_reward(name: str) -> Any:
    """Return the object of a built-in name or a path such as `a.b`, `a:b` or `./a.py:b`, or raise ValueError."""
    path = BUILT_IN_REWARDS.get(name) or name
    if "." not in dotted(path):
        known = f"one of {list(BUILT_IN_REWARDS)}, an import path such as my_rewards.mine, or a URL"
        raise ValueError(f"No reward function {name!r}{near(name, BUILT_IN_REWARDS)} Use {known}.")
    return find_function(path)
