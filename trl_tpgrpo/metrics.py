"""Metrics between two logs: recorded as they arise, reduced over time and processes when they are logged."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


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
