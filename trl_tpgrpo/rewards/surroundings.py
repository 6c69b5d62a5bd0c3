"""What reward functions share with training: settings of the process, its working directory and its random states."""

import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

import numpy as np
import torch


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]


def _set_autocast(found: list[tuple[str, bool, torch.dtype]]) -> None:
    for name, is_enabled, dtype in found:
        torch.set_autocast_enabled(name, is_enabled)
        torch.set_autocast_dtype(name, dtype)


def _set_device(found: torch.device) -> None:
    torch.set_default_device(None if found.type == "cpu" else found)  # `None` is the CPU and slows no operator down


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_device),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "autocast": (_autocast, _set_autocast),
    "the working directory": (os.getcwd, os.chdir),
}
RANDOM: tuple[tuple[Callable[[], bytes], Callable[[int], object]], ...] = (
    (lambda: pickle.dumps(random.getstate()), random.seed),
    (lambda: pickle.dumps(np.random.get_state(legacy=False)), np.random.seed),
    (lambda: torch.get_rng_state().numpy().tobytes(), torch.default_generator.manual_seed),
    (lambda: torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else b"",
     torch.cuda.manual_seed),
)  # fmt: skip


def settings() -> dict[str, Any]:
    """Return the settings of the process by name, `None` where one cannot be told."""
    return {name: _told(get) for name, (get, _) in SETTINGS.items()}


def _told(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (OSError, RuntimeError):  # a folder that was deleted; a precision that was set in torch's new and old way
        return None


def put_back(before: dict[str, Any]) -> list[str]:
    """Set what has changed to what it was before, unless that is a folder that is gone, and return the names."""
    changed = [name for name, (get, _) in SETTINGS.items() if before[name] not in (None, _told(get))]
    for name in changed:
        with suppress(FileNotFoundError):
            SETTINGS[name][1](before[name])
    return changed


@contextmanager
def unchanged(before: dict[str, Any]) -> Iterator[None]:
    """Put settings, modes of autograd and random states back at the end, in the main thread.

    Random states that have moved go on from a seed that is made of what they were: what comes after depends neither
    on seeds nor on numbers that were drawn inside, and the next draws inside are others.
    """
    random_before, with_grad = [get() for get, _ in RANDOM], torch.is_grad_enabled()
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(with_grad):
            yield
    finally:
        for (get, seed), state in zip(RANDOM, random_before, strict=True):
            if state and get() != state:
                seed(int.from_bytes(sha256(state).digest()[:4]))
        put_back(before)
