"""What the trainer refuses before it starts, with the reason."""

import copy

from datasets import Dataset
from peft import LoraConfig

from .config import TPGRPOConfig
from .rewards.scoring import RESERVED_COLUMNS


def checked_peft_config(peft_config: LoraConfig, default_targets: list[str]) -> LoraConfig:
    """A copy of `peft_config` that trains `default_targets` if it names no modules.

    Raises:
        TypeError: If it is no LoRA.
        ValueError: If it is for another kind of model, or has dropout.
    """
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}.")
    if peft_config.task_type is not None:
        raise ValueError(
            f"peft_config.task_type is for language models; leave it None, got {peft_config.task_type!r}."
        )
    if peft_config.lora_dropout:
        raise ValueError(
            f"peft_config.lora_dropout must be 0, got {peft_config.lora_dropout}: with dropout the policy that is trained "
            "is not the one that sampled."
        )
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = default_targets
    return peft_config


def check_datasets(train: Dataset | None, evaluation: Dataset | dict | None, args: TPGRPOConfig) -> None:
    """Refuse datasets that cannot be trained or evaluated on.

    Raises:
        TypeError: If one is no `datasets.Dataset`.
        ValueError: If one is missing, too small, or has the wrong columns.
    """
    named = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, dataset in {"train_dataset": train, **named}.items():
        if dataset is not None:
            _check_dataset(name, dataset)
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
