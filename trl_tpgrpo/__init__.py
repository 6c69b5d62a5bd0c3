"""TurningPoint-GRPO for flow-matching image models, as a trainer for TRL."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callbacks.guard_rails import GuardRails
    from .config import TPGRPOConfig
    from .trainer import TPGRPOTrainer


MODULES = {"GuardRails": "callbacks.guard_rails", "TPGRPOConfig": "config", "TPGRPOTrainer": "trainer"}
__all__ = ["GuardRails", "TPGRPOConfig", "TPGRPOTrainer"]

try:
    __version__ = version("trl-tpgrpo")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> object:
    """Import torch, diffusers and TRL when they are needed, not for `trl-tpgrpo --help`."""
    if name in MODULES:
        return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
