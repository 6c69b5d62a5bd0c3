"""TurningPoint-GRPO for flow-matching text-to-image models, as a trainer for TRL."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import TPGRPOConfig
    from .trainer import TPGRPOTrainer


__all__ = ["TPGRPOConfig", "TPGRPOTrainer"]

try:
    __version__ = version("trl-tpgrpo")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> object:
    """Import torch, diffusers and TRL when they are needed, not for `trl-tpgrpo --help`."""
    if name in __all__:
        module = "config" if name == "TPGRPOConfig" else "trainer"
        return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
