"""Every setting of a run."""

from .fields import described, non_defaults
from .settings import TPGRPOConfig


__all__ = ["TPGRPOConfig", "described", "non_defaults"]
