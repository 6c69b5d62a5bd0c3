"""The testbed: a world of coloured shapes with judge and prompts, and the bundled toy model."""

from pathlib import Path
from typing import Any

from .prompts import prompt_dataset


__all__ = ["PIPELINE_KWARGS", "TESTBED", "prompt_dataset"]

TESTBED = Path(__file__).parent / "weights"
"""Folder of the tiny pretrained `StableDiffusion3Pipeline`, an ordinary diffusers pipeline."""

PIPELINE_KWARGS: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 0}
"""Arguments for every call of the tiny pipeline: image size, and no tokens for the missing T5 encoder."""
