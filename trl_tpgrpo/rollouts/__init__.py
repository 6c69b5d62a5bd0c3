"""Rollouts: rows of a dataset -> trajectories with rewards."""

from .sampling import Rollouts
from .windows import NOISE, PROBED_GROUPS


__all__ = ["NOISE", "PROBED_GROUPS", "Rollouts"]
