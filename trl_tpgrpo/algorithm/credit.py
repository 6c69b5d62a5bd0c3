"""Step-level credit from the rewards along a trajectory, and advantages from credit.

Shapes: `B` trajectories (groups of G with the same prompt, one after the other), `K` SDE steps, `F` reward functions.
`rewards[:, j]` is R_j, the reward of the ODE completion of latent j: column 0 is the image of the ODE alone, column K
the trajectory's own image. The equations are those of TurningPoint-GRPO (arXiv 2602.06422).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


TRENDS = ("remaining", "global")
BASELINES = ("group", "completion", "fitted")
SCALES = ("group", "batch", "none")
SCOPES = ("step", "joint")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
EPSILON = 1e-4


@dataclass(frozen=True)
class CreditBatch:
    """Input of a custom credit rule besides the rewards of N trajectories with K SDE steps; all on the CPU."""

    num_generations: int  # G: G neighbouring rows share a prompt
    prompts: list[str]  # N
    sigmas: Tensor  # float32, (K + 1,), of the latents, decreasing
    log_probs: Tensor  # float32, (N, K), of the steps at sampling time
    every: int = 1  # SDE steps between two latents with a reward, which share one credit


@dataclass(frozen=True)
class CreditRule:
    """How rewards along a trajectory become advantages; the defaults are the paper's.

    `credit` names a function in `RULES`, or the import path of a custom one.
    """

    credit: str = "consistent"
    lambda_: float = 0.0  # decay of "lambda": 0 is "incremental", 1 is A_j everywhere
    trend: str = "remaining"  # gain whose sign turning points must match: from the step on, or "global" over all steps
    first_step: bool = True  # whether the first step can be a turning point (Remark 5.2)
    deadzone: float = 0.0  # step rewards up to this size count as 0 when turning points are detected
    balanced: bool = True  # whether to apply `balance`
    baseline: str = "group"  # subtract the mean of the group, nothing ("completion"), or see `fitted_credit`
    scale: str = "group"  # standard deviation to divide by: of the "group", of the "batch", or "none"
    scope: str = "step"  # mean and standard deviation over each "step", or over all steps ("joint")
    aggregation: str = "sum_then_normalize"  # of several reward functions; or "normalize_then_sum" (GDPO)
    clip: float | None = None  # largest size of an advantage; `None`: no limit
    share: float | None = None  # share of transitions to train on, see `draw_transitions`; `None`: all
    function: Callable[[Tensor, "CreditRule"], Tensor] | None = None  # custom function; `None`: the one in `RULES`
    batch: CreditBatch | None = field(default=None, compare=False)  # if a custom rule is applied to one

    @property
    def needs_completions(self) -> bool:
        """Whether the rule needs rewards of ODE completions, not only those of the trajectories' own images."""
        return getattr(self.function or RULES.get(self.credit), "needs_completions", True)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the function out, so that a checkpoint names no code; its credit is already computed."""
        return {**vars(self), "function": None}

    def __deepcopy__(self, memo: dict) -> "CreditRule":
        """Return itself, with the function."""
        return self


def step_rewards(rewards: Tensor) -> Tensor:
    """Return the gain of each step, `r_j = R_{j+1} - R_j`: (B, K) from (B, K + 1)."""
    return rewards.diff(dim=1)


def aggregated_rewards(rewards: Tensor) -> Tensor:
    """Return the gain from each step to the end, `A_j = R_K - R_j`: (B, K) from (B, K + 1)."""
    return rewards[:, -1:] - rewards[:, :-1]


def turning_points(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Find turning points before they are balanced: bool, (B, K) from (B, K + 1).

    Unless the credit is `"turning_point"`, the condition `|A_j| > |r_j|` must hold too (Definition 5.1). The sign of 0
    is 0: a zero neither flips nor agrees.
    """
    gained, remaining = step_rewards(rewards), aggregated_rewards(rewards)
    direction = torch.where(gained.abs() <= rule.deadzone, 0.0, gained).sign()
    trend_sign = (remaining if rule.trend == "remaining" else remaining[:, :1]).sign()
    agreement = direction * trend_sign
    turning = agreement > 0
    turning[:, 0] &= rule.first_step
    turning[:, 1:] &= agreement[:, :-1] < 0
    if rule.credit != "turning_point":
        turning &= direction * (rewards[:, -1:] - rewards[:, 1:]).sign() > 0
    return turning & (remaining != 0)


def balance(turning: Tensor, aggregated: Tensor) -> Tensor:
    """Keep as many turning points of positive as of negative aggregated reward, the largest of all B: bool, (B, K)."""
    signed = torch.where(turning, aggregated, 0.0).flatten()
    number = min(int((signed > 0).sum()), int((signed < 0).sum()))
    kept = torch.zeros_like(signed, dtype=torch.bool)
    for ranked in (signed, -signed):
        kept[ranked.argsort(descending=True, stable=True)[:number]] = True
    return kept.view_as(turning)


def kept_turning_points(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Return the turning points that remain after balancing: bool, (B, K) from (B, K + 1)."""
    turning = turning_points(rewards, rule)
    return balance(turning, aggregated_rewards(rewards)) if rule.balanced else turning


def lambda_return(rewards: Tensor, decay: float) -> Tensor:
    """Return `c_j = sum_l decay^l r_{j+l}`, from the last step backwards: (B, K) from (B, K + 1)."""
    returns = step_rewards(rewards)
    for step in range(returns.shape[1] - 2, -1, -1):
        returns[:, step] += decay * returns[:, step + 1]
    return returns


def outcome(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Return the final reward, the same for all steps (Flow-GRPO): (B, 1) from (B, K + 1) or (B, 1)."""
    return rewards[:, -1:]


outcome.needs_completions = False  # type: ignore[attr-defined]


def incremental(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Return the gain of each step, `r_j`: (B, K) from (B, K + 1)."""
    return step_rewards(rewards)


def turning_point_credit(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Return `A_j` at turning points and `r_j` elsewhere: (B, K) from (B, K + 1)."""
    turning = kept_turning_points(rewards, rule)
    return torch.where(turning, aggregated_rewards(rewards), step_rewards(rewards))


def lambda_credit(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Return the lambda-return of the gains with `rule.lambda_`: (B, K) from (B, K + 1)."""
    return lambda_return(rewards, rule.lambda_)


RULES: dict[str, Callable[[Tensor, CreditRule], Tensor]] = {
    "outcome": outcome, "incremental": incremental, "turning_point": turning_point_credit,
    "consistent": turning_point_credit, "lambda": lambda_credit,
}  # fmt: skip
"""Credit (B, K) from rewards (B, K + 1) of whole groups, by name; see [`assign_credit`]."""
CREDITS = tuple(RULES)


def credited_turning_points(rewards: Tensor, rule: CreditRule, num_steps: int) -> Tensor:
    """Return the steps that a rule credits as turning points: bool, (B, K); none if the rule has no turning points."""
    if rule.function is not None or RULES[rule.credit] is not turning_point_credit:
        return torch.zeros(len(rewards), num_steps, dtype=torch.bool)
    return kept_turning_points(rewards, rule)


def assign_credit(rewards: Tensor, rule: CreditRule, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the credit of K = `num_steps` steps, and whether each is a turning point (bool): both (B, K).

    Rewards are (B, K + 1), or (B, 1) (the last column) for a rule that needs no completions. A custom rule that raises
    an error, or returns anything else, is a `ValueError`.
    """
    credits = RULES[rule.credit](rewards, rule) if rule.function is None else _from_outside(rewards, rule, num_steps)
    return credits.expand(-1, num_steps), credited_turning_points(rewards, rule, num_steps)


@torch.no_grad()
def _from_outside(rewards: Tensor, rule: CreditRule, num_steps: int) -> Tensor:
    """Return the credit of a custom rule for a copy of the rewards, with NaN where a trajectory is left out."""
    assert rule.function is not None
    what, left_out = f"The credit rule {rule.credit!r}", rewards.isnan().all(1)
    try:
        credits = rule.function(rewards.clone(), rule)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error
    shapes = [(len(rewards), num_steps)] + ([] if rule.needs_completions else [(len(rewards), 1)])
    if not isinstance(credits, Tensor) or credits.dtype != torch.float32 or credits.shape not in shapes:
        is_tensor = isinstance(credits, Tensor)
        got = f"{credits.dtype} of {tuple(credits.shape)}" if is_tensor else type(credits).__name__
        raise ValueError(f"{what} must return a float32 tensor of {' or '.join(map(str, shapes))}, got {got}.")
    credits = credits.cpu().masked_fill(left_out[:, None], torch.nan)
    wrong = (~credits.isfinite() & ~left_out[:, None]).nonzero().tolist()
    if wrong:
        row, step = wrong[0]
        where = f"{credits[row, step].item()} for trajectory {row}, step {step}, whose rewards are finite"
        hint = " Trajectories that are left out have rewards of NaN: nanmean and nansum skip them."
        raise ValueError(f"{what} returned {where}.{hint if left_out.any() else ''}")
    return credits


def fitted_credit(credits: Tensor, rewards: Tensor, num_generations: int) -> Tensor:
    """Return `c_j + (1 - b_j) R_j`, the credit with the baseline `b_j R_j` instead of `R_j`: (B, K).

    `R_j` is a noisy estimate of the value of the latent before step j: the noisier it is, the less should be
    subtracted. `b_j` is the least-squares slope of `c_j + R_j` on `R_j` over the batch, both without their group
    means; 0 if R_j has no spread. Credits are (B, K), rewards (B, K + 1). Any multiple of R_j depends on the latent
    only, so the expected gradient is unchanged.
    """
    values = rewards[:, :-1].double()
    x, y = (_centred(one, num_generations) for one in (values, credits + values))
    slopes = (x * y).nansum(0) / x.square().nansum(0).clamp(min=EPSILON**2)
    return (credits + (1 - slopes) * values).to(credits.dtype)


def _centred(values: Tensor, num_generations: int) -> Tensor:
    """Return values (B, K) without the means of their groups of `num_generations` adjacent rows."""
    grouped = values.unflatten(0, (-1, num_generations))
    return (grouped - grouped.nanmean(1, keepdim=True)).flatten(0, 1)


def normalize(credits: Tensor, num_generations: int, rule: CreditRule) -> Tensor:
    """Standardise credit (B, K) within groups of `num_generations` adjacent rows: (B, K).

    Credit is divided by the population standard deviation or, without a baseline, by the root mean square. A group
    without spread gets 0. Rows of NaN (the function does not apply) stay NaN and are left out of every mean. This is
    computed in float64, because float32 rounding of a mean is not small compared with `EPSILON`.
    """
    grouped = credits.double().unflatten(0, (-1, num_generations))  # (B / G, G, K)
    dims = (1,) if rule.scope == "step" else (1, 2)
    spread_dims = dims if rule.scale == "group" else (0, *dims)
    has_mean = rule.baseline != "completion"
    mean, spread_mean = (grouped.nanmean(over, keepdim=True) if has_mean else 0.0 for over in (dims, spread_dims))
    spread = (grouped - spread_mean).square().nanmean(spread_dims, keepdim=True).sqrt() + EPSILON
    return ((grouped - mean) / (1 if rule.scale == "none" else spread)).flatten(0, 1).to(credits.dtype)


def draw_transitions(advantages: Tensor, share: float, seed: int) -> Tensor:
    """Draw a share of the transitions by absolute advantage, and weight them by the inverse probability: (B, K).

    A transition is kept with probability `p = min(1, c |a|)` and gets `a / p`; others get 0. `c` is set so that
    `share` of those with an advantage are kept on average. The expected gradient is unchanged (Horvitz and Thompson).
    Sampling is systematic: the number kept is the expected number, rounded up or down.
    """
    sizes = advantages.abs().double().flatten()
    wanted, certain = share * int((sizes > 0).sum()), torch.zeros_like(sizes, dtype=torch.bool)
    if not wanted:
        return advantages
    factor = wanted / sizes.sum()
    while (more := (factor * sizes >= 1) & ~certain).any():
        certain |= more
        factor = (wanted - certain.sum()) / sizes[~certain].sum()
    probabilities = torch.where(certain, 1.0, factor * sizes)
    start = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ends = torch.cat([start, start + probabilities.cumsum(0)]).floor()
    weights = torch.where(ends.diff() > 0, 1 / probabilities, 0.0).view_as(advantages)
    return advantages * weights.to(advantages.dtype)


@dataclass(frozen=True)
class CreditedSteps:
    """Advantages and turning points (the share of the functions that see one) of all steps: float32, (B, K)."""

    advantages: Tensor
    turning_points: Tensor


@dataclass(frozen=True)
class RewardTable:
    """The rewards of one generation batch of all processes, and the advantages that follow from them.

    For example, two images of one prompt (F = 1, K = 2) with `rewards_per_func = [[[0, 2, 3]], [[0, -2, 1]]]` have
    `step_rewards = [[2, 1], [-2, 3]]`. `CreditRule("incremental", scale="none")` subtracts the mean of each column:
    `advantages = [[2, -1], [-2, 1]]`.

    Rewards are NaN where a function does not apply. A trajectory with NaN only is left out of means and has advantages
    of 0. With `every` = n, only the latents before every n-th SDE step have a reward, C in all. Each step then gets
    the credit of its block of n steps, and shapes with K + 1 have C + 1.
    """

    rewards_per_func: Tensor  # float32, (B, F, K + 1), or (B, F, 1) of the trajectories' own images alone
    reward_weights: Tensor  # (F,)
    num_generations: int  # G
    num_steps: int  # K
    rule: CreditRule
    every: int = 1
    first: int = 0  # 1: x_0 has no reward, C is K - 1, and the mean reward of its group is used instead
    seed: int = 0  # seed for drawing transitions, if the rule has a share

    @property
    def states(self) -> list[int]:
        """Number of SDE steps before the ODE completion of each of the C + 1 images; K for the trajectory's own."""
        completed = self.rewards_per_func.shape[2] > 1
        return [*(range(self.first, self.num_steps, self.every) if completed else ()), self.num_steps]

    @cached_property
    def rewards(self) -> Tensor:
        """Weighted sum over the functions that apply: (B, K + 1); NaN for a trajectory that is left out.

        A `ValueError` where its square would overflow float32.
        """
        summed = (self.rewards_per_func * self.reward_weights[:, None]).nansum(1)
        if not summed.square().isfinite().all():
            what = f"the weighted sum of rewards is {summed.abs().max().item():.1e} in size, whose square overflows"
            raise ValueError(f"reward_weights {self.reward_weights.tolist()}: {what}. Lower them.")
        return torch.where(self.left_out[:, None], torch.nan, summed)

    @cached_property
    def left_out(self) -> Tensor:
        """Trajectories without a reward of any function: bool, (B,)."""
        return self.rewards_per_func.isnan().flatten(1).all(1)

    @cached_property
    def credited(self) -> CreditedSteps:
        """Advantages and turning points, computed at the first access and kept."""
        return compute_advantages(self)

    @property
    def advantages(self) -> Tensor:
        return self.credited.advantages

    @property
    def turning_points(self) -> Tensor:
        return self.credited.turning_points

    @property
    def step_rewards(self) -> Tensor:
        """Gain of each step, or of the block of steps that it is in: (B, K)."""
        return self.by_step(step_rewards(self.from_the_first(self.rewards)))

    @cached_property
    def trained_advantages(self) -> Tensor:
        """Weighted advantages of the drawn transitions, 0 for the others: (B, K)."""
        share = self.rule.share
        return self.advantages if share is None else draw_transitions(self.advantages, share, self.seed)

    def from_the_first(self, rewards: Tensor) -> Tensor:
        """Return rewards (B, C + 1) with that of x_0 in front, if it is not completed: (B, C + 2)."""
        if not self.first:
            return rewards
        means = rewards[:, -1].unflatten(0, (-1, self.num_generations)).nanmean(1)
        return torch.cat([means.repeat_interleave(self.num_generations)[:, None], rewards], 1)

    def by_step(self, by_block: Tensor) -> Tensor:
        """Return values of blocks, (B, C), as values of their steps: (B, K)."""
        return by_block[:, torch.arange(self.num_steps) // self.every]


def compute_advantages(table: RewardTable) -> CreditedSteps:
    """Compute credit and advantages of a generation batch, of the functions' weighted sum or function by function."""
    rule, num_blocks = table.rule, -(-table.num_steps // table.every)
    together = rule.aggregation == "sum_then_normalize"
    per_func = [
        table.from_the_first(one) for one in ([table.rewards] if together else table.rewards_per_func.unbind(1))
    ]
    credits, turning = zip(*(assign_credit(rewards, rule, num_blocks) for rewards in per_func), strict=True)
    if rule.baseline == "fitted":
        pairs = zip(credits, per_func, strict=True)
        credits = tuple(fitted_credit(credit, rewards, table.num_generations) for credit, rewards in pairs)
    normalized = [normalize(one, table.num_generations, rule) for one in credits]
    if together:
        advantages = normalized[0].nan_to_num(0.0)
    else:
        advantages = (torch.stack(normalized, 1) * table.reward_weights[:, None]).nansum(1)
        if rule.scale != "none":
            advantages = advantages / (advantages[~table.left_out].square().mean().sqrt() + EPSILON)
    if rule.clip is not None:
        advantages = advantages.clamp(-rule.clip, rule.clip)
    return CreditedSteps(table.by_step(advantages), table.by_step(torch.stack(turning).float().mean(0)))


def step_reward_variances(rewards: Tensor, num_generations: int) -> Tensor:
    """Return the mean over groups of the variance of each step's reward within the group: (K,) from (B, K + 1)."""
    grouped = step_rewards(rewards).unflatten(0, (-1, num_generations))
    return (grouped - grouped.nanmean(1, keepdim=True)).square().nanmean(1).nanmean(0)


def shortest_window(variances: Tensor, share: float) -> tuple[int, int]:
    """Find the shortest (then earliest) window [start, stop) with `share` of the sum of variances (K,)."""
    total = torch.cat([variances.new_zeros(1), variances.cumsum(0)])
    for length in range(1, len(variances)):
        enough = total[length:] - total[:-length] >= share * total[-1]
        if enough.any():
            start = int(enough.float().argmax())
            return start, start + length
    return 0, len(variances)
