"""Surrogates of the policy gradient and their trust regions, one transition a row.

Shapes: `B` transitions, `...` the dimensions of a latent. `log_ratio` (B,) is the log of the new over the old
probability of the next state that was sampled, a mean over its dimensions, with gradient; `advantages` are (B,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .sde import Transition, kl_divergence


LOSS_TYPES = ("clip", "dppo")


@dataclass(frozen=True)
class LossRule:
    """The trust region in which an update may move a transition; `epsilon` is for the one, the threshold the other."""

    loss_type: str = "clip"
    epsilon: float | None = 1e-5
    epsilon_high: float | None = 1e-5
    kl_mask_threshold: float | None = None
    ratio_norm: bool = False  # whether the clipped ratio is GRPO-Guard's
    step_weights: list[float] | None = None  # of the surrogates of K steps; `None`: 1 each

    @property
    def needs_means(self) -> bool:
        """Whether the means of the sampled transitions are compared with the new ones."""
        return self.ratio_norm or self.loss_type == "dppo"

    def surrogate(self, log_ratio: Tensor, advantages: Tensor, step: Transition, old: Transition) -> "Surrogate":
        """Return the loss of transitions whose distribution was `old` and is `step` now."""
        if self.loss_type == "clip":
            assert self.epsilon is not None and self.epsilon_high is not None
            return clipped_surrogate(log_ratio, advantages, self.epsilon, self.epsilon_high)
        assert self.kl_mask_threshold is not None
        return masked_surrogate(log_ratio, advantages, kl_divergence(step, old).detach(), self.kl_mask_threshold)


@dataclass(frozen=True)
class Surrogate:
    """The loss of each transition and what became of its ratio, each (B,)."""

    loss: Tensor  # with gradient
    ratio: Tensor  # new over old probability
    left_out: Tensor  # bool, whether the clip or mask took the gradient away
    divergence: Tensor | None = None  # of the new from the old transition, where it is what bounds the update


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Surrogate:
    """Compute `-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)` (arXiv 1707.06347, equation 7)."""
    ratio = torch.exp(log_ratio)
    clipped_ratio = torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    too_low = (ratio < 1 - epsilon) & (advantages < 0)
    too_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return Surrogate(loss, ratio.detach(), too_low | too_high)


def masked_surrogate(log_ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float) -> Surrogate:
    """Compute `-ratio * A`, and 0 where a transition is too far and would go further (arXiv 2606.11025, equation 18).

    That is, where `divergence` (B,), the exact one of the new from the old transition, has reached the threshold, and
    the ratio is above 1 with a positive advantage or below 1 with a negative one.
    """
    masked = (log_ratio.detach().sign() * advantages > 0) & (divergence >= threshold)
    ratio = torch.exp(torch.where(masked, 0.0, log_ratio))  # an overflow that is masked has no gradient either
    loss = torch.where(masked, 0.0, -ratio * advantages)
    return Surrogate(loss, torch.exp(log_ratio.detach()), masked, divergence)


def normalized_log_ratio(step: Transition, old: Transition, next_latents: Tensor) -> Tensor:
    """Return the log-ratio of GRPO-Guard (arXiv 2510.22319, equation 8), of mean 0 at every step: (B,).

    It is `std * (log_ratio + KL)` for a Gaussian log-ratio, here as `mean((mean - mean_old) * noise)`, `noise` being
    what was drawn in the rollout: the same, without the difference of two log-probabilities and its rounding.
    """
    noise = (next_latents - old.mean) / old.std
    return ((step.mean - old.mean) * noise).flatten(1).mean(1)


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
