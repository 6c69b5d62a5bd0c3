"""Costs of a run, counted by running the rollout on latents of one number; printed in the run's first lines."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerState

from ..algorithm.rollout import roll_out
from ..batches import scored_rule, sweeps, what_is_scored
from .terminal import show


class Counts(NamedTuple):
    """Costs of a rollout over all processes, and numbers of updates and rollouts (`None`: unknown)."""

    rollout: dict[str, list[int]]  # one number for each possible window, all equally likely; empty: unknown
    updates: float  # per rollout; below 1 if an update uses several rollouts
    num_updates: int | None
    num_rollouts: int | None
    are_bounds: bool = False  # because a window is measured, or transitions without advantage are skipped (beta=0)

    def mean(self, name: str) -> float:
        """Return a number per rollout, averaged over possible windows; 0 if absent."""
        numbers = self.rollout.get(name, [])
        return sum(numbers) / max(len(numbers), 1)

    def __str__(self) -> str:
        sampling, training = self.mean("NFE in sampling"), self.mean("NFE in training")
        nfe = (sampling + training) * (self.num_rollouts or 0)
        scored = next(name for name in self.rollout if name.endswith("scored"))
        return (
            f"rollout: {self.mean('trajectories'):,.0f} trajectories, {self.mean(scored):,.0f} {scored.split()[0]}, "
            f"{sampling:,.0f} function evaluations in sampling, {training:,.0f} in training\n"
            f"run: {self.num_updates:,} updates, {self.num_rollouts:,} rollouts, "
            f"{'at most ' * self.are_bounds}{nfe:,.0f} function evaluations"
        )


def count(args: Any, dataset_size: int | None = None, reward_funcs: Sequence[Callable] = ()) -> Counts:
    """Count the costs of a run with these settings and `dataset_size` prompts (`None`: unknown)."""
    trajectories, accumulated = args.generation_batch_size, args.gradient_accumulation_steps
    steps = trajectories // (args.per_device_train_batch_size * args.world_size)
    batches = steps * (args.num_iterations + (args.beta > 0))
    if args.recompute_old_log_probs:  # not for the first update, unless there are more iterations
        batches += max(0, steps - (accumulated if args.num_iterations == 1 else 0))
    if args.importance_sampling_level != "step" and max(args.chunk_sizes or [2]) > 1:  # ratios of chunks, later on
        batches += max(0, steps * args.num_iterations - accumulated)
    updates, total = steps * args.num_iterations / accumulated, args.max_steps if args.max_steps > 0 else None
    num_rollouts = None if total is None else math.ceil(total / updates)
    if dataset_size is not None:  # an epoch ends with an update
        rollouts = dataset_size // args.prompts_per_generation
        epoch = max(1, math.ceil(rollouts * updates))
        total = total or math.ceil(args.num_train_epochs * epoch)
        num_rollouts = total // epoch * rollouts + min(rollouts, math.ceil(total % epoch / updates))
    rule = scored_rule(args.completion_rule, reward_funcs)
    nfe, calls, scored = count_sampling(args, trajectories // args.world_size, rule)
    transitions = round(trajectories * args.num_sde_steps * (args.transition_share or 1))
    rollout = {
        "trajectories": [trajectories],
        "NFE in sampling": nfe,
        "model calls in sampling": calls if args.rollout_batch_size else [],
        what_is_scored(reward_funcs): scored,
        "transitions trained on": [transitions],
        "NFE in training": [transitions * batches // steps],
    }
    return Counts(rollout, updates, total, num_rollouts, args.beta == 0 or args.sde_window_share is not None)


def count_sampling(args: Any, num_rows: int, rule: Any) -> list[list[int]]:
    """Count NFE, model calls and images for sampling `num_rows` trajectories per process, for each window."""
    sigmas, batch_size = torch.linspace(1, 0, args.num_inference_steps + 1), args.rollout_batch_size
    sizes = [len(range(num_rows)[part]) for part in sweeps(num_rows, args)]

    def swept(size: int, start: int) -> tuple[int, int, int]:
        window, generators = args.window(start, start + args.num_sde_steps), [torch.Generator()] * size
        noise = torch.zeros(size // args.num_generations if args.share_initial_noise else size, 1)
        rollout = roll_out(lambda x, *_: torch.zeros_like(x), noise, sigmas, window, generators, rule, batch_size)
        return rollout.nfe, rollout.num_calls, len(rollout.final_latents)

    numbers = torch.tensor([[swept(size, start) for size in sizes] for start in args.window_starts])
    return (args.world_size * numbers.sum(1)).T.tolist()


class FirstLines(TrainerCallback):
    """Prints the costs of a rollout and of the run at the start of training."""

    def __init__(self, reward_funcs: list[Callable]):
        self._reward_funcs = reward_funcs

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            show(str(count(args, len(kwargs["train_dataloader"].dataset), self._reward_funcs)))
            for name in ("credit", "policy_class"):
                if "." in str(path := getattr(args, name)):
                    show(f"{name}: {path} (custom)")
