"""The clipped surrogate of PPO and GRPO, for one transition a row, and how far a policy has moved from its reference."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """The loss of each transition and what became of its ratio.

    Attributes:
        loss: (B,), with gradient.
        ratio: (B,), new over old probability.
        clipped: (B,) bool, whether the clip took the gradient away.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float
) -> Surrogate:
    """`-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)` (arXiv 1707.06347, equation 7).

    Args:
        log_prob: (B,), under the policy that is trained.
        old_log_prob: (B,), under the policy that sampled.
        advantages: (B,).
        epsilon: How far below 1 the ratio may go.
        epsilon_high: How far above 1.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    too_low = (ratio < 1 - epsilon) & (advantages < 0)
    too_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return Surrogate(loss, ratio.detach(), too_low | too_high)


def relative_difference(velocity: Tensor, reference: Tensor) -> Tensor:
    """`|v - v_ref|^2 / |v_ref|^2`, (B,): how far a prediction has moved, whatever the sampler makes of it.

    Args:
        velocity: (B, ...).
        reference: (B, ...).
    """
    distance = (velocity.float() - reference.float()).flatten(1).square().sum(1)
    return distance / reference.float().flatten(1).square().sum(1)
