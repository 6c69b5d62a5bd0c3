# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=4.7.0",
#     "transformers>=5.10.2",
# ]
# ///
"""Prompts written by people, from Pick-a-Pic (arXiv 2305.01569), for rewards such as `pick_score`.

    python examples/datasets/pick_a_pic.py --output_dir data/pick_a_pic
    trl-tpgrpo train --dataset_name data/pick_a_pic --reward_funcs pick_score ...

Column: `prompt`. The script removes duplicates and prompts that are too short or too long for the text encoders. The
authors of the data set have not filtered the prompts: read them before you publish images of them.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import HfArgumentParser


@dataclass
class Arguments:
    """Arguments of the script."""

    output_dir: Path = field(metadata={"help": "Folder for train.parquet and test.parquet."})
    source: str = field(
        default="yuvalkirstain/pickapic_v1_no_images",
        metadata={"help": "Data set with a column 'caption': a name on the Hub, or a folder."},
    )
    num_test: int = field(default=500, metadata={"help": "Prompts to evaluate on."})
    min_words: int = field(default=3, metadata={"help": "Shorter prompts are left out."})
    max_words: int = field(default=60, metadata={"help": "Longer prompts are left out: CLIP reads 77 tokens."})
    seed: int = field(default=0, metadata={"help": "Of the split."})


def build(captions: list[str], num_test: int, min_words: int = 3, max_words: int = 60, seed: int = 0) -> DatasetDict:
    """Different prompts of a suitable length, split at random.

    Raises:
        ValueError: If none are left to train on.
    """
    stripped = dict.fromkeys(" ".join(caption.split()) for caption in captions)
    prompts = sorted(prompt for prompt in stripped if min_words <= len(prompt.split()) <= max_words)
    if len(prompts) <= num_test:
        raise ValueError(f"num_test={num_test}: of {len(captions)} captions only {len(prompts)} prompts are left.")
    random.Random(seed).shuffle(prompts)
    return DatasetDict(
        test=Dataset.from_dict({"prompt": prompts[:num_test]}), train=Dataset.from_dict({"prompt": prompts[num_test:]})
    )


def main() -> None:
    """Fetch, choose, write."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    captions = load_dataset(args.source, split="train").select_columns("caption")["caption"]
    splits = build(list(captions), args.num_test, args.min_words, args.max_words, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(args.output_dir / f"{name}.parquet")
        print(f"{len(split)} prompts in {args.output_dir / f'{name}.parquet'}, such as: {split[0]['prompt']}")  # noqa: T201


if __name__ == "__main__":
    main()
