# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=4.7.0",
#     "transformers>=5.10.2",
# ]
# ///
"""Compositional prompts of GenEval's six kinds (arXiv 2310.11513) with their objects, for the reward `geneval`.

    python examples/datasets/compositional.py --output_dir data/compositional
    trl-tpgrpo train --dataset_name data/compositional --reward_funcs geneval ...

The script draws new prompts. It does not use GenEval's own 553, which remain a test set. Columns:

- `prompt`
- `tag`: `single_object`, `two_object`, `counting`, `colors`, `position` or `color_attr`
- `include`: the objects that the image must contain, as JSON: `class`, `count`, and if required `color` or `position`,
  such as `["left of", 0]`: the relation to another object, and the number of that object
- `exclude`: the objects that it must not contain, as JSON: as many of a class as make a wrong count
"""

import json
import random
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import HfArgumentParser


CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, "
    "book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
"""COCO's, under the names that GenEval gives them."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
WITHOUT_COLOR = ("person",)
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
WITHOUT_PLURAL = ("skis", "scissors", "sheep")
IRREGULAR = {"person": "people", "knife": "knives", "computer mouse": "computer mice"}


@dataclass
class Arguments:
    """Arguments of the script."""

    output_dir: Path = field(metadata={"help": "Folder for train.parquet and test.parquet."})
    num_train: int = field(default=12000, metadata={"help": "Prompts to train on, as many of each kind as there are."})
    num_test: int = field(default=300, metadata={"help": "Prompts to evaluate on."})
    seed: int = field(default=0, metadata={"help": "Of the draw."})


def thing(name: str, count: int = 1, **more: object) -> dict[str, Any]:
    """One entry of `include`: `more` is its color, or its position."""
    return {"class": name, "count": count, **more}


def with_article(words: str) -> str:
    """`a dog`, `an apple`, but `scissors`."""
    if words.split()[-1] in WITHOUT_PLURAL[:2]:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """`dogs`."""
    if name in WITHOUT_PLURAL:
        return name
    if name in IRREGULAR:
        return IRREGULAR[name]
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")


def row(
    tag: str, shown: str, include: list[dict[str, Any]], exclude: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One prompt."""
    columns = {"include": json.dumps(include), "exclude": json.dumps(exclude or [])}
    return {"prompt": f"a photo of {shown}", "tag": tag, **columns}


def all_rows() -> dict[str, list[dict[str, Any]]]:
    """Every prompt of each kind."""
    pairs = list(permutations(CLASSES, 2))
    colorable = [name for name in CLASSES if name not in WITHOUT_COLOR]
    coloured = [(name, color) for name in colorable for color in COLORS]
    return {
        "single_object": [row("single_object", with_article(name), [thing(name)]) for name in CLASSES],
        "two_object": [
            row("two_object", f"{with_article(one)} and {with_article(other)}", [thing(one), thing(other)])
            for one, other in pairs
        ],
        "counting": [
            row("counting", f"{word} {plural(name)}", [thing(name, number)], [{"class": name, "count": number + 1}])
            for name in CLASSES
            for number, word in NUMBERS.items()
        ],
        "colors": [
            row("colors", with_article(f"{color} {name}"), [thing(name, color=color)]) for name, color in coloured
        ],
        "position": [
            row(
                "position",
                f"{with_article(one)} {relation} {with_article(other)}",
                [thing(other), thing(one, position=[relation, 0])],
            )
            for one, other in pairs
            for relation in RELATIONS
        ],
        "color_attr": [
            _two_colors(number, *pair, place)
            for number, pair in enumerate(permutations(colorable, 2))
            for place in range(len(COLORS))
        ],
    }


def _two_colors(number: int, one: str, other: str, place: int) -> dict[str, Any]:
    """Pair `number` with color `place` for the first object, and one of the nine others for the second."""
    color, other_color = COLORS[place], COLORS[(place + 1 + number % 9) % len(COLORS)]
    shown = f"{with_article(f'{color} {one}')} and {with_article(f'{other_color} {other}')}"
    return row("color_attr", shown, [thing(one, color=color), thing(other, color=other_color)])


def build(num_train: int, num_test: int, seed: int = 0) -> DatasetDict:
    """Draw prompts, of each kind the same number, or all that there are of the small kinds.

    Raises:
        ValueError: If there are not so many prompts.
    """
    draw, by_kind = random.Random(seed), all_rows()
    for rows in by_kind.values():
        draw.shuffle(rows)
    splits = {}
    for name, wanted in (("test", num_test), ("train", num_train)):
        chosen: list[dict[str, Any]] = []
        kinds = sorted(by_kind, key=lambda kind: len(by_kind[kind]))
        for place, kind in enumerate(kinds):
            share = -(-(wanted - len(chosen)) // (len(kinds) - place))
            most = len(by_kind[kind]) if name == "train" else len(by_kind[kind]) // 2
            number = min(share, most)
            chosen += by_kind[kind][:number]
            by_kind[kind] = by_kind[kind][number:]
        if len(chosen) < wanted:
            raise ValueError(f"num_{name}={wanted}: there are not so many different prompts, only {len(chosen)}.")
        draw.shuffle(chosen)
        splits[name] = Dataset.from_list(chosen[:wanted])
    return DatasetDict(splits)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, split in build(arguments.num_train, arguments.num_test, arguments.seed).items():
        split.to_parquet(arguments.output_dir / f"{name}.parquet")
        print(f"{len(split)} prompts in {arguments.output_dir / f'{name}.parquet'}, such as: {split[0]['prompt']}")  # noqa: T201
