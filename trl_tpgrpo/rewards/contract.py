"""The interface of reward functions: arguments, attributes, return values. A failure never becomes a number."""

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
"""`reward_func(images=[...], prompts=[...], **other columns, trainer_state=..., log_metric=..., log_extra=...)`, which
returns one number per image, or `None` where the function does not apply. Plain or `async`. Depending on its
attributes, it receives `latents=...` or `latents=..., sigmas=...` instead of `images`."""

LARGEST_REWARD = (
    torch.finfo(torch.float32).max ** 0.5
)  # in size: rewards are kept, and their spreads taken, in float32
RESERVED_COLUMNS = ("images", "latents", "sigmas", "prompts", "trainer_state", "log_metric", "log_extra")


@dataclass(eq=False, repr=False)
class RewardError(RuntimeError):
    """Failure of a reward function: it raised an error, hung, or returned an invalid reward."""

    name: str  # of the function
    what: str  # description of the failure, after the name in the message
    row: int | None = None  # index of the failed image among all scored images; None: no single image
    prompt: str | None = None  # of the failed image or group
    image: Image.Image | None = None
    saved_to: Path | None = None  # file of the failed image

    @property
    def outcome(self) -> str:
        """Description of the failure, with the image or group."""
        what = self.what.removesuffix(".")  # raised by a function
        if self.row is None:
            return what if self.prompt is None else f"{what} for the group of the prompt {self.prompt!r}"
        return f"{what} for row {self.row}, prompt {self.prompt!r}"

    def __str__(self) -> str:
        saved = "" if self.saved_to is None else f" The image is in {self.saved_to}."
        return f"The reward function {self.name!r} {self.outcome}.{saved}"


class RewardUnavailable(RuntimeError):
    """Raised by a function if no image is the cause, such as an absent server; no image is then tried alone."""


CHOICES: dict[str, tuple] = {
    "image_type": ("pil", "pt", "latent"), "scores_states": (False, True), "scores_groups": (False, True),
    "runs_in": ("main", "thread"),
}  # fmt: skip


@dataclass(frozen=True)
class Declaration:
    """Attributes that a reward function can set to describe itself."""

    image_type: str = "pil"  # a list of PIL images; "pt": a float tensor (N, 3, H, W) in [0, 1]; "latent": (N, ...)
    scores_states: bool = False  # it receives noisy states (latents) and their sigmas (N,) instead of images
    scores_groups: bool = False  # each call receives all distinct images of one prompt, at one state
    batch_size: int | None = None  # images per call; None: all
    timeout: float | None = None  # seconds after which a call counts as hung; None: never
    runs_in: str = "main"  # or "thread": it releases the GIL and can run while the next images are sampled

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the arguments with the scored items."""
        return ("latents", "sigmas") if self.scores_states else (self.kind,)

    @property
    def kind(self) -> str:
        return "latents" if self.image_type == "latent" else "images"


def declared(reward_func: RewardFunc) -> Declaration:
    """Return the declaration of a function; attributes of a partial have priority over those of its function.

    Raises:
        ValueError: If an attribute has an invalid value, or one that another attribute excludes.
    """
    attributes: dict[str, Any] = {}
    for layer in reversed(_layers(reward_func)):
        attributes |= {name: getattr(layer, name) for name in Declaration.__dataclass_fields__ if name in dir(layer)}
    if attributes.get("scores_states") is True:
        attributes.setdefault("image_type", "latent")
    declaration, title = Declaration(**attributes), f"The reward function {reward_name(reward_func)!r}"
    for name, value in vars(declaration).items():
        allowed = f"one of {CHOICES[name]}" if name in CHOICES else "above 0, or None"
        if not (value in CHOICES[name] if name in CHOICES else value is None or value > 0):
            raise ValueError(f"{title} has {name}={value!r}; it must be {allowed}.")
    if declaration.scores_states and declaration.image_type != "latent":
        wrong = f"image_type={declaration.image_type!r}; leave it out, because noisy states are latents"
        raise ValueError(f"{title} has scores_states and {wrong}.")
    if declaration.scores_groups and declaration.batch_size is not None:
        raise ValueError(f"{title} has scores_groups and batch_size; leave it out: a group is scored at once.")
    return declaration


def takes_images(reward_funcs: Sequence[RewardFunc]) -> bool:
    """Check whether a function needs decoded images."""
    return any(declared(reward_func).image_type != "latent" for reward_func in reward_funcs)


def takes_states_alone(reward_funcs: Sequence[RewardFunc]) -> bool:
    """Check whether all functions score noisy states, so that no completions are needed."""
    return bool(reward_funcs) and all(declared(reward_func).scores_states for reward_func in reward_funcs)


def _layers(reward_func: RewardFunc) -> list[Any]:
    """List nested partials from the outermost, and the function in them."""
    layers: list[Any] = [reward_func]
    while isinstance(layers[-1], functools.partial):
        layers.append(layers[-1].func)
    return layers


def innermost(reward_func: RewardFunc) -> Any:
    """Return the function, or callable object, inside partials."""
    return _layers(reward_func)[-1]


def reward_name(reward_func: RewardFunc) -> str:
    """Return the `__name__` of a function or partial, else of its function, else of the object's class."""
    names = (getattr(layer, "__name__", None) for layer in _layers(reward_func))
    return next(filter(None, names), type(innermost(reward_func)).__name__)


def is_async(reward_func: RewardFunc) -> bool:
    """Check whether a function is async."""
    function = innermost(reward_func)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def reward_names(reward_funcs: list[RewardFunc]) -> list[str]:
    """Return the functions' names; raise a `ValueError` (not callable: `TypeError`) for invalid functions."""
    if not reward_funcs:
        raise ValueError("reward_funcs is empty: pass at least one reward function.")
    for reward_func in reward_funcs:
        if not callable(reward_func):
            raise TypeError(f"reward_funcs must be callables, got {reward_func!r} ({type(reward_func).__name__}).")
        declared(reward_func)
    names = [reward_name(reward_func) for reward_func in reward_funcs]
    if len(set(names)) < len(names):
        raise ValueError(f"Reward functions need different names for their metrics, got {names}.")
    return names


def checked(
    reward_func: RewardFunc, values: Any, prompts: list[str], images: list[Image.Image], first_row: int = 0
) -> torch.Tensor:
    """Return a function's values for N images as float32 on the CPU, (N,); NaN for `None`.

    Without decoded latents, there are no `images`.

    Raises:
        RewardError: If there are not N rewards, or one is invalid (with its row, counted from `first_row`).
    """
    name = reward_name(reward_func)
    if not isinstance(values, Sequence | torch.Tensor | np.ndarray) or isinstance(values, str):
        raise RewardError(name, f"must return a list of numbers, got {type(values).__name__}")
    if len(values) != len(prompts):
        raise RewardError(name, f"returned {len(values)} rewards for {len(prompts)} {declared(reward_func).kind}")
    numbers = []
    for row, value in enumerate(values):
        try:
            numbers.append(_number(value))
        except ValueError as error:
            image = images[row] if images else None
            raise RewardError(name, str(error), first_row + row, prompts[row], image) from None
    return torch.tensor(numbers, dtype=torch.float32)


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"returned {value!r}, which is not a number,") from None
    if not math.isfinite(number):
        raise ValueError(f"returned {number} (return None where the reward does not apply)")
    if abs(number) > LARGEST_REWARD:
        raise ValueError(f"returned {number}, above {LARGEST_REWARD:.1e} in size (its square overflows)")
    return number


def check_applicability(
    rewards_per_func: torch.Tensor, names: list[str], prompts: list[str], num_generations: int, failed: torch.Tensor
) -> None:
    """Raise a `RewardError` if no function applies to an image, or one applies to only some images of a group.

    Rewards of F functions are (B, F, K + 1), NaN where a function does not apply. Failed trajectories (B,), on whose
    images a function failed, are left out.
    """
    absent = rewards_per_func.isnan()
    for group in torch.arange(len(prompts)).split(num_generations):
        kept = [row for row in group.tolist() if not failed[row]]
        for row in kept:
            if absent[row].all():
                what = f"returned None for row {row}, prompt {prompts[row]!r}, so it has no reward"
                raise RewardError(" and ".join(names), what)
            differs = (absent[row] != absent[kept[0], :, :1]).any(1)  # (F,)
            if differs.any():
                what = f"returned None for some images of the prompt {prompts[row]!r} and numbers for others"
                what += ". Whether it applies must depend on the dataset's row only"
                raise RewardError(names[int(differs.nonzero()[0])], what)


def check_signature(reward_func: RewardFunc, columns: list[str]) -> None:
    """Raise a `TypeError` if a function does not accept the columns of the dataset, before sampling."""
    others = (name for name in RESERVED_COLUMNS if name not in ("images", "latents", "sigmas"))
    arguments = dict.fromkeys([*declared(reward_func).scored, *others, *columns])
    try:
        inspect.signature(reward_func).bind(**arguments)
    except TypeError as error:
        lacks = "missing a required" in str(error)
        remedy = f"the dataset has prompts and the columns {columns}" if lacks else "add **columns to its parameters"
        what = f"The reward function {reward_name(reward_func)!r} cannot be called with {list(arguments)}"
        raise TypeError(f"{what}: {error}: {remedy}.") from error


def check_settings(reward_funcs: list[RewardFunc], eval_only: list[RewardFunc], args: Any, evaluates: bool) -> None:
    """Raise a `ValueError` for settings that functions (`eval_only`: in evaluation) do not support."""
    if takes_states_alone(reward_funcs):
        given = {"completion": args.completion} if not args.completion.startswith("exact") else {}
        given |= {} if args.completion_check_every is None else {"completion_check_every": args.completion_check_every}
        for name, value in given.items():
            remedy = "leave it out (completion='exact_every_M' scores every M-th state)"
            raise ValueError(
                f"{name}={value!r}: all reward functions score noisy states, so there are no completions: {remedy}."
            )
    ranks = [reward_name(function) for function in reward_funcs if declared(function).scores_groups]
    if args.noise_calibration_iterations and ranks and len(ranks) == len(reward_funcs):
        what = f"noise_calibration_iterations: {' and '.join(ranks)} compare the images of a group"
        raise ValueError(f"{what}, so their rewards are balanced at any noise level: set it to 0.")
    own = {"num_generations": args.generation_batch_size // args.world_size}
    own |= {"num_generations_eval": args.per_device_eval_batch_size} if evaluates else {}
    for name, number in own.items():
        functions = reward_funcs if name == "num_generations" else [*reward_funcs, *eval_only]
        for title in (reward_name(function) for function in functions if declared(function).scores_groups):
            if number % (group := getattr(args, name)):
                what = f"{number} images per process are not a multiple of {name} ({group})"
                raise ValueError(f"The reward function {title!r} scores groups: {what}.")


def check_available(reward_funcs: list[RewardFunc]) -> None:
    """Call `check_available` (which may raise) of functions that have it, such as remote rewards."""
    for reward_func in map(innermost, reward_funcs):
        if "check_available" in dir(reward_func):
            reward_func.check_available()
