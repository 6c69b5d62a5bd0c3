"""What a reward function is, may declare, and may return; a failure never becomes a number."""

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
returns one number an image, or `None` where the function does not apply. Plain or `async`. What it declares may make
that `latents=...`, or `latents=..., sigmas=...`."""

LARGEST_REWARD = (
    torch.finfo(torch.float32).max ** 0.5
)  # in size: rewards are kept, and their spreads taken, in float32
RESERVED_COLUMNS = ("images", "latents", "sigmas", "prompts", "trainer_state", "log_metric", "log_extra")


@dataclass(eq=False, repr=False)
class RewardError(RuntimeError):
    """Failure of a reward function, which raised, hung, or returned something that is no reward."""

    name: str  # of the function
    what: str  # the function did, as the words that follow its name in the message
    row: int | None = None  # index of the image that it failed on among all that are scored; None: on none alone
    prompt: str | None = None  # of that image, or of the group that it failed on
    image: Image.Image | None = None
    saved_to: Path | None = None  # the file of that image

    @property
    def outcome(self) -> str:
        """What the function did, and on which image or group."""
        what = self.what.removesuffix(".")  # of what a function raised
        if self.row is None:
            return what if self.prompt is None else f"{what} for the group of the prompt {self.prompt!r}"
        return f"{what} for row {self.row}, prompt {self.prompt!r}"

    def __str__(self) -> str:
        saved = "" if self.saved_to is None else f" The image is in {self.saved_to}."
        return f"The reward function {self.name!r} {self.outcome}.{saved}"


class RewardUnavailable(RuntimeError):
    """What a function raises where no image is the cause, as when a server is gone: no image is then tried alone."""


CHOICES: dict[str, tuple] = {
    "image_type": ("pil", "pt", "latent"), "scores_states": (False, True), "scores_groups": (False, True),
    "runs_in": ("main", "thread"),
}  # fmt: skip


@dataclass(frozen=True)
class Declaration:
    """What a reward function says of itself, by attributes of these names."""

    image_type: str = "pil"  # a list of PIL images; "pt": a float tensor (N, 3, H, W) in [0, 1]; "latent": (N, ...)
    scores_states: bool = False  # it takes noisy states, as latents, and their sigmas (N,), instead of images
    scores_groups: bool = False  # it takes all distinct images of one prompt, at one state, and nothing else at once
    batch_size: int | None = None  # images that it takes at once; None: all that there are
    timeout: float | None = None  # seconds after which a call counts as hung; None: never
    runs_in: str = "main"  # or "thread": it releases the interpreter, and may run while the next images are sampled

    @property
    def scored(self) -> tuple[str, ...]:
        """The names of the arguments in which it gets what it scores."""
        return ("latents", "sigmas") if self.scores_states else (self.kind,)

    @property
    def kind(self) -> str:
        return "latents" if self.image_type == "latent" else "images"


def declared(reward_func: RewardFunc) -> Declaration:
    """Return what a function declares, a partial before the function in it.

    Raises:
        ValueError: If an attribute has a value that does not exist, or one that another one excludes.
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
        wrong = f"image_type={declaration.image_type!r}; leave it out: noisy states are latents"
        raise ValueError(f"{title} has scores_states and {wrong}.")
    if declaration.scores_groups and declaration.batch_size is not None:
        raise ValueError(f"{title} has scores_groups and batch_size; leave it out: a group is scored at once.")
    return declaration


def takes_images(reward_funcs: Sequence[RewardFunc]) -> bool:
    """Say whether one of the functions needs images, for which latents have to be decoded."""
    return any(declared(reward_func).image_type != "latent" for reward_func in reward_funcs)


def takes_states_alone(reward_funcs: Sequence[RewardFunc]) -> bool:
    """Say whether all functions score noisy states, so that none of these has to be completed."""
    return bool(reward_funcs) and all(declared(reward_func).scores_states for reward_func in reward_funcs)


def _layers(reward_func: RewardFunc) -> list[Any]:
    """List partials from the outermost to the function in them."""
    layers: list[Any] = [reward_func]
    while isinstance(layers[-1], functools.partial):
        layers.append(layers[-1].func)
    return layers


def innermost(reward_func: RewardFunc) -> Any:
    """Return the function, or callable object, that partials are of."""
    return _layers(reward_func)[-1]


def reward_name(reward_func: RewardFunc) -> str:
    """Return the `__name__` of a function, a partial or else its function, or else the callable object's class's."""
    names = (getattr(layer, "__name__", None) for layer in _layers(reward_func))
    return next(filter(None, names), type(innermost(reward_func)).__name__)


def is_async(reward_func: RewardFunc) -> bool:
    """Say whether a function returns something to be awaited."""
    function = innermost(reward_func)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def reward_names(reward_funcs: list[RewardFunc]) -> list[str]:
    """Return the functions' names; raise a `ValueError` (no callable: `TypeError`) where they cannot be used."""
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


def checked(
    reward_func: RewardFunc, values: Any, prompts: list[str], images: list[Image.Image], first_row: int = 0
) -> torch.Tensor:
    """Return what a function returned for N images as numbers: float32, on the CPU, (N,); NaN for `None`.

    Of latents that are not decoded there are no `images`.

    Raises:
        RewardError: If these are not N rewards; if one is no reward, with its row, counted from `first_row`.
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
        raise ValueError(f"returned {value!r}, no number,") from None
    if not math.isfinite(number):
        raise ValueError(f"returned {number} (None is for where a reward does not apply)")
    if abs(number) > LARGEST_REWARD:
        raise ValueError(f"returned {number}, beyond {LARGEST_REWARD:.1e}, above which squares overflow")
    return number


def check_applicability(
    rewards_per_func: torch.Tensor, names: list[str], prompts: list[str], num_generations: int, failed: torch.Tensor
) -> None:
    """Raise a `RewardError` if no function applies to an image, or one applies to some images of a group only.

    Rewards of F functions are (B, F, K + 1), NaN where a function does not apply. Trajectories (B,) that have failed,
    because a function failed on one of their images, are left out.
    """
    absent = rewards_per_func.isnan()
    for group in torch.arange(len(prompts)).split(num_generations):
        kept = [row for row in group.tolist() if not failed[row]]
        for row in kept:
            if absent[row].all():
                what = f"returned None for row {row}, prompt {prompts[row]!r}: no reward is left"
                raise RewardError(" and ".join(names), what)
            differs = (absent[row] != absent[kept[0], :, :1]).any(1)  # (F,)
            if differs.any():
                what = f"returned None for some images of the prompt {prompts[row]!r} and numbers for others"
                what += ", but whether it applies may depend on the dataset's row only"
                raise RewardError(names[int(differs.nonzero()[0])], what)


def check_signature(reward_func: RewardFunc, columns: list[str]) -> None:
    """Raise a `TypeError` if a function does not take the columns of the dataset, before anything is sampled."""
    others = (name for name in RESERVED_COLUMNS if name not in ("images", "latents", "sigmas"))
    arguments = dict.fromkeys([*declared(reward_func).scored, *others, *columns])
    try:
        inspect.signature(reward_func).bind(**arguments)
    except TypeError as error:
        lacks = "missing a required" in str(error)
        remedy = f"the dataset has the prompts and {columns}" if lacks else "let it take **columns"
        what = f"The reward function {reward_name(reward_func)!r} cannot be called with {list(arguments)}"
        raise TypeError(f"{what}: {error}: {remedy}.") from error


def check_settings(reward_funcs: list[RewardFunc], eval_only: list[RewardFunc], args: Any, evaluates: bool) -> None:
    """Raise a `ValueError` for settings that do not go with what functions declare, `eval_only` in evaluation."""
    if takes_states_alone(reward_funcs):
        given = {"completion": args.completion} if not args.completion.startswith("exact") else {}
        given |= {} if args.completion_check_every is None else {"completion_check_every": args.completion_check_every}
        for name, value in given.items():
            remedy = "leave it out (completion='exact_every_M' scores every M-th state)"
            raise ValueError(
                f"{name}={value!r}: all reward functions score noisy states, none is completed: {remedy}."
            )
    ranks = [reward_name(function) for function in reward_funcs if declared(function).scores_groups]
    if args.noise_calibration_iterations and ranks and len(ranks) == len(reward_funcs):
        what = f"noise_calibration_iterations: {' and '.join(ranks)} compare the images of a group"
        raise ValueError(f"{what}, whose rewards are as often above as below at any noise: set it to 0.")
    own = {"num_generations": args.generation_batch_size // args.world_size}
    own |= {"num_generations_eval": args.per_device_eval_batch_size} if evaluates else {}
    for name, number in own.items():
        functions = reward_funcs if name == "num_generations" else [*reward_funcs, *eval_only]
        for title in (reward_name(function) for function in functions if declared(function).scores_groups):
            if number % (group := getattr(args, name)):
                what = f"{number} images a process are no whole groups of {name} ({group})"
                raise ValueError(f"The reward function {title!r} scores groups: {what}.")


def check_available(reward_funcs: list[RewardFunc]) -> None:
    """Call `check_available`, which may raise, of functions that have it, such as those that ask a server."""
    for reward_func in map(innermost, reward_funcs):
        if "check_available" in dir(reward_func):
            reward_func.check_available()
