"""State that reward functions share with training: process settings, working directory and random states."""

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
    torch.set_default_device(None if found.type == "cpu" else found)  # `None` is the CPU, without a cost per operator


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
    """Return the settings of the process by name; `None` if unknown."""
    return {name: _told(get) for name, (get, _) in SETTINGS.items()}


def _told(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (OSError, RuntimeError):  # a deleted folder; a precision set by torch's new and old API
        return None


def put_back(before: dict[str, Any]) -> list[str]:
    """Restore changed settings (except a deleted folder) and return their names."""
    changed = [name for name, (get, _) in SETTINGS.items() if before[name] not in (None, _told(get))]
    for name in changed:
        with suppress(FileNotFoundError):
            SETTINGS[name][1](before[name])
    return changed


@contextmanager
def unchanged(before: dict[str, Any]) -> Iterator[None]:
    """Restore settings, autograd modes and random states at the end, in the main thread.

    Changed random states continue from a seed derived from their former state: later numbers do not depend on seeds or
    draws inside the context, and the next draws inside differ.
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
