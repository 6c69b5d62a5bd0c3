"""How faithful cheap completions are: their step rewards and turning points against those of exact ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .completion import CompletionRule
from .credit import CreditRule, step_rewards, turning_points


@dataclass(frozen=True)
class Fidelity:
    """Agreement with exact completions: (K + 1,) tensors, of each of K steps and then of all as one population.

    A number is NaN where there is nothing to compare: a correlation without spread, an F1 without turning points.
    """

    correlation: Tensor  # Pearson's, of the step rewards
    sign_agreement: Tensor  # share of the step rewards with the same sign, of which 0 is one
    f1: Tensor  # twice the turning points found by both over the sum of those found by each, before they are balanced

    def overall(self) -> dict[str, float]:
        """Return the three numbers over all steps."""
        return {name: values[-1].item() for name, values in vars(self).items()}


def compare(exact: Tensor, cheap: Tensor, completion: CompletionRule, rule: CreditRule) -> Fidelity:
    """Compare rewards along the same B trajectories of K SDE steps.

    With exact completions of all states they are (B, K + 1), with those of the C states of a `completion` rule (B,
    C + 1). What comes before the first of them is left out, and K is less. Under credits without turning points the
    paper's consistent ones are compared.
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
