"""What a run gives to the Hub: weights, card, images, recipe and checkpoints."""

from .card import RunCard, sample_rows
from .repository import HubError, HubRepository


__all__ = ["HubError", "HubRepository", "RunCard", "sample_rows"]
