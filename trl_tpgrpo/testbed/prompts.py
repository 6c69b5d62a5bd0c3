"""Prompts of the shapes world as a dataset: for training, for tuning, and held out for reporting."""

import numpy as np
from datasets import Dataset

from .world import KINDS, split_captions


def prompt_dataset(split: str, num_prompts: int = 256, seed: int = 0) -> Dataset:
    """Return prompts of one split with the columns `prompt` and `kind`, balanced by kind, in random order.

    Kinds with too few captions repeat them. The splits share no set of things, see `world.split_captions`.

    Args:
        split: Split `"train"`, `"tuning"` (for choosing settings) or `"heldout"` (for reporting).
        num_prompts: Number of prompts, a multiple of 4.
        seed: Seed for selection and order.
    """
    splits = split_captions()
    if split not in splits:
        raise ValueError(f"split must be one of {tuple(splits)}, got {split!r}.")
    if num_prompts <= 0 or num_prompts % len(KINDS):
        raise ValueError(f"num_prompts must be a positive multiple of {len(KINDS)}, got {num_prompts}.")
    rng, rows, number = np.random.default_rng(seed), [], num_prompts // len(KINDS)
    for kind in KINDS:
        captions = [caption for caption in splits[split] if caption.kind == kind]
        repeated = [captions[i] for _ in range(-(-number // len(captions))) for i in rng.permutation(len(captions))]
        rows += [{"prompt": str(caption), "kind": kind} for caption in repeated[:number]]
    return Dataset.from_list([rows[index] for index in rng.permutation(len(rows))])
