"""The noise of each SDE step, raised or lowered until as many step rewards are positive as negative.

This is the calibration of DenseGRPO (arXiv 2601.20218, algorithm 1). `docs/algorithm.md` lists what the paper leaves
open and what differs here.

Shapes: `B` trajectories, `K` SDE steps.
"""

from collections.abc import Callable

from torch import Tensor

from .credit import step_rewards


TOLERANCE = 2  # samples (the paper's number), or one standard deviation if that is larger


def is_balanced(rewards: Tensor) -> Tensor:
    """Check for each step whether positive and negative step rewards are balanced: bool, (K,) from (B, K + 1).

    The condition is `|n+ - n-| < max(2, sqrt(n+ + n-))` for `n+` positive and `n-` negative ones; 0 and NaN do not
    count. The square root is the standard deviation of the difference if both signs are equally likely.
    """
    gained = step_rewards(rewards)
    positive, negative = (gained > 0).sum(0), (gained < 0).sum(0)
    return (positive - negative).abs() < (positive + negative).sqrt().clamp(min=TOLERANCE)


def calibrate(
    measure: Callable[[Tensor, int], Tensor], noise_levels: Tensor, step: float, highest: float, num_iterations: int
) -> Tensor:
    """Return noise levels (K,) at which positive and negative rewards of each SDE step are balanced.

    Each iteration raises the noise of balanced steps by `step` and lowers that of the others, within `step` and
    `highest`.

    Args:
        measure: Function of the noise levels (K,) and the iteration (from 0) that returns the rewards (B, K + 1)
            along trajectories sampled with them.
        noise_levels: (K,), the initial noise levels.
    """
    for iteration in range(num_iterations):
        direction = 2 * is_balanced(measure(noise_levels, iteration)).to(noise_levels) - 1
        noise_levels = (noise_levels + step * direction).clamp(step, highest)
    return noise_levels
