"""Surrogate losses with their trust regions, one row per transition.

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
    """The trust region of an update: a clip range (`epsilon`) or a mask by KL divergence (threshold)."""

    loss_type: str = "clip"
    epsilon: float | None = 1e-5
    epsilon_high: float | None = 1e-5
    kl_mask_threshold: float | None = None
    ratio_norm: bool = False  # whether the clipped ratio is GRPO-Guard's
    step_weights: list[float] | None = None  # weights of the surrogates of K steps; `None`: 1 each

    @property
    def needs_means(self) -> bool:
        """Whether the loss needs the means of the sampled transitions."""
        return self.ratio_norm or self.loss_type == "dppo"

    def surrogate(self, log_ratio: Tensor, advantages: Tensor, step: Transition, old: Transition) -> "Surrogate":
        """Return the loss of transitions from their `old` distribution and the current one, `step`."""
        if self.loss_type == "clip":
            assert self.epsilon is not None and self.epsilon_high is not None
            return clipped_surrogate(log_ratio, advantages, self.epsilon, self.epsilon_high)
        assert self.kl_mask_threshold is not None
        return masked_surrogate(log_ratio, advantages, kl_divergence(step, old).detach(), self.kl_mask_threshold)


@dataclass(frozen=True)
class Surrogate:
    """The loss and ratio of each transition, each (B,)."""

    loss: Tensor  # with gradient
    ratio: Tensor  # new over old probability
    left_out: Tensor  # bool, whether clipping or masking removed the gradient
    divergence: Tensor | None = None  # KL divergence of the new from the old transition, if it bounds the update


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Surrogate:
    """Compute `-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)` (arXiv 1707.06347, equation 7)."""
    ratio = torch.exp(log_ratio)
    clipped_ratio = torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    too_low = (ratio < 1 - epsilon) & (advantages < 0)
    too_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return Surrogate(loss, ratio.detach(), too_low | too_high)


def masked_surrogate(log_ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float) -> Surrogate:
    """Compute `-ratio * A`, and 0 where a transition is too far and moves further (arXiv 2606.11025, equation 18).

    A transition is masked if `divergence` (B,), the exact KL of the new from the old one, has reached the threshold
    and the ratio is above 1 with a positive advantage or below 1 with a negative one.
    """
    masked = (log_ratio.detach().sign() * advantages > 0) & (divergence >= threshold)
    ratio = torch.exp(torch.where(masked, 0.0, log_ratio))  # an overflow that is masked has no gradient either
    loss = torch.where(masked, 0.0, -ratio * advantages)
    return Surrogate(loss, torch.exp(log_ratio.detach()), masked, divergence)


def normalized_log_ratio(step: Transition, old: Transition, next_latents: Tensor) -> Tensor:
    """Return the log-ratio of GRPO-Guard (arXiv 2510.22319, equation 8), of mean 0 at every step: (B,).

    It is `std * (log_ratio + KL)` for a Gaussian log-ratio. It is computed as `mean((mean - mean_old) * noise)` with
    the noise of the rollout, which is equal and avoids the rounding of a difference of two log-probabilities.
    """
    noise = (next_latents - old.mean) / old.std
    return ((step.mean - old.mean) * noise).flatten(1).mean(1)


def relative_difference(velocity: Tensor, reference: Tensor) -> Tensor:
    """Return `|v - v_ref|^2 / |v_ref|^2`, (B,), of velocities (B, ...): a distance independent of SDE and schedule."""
    distance = (velocity.float() - reference.float()).flatten(1).square().sum(1)
    return distance / reference.float().flatten(1).square().sum(1)


def first_wrong_term(terms: list[tuple[int, dict[str, Tensor], Tensor]]) -> str:
    """Name the first SDE step and term of a loss that is not finite, and the largest ratio there.

    Args:
        terms: For each step: position in the window, loss terms by name, largest probability ratio.
    """
    for position, named, ratio in terms:
        wrong = [name for name, value in named.items() if not torch.isfinite(value)]
        if wrong:
            return f"the {wrong[0]} of SDE step {position}, where the largest probability ratio is {ratio.item():.3g}"
    return "the sum of finite terms"
