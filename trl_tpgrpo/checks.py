"""What the trainer refuses before it starts, with the reason."""

import copy

import torch
from datasets import Dataset
from peft import LoraConfig

from .config import TPGRPOConfig
from .rewards.contract import RESERVED_COLUMNS, RewardFunc, check_signature


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
    if peft_config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"peft_config.init_lora_weights must be True, False or 'gaussian', got {peft_config.init_lora_weights!r}: the "
            "others change the base weights, which are the reference and are not saved."
        )
    if peft_config.bias != "none" or peft_config.modules_to_save is not None:
        raise ValueError(
            "peft_config.bias must be 'none' and modules_to_save None: diffusers' adapters hold LoRA weights only, got "
            f"bias={peft_config.bias!r}, modules_to_save={peft_config.modules_to_save}."
        )
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = default_targets
    return peft_config


def check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a user's optimizer that would train nothing.

    Raises:
        ValueError: If none of its parameters is trained.
    """
    if optimizer is None:
        return
    if not any(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "optimizers: none of the optimizer's parameters is trained. The weights of an adapter exist only since "
            "peft_config was applied: choose the optimizer by args.optim."
        )


def check_sharded_optimizer(optim: str, is_fsdp_enabled: bool) -> None:
    """Refuse optimizers of bitsandbytes under FSDP, whose kernels do not know sharded tensors (bitsandbytes#1633).

    Raises:
        ValueError: If `optim` is one of them.
    """
    of_bitsandbytes = (
        any(part in optim for part in ("bnb", "8bit", "paged", "lion", "ademamix")) and "torch" not in optim
    )
    if is_fsdp_enabled and of_bitsandbytes:
        raise ValueError(f"optim={optim!r} is of bitsandbytes and fails under FSDP: use 'adamw_torch_8bit' (torchao).")


def check_datasets(
    train: Dataset | None,
    evaluation: Dataset | dict | None,
    reward_funcs: list[RewardFunc],
    eval_reward_funcs: list[RewardFunc],
    args: TPGRPOConfig,
) -> None:
    """Refuse datasets that cannot be trained or evaluated on with these reward functions.

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


def all_prompts(train: Dataset | None, evaluation: Dataset | dict | None) -> list[str]:
    """Those of all datasets."""
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    return [prompt for dataset in (train, *named.values()) if dataset is not None for prompt in dataset["prompt"]]


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
