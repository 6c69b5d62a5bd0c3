"""Chunks of neighbouring SDE steps that share one probability ratio (GCPO, arXiv 2510.21583).

Shapes: `B` trajectories, `K` SDE steps. A partition is a list of chunk sizes in step order that sum to K.
"""

from itertools import groupby, pairwise

import torch
from torch import Tensor


LEVELS = ("step", "chunk", "trajectory")


def chunk_means(log_ratios: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Give each step the mean log-ratio of its chunk, the log of the geometric mean of ratios (eq. 15): (B, K)."""
    means = [chunk.mean(1, keepdim=True).expand_as(chunk) for chunk in log_ratios.split(sizes, 1)]
    return torch.cat(means, 1)


def step_weights(sizes: tuple[int, ...]) -> list[float]:
    """Return weights (K,) for the mean over steps that give every chunk the same weight (equation 14)."""
    return [sum(sizes) / (len(sizes) * size) for size in sizes for _ in range(size)]


def relative_change(states: Tensor) -> Tensor:
    """Return `|x_{k+1} - x_k|_1 / |x_k|_1` (equation 16), a mean over trajectories: (K,) from (B, K + 1, ...)."""
    changes = [
        (after - before).abs().flatten(1).sum(1) / before.abs().flatten(1).sum(1)
        for before, after in zip(states[:, :-1].unbind(1), states[:, 1:].unbind(1), strict=True)
    ]
    return torch.stack(changes, 1).mean(0)


def chunks_by_change(change: Tensor) -> tuple[int, ...]:
    """Cut K steps where the relative change (K,) of the latents switches between falling and rising (section 4.3).

    A chunk with more than half of the steps (and more than two) is cut again where the slope of its change changes
    sign, and so on. A chunk without such a point is halved.
    """
    return tuple(_cut(change.tolist(), longest=max(2, len(change) // 2)))


def _cut(values: list[float], longest: int) -> list[int]:
    if len(values) <= longest:
        return [len(values)]
    slopes = [after - before for before, after in pairwise(values)]
    slopes.append(slopes[-1])  # one a step
    runs = [list(run) for _, run in groupby(slopes, key=lambda slope: slope > 0)]
    if len(runs) == 1:
        middle = (len(slopes) + 1) // 2
        runs = [slopes[:middle], slopes[middle:]]
    return [size for run in runs for size in _cut(run, longest)]
