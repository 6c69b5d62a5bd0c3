"""TurningPoint-GRPO for flow-matching text-to-image models, as a trainer for TRL."""

from importlib.metadata import PackageNotFoundError, version

from .config import TPGRPOConfig
from .trainer import TPGRPOTrainer


__all__ = ["TPGRPOConfig", "TPGRPOTrainer"]

try:
    __version__ = version("trl-tpgrpo")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"
