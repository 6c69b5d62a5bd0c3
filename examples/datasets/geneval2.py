# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=4.7.0",
#     "transformers>=5.10.2",
# ]
# ///
"""GenEval 2's prompts and questions (arXiv 2512.16853), for evaluation by a judge with `soft_tifa_gm`.

    python examples/datasets/geneval2.py --source geneval2_data.jsonl --output_dir data/geneval2
    trl-tpgrpo evaluate --dataset_name data/geneval2 --by atom_count --reward_funcs my_rewards.judge ...

The source file is in its authors' repository, `facebookresearch/GenEval2`, under CC BY-NC 4.0. Columns:

- `prompt`
- `questions`: the published questions with their answers, `{"question": "Is the cup red?", "answer": "yes"}`
- `atom_count`: number of atoms in the prompt, 3 to 10. There are more questions, since "a cup" is counted too
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import HfArgumentParser


@dataclass
class Arguments:
    """Arguments of the script."""

    source: Path = field(metadata={"help": "The published file, a line of JSON a prompt."})
    output_dir: Path = field(metadata={"help": "Folder for test.parquet."})


def read(line: str, number: int) -> dict[str, Any]:
    """Row of a line, of the keys `prompt`, `atom_count` and `vqa_list`, pairs of a question and its answer.

    Raises:
        ValueError: If the line has another form.
    """
    match json.loads(line):
        case {"prompt": str(prompt), "atom_count": int(count), "vqa_list": [_, *_] as pairs}:
            questions = [{"question": text, "answer": answer.lower()} for text, answer in pairs]
            return {"prompt": prompt, "questions": questions, "atom_count": count}
    raise ValueError(f"Line {number} has not GenEval 2's keys 'prompt', 'atom_count' and 'vqa_list': {line[:200]}")


def main() -> None:
    """Read, translate, write."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    lines = args.source.read_text(encoding="utf-8").splitlines()
    rows = Dataset.from_list([read(line, number) for number, line in enumerate(lines, start=1)])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(args.output_dir / "test.parquet")
    print(f"{len(rows)} prompts in {args.output_dir / 'test.parquet'}, such as: {rows[0]['prompt']}")  # noqa: T201


if __name__ == "__main__":
    main()
