"""Rewards along a trajectory, turned into what each of its steps is credited with, and that into advantages.

Shapes: `B` trajectories (groups of G with the same prompt, one after the other), `K` SDE steps, `F` reward functions.
`rewards[:, j]` is the reward of the image reached by j SDE steps and then the ODE: column 0 is the ODE's own image,
column K the trajectory's.

The equations are TurningPoint-GRPO's (arXiv 2602.06422). `x.sign()` is 0 at 0, so a zero neither flips nor agrees.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


CREDITS = ("outcome", "incremental", "turning_point", "consistent", "lambda")
TRENDS = ("remaining", "global")
BASELINES = ("group", "completion")
SCALES = ("group", "batch", "none")
SCOPES = ("step", "joint")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")

EPSILON = 1e-4


def step_rewards(rewards: Tensor) -> Tensor:
    """What each step added, `r_j = R_{j+1} - R_j`: (B, K) from (B, K + 1)."""
    return rewards.diff(dim=1)


def aggregated_rewards(rewards: Tensor) -> Tensor:
    """What followed from each step to the end, `A_j = R_K - R_j`: (B, K) from (B, K + 1)."""
    return rewards[:, -1:] - rewards[:, :-1]


def turning_points(
    rewards: Tensor,
    consistent: bool = True,
    trend: str = "remaining",
    first_step: bool = True,
    deadzone: float = 0.0,
) -> Tensor:
    """Which steps turn their trajectory around: bool, (B, K).

    Args:
        rewards: (B, K + 1).
        consistent: Also ask that what follows the step goes its way, hence `|A_j| > |r_j|` (Definition 5.1).
        trend: What a step is held against: `"remaining"`, the gain from it to the end (the paper's text), or
            `"global"`, that of the whole trajectory (the paper's demo code).
        first_step: Whether the first step, which has none before it, may be one (Remark 5.2).
        deadzone: Step rewards up to this size count as 0.
    """
    gained, remaining = step_rewards(rewards), aggregated_rewards(rewards)
    direction = torch.where(gained.abs() <= deadzone, 0.0, gained).sign()
    held_against = remaining.sign() if trend == "remaining" else remaining[:, :1].sign().expand_as(remaining)
    along = direction * held_against
    turning = along > 0
    turning[:, 0] &= first_step
    turning[:, 1:] &= along[:, :-1] < 0
    if consistent:
        turning &= direction * (rewards[:, -1:] - rewards[:, 1:]).sign() > 0
    return turning & (remaining != 0)


def balance(turning: Tensor, aggregated: Tensor) -> Tensor:
    """Keep as many turning points of positive as of negative aggregated reward, those with the largest: bool, (B, K).

    To be called on the whole generation batch of all processes, so that the result does not depend on their number.
    """
    signed = torch.where(turning, aggregated, 0.0).flatten()
    number = min(int((signed > 0).sum()), int((signed < 0).sum()))
    kept = torch.zeros_like(signed, dtype=torch.bool)
    for one_sign in (signed, -signed):
        kept[one_sign.argsort(descending=True, stable=True)[:number]] = True
    return kept.view_as(turning)


def step_reward_variances(rewards: Tensor, num_generations: int) -> Tensor:
    """Variance of each step's reward within a prompt's group, on average: (K,) from (B, K + 1)."""
    grouped = step_rewards(rewards).unflatten(0, (-1, num_generations))
    return (grouped - grouped.nanmean(1, keepdim=True)).square().nanmean(1).nanmean(0)


def shortest_window(variances: Tensor, share: float) -> tuple[int, int]:
    """The fewest neighbouring steps [start, stop) with `share` of the sum of variances (K,); of several the earliest."""
    total = torch.cat([variances.new_zeros(1), variances.cumsum(0)])
    for length in range(1, len(variances)):
        held = total[length:] - total[:-length]
        start = int((held >= share * total[-1]).float().argmax())
        if held[start] >= share * total[-1]:
            return start, start + length
    return 0, len(variances)


@dataclass(frozen=True)
class CreditRule:
    """How rewards along a trajectory become advantages; the defaults are the paper's.

    Attributes:
        credit: `"outcome"` (the final reward on every step: Flow-GRPO), `"incremental"` (`r_j`), `"turning_point"` and
            `"consistent"` (`A_j` at turning points, `r_j` elsewhere) or `"lambda"` (the lambda-return of the `r_j`).
        lambda_: Decay of `"lambda"`: 0 is `"incremental"`, 1 is `A_j` everywhere.
        trend: See `turning_points`.
        first_step: See there.
        deadzone: See there.
        balanced: Whether to apply `balance`.
        baseline: `"group"` subtracts the group's mean, `"completion"` nothing: `R_j` already is the state's value.
        scale: Divide by the spread within the `"group"`, within the `"batch"`, or not at all (`"none"`).
        scope: Mean and spread of each `"step"` on its own, or `"joint"` over all steps.
        aggregation: Of several reward functions: `"sum_then_normalize"` or `"normalize_then_sum"` (GDPO).
    """

    credit: str = "consistent"
    lambda_: float = 0.0
    trend: str = "remaining"
    first_step: bool = True
    deadzone: float = 0.0
    balanced: bool = True
    baseline: str = "group"
    scale: str = "group"
    scope: str = "step"
    aggregation: str = "sum_then_normalize"

    def turning_points(self, rewards: Tensor) -> Tensor:
        """The steps that get their aggregated reward: bool, (B, K); none where the credit knows no turning points."""
        if self.credit not in ("turning_point", "consistent"):
            return torch.zeros_like(rewards[:, 1:], dtype=torch.bool)
        turning = turning_points(rewards, self.credit == "consistent", self.trend, self.first_step, self.deadzone)
        return balance(turning, aggregated_rewards(rewards)) if self.balanced else turning


def credit(rewards: Tensor, rule: CreditRule, num_steps: int) -> Tensor:
    """What each SDE step is credited with: (B, K).

    Args:
        rewards: (B, K + 1); for `"outcome"` the last column is enough: (B, 1).
        rule: The rule.
        num_steps: K.
    """
    if rule.credit == "outcome":
        return rewards[:, -1:].expand(-1, num_steps)
    gained = step_rewards(rewards)
    if rule.credit == "lambda":
        return lambda_return(gained, rule.lambda_)
    return torch.where(rule.turning_points(rewards), aggregated_rewards(rewards), gained)


def lambda_return(gained: Tensor, decay: float) -> Tensor:
    """`c_j = sum_l decay^l r_{j+l}`, from the last step backwards: (B, K)."""
    returns = gained.clone()
    for step in range(gained.shape[1] - 2, -1, -1):
        returns[:, step] += decay * returns[:, step + 1]
    return returns


def advantages(credits: Tensor, num_generations: int, rule: CreditRule) -> Tensor:
    """Standardise credit within the prompt's group: (B, K).

    With the group's mean as baseline the spread is the population's standard deviation; with no baseline it is the root
    mean square, as nothing is subtracted. A group without spread gets 0.

    A row that is NaN (the function does not apply) stays so and is left out of every mean. Computed in float64: the rounding
    of a mean in float32 would not be small against the 1e-4 that is added to a spread of 0.

    Args:
        credits: (B, K); rows of one prompt are adjacent.
        num_generations: G, the group's size.
        rule: Baseline, scale and scope.
    """
    grouped = credits.double().unflatten(0, (-1, num_generations))  # (B / G, G, K)
    scope = (1,) if rule.scope == "step" else (1, 2)
    centred = grouped - grouped.nanmean(scope, keepdim=True) if rule.baseline == "group" else grouped
    if rule.scale == "none":
        return centred.flatten(0, 1).to(credits.dtype)
    if rule.scale == "group":
        spread = centred.square().nanmean(scope, keepdim=True).sqrt()
    else:
        whole = grouped - grouped.nanmean((0, *scope), keepdim=True) if rule.baseline == "group" else grouped
        spread = whole.square().nanmean((0, *scope), keepdim=True).sqrt()
    return (centred / (spread + EPSILON)).flatten(0, 1).to(credits.dtype)


@dataclass(frozen=True)
class RewardTable:
    """The rewards of one generation batch of all processes, and the advantages that follow from them.

    Attributes:
        rewards_per_func: float32, (B, F, K + 1), or (B, F, 1) if only the trajectory's own image is scored; NaN where a
            function does not apply to a prompt. A trajectory that is NaN throughout is left out: of every mean and spread,
            with advantages of 0.
        reward_weights: (F,).
        num_generations: G.
        num_steps: K.
        rule: How rewards become advantages.
        every: Only the states before every so-manieth SDE step have a reward, C in all: each step gets the credit of the
            block of steps that starts there, and K + 1 reads C + 1.
    """

    rewards_per_func: Tensor
    reward_weights: Tensor
    num_generations: int
    num_steps: int
    rule: CreditRule
    every: int = 1

    @cached_property
    def rewards(self) -> Tensor:
        """Weighted sum over the functions that apply: (B, K + 1); NaN for a trajectory that is left out."""
        summed = (self.rewards_per_func * self.reward_weights[:, None]).nansum(1)
        return torch.where(self.left_out[:, None], torch.nan, summed)

    @cached_property
    def left_out(self) -> Tensor:
        """Trajectories that no function has a reward for: bool, (B,)."""
        return self.rewards_per_func.isnan().flatten(1).all(1)

    @cached_property
    def advantages(self) -> Tensor:
        """(B, K), computed at the first look."""
        if self.rule.aggregation == "sum_then_normalize":
            return self._of_steps(self._advantages(self.rewards).nan_to_num(0.0))
        each = [self._advantages(rewards) for rewards in self.rewards_per_func.unbind(1)]
        summed = (torch.stack(each, 1) * self.reward_weights[:, None]).nansum(1)
        scale = 1.0 if self.rule.scale == "none" else summed[~self.left_out].square().mean().sqrt() + EPSILON
        return self._of_steps(summed / scale)

    @cached_property
    def turning_points(self) -> Tensor:
        """Share of the functions whose credit takes the step for a turning point: (B, K), 0 or 1 for a sum of functions."""
        if self.rule.aggregation == "sum_then_normalize":
            return self._of_steps(self.rule.turning_points(self.rewards).float())
        each = [self.rule.turning_points(rewards) for rewards in self.rewards_per_func.unbind(1)]
        return self._of_steps(torch.stack(each).float().mean(0))

    @property
    def step_rewards(self) -> Tensor:
        """What each step added, or the block of steps that it is in: (B, K)."""
        return self._of_steps(step_rewards(self.rewards))

    def _advantages(self, rewards: Tensor) -> Tensor:
        num_blocks = -(-self.num_steps // self.every)
        return advantages(credit(rewards, self.rule, num_blocks), self.num_generations, self.rule)

    def _of_steps(self, of_blocks: Tensor) -> Tensor:
        return of_blocks[:, torch.arange(self.num_steps) // self.every]
