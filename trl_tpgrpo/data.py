"""The prompts of a run: their order in training, and what datasets must have."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import RepeatSampler

from .rewards.contract import RESERVED_COLUMNS, RewardFunc, check_signature


class EpochSampler(RepeatSampler):
    """TRL's `RepeatSampler`, with an order that depends on the epoch alone and so survives a resume."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch; accelerate's own way does not reach through its wrappers on several processes."""

    sampler: EpochSampler | None = None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self.sampler is not None
        self.sampler.epoch = int(state.epoch + 1e-6)


def check_datasets(
    train: Dataset | None,
    evaluation: Dataset | dict | None,
    reward_funcs: list[RewardFunc],
    eval_reward_funcs: list[RewardFunc],
    args: Any,
) -> None:
    """Refuse datasets that cannot be trained or evaluated on with these reward functions.

    Args:
        train: Dataset for training, if there is one.
        evaluation: Dataset for evaluation, or several by name, if there is one.
        reward_funcs: Functions that are trained on.
        eval_reward_funcs: Functions that are called in evaluation only.
        args: Settings of the run, a `TPGRPOConfig`.

    Raises:
        TypeError: If one is no `datasets.Dataset`, or a function does not take its columns.
        ValueError: If one is missing, too small, or has the wrong columns.
    """
    named = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, dataset in {"train_dataset": train, **named}.items():
        if dataset is not None:
            _check_dataset(name, dataset)
            for reward_func in reward_funcs if dataset is train else [*reward_funcs, *eval_reward_funcs]:
                check_signature(reward_func, [column for column in dataset.column_names if column != "prompt"])
    if evaluation is None and eval_reward_funcs and train is not None:
        raise ValueError("eval_reward_funcs are called in evaluation only: pass an eval_dataset too.")
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset.")
    num_prompts = args.prompts_per_generation
    if train is not None and len(train) < num_prompts:
        raise ValueError(
            f"train_dataset has {len(train)} prompts, but one rollout takes {num_prompts} (generation_batch_size "
            f"{args.generation_batch_size} / num_generations {args.num_generations}): nothing would be trained."
        )


def _check_dataset(name: str, dataset: Dataset) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}.")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} needs a column 'prompt', got {dataset.column_names}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    for column in set(RESERVED_COLUMNS) & set(dataset.column_names):
        raise ValueError(
            f"{name} has a column {column!r}, a name that reward functions get for something else: rename it."
        )
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}: the prompt of row {row} must be a string, got {type(prompt).__name__}.")


def all_prompts(train: Dataset | None, evaluation: Dataset | dict | None) -> list[str]:
    """List the prompts of all datasets."""
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    return [prompt for dataset in (train, *named.values()) if dataset is not None for prompt in dataset["prompt"]]
