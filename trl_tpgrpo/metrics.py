"""Metrics between two logs: recorded one by one, reduced over time and processes at the log."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from .algorithm.credit import RewardTable
from .algorithm.losses import Surrogate


def _spread(values: Tensor) -> Tensor:
    return (values - values.nanmean()).square().nanmean().sqrt()


REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mean": (torch.mean, torch.mean),
    "nanmean": (torch.nanmean, torch.nanmean),
    "sum": (torch.sum, torch.sum),
    "max": (torch.amax, torch.amax),
    "std": (_spread, torch.nanmean),
    "seconds": (torch.sum, torch.amax),
    "logged": (torch.mean, torch.mean),
}
"""Reduction within a process, then over all processes that have recorded a name."""

THUMBNAIL = 32  # approximate size in pixels at which images are compared, for differences that a person sees


class Metrics:
    """Values by name and reduction. They stay on their device until `flush`, so recording does not wait.

    NaN stays NaN, except for rewards that do not apply, which `"nanmean"` and `"std"` skip. `"std"` is for values that
    all processes have. `"seconds"` are those of the slowest process. `"logged"` metrics come from reward functions.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._num_seen: dict[tuple[str, str], int] = {}

    def record(self, name: str, value: float | Tensor, reduction: str = "mean") -> None:
        """Add a number, or each number of a tensor."""
        self._values[name, reduction].append(torch.as_tensor(value, dtype=torch.float32).detach().flatten())

    @contextmanager
    def seconds(self, phase: str) -> Iterator[None]:
        """Record the wall-clock seconds of a phase as `seconds/{phase}`."""
        start = time.perf_counter()
        yield
        self.record(f"seconds/{phase}", time.perf_counter() - start, "seconds")

    def flush(self, taken: Collection[str] = ()) -> dict[str, float]:
        """Return the metrics recorded since the last flush, reduced over all processes.

        Raises:
            ValueError: If a reward function has logged a metric under a `taken` name or one of the trainer's.
        """
        values = dict(self._values)
        self.clear()
        return _reduced(values, taken)

    def clear(self) -> None:
        """Forget recorded metrics, for example those of a failed call."""
        self._values.clear()
        self._num_seen.clear()

    def latest(self) -> dict[str, float]:
        """Return the metrics recorded since the last call or flush, reduced; the next flush includes them too."""
        values = {key: recorded[self._num_seen.get(key, 0) :] for key, recorded in self._values.items()}
        self._num_seen = {key: len(recorded) for key, recorded in self._values.items()}
        return _reduced({key: recorded for key, recorded in values.items() if recorded})


def _reduced(values: dict[tuple[str, str], list[Tensor]], taken: Collection[str] = ()) -> dict[str, float]:
    local = {}
    for (name, reduction), recorded in values.items():
        within, _ = REDUCTIONS[reduction]
        local[name, reduction] = within(torch.cat([value.cpu() for value in recorded])).item()
    gathered: dict[tuple[str, str], list[float]] = defaultdict(list)  # of the processes that have recorded some
    for process in gather_object([local]):
        for key, number in process.items():
            gathered[key].append(number)
    own = {name for name, reduction in gathered if reduction != "logged"}
    for name, reduction in gathered:
        if reduction == "logged" and (name in own or name in taken):
            raise ValueError(f"log_metric: {name!r} is a metric of the trainer. Use another name.")
    return {
        name: REDUCTIONS[reduction][1](torch.tensor(numbers)).item()
        for (name, reduction), numbers in sorted(gathered.items())
    }


def record_surrogate(metrics: Metrics, surrogate: Surrogate) -> None:
    """Record how far transitions (B,) have moved, and the share without gradient because of it."""
    deviation = surrogate.ratio - 1
    metrics.record("ratio/mean", surrogate.ratio.mean())
    metrics.record("ratio/max_deviation", deviation.abs().max(), "max")
    metrics.record("ratio/frac_above_one", (0.5 * deviation.sign() + 0.5).mean())
    if surrogate.divergence is None:
        metrics.record("clip_ratio", surrogate.left_out.float().mean())
    else:
        metrics.record("mask_ratio", surrogate.left_out.float().mean())
        metrics.record("divergence/mean", surrogate.divergence.mean())
        metrics.record("divergence/max", surrogate.divergence.max(), "max")
    metrics.record("nfe_train", len(deviation), "sum")


def rollout_metrics(table: RewardTable, names: list[str]) -> dict[str, Tensor]:
    """Return 0-dimensional metrics of the rewards of a generation batch, in total and per function.

    Those with "reward" in their name are NaN where a function applies nowhere.
    """
    final, kept = table.rewards[:, -1], ~table.left_out
    groups = final.view(-1, table.num_generations)
    highest, lowest = groups.nan_to_num(-torch.inf).amax(1), groups.nan_to_num(torch.inf).amin(1)
    metrics = {
        "reward": final.nanmean(),
        "reward_std": _spread(final),
        "reward_group_std": (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nanmean(),
        "frac_reward_zero_std": (highest == lowest).float().mean(),
        "advantages/std": table.advantages[kept].std(correction=0),
        "advantages/frac_zero": (table.advantages[kept] == 0).float().mean(),
    }
    completed = table.rewards.shape[1] > 1
    states = table.states if completed else []
    for name, rewards in zip(names, table.rewards_per_func.unbind(1), strict=True):
        means = rewards.nanmean(0)  # (K + 1,)
        spreads = (rewards - means).square().nanmean(0).sqrt()
        metrics |= {f"rewards/{name}/mean": means[-1], f"rewards/{name}/std": spreads[-1]}
        for state, mean, spread in zip(states, means, spreads, strict=completed):
            metrics |= {f"rewards/{name}/mean_of_state_{state}": mean, f"rewards/{name}/std_of_state_{state}": spread}
    return metrics | (_credit_metrics(table) if completed else {})


def _credit_metrics(table: RewardTable) -> dict[str, Tensor]:
    """Return metrics of step rewards, advantages and turning points."""
    turning = table.turning_points[~table.left_out]
    grouped = table.step_rewards.unflatten(0, (-1, table.num_generations))
    within_group = (grouped - grouped.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    metrics, signs = {"turning_points/rate": turning.mean()}, table.step_rewards.sign()
    for step in range(table.num_steps):
        metrics[f"turning_points/step_{step}"] = turning[:, step].mean()
        metrics[f"step_reward_std/step_{step}"] = within_group[:, step].nanmean()
        is_positive = signs[:, step][signs[:, step].abs() == 1] > 0  # without 0 and NaN
        metrics[f"step_reward_frac_positive/step_{step}"] = is_positive.float().mean()
    return metrics


def image_variety(images: list[Image.Image], prompts: Sequence[Hashable]) -> Tensor:
    """Return the standard deviation of pixel values among the images of each of P prompts: (P,); NaN for one image."""
    pixels = torch.stack([_thumbnail(image) for image in images])
    sizes = [len(list(group)) for _, group in groupby(prompts)]
    spreads = [group.std(0, correction=0).mean() for group in pixels.split(sizes)]
    return torch.stack(spreads).where(torch.tensor(sizes) > 1, torch.nan)


def _thumbnail(image: Image.Image) -> Tensor:
    """Return float32, (H, W, 3), in [0, 1]."""
    factor = max(1, max(image.size) // THUMBNAIL)
    return torch.from_numpy(np.asarray(image.convert("RGB").reduce(factor), np.float32) / 255)
