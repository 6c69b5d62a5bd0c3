"""The shapes world: captions of coloured shapes, and the geometry of images of them.

Coordinates are pixels, x to the right and y downwards. `benchmarks/pretrain.py` draws any number of such pictures.
"""

import itertools
from dataclasses import dataclass

import numpy as np


IMAGE_SIZE = 32
BACKGROUND = np.array([0.10, 0.10, 0.12])
COLOURS = {
    "red": np.array([0.90, 0.15, 0.15]),
    "green": np.array([0.15, 0.80, 0.20]),
    "blue": np.array([0.20, 0.35, 0.95]),
    "yellow": np.array([0.95, 0.85, 0.15]),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {2: "two", 3: "three"}
KINDS = ("single", "count", "pair", "position")


@dataclass(frozen=True)
class Thing:
    """Coloured shape in a caption."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """Content of an image: things (one entry each, also if counted) and the relation of the first to the second."""

    kind: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def __str__(self) -> str:
        first = self.things[0]
        if self.kind == "single":
            return f"a {first}"
        if self.kind == "count":
            return f"{NUMBERS[len(self.things)]} {first}s"
        return f"a {first} {self.relation or 'and'} a {self.things[1]}"


def all_captions() -> list[Caption]:
    """Return every caption of the world: 12 single, 24 count, 132 pair and 528 position."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = list(itertools.permutations(things, 2))
    return [
        *(Caption("single", (thing,)) for thing in things),
        *(Caption("count", (thing,) * number) for thing in things for number in NUMBERS),
        *(Caption("pair", pair) for pair in pairs),
        *(Caption("position", pair, relation) for pair in pairs for relation in RELATIONS),
    ]


_CAPTIONS = {str(caption): caption for caption in all_captions()}


def parse_caption(text: str) -> Caption:
    """Return the caption with this `text`; raise a `ValueError` if there is none."""
    if text not in _CAPTIONS:
        raise ValueError(f"{text!r} is not a caption of this world, such as 'a red circle left of a blue square'.")
    return _CAPTIONS[text]


def split_captions(seed: int = 0) -> dict[str, list[Caption]]:
    """Split all captions into `train` (70%), `tuning` (15%) and `heldout` (15%) that share no set of things.

    Of the held-out captions, those of two different things never appear in the base model's pretraining either.
    """
    shuffle = np.random.default_rng(seed).permutation
    groups: dict[tuple, list[Caption]] = {}
    for caption in all_captions():
        family = "two" if caption.kind in ("pair", "position") else caption.kind
        key = (family, tuple(sorted(map(str, caption.things))))
        groups.setdefault(key, []).append(caption)
    splits: dict[str, list[Caption]] = {"train": [], "tuning": [], "heldout": []}
    for family in ("single", "count", "two"):
        keys = sorted(key for key in groups if key[0] == family)
        part = round(0.15 * len(keys))
        for number, index in enumerate(shuffle(len(keys))):
            name = "heldout" if number < part else "tuning" if number < 2 * part else "train"
            splits[name] += groups[keys[index]]
    return splits


def inside(shape: str, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return which points are inside a shape that fills [-1, 1] x [-1, 1]; `across` and `down` broadcast."""
    if shape == "circle":
        return across**2 + down**2 <= 1
    in_box = (np.abs(across) <= 1) & (np.abs(down) <= 1)
    if shape == "square":
        return in_box
    return in_box & (np.abs(across) <= (down + 1) / 2)


def offset(relation: str, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the offset of `first` from `second` in the relation's direction, and (unsigned) across it, in pixels."""
    direction = np.array(RELATIONS[relation])
    difference = np.asarray(first) - np.asarray(second)
    return float(difference @ direction), float(np.abs(difference @ direction[::-1]))
