# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=4.7.0",
#     "transformers>=5.10.2",
# ]
# ///
"""Prompts that ask for a text in the image, with the text, for the reward `ocr`.

    python examples/datasets/text_rendering.py --output_dir data/text_rendering
    trl-tpgrpo train --dataset_name data/text_rendering --reward_funcs ocr ...

Columns: `prompt`, with the text between double quotes, and `text`. Texts are one to four words drawn from a list. No
text of the test split is in the training split.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import HfArgumentParser


SCENES = (
    "A neon sign in a rainy street that says {}",
    "A wooden board at the entrance of a farm that reads {}",
    "A chalkboard in a cafe with the words {} written on it",
    "A cardboard box with {} stamped on its side",
    "The cover of an old book titled {}",
    "A white coffee mug with {} printed on it",
    "A birthday cake with {} in icing",
    "A brick wall with the graffiti {}",
    "A poster on a bus stop that says {}",
    "A shop window with {} in golden letters",
    "A road sign in the desert that reads {}",
    "A T-shirt on a clothes line with the words {}",
    "A sticky note on a fridge that says {}",
    "The hull of a fishing boat named {}",
    "A paper flag on a sand castle that says {}",
    "A ticket on a table with {} printed in bold",
    "A theatre marquee at night announcing {}",
    "A glass jar with a label that reads {}",
    "A banner above a street market that says {}",
    "A robot holding up a card with the words {}",
)
WORDS = (
    "open late fresh bread north harbour quiet please golden hour river wild honey lost found paper moon summer camp "
    "silver lake first class slow down winter sale good morning blue door little wonder house green tea market stone "
    "bridge happy travel keep left grand hotel cold drinks night train free range city lights art for all home again "
    "mind the gap wet paint no parking deep sea red planet lucky number seven garden party old friends new ideas "
    "small steps big dreams star dust"
).split()


@dataclass
class Arguments:
    """Arguments of the script."""

    output_dir: Path = field(metadata={"help": "Folder for train.parquet and test.parquet."})
    num_train: int = field(default=5000, metadata={"help": "Prompts to train on."})
    num_test: int = field(default=200, metadata={"help": "Prompts to evaluate on, with texts of their own."})
    seed: int = field(default=0, metadata={"help": "Of the draw."})


def build(num_train: int, num_test: int, seed: int = 0) -> DatasetDict:
    """Draw the prompts.

    Raises:
        ValueError: If there are not so many texts.
    """
    draw, texts = random.Random(seed), dict[str, None]()
    for _ in range(50 * (num_train + num_test)):
        if len(texts) == num_train + num_test:
            break
        texts[draw.choice((str.upper, str.title, str.lower))(" ".join(draw.choices(WORDS, k=draw.randint(1, 4))))] = (
            None
        )
    if len(texts) < num_train + num_test:
        raise ValueError(f"num_train and num_test: there are not {num_train + num_test} different texts.")
    rows = [{"prompt": draw.choice(SCENES).format(f'"{text}"'), "text": text} for text in texts]
    return DatasetDict(test=Dataset.from_list(rows[:num_test]), train=Dataset.from_list(rows[num_test:]))


def write(splits: DatasetDict, output_dir: Path) -> None:
    """One parquet file a split, which `load_dataset(output_dir)` and `--dataset_name output_dir` read."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(output_dir / f"{name}.parquet")
        print(f"{len(split)} prompts in {output_dir / f'{name}.parquet'}, such as: {split[0]['prompt']}")  # noqa: T201


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    write(build(arguments.num_train, arguments.num_test, arguments.seed), arguments.output_dir)
