"""The prompts of a run: their order in training, and checks of datasets."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeAlias

import PIL.Image
from datasets import Dataset, Image
from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import RepeatSampler

from .rewards.contract import RESERVED_COLUMNS, RewardFunc, check_settings, check_signature


READ_AT_ONCE = 100  # rows with images, which a selection of a dataset copies


Datasets: TypeAlias = Dataset | dict[str, Dataset] | None  # for evaluation: one, several by name, or none


class EpochSampler(RepeatSampler):
    """TRL's `RepeatSampler` with an order that depends only on the epoch, so that a resumed run has it too."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch; accelerate's own call does not reach it on several processes."""

    sampler: EpochSampler  # set by the trainer when it makes one

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = int(state.epoch + 1e-6)


def check_datasets(
    train: Dataset | None, evaluation: Datasets, reward_funcs: list[RewardFunc], eval_only: list[RewardFunc], args: Any
) -> None:
    """Raise a `TypeError` or `ValueError` for datasets or reward functions that do not fit the settings `args`.

    `eval_only` are the reward functions for evaluation only.
    """
    check_settings(reward_funcs, eval_only, args, evaluates=evaluation is not None)
    named = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, dataset in {"train_dataset": train, **named}.items():
        if dataset is not None:
            _check_dataset(name, dataset)
            for reward_func in reward_funcs if dataset is train else [*reward_funcs, *eval_only]:
                check_signature(reward_func, [column for column in _columns(dataset) if column != "prompt"])
    if evaluation is None and eval_only and train is not None:
        raise ValueError("eval_reward_funcs are for evaluation only: pass an eval_dataset too.")
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset.")
    if evaluation is None and args.eval_on_start:
        raise ValueError("eval_on_start=True needs an eval_dataset.")
    if train is not None and len(train) < (needed := args.prompts_per_generation):
        sizes = f"generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}"
        raise ValueError(f"train_dataset has {len(train)} prompts, but one rollout needs {needed} ({sizes}).")


def _columns(dataset: Dataset) -> list[str]:
    """List the columns of the rows, which `with_format` may reduce."""
    return dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]


def _check_dataset(name: str, dataset: Dataset) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}.")
    if "prompt" not in (columns := _columns(dataset)):
        raise ValueError(f"{name} needs a column 'prompt', got {columns}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    for column in set(RESERVED_COLUMNS) & set(columns):
        raise ValueError(f"{name} has a column {column!r}, a reserved argument of reward functions: rename it.")
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}: the prompt of row {row} must be a string, got {type(prompt).__name__}.")


def prompt_columns(named: dict[str, Any], takes_image: bool) -> list[str]:
    """Return the columns of a prompt; raise a `ValueError` for a dataset without input images, if needed."""
    for name, dataset in named.items() if takes_image else ():
        if isinstance(dataset, dict):
            prompt_columns(dataset, takes_image)
        elif dataset is not None:
            _check_images(name, dataset)
    return ["prompt", "image"] if takes_image else ["prompt"]


def _check_images(name: str, dataset: Dataset) -> None:
    if "image" not in (columns := _columns(dataset)):
        raise ValueError(f"{name} needs a column 'image' with input images for this editing model, got {columns}.")
    if isinstance(dataset.features.get("image"), Image):
        batches = dataset.select_columns("image").with_format("arrow").iter(READ_AT_ONCE)
        absent = (is_null.as_py() for batch in batches for is_null in batch["image"].is_null())
        for row in (row for row, is_absent in enumerate(absent) if is_absent):
            raise ValueError(f"{name}: the image of row {row} is missing.")
    if not isinstance(image := dataset[0]["image"], PIL.Image.Image):
        kind = type(image).__name__
        remedy = "dataset.cast_column('image', datasets.Image()), or a folder of images with a metadata.jsonl"
        raise ValueError(f"{name}: the column 'image' must hold images, got {kind}. For paths, use {remedy}.")


def needed_rows(
    train: Dataset | None, evaluation: Datasets, args: Any, columns: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """List the prompts that `max_steps` updates use, and those of the evaluations."""
    passes = args.steps_per_generation * args.num_iterations
    number = math.ceil(args.max_steps * args.gradient_accumulation_steps / passes) * args.prompts_per_generation
    if train is not None and 0 < number < len(train):
        options = {"batch_size": args.prompts_per_generation, "shuffle": args.shuffle_dataset, "seed": args.seed}
        train = train.select(list(islice(EpochSampler(train, mini_repeat_count=1, **options), number)))
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    of_train, of_evaluation = (
        [row for dataset in part if dataset is not None for row in dataset.select_columns(columns)]
        for part in ([train], named.values())
    )
    return of_train, of_evaluation
