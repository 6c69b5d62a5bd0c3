"""Fidelity of cheap completions: agreement of their step rewards and turning points with exact completions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .completion import CompletionRule
from .credit import CreditRule, step_rewards, turning_points


@dataclass(frozen=True)
class Fidelity:
    """Agreement with exact completions: tensors (K + 1,), for each of K steps, then for all steps pooled.

    A value is NaN if it is undefined: a correlation without spread, an F1 without turning points.
    """

    correlation: Tensor  # Pearson's, of the step rewards
    sign_agreement: Tensor  # share of the step rewards with the same sign; 0 is a sign of its own
    f1: Tensor  # F1 of the turning points, before they are balanced

    def overall(self) -> dict[str, float]:
        """Return the three numbers over all steps."""
        return {name: values[-1].item() for name, values in vars(self).items()}


def compare(exact: Tensor, cheap: Tensor, completion: CompletionRule, rule: CreditRule) -> Fidelity:
    """Compare rewards along the same B trajectories of K SDE steps.

    Exact rewards are (B, K + 1); those of a `completion` rule with C completed latents are (B, C + 1). Steps before
    the first completed latent are left out. For credits without turning points, consistent turning points are
    compared.
    """
    exact = exact[:, completion.first :]
    block = torch.arange(exact.shape[1] - 1) // completion.every
    gains, cheap_gains = step_rewards(exact).double(), step_rewards(cheap).double()[:, block]
    turning, cheap_turning = turning_points(exact, rule), turning_points(cheap, rule)[:, block]
    same_sign = (gains.sign() == cheap_gains.sign()).double()
    return Fidelity(
        correlation=_each_and_all(_correlation, gains, cheap_gains),
        sign_agreement=torch.cat([same_sign.mean(0), same_sign.mean()[None]]).float(),
        f1=_each_and_all(_f1, turning, cheap_turning),
    )


def _each_and_all(measure: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    columns = [*zip(first.unbind(1), second.unbind(1), strict=True), (first.flatten(), second.flatten())]
    return torch.stack([measure(*pair) for pair in columns]).float()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()


def _f1(first: Tensor, second: Tensor) -> Tensor:
    return 2 * (first & second).sum() / (first.sum() + second.sum()).double()
