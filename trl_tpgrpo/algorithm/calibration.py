"""The noise of each SDE step, raised or lowered until as many step rewards are positive as negative.

This is the calibration of DenseGRPO (arXiv 2601.20218, algorithm 1). What the paper leaves open, and what is otherwise
here, is in `docs/algorithm.md`.

Shapes: `B` trajectories, `K` SDE steps.
"""

from collections.abc import Callable

from torch import Tensor

from .credit import step_rewards


TOLERANCE = 2  # samples (the paper's number), or a standard deviation where that is more


def is_balanced(rewards: Tensor) -> Tensor:
    """Say of each step whether about as many of its rewards are positive as negative: bool, (K,) from (B, K + 1).

    That is `|n+ - n-| < max(2, sqrt(n+ + n-))` for `n+` positive and `n-` negative ones; 0 and NaN are neither. The
    square root is the standard deviation of the difference where both signs are equally likely.
    """
    gained = step_rewards(rewards)
    positive, negative = (gained > 0).sum(0), (gained < 0).sum(0)
    return (positive - negative).abs() < (positive + negative).sqrt().clamp(min=TOLERANCE)


def calibrate(
    measure: Callable[[Tensor, int], Tensor], noise_levels: Tensor, step: float, highest: float, num_iterations: int
) -> Tensor:
    """Return the noise (K,) up to which the signs of each SDE step's rewards are balanced.

    An iteration raises the noise of balanced steps by `step` and lowers that of the others, from `step` to `highest`.

    Args:
        measure: Function of the noise (K,) and the iteration's number, from 0, to the rewards (B, K + 1) along
            trajectories that are sampled with it.
        noise_levels: (K,), the noise at the start.
    """
    for iteration in range(num_iterations):
        direction = 2 * is_balanced(measure(noise_levels, iteration)).to(noise_levels) - 1
        noise_levels = (noise_levels + step * direction).clamp(step, highest)
    return noise_levels
