"""Metrics between two logs: recorded as they arise, reduced over time and processes when they are logged."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from .algorithm.credit import RewardTable


def _spread(values: Tensor) -> Tensor:
    return (values - values.nanmean()).square().nanmean().sqrt()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.Tensor.nanmean,
    "sum": torch.Tensor.sum,
    "max": torch.Tensor.amax,
    "std": _spread,
}


ABSENT = {
    "mean": torch.tensor(torch.nan),
    "sum": torch.tensor(0.0),
    "max": torch.tensor(-torch.inf),
    "std": torch.tensor(torch.nan),
}
"""What a process that has recorded nothing adds."""

THUMBNAIL = 32
"""Pixels, about, of the images whose variety is measured: what a person would see as another picture."""


class Metrics:
    """Values by name, kept on their device until `flush`, so that recording waits for nothing.

    A name is reduced as it was first recorded: by `"mean"` (NaN left out), `"sum"`, `"max"` or `"std"` (of values that all processes have).
    A process that has not recorded a name that others have does not count in it.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._reductions: dict[str, str] = {}
        self._num_seen: dict[str, int] = {}

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
        values = dict(self._values)
        self._values.clear()
        self._num_seen.clear()
        return self._reduce(values, accelerator)

    def latest(self, accelerator: Accelerator) -> dict[str, float]:
        """What has been recorded since `latest` or `flush` was last called, reduced like that; it stays for the next flush."""
        values = {name: recorded[self._num_seen.get(name, 0) :] for name, recorded in self._values.items()}
        self._num_seen = {name: len(recorded) for name, recorded in self._values.items()}
        return self._reduce({name: recorded for name, recorded in values.items() if recorded}, accelerator)

    def _reduce(self, values: dict[str, list[Tensor]], accelerator: Accelerator) -> dict[str, float]:
        known: dict[str, str] = {}
        for of_process in gather_object([{name: self._reductions[name] for name in values}]):
            known |= of_process
        names, reductions = sorted(known), [known[name] for name in sorted(known)]
        if not names:
            return {}
        local = [
            REDUCTIONS[reduction](torch.cat([value.cpu() for value in values[name]]))
            if name in values
            else ABSENT[reduction]
            for name, reduction in zip(names, reductions, strict=True)
        ]
        gathered = accelerator.gather(torch.stack(local).to(accelerator.device)[None]).cpu()  # (processes, names)
        return {
            name: REDUCTIONS[_over_processes(name, reduction)](gathered[:, index]).item()
            for index, (name, reduction) in enumerate(zip(names, reductions, strict=True))
        }


def _over_processes(name: str, reduction: str) -> str:
    if name.startswith("seconds/"):
        return "max"
    return "mean" if reduction == "std" else reduction


def rollout_metrics(table: RewardTable, names: list[str]) -> dict[str, Tensor]:
    """What a rollout's rewards look like: in all, per function along the trajectory, and as advantages.

    Args:
        table: The rewards of the generation batch.
        names: Of the F reward functions.

    Returns:
        0-dimensional tensors by name; NaN for a function that applies nowhere.
    """
    final, kept = table.rewards[:, -1], ~table.left_out
    groups = final.view(-1, table.num_generations)
    highest, lowest = groups.nan_to_num(-torch.inf).amax(1), groups.nan_to_num(torch.inf).amin(1)
    metrics = {
        "reward": final.nanmean(),
        "reward_std": _spread(final),
        "frac_reward_zero_std": (highest == lowest).float().mean(),
        "advantages/std": table.advantages[kept].std(correction=0),
        "advantages/frac_zero": (table.advantages[kept] == 0).float().mean(),
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
    turning = table.turning_points[~table.left_out]
    grouped = table.step_rewards.unflatten(0, (-1, table.num_generations))
    within_group = (grouped - grouped.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    metrics = {"turning_points/rate": turning.mean()}
    for step in range(table.num_steps):
        metrics[f"turning_points/step_{step}"] = turning[:, step].mean()
        metrics[f"step_reward_std/step_{step}"] = within_group[:, step].nanmean()
    return metrics


def image_variety(images: list[Image.Image], prompts: list[str]) -> Tensor:
    """How much the images of a prompt differ: the standard deviation of a pixel's value, in [0, 0.5].

    Args:
        images: B images, all of one size; those of a prompt are neighbours. They are compared at 32 pixels or less.
        prompts: Their B prompts.

    Returns:
        (P,), of each prompt; NaN where it has one image only.
    """
    pixels = torch.stack([_thumbnail(image) for image in images])
    sizes = [len(list(group)) for _, group in groupby(prompts)]
    spreads = [
        group.std(0, correction=0).mean() if len(group) > 1 else group.new_tensor(torch.nan)
        for group in pixels.split(sizes)
    ]
    return torch.stack(spreads)


def _thumbnail(image: Image.Image) -> Tensor:
    """float32, (H, W, 3), in [0, 1]."""
    factor = max(1, max(image.size) // THUMBNAIL)
    return torch.from_numpy(np.asarray(image.convert("RGB").reduce(factor), np.float32) / 255)
