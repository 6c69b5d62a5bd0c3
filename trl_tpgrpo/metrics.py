"""Metrics between two logs: recorded as they arise, reduced over time and processes when they are logged."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from .credit import RewardTable


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.Tensor.nanmean,
    "sum": torch.Tensor.sum,
    "max": torch.Tensor.amax,
}


class Metrics:
    """Values by name, kept on their device until `flush`, so that recording waits for nothing.

    A name is reduced as it was first recorded: by `"mean"` (NaN left out), `"sum"` or `"max"`. Every process must record the
    same names.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._reductions: dict[str, str] = {}

    def record(self, name: str, value: float | Tensor, reduction: str = "mean") -> None:
        """Add a number, or each number of a tensor."""
        self._reductions.setdefault(name, reduction)
        self._values[name].append(torch.as_tensor(value, dtype=torch.float32).detach().flatten())

    @contextmanager
    def seconds(self, phase: str) -> Iterator[None]:
        """Record the wall-clock seconds of a phase as `seconds/{phase}`."""
        start = time.perf_counter()
        yield
        self.record(f"seconds/{phase}", time.perf_counter() - start, "sum")

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Everything recorded since the last flush, reduced over all processes; seconds are those of the slowest one."""
        names = sorted(self._values)
        if not names:
            return {}
        reductions = [self._reductions[name] for name in names]
        local = [
            REDUCTIONS[reduction](torch.cat([value.cpu() for value in self._values[name]]))
            for name, reduction in zip(names, reductions, strict=True)
        ]
        gathered = accelerator.gather(torch.stack(local).to(accelerator.device)[None]).cpu()  # (processes, names)
        self._values.clear()
        over_processes = ["max" if name.startswith("seconds/") else self._reductions[name] for name in names]
        return {
            name: REDUCTIONS[reduction](gathered[:, index]).item()
            for index, (name, reduction) in enumerate(zip(names, over_processes, strict=True))
        }


def rollout_metrics(table: RewardTable, names: list[str]) -> dict[str, Tensor]:
    """What a rollout's rewards look like: in all, per function along the trajectory, and as advantages.

    Args:
        table: The rewards of the generation batch.
        names: Of the F reward functions.

    Returns:
        0-dimensional tensors by name; NaN for a function that applies nowhere.
    """
    final = table.rewards[:, -1]
    groups = final.view(-1, table.num_generations)
    metrics = {
        "reward": final.mean(),
        "reward_std": final.std(correction=0),
        "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
        "advantages/std": table.advantages.std(correction=0),
        "advantages/frac_zero": (table.advantages == 0).float().mean(),
    }
    completed = table.rewards.shape[1] > 1
    for name, rewards in zip(names, table.rewards_per_func.unbind(1), strict=True):
        means = rewards.nanmean(0)  # (K + 1,)
        spreads = (rewards - means).square().nanmean(0).sqrt()
        metrics |= {f"rewards/{name}/mean": means[-1], f"rewards/{name}/std": spreads[-1]}
        states = [*range(0, table.num_steps, table.every), table.num_steps] if completed else []
        for place, state in enumerate(states):
            metrics[f"rewards/{name}/mean_of_state_{state}"] = means[place]
            metrics[f"rewards/{name}/std_of_state_{state}"] = spreads[place]
    return metrics | (_credit_metrics(table) if completed else {})


def _credit_metrics(table: RewardTable) -> dict[str, Tensor]:
    """Where along the trajectory rewards tell images apart, and where trajectories turn."""
    turning = table.turning_points
    within_group = table.step_rewards.unflatten(0, (-1, table.num_generations)).std(1, correction=0)
    metrics = {"turning_points/rate": turning.mean()}
    for step in range(table.num_steps):
        metrics[f"turning_points/step_{step}"] = turning[:, step].mean()
        metrics[f"step_reward_std/step_{step}"] = within_group[:, step].mean()
    return metrics
