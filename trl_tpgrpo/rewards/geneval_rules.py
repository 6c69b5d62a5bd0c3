"""GenEval's rules for detected objects: valid boxes, positions, correctness (arXiv 2310.11513).

Boxes are (left, top, right, bottom) in pixels. A clause of a prompt's metadata has `class`, `count`, and optionally
`color` or `position`: a relation and the index of the earlier clause that it refers to, ("left of", 0).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """Detected object: box, the detector's confidence, and a mask (H, W) of bools if there is one."""

    box: Box
    score: float
    mask: Tensor | None = None


Objects = dict[str, list[Detection]]
"""Detections by class, most confident first."""

ColoursOf = Callable[[str, list[Detection]], list[str]]
"""The colours of objects of a class."""


def clauses(value: str | Sequence[dict] | None) -> list[dict[str, Any]]:
    """Return the clauses of `include` or `exclude`, without the entries that are `None`.

    A string is read as JSON: a column of a `Dataset` cannot hold lists like ["left of", 0], only their text.
    """
    listed = json.loads(value) if isinstance(value, str) else value or []
    return [{key: entry for key, entry in clause.items() if entry is not None} for clause in listed]


def check_metadata(tag: str, include: list[dict], exclude: list[dict], classes: Sequence[str]) -> None:
    """Raise a `ValueError` for metadata with an unknown tag, class, colour, relation, or invalid count or clause."""
    if tag not in TAGS:
        raise ValueError(f"tag is {tag!r}: use one of {TAGS}.")
    if not include:
        raise ValueError("include is empty: name at least one class and its count.")
    for index, clause in enumerate(include + exclude):
        if clause.get("class") not in classes:
            raise ValueError(f"class is {clause.get('class')!r}: use one of {tuple(classes)}.")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise ValueError(f"count is {clause.get('count')!r} for {clause['class']!r}: use a number from 1.")
        if clause.get("color", COLOURS[0]) not in COLOURS:
            raise ValueError(f"color is {clause['color']!r}: use one of {COLOURS}.")
        position = clause.get("position", (RELATIONS[0], index - 1))
        if len(position) != 2 or position[0] not in RELATIONS or int(position[1]) >= index:
            use = f"use one of {RELATIONS} and the number of an earlier clause"
            raise ValueError(f"position is {position!r} in clause {index}: {use}.")


def kept(detections: Objects, tag: str) -> Objects:
    """Return the objects that count: confidence over 0.3 (0.9 for `counting`), at most 16 a class, best first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    result: Objects = {}
    for name, found in detections.items():
        confident = sorted((one for one in found if one.score > threshold), key=lambda one: -one.score)
        if confident:
            result[name] = confident[:MAX_OBJECTS]
    return result


def relative_position(box: Box, other: Box) -> set[str]:
    """Return the relations of `box` to `other`: none if they are too close, two on a diagonal.

    A relation holds where the centres' offset along its axis, less a tenth of both sizes, is over half of the offset.
    """
    offsets = [(box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(box[axis + 2] - box[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    pairs = zip(offsets, sizes, strict=True)
    beyond = [math.copysign(max(abs(offset) - POSITION_THRESHOLD * size, 0), offset) for offset, size in pairs]
    if all(abs(value) < 1e-3 for value in beyond):
        return set()
    across, down = (value / math.hypot(*offsets) for value in beyond)
    holds = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


def is_right(objects: Objects, include: list[dict], exclude: list[dict], colours_of: ColoursOf) -> bool:
    """Return GenEval's verdict: true with enough objects of `include` and fewer than in `exclude`.

    Of each class of `include`, the `count` most confident must have the colour and the position.
    """
    unwanted = [clause for clause in exclude if len(objects.get(clause["class"], [])) >= clause["count"]]
    return not unwanted and all(part == 1 for part in _parts(objects, include, colours_of, only_most_confident=True))


def graded_score(objects: Objects, include: list[dict], colours_of: ColoursOf) -> float:
    """Return Flow-GRPO's graded reward (arXiv 2505.05470), the mean over all parts of all clauses; 1 if all are right.

    The parts of a clause are the count, `1 - |count - found| / count` (negative with more than twice the count), and,
    if requested, the colour, `1 - |count - found of the colour| / count`, or the position, 1 or 0; both are 0 if the
    count is wrong. Counts must be exact here, unlike in `is_right`. In Flow-GRPO's reward server, a wrong position
    costs half as much, because it adds a 1 to its 0.
    """
    scores = _parts(objects, include, colours_of, only_most_confident=False)
    return sum(scores) / len(scores)


def _parts(objects: Objects, include: list[dict], colours_of: ColoursOf, only_most_confident: bool) -> list[float]:
    """Score the parts of all clauses, on all objects of a class or on the requested number."""
    scores: list[float] = []
    matched: list[list[Detection] | None] = []
    for clause in include:
        found, count = objects.get(clause["class"], []), clause["count"]
        if only_most_confident:
            found = found[:count]
        scores.append(1 - abs(count - len(found)) / count)
        right = len(found) == count
        if not right and ("color" in clause or "position" in clause):
            scores.append(0.0)
        if right and "color" in clause:
            num_coloured = colours_of(clause["class"], found).count(clause["color"])
            scores.append(num_coloured / count)
            right = num_coloured == count
        if right and "position" in clause:
            relation, others = clause["position"][0], matched[int(clause["position"][1])]
            boxes = [(one.box, other.box) for one in found for other in others or []]
            right = others is not None and all(relation in relative_position(*pair) for pair in boxes)
            scores.append(float(right))
        matched.append(found if right else None)
    return scores
