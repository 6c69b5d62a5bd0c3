"""Calling reward functions, and stopping with a clear message when one fails; a failure never becomes a number."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


RewardFunc = Callable[..., Sequence[float | None]]
"""`reward_func(images=[...], prompts=[...], **other dataset columns, trainer_state=..., log_metric=...)`: one number an
image, or `None` where the function does not apply."""

RESERVED_COLUMNS = ("images", "prompts", "trainer_state", "log_metric")


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is no reward."""


def reward_name(reward_func: RewardFunc) -> str:
    """The name of a function, of a partial's function, or of a callable object's class."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def reward_names(reward_funcs: list[RewardFunc]) -> list[str]:
    """The functions' names, for metrics and messages.

    Raises:
        TypeError: If one is not callable, or asynchronous.
        ValueError: If there is none, or two of the same name.
    """
    if not reward_funcs:
        raise ValueError("reward_funcs is empty: give at least one reward function.")
    for reward_func in reward_funcs:
        if not callable(reward_func):
            raise TypeError(f"reward_funcs must be callables, got {reward_func!r} ({type(reward_func).__name__}).")
        if inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(type(reward_func).__call__):
            raise TypeError(f"The reward function {reward_name(reward_func)!r} is async; make it a plain function.")
    names = [reward_name(reward_func) for reward_func in reward_funcs]
    if len(set(names)) < len(names):
        raise ValueError(f"Reward functions need different names for their metrics, got {names}.")
    return names


def score(
    reward_func: RewardFunc, images: list[Image.Image], prompts: list[str], columns: dict[str, list], **extra: Any
) -> torch.Tensor:
    """Call a reward function on a batch and check what it returns.

    Args:
        reward_func: The function.
        images: N images.
        prompts: Their N prompts.
        columns: The other columns of the dataset, N values each.
        **extra: Passed on as they are, such as `trainer_state`.

    Returns:
        float32 on the CPU, (N,); NaN where the function returned `None`.

    Raises:
        RewardError: If it raises, or returns the wrong number or kind of values; with its name and the row.
    """
    name = reward_name(reward_func)
    try:
        values = reward_func(images=images, prompts=prompts, **columns, **extra)
    except Exception as error:  # whatever a user's function raises is reported with its row
        row = _first_failing_row(reward_func, images, prompts, columns, extra)
        where = (
            f"for {_describe(row, prompts)}"
            if row is not None
            else f"on a batch of {len(images)} images, on none alone"
        )
        raise RewardError(f"The reward function {name!r} raised {type(error).__name__}: {error} ({where}).") from error
    if not isinstance(values, Sequence | torch.Tensor | np.ndarray):
        raise RewardError(f"The reward function {name!r} must return a list of numbers, got {type(values).__name__}.")
    if len(values) != len(images):
        raise RewardError(f"The reward function {name!r} returned {len(values)} rewards for {len(images)} images.")
    return torch.tensor([_checked(value, name, row, prompts) for row, value in enumerate(values)])


def _checked(value: Any, name: str, row: int, prompts: list[str]) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(
            f"The reward function {name!r} returned {value!r}, no number, for {_describe(row, prompts)}."
        ) from None
    if not math.isfinite(number):
        raise RewardError(
            f"The reward function {name!r} returned {number} for {_describe(row, prompts)}. Return None where a reward "
            "does not apply."
        )
    return number


def _describe(row: int, prompts: list[str]) -> str:
    return f"row {row}, prompt {prompts[row]!r}"


def _first_failing_row(
    reward_func: RewardFunc,
    images: list[Image.Image],
    prompts: list[str],
    columns: dict[str, list],
    extra: dict[str, Any],
) -> int | None:
    """Call again with one image at a time, to name the row; the run stops anyway."""
    for row in range(len(images)):
        one = {key: [values[row]] for key, values in columns.items()}
        try:
            reward_func(images=[images[row]], prompts=[prompts[row]], **one, **extra)
        except Exception:  # noqa: BLE001
            return row
    return None


def check_applicability(
    rewards_per_func: torch.Tensor, names: list[str], prompts: list[str], num_generations: int
) -> None:
    """Refuse rewards that would compare unlike things.

    Args:
        rewards_per_func: (B, F, K + 1), NaN where a function does not apply.
        names: The F functions' names.
        prompts: The B trajectories' prompts, in groups of `num_generations`.
        num_generations: The groups' size.

    Raises:
        RewardError: If no function applies to an image, or one applies to some images of a group only.
    """
    absent = rewards_per_func.isnan()
    for row, prompt in enumerate(prompts):
        if absent[row].all():
            raise RewardError(f"Every reward function returned None for {_describe(row, prompts)}.")
        first = row - row % num_generations
        for column, name in enumerate(names):
            if not (absent[row, column] == absent[first, column, 0]).all():
                raise RewardError(
                    f"The reward function {name!r} returned None for some images of the prompt {prompt!r} and numbers for "
                    "others; whether it applies may depend on the dataset's row only."
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
