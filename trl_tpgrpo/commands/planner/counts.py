"""How often the model is asked, in sampling and in training, and how many images are made: from the rollout itself, run on latents of
one number.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...algorithm.completion import CompletionRule
from ...algorithm.rollout import EXACT, Rollout, Window, roll_out
from ...config import TPGRPOConfig
from ...rollouts import PROBED_GROUPS, sweeps


@dataclass
class PlannedConfig(TPGRPOConfig):
    """The settings of a run that takes place on `num_processes` GPUs elsewhere, in bfloat16 if they leave it open."""

    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu  # type: ignore[has-type]
        self.use_cpu, self.tf32 = True, None  # or transformers would ask this machine for what the other one can
        super().__post_init__()

    @property
    def world_size(self) -> int:
        return self.num_processes


def changed(args: TPGRPOConfig, **changes: Any) -> TPGRPOConfig:
    """A copy with other values, which are not checked."""
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@dataclass(frozen=True)
class Spread:
    """A count that depends on where the window starts.

    Attributes:
        mean: Over the starts, which are equally likely.
        least: Over the starts.
        most: Over the starts.
    """

    mean: float
    least: int
    most: int


@dataclass(frozen=True)
class Sampling:
    """What sampling takes, over all processes; each as the trainer counts it.

    Attributes:
        evaluations: Of the model, in samples (`num_evaluations`). Classifier-free guidance counts as one.
        calls: Of the model, in batches (`num_calls`); `None` where the batch size is to be measured.
        images: Decoded, and scored by each reward function (`num_decoded_images`, `num_scored_images`).
    """

    evaluations: Spread
    calls: Spread | None
    images: Spread


@dataclass(frozen=True)
class Counts:
    """What a run takes, over all processes.

    Attributes:
        trajectories: Of a rollout.
        sampling: Of a rollout; the most that it can be where `sde_window_share` measures the window.
        transitions: SDE steps of a rollout, each trained on `num_iterations` times.
        train_evaluations: Evaluations of the model and the reference in training on a rollout (`num_train_evaluations`);
            the most that it can be with `beta=0`, where transitions without advantage are left out.
        measuring: Added once, before the first rollout, by `sde_window_share`.
        checking: Added to every `completion_check_every`-th rollout.
        updates: Of a rollout; below 1 if several rollouts make an update.
        num_updates: Of the run; `None` where the size of the dataset is not known.
        num_rollouts: Of the run; `None` where the size of the dataset is not known.
    """

    trajectories: int
    sampling: Sampling
    transitions: int
    train_evaluations: int
    measuring: Sampling | None
    checking: Sampling | None
    updates: float
    num_updates: int | None
    num_rollouts: int | None


def count(args: TPGRPOConfig, dataset_size: int | None = None) -> Counts:
    """What a run with these settings takes.

    Args:
        args: The settings.
        dataset_size: Prompts for training; `None`: not known.
    """
    rows, sizes = rows_of(args), sweep_sizes(args, rows_of(args))
    group = args.num_generations
    of_probe = min(rows, PROBED_GROUPS * group) if rows % group == 0 else rows
    whole = args.window(*args.sde_window_limits)
    num_updates, num_rollouts = _lengths(args, dataset_size)
    return Counts(
        trajectories=rows * args.world_size,
        sampling=sampling_of(args, sizes, windows_of(args), args.completion_rule),
        transitions=rows * args.world_size * len(windows_of(args)[0]),
        train_evaluations=_train_evaluations(args) * args.world_size,
        measuring=None
        if args.sde_window_share is None
        else sampling_of(args, sweep_sizes(args, of_probe), [whole], EXACT),
        checking=sampling_of(args, [min(rows, group)], windows_of(args), EXACT)
        if args.completion_check_every
        else None,
        updates=_updates(args),
        num_updates=num_updates,
        num_rollouts=num_rollouts,
    )


def rows_of(args: TPGRPOConfig) -> int:
    """The trajectories of a rollout on one process."""
    assert args.steps_per_generation
    return args.per_device_train_batch_size * args.steps_per_generation


def windows_of(args: TPGRPOConfig) -> list[Window]:
    """The windows that a rollout may have; if it is measured, the whole of which it is a part."""
    if args.sde_window_share is not None:
        return [args.window(*args.sde_window_limits)]
    return [args.window(start, start + args.num_sde_steps) for start in args.window_starts]


def sweep_sizes(args: TPGRPOConfig, num_rows: int) -> list[int]:
    """Of the trajectories of a process those that are sampled together, one number after the other."""
    return [len(range(num_rows)[part]) for part in sweeps(num_rows, args)]


def sampling_of(args: TPGRPOConfig, sizes: list[int], windows: list[Window], rule: CompletionRule | None) -> Sampling:
    """What sweeps of `sizes` trajectories on each process take, with each of `windows` as likely as the others."""
    rollouts = [{size: _counted(args, size, window, rule) for size in set(sizes)} for window in windows]

    def spread(number: Callable[[Rollout], int]) -> Spread:
        values = [args.world_size * sum(number(by_size[size]) for size in sizes) for by_size in rollouts]
        return Spread(sum(values) / len(values), min(values), max(values))

    return Sampling(
        evaluations=spread(lambda rollout: rollout.num_evaluations),
        calls=None if args.rollout_batch_size is None else spread(lambda rollout: rollout.num_calls),
        images=spread(lambda rollout: len(rollout.final_latents)),
    )


def _counted(args: TPGRPOConfig, rows: int, window: Window, rule: CompletionRule | None) -> Rollout:
    """A sweep of latents of one number."""
    return roll_out(
        lambda latents, step, which: torch.zeros_like(latents),
        torch.zeros(rows // sharing_of(args), 1),
        torch.linspace(1, 0, args.num_inference_steps + 1),
        window,
        [torch.Generator()] * rows,
        rule,
        args.rollout_batch_size,
    )


def sharing_of(args: TPGRPOConfig) -> int:
    """How many trajectories start from the same noise."""
    return args.num_generations if args.share_initial_noise else 1


def _train_evaluations(args: TPGRPOConfig) -> int:
    """Those of one process for a rollout: of the policy, of the reference once, and for log-probabilities once more."""
    assert args.steps_per_generation and args.gradient_accumulation_steps
    of_chunk = args.per_device_train_batch_size * len(windows_of(args)[0])
    chunks = args.steps_per_generation * args.num_iterations
    if args.beta > 0:
        chunks += args.steps_per_generation
    if args.recompute_old_log_probs:
        of_first_update = args.gradient_accumulation_steps if args.num_iterations == 1 else 0
        chunks += max(0, args.steps_per_generation - of_first_update)
    return of_chunk * chunks


def _updates(args: TPGRPOConfig) -> float:
    """Of a rollout."""
    assert args.steps_per_generation and args.gradient_accumulation_steps
    return args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps


def _lengths(args: TPGRPOConfig, dataset_size: int | None) -> tuple[int | None, int | None]:
    """Updates and rollouts of the run; an epoch ends with an update, whatever has been accumulated."""
    of_rollout = _updates(args)
    if dataset_size is None:
        known = args.max_steps > 0
        return (args.max_steps, math.ceil(args.max_steps / of_rollout)) if known else (None, None)
    rollouts = dataset_size // args.prompts_per_generation
    updates = max(1, math.ceil(rollouts * of_rollout))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    epochs, left = divmod(total, updates)
    return total, epochs * rollouts + min(rollouts, math.ceil(left / of_rollout))
