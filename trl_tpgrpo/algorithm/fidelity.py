"""How faithful cheap completions are: their step rewards and turning points against those of exact ones.

Shapes: `B` trajectories, `K` SDE steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .credit import CreditRule, step_rewards, turning_points


@dataclass(frozen=True)
class Fidelity:
    """Agreement with exact completions, of each step and of all.

    Each tensor is (K + 1,): the K steps one by one, then all of them as one population. A number is NaN where there is
    nothing to compare: a correlation without spread, an F1 without turning points.

    Attributes:
        correlation: Pearson's, of the step rewards.
        sign_agreement: Share of the step rewards with the same sign, of which 0 is one.
        f1: Of the turning points, before they are balanced: twice those found by both, over the sum of those found by each.
    """

    correlation: Tensor
    sign_agreement: Tensor
    f1: Tensor

    def overall(self) -> dict[str, float]:
        """The three numbers over all steps."""
        return {name: values[-1].item() for name, values in vars(self).items()}


def compare(exact: Tensor, cheap: Tensor, every: int, rule: CreditRule) -> Fidelity:
    """Compare rewards along the same trajectories.

    Args:
        exact: (B, K + 1), of exact completions of every state.
        cheap: (B, C + 1), of cheap ones, of the states before every so-manieth step.
        every: That number.
        rule: What a turning point is; under credits that know none, the paper's consistent ones are compared.
    """
    steps = torch.arange(exact.shape[1] - 1)
    gains, cheap_gains = step_rewards(exact).double(), step_rewards(cheap).double()[:, steps // every]
    options = (rule.credit != "turning_point", rule.trend, rule.first_step, rule.deadzone)
    turning, cheap_turning = turning_points(exact, *options), turning_points(cheap, *options)[:, steps // every]
    return Fidelity(
        correlation=_each_and_all(_correlation, gains, cheap_gains),
        sign_agreement=_each_and_all(_agreement, gains.sign(), cheap_gains.sign()),
        f1=_each_and_all(_f1, turning, cheap_turning),
    )


def _each_and_all(measure: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    columns = [*zip(first.unbind(1), second.unbind(1), strict=True), (first.flatten(), second.flatten())]
    return torch.stack([measure(one, other) for one, other in columns]).float()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()


def _agreement(first: Tensor, second: Tensor) -> Tensor:
    return (first == second).double().mean()


def _f1(first: Tensor, second: Tensor) -> Tensor:
    return 2 * (first & second).sum() / (first.sum() + second.sum()).double()
