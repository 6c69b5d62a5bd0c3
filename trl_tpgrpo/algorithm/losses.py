"""The clipped surrogate of PPO and GRPO, one transition a row, and how far a policy has moved from its reference."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """The loss of each transition and what became of its ratio, each (B,)."""

    loss: Tensor  # with gradient
    ratio: Tensor  # new over old probability
    clipped: Tensor  # bool, whether the clip took the gradient away


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float
) -> Surrogate:
    """Compute `-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)` (arXiv 1707.06347, equation 7).

    Log-probabilities under the policy that is trained and under the one that sampled, and advantages, are (B,).
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    too_low = (ratio < 1 - epsilon) & (advantages < 0)
    too_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return Surrogate(loss, ratio.detach(), too_low | too_high)


def relative_difference(velocity: Tensor, reference: Tensor) -> Tensor:
    """Return `|v - v_ref|^2 / |v_ref|^2`, (B,), of velocities (B, ...): a distance that no SDE or schedule scales."""
    distance = (velocity.float() - reference.float()).flatten(1).square().sum(1)
    return distance / reference.float().flatten(1).square().sum(1)


def first_wrong_term(terms: list[tuple[int, dict[str, Tensor], Tensor]]) -> str:
    """Name the first SDE step and term of a loss that is not finite, and the largest ratio there.

    Args:
        terms: By step its position in the window, the terms of its loss by name, and the largest probability ratio.
    """
    for position, named, ratio in terms:
        wrong = [name for name, value in named.items() if not torch.isfinite(value)]
        if wrong:
            return f"the {wrong[0]} of SDE step {position}, where the largest probability ratio is {ratio.item():.3g}"
    return "the sum of finite terms"
