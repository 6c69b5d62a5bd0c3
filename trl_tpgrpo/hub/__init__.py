"""Pushes to the Hub: weights, card, images, recipe and checkpoints."""

from .card import PAPER, RunCard, sample_rows
from .repository import HubError, HubRepository


__all__ = ["PAPER", "HubError", "HubRepository", "RunCard", "sample_rows"]
