"""Prompts from the Hub, a folder or a file, in the column that the trainer reads."""

from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from .options import near


FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""Formats of `datasets` by file extension; a text file has one prompt per line."""

SAVED = ("dataset_dict.json", "dataset_info.json")
"""Files in a folder written by `save_to_disk`."""


def is_local(name: str) -> bool:
    """Check whether a dataset's name is that of a file or folder (existing or not)."""
    is_file_name = "." in name and "/" not in name  # not a Hub id
    return Path(name).exists() or Path(name).suffix in FORMATS or name.startswith((".", "/", "~")) or is_file_name


def split_of(name: str | None, split: str, test_size: float | None) -> str:
    """Return the split for evaluation: a whole file, if no prompts are held out."""
    return "train" if name and test_size is None and Path(name).expanduser().is_file() else split


def read_prompts(
    name: str, config: str | None, splits: list[str], column: str | None, test_size: float | None = None
) -> list[Dataset]:
    """Load splits of a dataset, with `column` renamed to `prompt`; an error names the file, split or column.

    With a `test_size` (share or number of rows), a dataset with one split is split into `train` and `test`.
    """
    found = _load_local(name, config) if is_local(name) else load_dataset(name, name=config)
    if test_size is not None and len(found) > 1:
        raise ValueError(f"--test_split_size is for a dataset with one split, but this one has {list(found)}.")
    if test_size is not None:
        found = next(iter(found.values())).train_test_split(test_size, seed=0)
    return chosen(found, splits, column)


def _load_local(name: str, config: str | None) -> DatasetDict:
    path = Path(name).expanduser()
    if not path.exists():
        others = [other.name for other in path.parent.glob("*")]
        raise FileNotFoundError(f"--dataset_name: there is no file or folder {name}{near(path.name, others)}")
    if path.is_file() and path.suffix not in FORMATS:
        raise ValueError(f"--dataset_name: {name} must end in one of {', '.join(FORMATS)}.")
    if path.is_file() and not path.read_bytes().strip():
        raise ValueError(f"--dataset_name: {name} is empty.")
    if any((path / file).is_file() for file in SAVED):
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    disable_progress_bars()
    try:
        kind, files = (FORMATS[path.suffix], str(path)) if path.is_file() else (str(path), None)
        return load_dataset(kind, name=config, data_files=files)
    except DatasetGenerationError as error:
        raise ValueError(f"--dataset_name: {name} cannot be read: {error.__cause__ or error}") from error
    finally:
        enable_progress_bars()


def chosen(found: DatasetDict, splits: list[str], column: str | None = None) -> list[Dataset]:
    """Return splits of a loaded dataset, with prompts in the column `prompt`; raise ValueError if one is missing."""
    for split in splits:
        if split not in found:
            remedy = "see --dataset_train_split and --dataset_test_split"
            if len(found) == 1 and split != splits[0]:
                remedy = "hold out prompts by --test_split_size 0.1, or set --eval_strategy no --eval_on_start no"
            raise ValueError(f"The dataset has no split {split!r}, only {list(found)}: {remedy}.")
    return [_with_prompts(found[split], column) for split in splits]


def _with_prompts(dataset: Dataset, column: str | None) -> Dataset:
    names = dataset.column_names
    if column is None and names == ["text"]:  # of a text file: one prompt per line
        lines = [line.removeprefix("\ufeff") for line in dataset["text"]]  # byte order mark
        dataset, column = Dataset.from_dict({"prompt": [line for line in lines if line.strip()]}), "prompt"
    elif (column or "prompt") not in names:
        hint = near(column or "prompt", names) + ("" if column else " Set --prompt_column.")
        raise ValueError(f"The dataset has no column {column or 'prompt'!r}, only {names}{hint}")
    elif column not in (None, "prompt"):
        dataset = dataset.remove_columns([name for name in names if name == "prompt"]).rename_column(column, "prompt")
    if (kind := getattr(dataset.features["prompt"], "dtype", "list")) not in ("string", "large_string"):
        what = f"The column {column or 'prompt'!r} must contain strings, but has the type {kind}"
        raise ValueError(f"{what}: check for prompts that are numbers, lists or empty.")
    return dataset
