"""A served reward function: its attributes, its calls, and checks of its rewards."""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import inspect
import json
import logging
import math
import os
import re
import reprlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from .protocol import Refusal


logger = logging.getLogger(__name__)

RESERVED_NAMES = ("health",)
DECLARED = {"__name__", "batch_size", "image_type", "scores_states", "scores_groups", "timeout", "to"}
MAX_MESSAGE = 2000  # characters of an error message


class Outcome(NamedTuple):
    """Result of a call for N images."""

    rewards: list[float | None | Refusal]  # N; a `Refusal` for an invalid reward
    metrics: dict[str, list[float | None]]  # logged values; `None` for NaN, which JSON lacks
    extra: dict[str, list]  # logged columns, N values each


class ServedReward:
    """A reward function (or a class without arguments) and its attributes."""

    def __init__(self, function: Any, device: str | None = None):
        self.function: Any = function() if inspect.isclass(function) else function
        self.device = device
        layers = [self.function]  # attributes of a partial have priority over its function's
        while isinstance(layers[-1], functools.partial):
            layers.append(layers[-1].func)
        found = {name: getattr(layer, name) for layer in reversed(layers) for name in DECLARED & set(dir(layer))}
        self.name: str = found.get("__name__", type(layers[-1]).__name__)
        self.batch_size: int | None = found.get("batch_size")
        self.timeout: float | None = found.get("timeout")
        self.image_type: str = found.get("image_type", "pil")
        if not (self.name.isidentifier() and self.name.isascii()) or self.name in RESERVED_NAMES:
            raise ValueError(f"The reward function's name {self.name!r} cannot be part of a URL: set its __name__.")
        if self.image_type not in ("pil", "pt"):
            wrong = f"image_type={self.image_type!r}, not 'pil' or 'pt'"
            raise ValueError(f"The reward function {self.name!r} has {wrong}.")
        for name in ("batch_size", "timeout"):
            if not (found.get(name) is None or 0 < found[name] <= threading.TIMEOUT_MAX):
                wrong = f"{name}={found[name]!r}; it must be above 0, or None"
                raise ValueError(f"The reward function {self.name!r} has {wrong}.")
        for name in ("scores_states", "scores_groups"):
            if found.get(name):
                what = "latents" if name == "scores_states" else "whole groups"
                raise ValueError(
                    f"The reward function {self.name!r} has {name}, but {what} cannot be sent to a server."
                )
        move = found.get("to")
        if device is not None and move is not None:
            move(device)

    def call(self, images: list[Image.Image], prompts: list[str], columns: dict[str, list]) -> Outcome | Refusal:
        """Score N images; return a `Refusal` if the function raises, or does not return a list of N values."""
        try:
            return self._call(images, prompts, columns)
        except Refusal as refusal:
            return refusal
        except BaseException as error:  # even KeyboardInterrupt, which does not come from the keyboard in this thread
            logger.error("The reward function %r raised.", self.name, exc_info=error)
            kind = type(error).__name__
            message = f"The reward function {self.name!r} raised {kind}: {text_of(error)}."
            return Refusal(422, "reward_raised", message, exception=kind)

    def _call(self, images: list[Image.Image], prompts: list[str], columns: dict[str, list]) -> Outcome:
        metrics: dict[str, list[float | None]] = {}
        extra: dict[str, list] = {}

        def log_metric(name: str, value: Any, *_: Any) -> None:
            number = math.inf if isinstance(value, (str, bytes)) else float(value)
            if not isinstance(name, str) or math.isinf(number):
                given = f"{name!r}, {reprlib.repr(value)}"
                raise ValueError(f"log_metric({given}) takes a name and a finite number, or NaN")
            metrics.setdefault(name, []).append(None if math.isnan(number) else number)

        def log_extra(name: str, values: Sequence) -> None:
            listed = json.loads(json.dumps(list(values), allow_nan=False))  # a copy, against later changes
            if not isinstance(name, str) or len(listed) != len(images):
                raise ValueError(f"log_extra({name!r}) got {len(listed)} values for {len(images)} images")
            extra[name] = listed

        given: Any = self._tensor(images) if self.image_type == "pt" else images
        log: dict[str, Any] = {"trainer_state": None, "log_metric": log_metric, "log_extra": log_extra}
        values = self.function(images=given, prompts=prompts, **columns, **log)
        if inspect.isawaitable(values):
            values = asyncio.run(asyncio.wait_for(values, timeout=None))  # for arguments that `run` does not accept
        return Outcome(self._checked(values, len(images)), metrics, extra)

    def _tensor(self, images: list[Image.Image]) -> Any:
        """Return float32, (N, 3, H, W), in [0, 1], on the device."""
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return pixels.to(self.device or "cpu").permute(0, 3, 1, 2).float() / 255

    def _checked(self, values: Any, number: int) -> list[float | None | Refusal]:
        try:
            len(values)  # without a length, it may be endless
            rewards = [None if value is None else self._reward(value) for value in values]
        except TypeError:
            raise self._wrong(f"must return a list of numbers, got {type(values).__name__}") from None
        if len(rewards) != number:
            raise self._wrong(f"returned {len(rewards)} rewards for {number} images")
        return rewards

    def _reward(self, value: Any) -> float | Refusal:
        try:
            reward = float(None if isinstance(value, str) else value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return self._wrong(f"returned {reprlib.repr(value)}, which is not a number")
        if not math.isfinite(reward):
            return self._wrong(f"returned {reward} (return None where the reward does not apply)")
        return reward

    def _wrong(self, what: str) -> Refusal:
        return Refusal(500, "no_reward", f"The reward function {self.name!r} {what}.")


def text_of(error: BaseException) -> str:
    """Return the message of an error, shortened if it is long."""
    try:
        return str(error)[:MAX_MESSAGE]
    except BaseException:  # any exception of a user's `__str__`
        return "no message: its __str__ fails"


def dotted(path: str) -> str:
    """Return the dotted form of an import path in the form `a.b`, `a:b` or `./a.py:b`."""
    return re.sub(r"\.py:|[:/]", ".", re.sub(r"^\./", "", path))  # Python 3.8 has no `removeprefix`


def import_path(name: str, given: Any, known: Sequence[str] = ()) -> str:
    """Return the dotted import path of `given` (a function, class or path in any form), or a `known` name.

    Raises a `ValueError` with the setting's `name` if nothing is found, or an object cannot be imported again.
    """
    if given in known:
        return given
    if not (isinstance(given, str) or callable(given)):
        raise ValueError(f"{name} must be a name, an import path or a function, got {given!r}.")
    if isinstance(given, str):
        path = dotted(given)
    else:
        module, own_name = (getattr(given, attribute, None) for attribute in ("__module__", "__qualname__"))
        path = f"{module}.{own_name}"
        if getattr(sys.modules.get(str(module)), str(own_name), None) is not given:
            remedy = "define it at the top level of a module or script, not as a lambda or inside a function"
            raise ValueError(f"{name}: {given!r} cannot be imported as {path}: {remedy}.")
    if known and "." not in path:
        alike = difflib.get_close_matches(path, known, n=1)
        hint = f": did you mean {alike[0]}?" if alike else "."
        raise ValueError(f"{name} must be one of {known}, or an import path such as my_rules.mine, got {path!r}{hint}")
    if not callable(found := find_function(path, name)):
        raise ValueError(f"{name}: {path} must be a function or a class, got {found!r}.")
    return path


def find_function(path: str, what: str = "reward function") -> Callable[..., Any]:
    """Import an object by a path in any form of `dotted`, also from the current directory.

    A `ValueError` names `what` it is for, and the reason why it was not found.
    """
    module_path, _, name = dotted(path).rpartition(".")
    if not module_path or module_path.startswith("."):
        form = "an import path in the current folder, such as my_rewards.mine or ./folder/my_rewards.py:mine"
        raise ValueError(f"The {what} {path!r} must be {form}.")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        where = "The current folder and the installed packages are searched."
        raise ValueError(f"The module of the {what} {path!r} cannot be imported: {error}. {where}") from error
    except Exception as error:  # any exception of a user's module
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f"{last.filename}, line {last.lineno}"
        said = f"{type(error).__name__}: {error} ({where})"
        raise ValueError(f"The module of {path!r} fails on import: {said}.") from error
    finally:
        sys.path.remove(folder)
    function: Any = getattr(module, name, None)
    if function is None:
        alike = difflib.get_close_matches(name, dir(module), n=1)
        hint = f": did you mean {alike[0]}?" if alike else "."
        raise ValueError(f"The module {module_path!r} has no {what} {name!r}{hint}")
    return function
