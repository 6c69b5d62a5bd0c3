"""Every setting of a run."""

from .fields import described, non_defaults, without_secrets
from .settings import TPGRPOConfig


__all__ = ["TPGRPOConfig", "described", "non_defaults", "without_secrets"]
