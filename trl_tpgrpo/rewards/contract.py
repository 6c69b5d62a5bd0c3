"""The contract with reward functions: what they are, what they declare, and what is a reward; a failure never becomes a number."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


RewardFunc = Callable[..., Any]
"""`reward_func(images=[...], prompts=[...], **other dataset columns, trainer_state=..., log_metric=..., log_extra=...)`: one
number an image, or `None` where the function does not apply. Plain or `async`."""

RESERVED_COLUMNS = ("images", "prompts", "trainer_state", "log_metric", "log_extra")
IMAGE_TYPES = ("pil", "pt")
PLACES = ("main", "thread")


class RewardError(RuntimeError):
    """A reward function raised, hung, or returned something that is no reward.

    Args:
        name: Of the function.
        what: It did.
        row: Of the images that were scored, which it did it on; `None` if on none alone.
        prompt: Of that row.
        image: Of that row.
        hung: Whether it has not returned.

    Attributes:
        saved_to: Where the image has been saved, for the message.
    """

    def __init__(
        self,
        name: str,
        what: str,
        row: int | None = None,
        prompt: str | None = None,
        image: Image.Image | None = None,
        hung: bool = False,
    ):
        super().__init__(name, what)
        self.name, self.what, self.row, self.prompt, self.image, self.hung = name, what, row, prompt, image, hung
        self.saved_to: Path | None = None

    def at(self, row: int, prompt: str, image: Image.Image) -> "RewardError":
        """The same, known to be of this row."""
        error = RewardError(self.name, self.what, row, prompt, image, self.hung)
        error.__cause__ = self.__cause__
        return error

    @property
    def outcome(self) -> str:
        """What the function did, and on what."""
        return self.what if self.row is None else f"{self.what} for {describe(self.row, str(self.prompt))}"

    def __str__(self) -> str:
        saved = "" if self.saved_to is None else f" The image is in {self.saved_to}."
        return f"The reward function {self.name!r} {self.outcome}.{saved}"


class RewardUnavailable(RuntimeError):
    """For reward functions to raise where no image is the cause, as when a server is gone: they are not asked image by image."""


@dataclass(frozen=True)
class Declaration:
    """What a reward function says of itself, by attributes of these names.

    Attributes:
        image_type: `"pil"`: it takes a list of PIL images; `"pt"`: a float tensor (N, 3, H, W) in [0, 1], on the device.
        batch_size: How many images it takes at once; `None`: all that there are.
        timeout: Seconds after which a call counts as hung; `None`: never.
        runs_in: `"main"`: it is called while nothing else goes on; `"thread"`: it releases the interpreter, and may run while
            the next images are sampled.
    """

    image_type: str = "pil"
    batch_size: int | None = None
    timeout: float | None = None
    runs_in: str = "main"


def declared(reward_func: RewardFunc) -> Declaration:
    """What a function declares.

    Raises:
        ValueError: If that is none of what it may declare.
    """
    function = _innermost(reward_func)
    names = Declaration.__dataclass_fields__
    declaration = Declaration(**{name: getattr(function, name) for name in names if name in dir(function)})
    name = reward_name(reward_func)
    for attribute, allowed in (("image_type", IMAGE_TYPES), ("runs_in", PLACES)):
        if getattr(declaration, attribute) not in allowed:
            raise ValueError(
                f"The reward function {name!r} has {attribute}={getattr(declaration, attribute)!r}; it must be one of {allowed}."
            )
    for attribute in ("batch_size", "timeout"):
        value = getattr(declaration, attribute)
        if value is not None and not value > 0:
            raise ValueError(f"The reward function {name!r} has {attribute}={value!r}; it must be above 0, or None.")
    return declaration


def _innermost(reward_func: RewardFunc) -> RewardFunc:
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return reward_func


def reward_name(reward_func: RewardFunc) -> str:
    """The name of a function, of a partial's function, or of a callable object: its `__name__` or its class's."""
    function = _innermost(reward_func)
    return getattr(function, "__name__", type(function).__name__)


def is_async(reward_func: RewardFunc) -> bool:
    """Whether it returns something to be awaited."""
    function = _innermost(reward_func)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def reward_names(reward_funcs: list[RewardFunc]) -> list[str]:
    """The functions' names, for metrics and messages.

    Raises:
        TypeError: If one is not callable.
        ValueError: If there is none, or two of the same name, or one declares what does not exist.
    """
    if not reward_funcs:
        raise ValueError("reward_funcs is empty: give at least one reward function.")
    for reward_func in reward_funcs:
        if not callable(reward_func):
            raise TypeError(f"reward_funcs must be callables, got {reward_func!r} ({type(reward_func).__name__}).")
        declared(reward_func)
    names = [reward_name(reward_func) for reward_func in reward_funcs]
    if len(set(names)) < len(names):
        raise ValueError(f"Reward functions need different names for their metrics, got {names}.")
    return names


def checked(reward_func: RewardFunc, values: Any, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
    """What a function returned, as numbers.

    Args:
        reward_func: The function.
        values: What it returned.
        prompts: The N prompts that it was called with.
        images: The N images.

    Returns:
        float32 on the CPU, (N,); NaN where the function returned `None`.

    Raises:
        RewardError: If these are not N rewards; with the row if one of them is none.
    """
    name = reward_name(reward_func)
    if not isinstance(values, Sequence | torch.Tensor | np.ndarray) or isinstance(values, str):
        raise RewardError(name, f"must return a list of numbers, got {type(values).__name__}")
    if len(values) != len(prompts):
        raise RewardError(name, f"returned {len(values)} rewards for {len(prompts)} images")
    numbers = []
    for row, value in enumerate(values):
        try:
            numbers.append(_number(name, value))
        except RewardError as error:
            raise error.at(row, prompts[row], images[row]) from None
    return torch.tensor(numbers, dtype=torch.float32)


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(name, f"returned {value!r}, no number,") from None
    if not math.isfinite(number):
        raise RewardError(name, f"returned {number} (None is for where a reward does not apply)")
    return number


def describe(row: int, prompt: str) -> str:
    """For messages."""
    return f"row {row}, prompt {prompt!r}"


def check_applicability(
    rewards_per_func: torch.Tensor, names: list[str], prompts: list[str], num_generations: int, failed: torch.Tensor
) -> None:
    """Refuse rewards that would compare unlike things.

    Args:
        rewards_per_func: (B, F, K + 1), NaN where a function does not apply.
        names: The F functions' names.
        prompts: The B trajectories' prompts, in groups of `num_generations`.
        num_generations: The groups' size.
        failed: bool, (B,): trajectories that are left out, because a function has failed on one of their images.

    Raises:
        RewardError: If no function applies to an image, or one applies to some images of a group only.
    """
    absent = rewards_per_func.isnan()
    all_names = " and ".join(names)
    for group in torch.arange(len(prompts)).split(num_generations):
        left = [row for row in group.tolist() if not failed[row]]
        for row in left:
            if absent[row].all():
                raise RewardError(all_names, f"returned None for {describe(row, prompts[row])}: no reward is left")
            for column, name in enumerate(names):
                if not (absent[row, column] == absent[left[0], column, 0]).all():
                    raise RewardError(
                        name,
                        f"returned None for some images of the prompt {prompts[row]!r} and numbers for others; whether it applies "
                        "may depend on the dataset's row only",
                    )


def check_signature(reward_func: RewardFunc, columns: list[str]) -> None:
    """Refuse a function that cannot take what it will be called with, before anything is sampled for it.

    Raises:
        TypeError: If it does not take the columns of the dataset.
    """
    arguments = {name: None for name in (*RESERVED_COLUMNS, *columns)}
    try:
        inspect.signature(reward_func).bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"The reward function {reward_name(reward_func)!r} cannot be called with {list(arguments)}: {error}. Let it take "
            "**columns."
        ) from error
