"""The two worlds that methods are compared in: shapes with a judge of rules, and words that a recogniser reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from words import judge as words_judge
from words import world as words

from trl_tpgrpo.commands.demo import distinct
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import score_images, shapes_reward


@dataclass(frozen=True)
class World:
    """A pretrained pipeline with its prompts and the reward of its images."""

    weights: Path
    pipeline_kwargs: dict[str, Any]
    prompts: Callable[[str], Dataset]
    """Distinct prompts of a split, which weigh the same."""
    train_dataset: Callable[[], Dataset]
    reward: Callable[..., list[float]]
    means: Callable[[list, list[str]], dict[str, float]]
    """Mean scores of images and their prompts; `reward` is the one that is trained on."""
    best: float
    """Reward of true pictures, encoded and decoded by the VAE: what an image can get."""


def mean_shapes(images: list, prompts: list[str]) -> dict[str, float]:
    scores = score_images(images, prompts)
    strict, graded = (float(np.mean([getattr(one, name) for one in scores])) for name in ("strict", "graded"))
    return {"reward": (strict + graded) / 2, "strict": strict, "graded": graded}


def mean_words(images: list, prompts: list[str]) -> dict[str, float]:
    rewards = np.array(words_judge.words_reward(images, prompts))
    return {"reward": float(rewards.mean()), "strict": float((rewards == 1).mean())}


def words_dataset(split: str) -> Dataset:
    return Dataset.from_dict({"prompt": words.split_prompts()[split]})


WORLDS = {
    "shapes": World(
        weights=TESTBED,
        pipeline_kwargs=PIPELINE_KWARGS,
        prompts=lambda split: distinct(prompt_dataset(split)).take(90),
        train_dataset=lambda: prompt_dataset("train"),
        reward=shapes_reward,
        means=mean_shapes,
        best=0.986,
    ),
    "words": World(
        weights=words.WEIGHTS,
        pipeline_kwargs={"height": words.HEIGHT, "width": words.WIDTH, "max_sequence_length": 0},
        prompts=lambda split: words_dataset(split).take(360),
        train_dataset=lambda: words_dataset("train"),
        reward=words_judge.words_reward,
        means=mean_words,
        best=0.995,
    ),
}
