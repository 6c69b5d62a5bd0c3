"""Credit and advantages: parity with published code, closed forms and invariants, hand-made examples."""

import json
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trl_tpgrpo.algorithm.credit import (
    AGGREGATIONS,
    CREDITS,
    EPSILON,
    SCALES,
    TRENDS,
    CreditRule,
    RewardTable,
    aggregated_rewards,
    assign_credit,
    balance,
    compute_advantages,
    draw_transitions,
    fitted_credit,
    lambda_return,
    normalize,
    step_reward_variances,
    step_rewards,
    turning_points,
)


REFERENCE = Path(__file__).parent / "reference"
CREDIT_REFERENCE = json.loads((REFERENCE / "credit.json").read_text())
ADVANTAGE_REFERENCE = json.loads((REFERENCE / "advantages.json").read_text())
NAN = float("nan")


@st.composite
def reward_rows(draw: st.DrawFn, min_rows: int = 1, max_rows: int = 6, limit: int = 40) -> Tensor:
    """Draw rewards (B, K + 1) on a grid of eighths, on which float32 sums are exact and ties are common."""
    num_rows, num_steps = draw(st.integers(min_rows, max_rows)), draw(st.integers(1, 8))
    row = st.lists(st.integers(-limit, limit), min_size=num_steps + 1, max_size=num_steps + 1)
    return torch.tensor(draw(st.lists(row, min_size=num_rows, max_size=num_rows)), dtype=torch.float32) / 8


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def credit(rewards: Tensor, rule: CreditRule, num_steps: int) -> Tensor:
    return assign_credit(rewards, rule, num_steps)[0]


def turning(rewards: Tensor, consistent: bool = True, **options: Any) -> Tensor:
    return turning_points(rewards, CreditRule("consistent" if consistent else "turning_point", **options))


# Parity with published code


@pytest.mark.parametrize("batch", CREDIT_REFERENCE)
@pytest.mark.parametrize(
    ("variant", "rule"),
    [
        ("turning_point", CreditRule("turning_point", trend="global", balanced=False)),
        ("turning_point_no_first_step", CreditRule("turning_point", trend="global", balanced=False, first_step=False)),
        ("consistent", CreditRule("consistent", trend="global", balanced=False)),
    ],
)
def test_credit_equals_published_code(batch: str, variant: str, rule: CreditRule) -> None:
    rewards = torch.tensor(CREDIT_REFERENCE[batch]["rewards"])
    expected = torch.tensor(CREDIT_REFERENCE[batch]["step_rewards"][variant])
    torch.testing.assert_close(credit(rewards, rule, expected.shape[1]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", CREDIT_REFERENCE)
def test_credit_of_the_demo_is_expressible(batch: str) -> None:
    """Leave out steps with nothing to gain from there on, which the demo, unlike us, calls turning points."""
    rewards = torch.tensor(CREDIT_REFERENCE[batch]["rewards"])
    expected = torch.tensor(CREDIT_REFERENCE[batch]["step_rewards"]["demo_default"])
    turns = turning(rewards, consistent=False, trend="global")
    demo = aggregated_rewards(rewards)[:, :1] + torch.where(turns, step_rewards(rewards), 0.0)
    gains = aggregated_rewards(rewards) != 0
    torch.testing.assert_close(demo[gains], expected[gains], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "released"), [("group", "group_std"), ("batch", "global_std")])
def test_advantages_equal_published_code(scale: str, released: str) -> None:
    prompts = ADVANTAGE_REFERENCE["prompts"]
    sizes = {prompts.count(prompt) for prompt in prompts}
    assert len(sizes) == 1
    by_prompt = sorted(range(len(prompts)), key=prompts.__getitem__)
    credits = torch.tensor(ADVANTAGE_REFERENCE["step_rewards"])[by_prompt]
    expected = torch.tensor(ADVANTAGE_REFERENCE["advantages"][released])[by_prompt]
    computed = normalize(credits, sizes.pop(), CreditRule(scale=scale))
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)


# Step rewards, aggregated rewards, lambda-returns


@given(reward_rows())
def test_step_rewards_telescope(rewards: Tensor) -> None:
    assert torch.equal(step_rewards(rewards).sum(1), rewards[:, -1] - rewards[:, 0])
    assert torch.equal(step_rewards(rewards).sum(1), aggregated_rewards(rewards)[:, 0])


@given(reward_rows())
def test_aggregated_reward_is_what_the_steps_from_there_add(rewards: Tensor) -> None:
    from_there = step_rewards(rewards).flip(1).cumsum(1).flip(1)
    assert torch.equal(aggregated_rewards(rewards), from_there)


@given(reward_rows(), st.integers(-40, 40))
def test_a_constant_added_to_a_trajectory_changes_no_credit(rewards: Tensor, constant: int) -> None:
    moved = rewards.clone()
    moved[0] += constant / 8
    assert torch.equal(step_rewards(moved), step_rewards(rewards))
    assert torch.equal(aggregated_rewards(moved), aggregated_rewards(rewards))
    for name in set(CREDITS) - {"outcome"}:
        rule, num_steps = CreditRule(name, lambda_=0.5), rewards.shape[1] - 1
        assert torch.equal(credit(moved, rule, num_steps), credit(rewards, rule, num_steps))


@given(reward_rows())
def test_lambda_zero_is_incremental_and_lambda_one_is_aggregated(rewards: Tensor) -> None:
    num_steps = rewards.shape[1] - 1
    incremental = credit(rewards, CreditRule("incremental"), num_steps)
    assert torch.equal(incremental, step_rewards(rewards))
    assert torch.equal(credit(rewards, CreditRule("lambda", lambda_=0.0), num_steps), incremental)
    assert torch.equal(credit(rewards, CreditRule("lambda", lambda_=1.0), num_steps), aggregated_rewards(rewards))


def test_lambda_return_of_a_hand_made_example() -> None:
    rewards = rows([0.0, 1.0, 3.0, 7.0])
    assert torch.equal(lambda_return(rewards, 0.5), rows([1 + 0.5 * 4, 2 + 0.5 * 4, 4]))
    assert torch.equal(rewards, rows([0.0, 1.0, 3.0, 7.0]))


def test_outcome_gives_every_step_the_final_reward_and_needs_no_other() -> None:
    rule = CreditRule("outcome")
    expected = rows([5, 5, 5], [7, 7, 7])
    assert torch.equal(credit(rows([1, 2, 3, 5], [0, 0, 0, 7]), rule, 3), expected)
    assert torch.equal(credit(rows([5], [7]), rule, 3), expected)


@given(reward_rows(), st.sampled_from(CREDITS), st.sampled_from(TRENDS), st.booleans())
def test_negated_rewards_negate_credit(rewards: Tensor, name: str, trend: str, balanced: bool) -> None:
    rule = CreditRule(name, lambda_=0.5, trend=trend, balanced=balanced)
    num_steps = rewards.shape[1] - 1
    assert torch.equal(credit(-rewards, rule, num_steps), -credit(rewards, rule, num_steps))


# Turning points


@given(reward_rows(), st.booleans(), st.sampled_from(TRENDS), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_negated_rewards_turn_at_the_same_steps(
    rewards: Tensor, consistent: bool, trend: str, first_step: bool, deadzone: float
) -> None:
    options = {"consistent": consistent, "trend": trend, "first_step": first_step, "deadzone": deadzone}
    assert torch.equal(turning(-rewards, **options), turning(rewards, **options))


@given(reward_rows(), st.sampled_from(TRENDS))
def test_consistent_turning_points_outweigh_their_step_and_are_some_of_all(rewards: Tensor, trend: str) -> None:
    strict, every = (turning(rewards, consistent, trend=trend) for consistent in (True, False))
    assert not (strict & ~every).any()
    assert (aggregated_rewards(rewards).abs() > step_rewards(rewards).abs())[strict].all()


@given(reward_rows(), st.booleans(), st.sampled_from(TRENDS))
def test_turning_points_equal_their_definition_step_by_step(rewards: Tensor, consistent: bool, trend: str) -> None:
    found = turning(rewards, consistent, trend=trend)
    for row, points in zip(rewards.tolist(), found.tolist(), strict=True):
        assert points == [is_turning_point(row, step, consistent, trend) for step in range(len(row) - 1)]


def is_turning_point(row: list[float], step: int, consistent: bool, trend: str) -> bool:
    """Apply the definition in products of differences instead of signs."""
    last = row[-1]

    def along(index: int) -> float:
        return (row[index + 1] - row[index]) * (last - row[index if trend == "remaining" else 0])

    turned = along(step) > 0 and (step == 0 or along(step - 1) < 0)
    agrees = (row[step + 1] - row[step]) * (last - row[step + 1]) > 0
    return turned and last != row[step] and (agrees or not consistent)


def test_remaining_and_global_trend_differ_where_the_gain_to_come_has_another_sign() -> None:
    rewards = rows([0, 3, 2, 4, 1])
    assert step_rewards(rewards).tolist() == [[3, -1, 2, -3]]
    assert aggregated_rewards(rewards).tolist() == [[1, -2, -1, -3]]
    remaining = turning(rewards, consistent=False, trend="remaining")
    whole = turning(rewards, consistent=False, trend="global")
    assert remaining.tolist() == [[True, False, False, True]]
    assert whole.tolist() == [[True, False, True, False]]


def test_consistency_drops_steps_that_overshoot() -> None:
    rewards = rows([0, 3, 1, 2, 4], [0, 7, 1, 2, 6])
    overshoot = [True, False, False, False]
    assert turning(rewards, consistent=False).tolist() == [[True, False, True, False], overshoot]
    assert turning(rewards, consistent=True).tolist() == [[True, False, True, False], [False] * 4]


@pytest.mark.parametrize("trend", TRENDS)
def test_a_zero_is_neither_a_flip_nor_an_agreement(trend: str) -> None:
    flat_before = rows([0, 0, 1, 3])
    assert not turning(flat_before, consistent=False, trend=trend).any()
    flat_at_the_turn = rows([0, -1, -1, 3])
    assert turning(flat_at_the_turn, consistent=False, trend=trend).tolist() == [[False, False, False]]
    no_trend = rows([1, 0, 2, 1])
    assert not turning(no_trend, consistent=False, trend="global").any()


def test_a_step_after_which_nothing_is_gained_is_no_turning_point() -> None:
    some_left = rows([0, 3, 2, 4, 3, 1])
    assert aggregated_rewards(some_left)[0, 2] == -1
    assert turning(some_left, consistent=False, trend="global").tolist() == [[True, False, True, False, False]]
    cancelled = rows([0, 3, 2, 4, 3, 2])
    assert aggregated_rewards(cancelled)[0, 2] == 0
    assert turning(cancelled, consistent=False, trend="global").tolist() == [[True, False, False, False, False]]


def test_first_step_can_be_switched_off() -> None:
    rewards = rows([0, 3, 1, 2, 4])
    assert turning(rewards, first_step=True).tolist() == [[True, False, True, False]]
    assert turning(rewards, first_step=False).tolist() == [[False, False, True, False]]


def test_steps_in_the_deadzone_count_as_zero() -> None:
    rewards = rows([0.0, -0.25, 0.5, 1.0])
    options = {"consistent": True, "first_step": False}
    assert turning(rewards, **options).tolist() == [[False, True, False]]
    assert turning(rewards, **options, deadzone=0.125).tolist() == [[False, True, False]]
    assert turning(rewards, **options, deadzone=0.25).tolist() == [[False, False, False]]


@given(reward_rows(), st.sampled_from([0.125, 1.0, 20.0]))
def test_no_step_in_the_deadzone_turns(rewards: Tensor, deadzone: float) -> None:
    turns = turning(rewards, consistent=False, deadzone=deadzone)
    assert not turns[step_rewards(rewards).abs() <= deadzone].any()


def test_credit_replaces_only_at_turning_points() -> None:
    rewards = rows([0, 3, 1, 2, 4])
    assert credit(rewards, CreditRule("consistent", balanced=False), 4).tolist() == [[4, -2, 3, 2]]
    assert credit(rewards, CreditRule("consistent", balanced=True), 4).tolist() == [[3, -2, 1, 2]]


@pytest.mark.parametrize("name", ["outcome", "incremental", "lambda"])
def test_other_credits_know_no_turning_points(name: str) -> None:
    _, turns = assign_credit(rows([0, 3, 1, 2, 4]), CreditRule(name), 4)
    assert turns.shape == (1, 4) and not turns.any()


# Balance


@given(reward_rows(), st.data())
def test_balance_keeps_as_many_of_each_sign_and_the_largest(rewards: Tensor, data: st.DataObject) -> None:
    aggregated = aggregated_rewards(rewards)
    size = aggregated.numel()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view_as(aggregated)
    mask &= aggregated != 0
    kept = balance(mask, aggregated)
    dropped = mask & ~kept
    assert not (kept & ~mask).any()
    numbers = [int((mask & (sign * aggregated > 0)).sum()) for sign in (1, -1)]
    for sign in (1, -1):
        has_sign = sign * aggregated > 0
        assert int((kept & has_sign).sum()) == min(numbers)
        left_out, stayed = aggregated[dropped & has_sign].abs(), aggregated[kept & has_sign].abs()
        assert not len(left_out) or not len(stayed) or stayed.min() >= left_out.max()


def test_balance_of_a_hand_made_example() -> None:
    aggregated = rows([1, 5, -2, 3], [-7, 4, 2, 9])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert balance(mask, aggregated).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_balance_without_one_sign_keeps_nothing() -> None:
    assert not balance(torch.ones(2, 2, dtype=torch.bool), rows([1, 2], [3, 4])).any()


# Advantages


@given(reward_rows(min_rows=6, max_rows=6), st.permutations([0, 1, 2]), st.sampled_from(SCALES))
def test_permuting_a_group_permutes_its_advantages(rewards: Tensor, order: list[int], scale: str) -> None:
    credits, rule = step_rewards(rewards), CreditRule(scale=scale)
    shuffled = [*order, 3, 4, 5]
    expected = normalize(credits, 3, rule)[shuffled]
    torch.testing.assert_close(normalize(credits[shuffled], 3, rule), expected, rtol=1e-5, atol=1e-5)


@given(reward_rows(min_rows=8, max_rows=8))
def test_group_advantages_are_centred_and_of_unit_spread_or_all_zero(rewards: Tensor) -> None:
    credits = step_rewards(rewards)
    grouped = normalize(credits, 4, CreditRule()).unflatten(0, (2, 4))
    spread = credits.unflatten(0, (2, 4)).std(1, correction=0)
    torch.testing.assert_close(grouped.mean(1), torch.zeros_like(spread), rtol=0, atol=1e-5)
    torch.testing.assert_close(grouped.std(1, correction=0), spread / (spread + EPSILON), rtol=1e-4, atol=1e-5)
    assert (grouped.abs().amax(1)[spread == 0] == 0).all()


def test_a_group_without_spread_gets_nothing() -> None:
    credits = torch.full((4, 3), 0.1)
    for scale in SCALES:
        torch.testing.assert_close(
            normalize(credits, 4, CreditRule(scale=scale)), torch.zeros(4, 3), rtol=0, atol=1e-3
        )


def test_joint_scope_takes_mean_and_spread_over_all_steps_of_the_group() -> None:
    credits = rows([0, 2], [4, 6], [1, 1], [1, 9])
    computed = normalize(credits, 2, CreditRule(scope="joint"))
    first, second = credits[:2], credits[2:]
    expected = torch.cat([(one - one.mean()) / (one.std(correction=0) + EPSILON) for one in (first, second)])
    torch.testing.assert_close(computed, expected)
    assert not torch.allclose(computed, normalize(credits, 2, CreditRule(scope="step")))


def test_joint_scope_scaled_by_the_batch_divides_every_step_by_one_number() -> None:
    credits = rows([0, 2], [4, 6], [1, 1], [1, 9])
    computed = normalize(credits, 2, CreditRule(scope="joint", scale="batch"))
    means = torch.tensor([3.0, 3.0, 3.0, 3.0])[:, None]
    torch.testing.assert_close(computed, (credits - means) / (credits.std(correction=0) + EPSILON))


def test_without_scaling_only_the_mean_is_subtracted() -> None:
    computed = normalize(rows([1, 10], [3, 30]), 2, CreditRule(scale="none"))
    assert computed.tolist() == [[-1, -10], [1, 10]]


def test_completion_baseline_subtracts_nothing() -> None:
    credits = rows([1, 10], [3, 30])
    assert torch.equal(normalize(credits, 2, CreditRule(baseline="completion", scale="none")), credits)
    scaled = normalize(credits, 2, CreditRule(baseline="completion", scale="group"))
    torch.testing.assert_close(scaled, credits / (credits.square().mean(0).sqrt() + EPSILON))


def test_groups_of_one_are_legal_with_completion_baseline_scaled_by_the_batch() -> None:
    credits = rows([1, -2], [3, 0], [-2, 4])
    computed = normalize(credits, 1, CreditRule(baseline="completion", scale="batch"))
    torch.testing.assert_close(computed, credits / (credits.square().mean(0).sqrt() + EPSILON))
    assert torch.equal(computed.sign(), credits.sign())


def test_rows_without_reward_are_left_out_of_every_mean() -> None:
    credits = rows([1, 2], [3, 6], [NAN, NAN], [NAN, NAN])
    for scale in SCALES:
        computed = normalize(credits, 2, CreditRule(scale=scale))
        torch.testing.assert_close(computed[:2], normalize(credits[:2], 2, CreditRule(scale=scale)))
        assert computed[2:].isnan().all()


# The table of rewards


def table(rewards_per_func: Tensor, weights: list[float], num_generations: int, **rule: Any) -> RewardTable:
    num_steps = rewards_per_func.shape[2] - 1
    return RewardTable(rewards_per_func, torch.tensor(weights), num_generations, num_steps, CreditRule(**rule))


def random_rewards(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rewards_are_the_weighted_sum_of_the_functions_that_apply() -> None:
    per_func = torch.tensor([[[1.0, 2.0], [10.0, 20.0]], [[3.0, 4.0], [NAN, NAN]]])
    assert table(per_func, [1.0, 0.5], 2).rewards.tolist() == [[6, 12], [3, 4]]


def test_sum_then_normalize_is_credit_and_advantages_of_the_sum() -> None:
    per_func = random_rewards(6, 2, 5)
    made = table(per_func, [1.0, 2.0], 3)
    expected = normalize(credit(per_func[:, 0] + 2 * per_func[:, 1], made.rule, 4), 3, made.rule)
    torch.testing.assert_close(made.advantages, expected)


def test_normalize_then_sum_weighs_functions_alike_whatever_their_scale() -> None:
    per_func = random_rewards(6, 2, 5)
    options = {"aggregation": "normalize_then_sum", "credit": "incremental"}
    scaled = per_func * torch.tensor([1.0, 1000.0])[:, None]
    expected = table(per_func, [1.0, 0.5], 3, **options).advantages
    torch.testing.assert_close(table(scaled, [1.0, 0.5], 3, **options).advantages, expected, rtol=1e-3, atol=1e-3)
    summed = {**options, "aggregation": "sum_then_normalize"}
    assert not torch.allclose(
        table(scaled, [1.0, 0.5], 3, **summed).advantages,
        table(per_func, [1.0, 0.5], 3, **summed).advantages,
        atol=0.1,
    )


def test_normalize_then_sum_is_proportional_to_the_weighted_sum_of_each_functions_advantages() -> None:
    per_func = random_rewards(6, 2, 5)
    made = table(per_func, [1.0, 0.5], 3, aggregation="normalize_then_sum")
    each = [normalize(credit(one, made.rule, 4), 3, made.rule) for one in per_func.unbind(1)]
    summed = each[0] + 0.5 * each[1]
    torch.testing.assert_close(made.advantages, summed / (summed.square().mean().sqrt() + EPSILON))


@pytest.mark.parametrize("name", CREDITS)
def test_normalize_then_sum_with_a_function_that_does_not_apply_to_a_group(name: str) -> None:
    per_func = random_rewards(6, 2, 5)
    per_func[:3, 1] = NAN
    options = {"aggregation": "normalize_then_sum", "credit": name, "balanced": False}
    both = table(per_func, [1.0, 0.5], 3, **options).advantages
    assert torch.isfinite(both).all()
    alone = table(per_func[:3, :1], [1.0], 3, **options).advantages
    ratio = (both[:3] / alone).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_rows_to_which_no_function_applies_get_no_advantage(aggregation: str) -> None:
    per_func = random_rewards(4, 2, 4)
    per_func[2:] = NAN
    computed = table(per_func, [1.0, 1.0], 2, aggregation=aggregation).advantages
    assert torch.equal(computed[2:], torch.zeros(2, 3))
    assert (computed[:2] != 0).any()


def test_advantages_are_clamped_to_a_largest_size() -> None:
    rewards = torch.tensor([[[0.0, 9.0]], [[0.0, 1.0]], [[0.0, -1.0]], [[0.0, -3.0]]])
    free, clipped = (
        RewardTable(rewards, torch.ones(1), 4, 1, CreditRule("incremental", scale="none", clip=clip)).advantages[:, 0]
        for clip in (None, 4.0)
    )
    assert free.tolist() == [7.5, -0.5, -2.5, -4.5]
    assert clipped.tolist() == [4.0, -0.5, -2.5, -4.0]


def test_balance_is_of_the_whole_table_so_the_split_into_processes_does_not_matter() -> None:
    rising, falling = [0.0, -1.0, 0.0, 2.0], [0.0, 1.0, 0.0, -2.0]
    flat = [0.0, 1.0, 2.0, 3.0]
    per_func = rows(rising, flat, falling, [-reward for reward in flat])[:, None]
    options = {"first_step": False}
    whole = table(per_func, [1.0], 2, **options)
    halves = torch.cat([table(half, [1.0], 2, **options).advantages for half in per_func.split(2)])
    assert whole.turning_points.nonzero().tolist() == [[0, 1], [2, 1]]
    assert not torch.allclose(whole.advantages, halves)
    incremental = {**options, "credit": "incremental"}
    parts = torch.cat([table(half, [1.0], 2, **incremental).advantages for half in per_func.split(2)])
    assert torch.equal(table(per_func, [1.0], 2, **incremental).advantages, parts)


def test_outcome_needs_only_the_trajectorys_own_reward() -> None:
    final = random_rewards(4, 1, 1)
    made = RewardTable(final, torch.ones(1), 2, 3, CreditRule("outcome"))
    assert made.advantages.shape == (4, 3)
    assert torch.equal(made.advantages, made.advantages[:, :1].expand(-1, 3))
    assert torch.equal(made.turning_points, torch.zeros(4, 3))


def test_the_example_of_the_docstring() -> None:
    per_func = torch.tensor([[[0.0, 2.0, 3.0]], [[0.0, -2.0, 1.0]]])
    made = table(per_func, [1.0], 2, credit="incremental", scale="none")
    assert made.step_rewards.tolist() == [[2, 1], [-2, 3]]
    assert made.advantages.tolist() == [[2, -1], [-2, 1]]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_table_keeps_what_is_computed_once(aggregation: str) -> None:
    made = table(random_rewards(6, 2, 5), [1.0, 2.0], 3, aggregation=aggregation)
    assert made.advantages is made.credited.advantages and made.turning_points is made.credited.turning_points
    again = compute_advantages(made)
    assert again is not made.credited
    assert torch.equal(again.advantages, made.advantages)
    assert torch.equal(again.turning_points, made.turning_points)


def test_a_table_that_is_loaded_computes_its_advantages_whatever_was_cached_before() -> None:
    made = table(random_rewards(6, 2, 5), [1.0, 2.0], 3)
    loaded = pickle.loads(pickle.dumps(made))
    loaded.__dict__["advantages"] = torch.zeros(6, 4)  # where earlier versions kept them
    assert torch.equal(loaded.advantages, made.advantages)


def test_a_group_without_spread_gets_zero_whatever_its_reward() -> None:
    """Show float64 at work: in float32 the rounding of the mean would be 0.02 of an advantage."""
    same = normalize(torch.full((24, 2), 24.02), 24, CreditRule(credit="outcome"))
    assert same.abs().max() < 1e-9


# Trajectories that are left out


@given(st.integers(0, 2**31), st.sampled_from(AGGREGATIONS), st.sampled_from(CREDITS))
def test_a_trajectory_that_is_left_out_is_as_if_it_were_not_there(
    seed: int, aggregation: str, credit_name: str
) -> None:
    """Compare groups of three, of which one is left out, with groups of the other two."""
    rewards = torch.rand(6, 2, 4, generator=torch.Generator().manual_seed(seed))
    kept = torch.tensor([True, False, True, True, True, False])
    rule = CreditRule(credit=credit_name, lambda_=0.5, aggregation=aggregation)
    some = RewardTable(rewards.where(kept[:, None, None], torch.nan), torch.tensor([1.0, 0.5]), 3, 3, rule)
    alone = RewardTable(rewards[kept], torch.tensor([1.0, 0.5]), 2, 3, rule)
    assert some.left_out.tolist() == (~kept).tolist()
    torch.testing.assert_close(some.advantages[kept], alone.advantages)
    assert torch.equal(some.advantages[~kept], torch.zeros(2, 3))
    assert torch.equal(some.turning_points[kept], alone.turning_points)
    variances = step_reward_variances(some.rewards, 3)
    torch.testing.assert_close(variances, step_reward_variances(alone.rewards, 2))


def test_a_group_of_which_nothing_is_left_has_no_advantages() -> None:
    rewards = torch.rand(4, 1, 3)
    rewards[:2] = torch.nan
    table = RewardTable(rewards, torch.ones(1), 2, 2, CreditRule())
    assert torch.equal(table.advantages[:2], torch.zeros(2, 2))
    assert table.advantages[2:].isfinite().all()


# A baseline that is fitted


def noisy_walks(num_groups: int, group: int, num_steps: int) -> Tensor:
    """Rewards (B, K + 1) of trajectories whose values are a walk of chance, seen through noise."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, num_groups * group, num_steps + 1, generator=generator)
    return noise[0].cumsum(1) + noise[1] + torch.arange(num_groups).repeat_interleave(group)[:, None]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_fitted_baseline_has_the_slopes_of_least_squares(decay: float) -> None:
    rewards, group = noisy_walks(30, 8, 4), 8
    credits = lambda_return(rewards, decay)
    fitted = fitted_credit(credits, rewards, group)
    before = rewards[:, :-1].double().numpy()
    targets = credits.double().numpy() + before
    groups = np.kron(np.eye(30), np.ones((group, 1)))  # a mean of its own for each group
    for step in range(4):
        matrix = np.column_stack([before[:, step], groups])
        slope = np.linalg.lstsq(matrix, targets[:, step], rcond=None)[0][0]
        np.testing.assert_allclose(fitted[:, step], targets[:, step] - slope * before[:, step], atol=1e-5)
        assert 0.1 < slope < 0.9  # of noisy values less than all


def test_the_fitted_credit_is_the_td_lambda_return_less_its_share_of_the_state() -> None:
    """`(1 - l) sum_{i > j} l^{i - j - 1} R_i + ... + l^{K - 1 - j} R_K - b_j R_j`, written out for three steps."""
    rewards, decay = noisy_walks(20, 4, 3), 0.5
    first, second, third, last = rewards.unbind(1)
    returns = [(1 - decay) * (second + decay * third) + decay**2 * last, (1 - decay) * third + decay * last, last]
    fitted = fitted_credit(lambda_return(rewards, decay), rewards, 4)
    for step, (value, target) in enumerate(zip((first, second, third), returns, strict=True)):
        slopes = (target - fitted[:, step]) / value
        torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-3, atol=1e-3)


def test_without_a_completion_of_the_first_state_its_credit_is_what_follows_less_the_groups_mean() -> None:
    rewards, rule = noisy_walks(5, 4, 3), CreditRule("lambda", 0.5, baseline="fitted", scale="none")
    table = RewardTable(rewards[:, None, 1:], torch.ones(1), 4, 3, rule, first=1)
    target = 0.5 * rewards[:, 1] + 0.25 * rewards[:, 2] + 0.25 * rewards[:, 3]
    expected = target - target.view(5, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(table.advantages[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert table.states == [1, 2, 3]
    assert table.step_rewards.shape == table.advantages.shape == (20, 3)


def test_a_group_that_is_left_out_is_no_part_of_the_fit() -> None:
    rewards = noisy_walks(6, 4, 3)
    alone = fitted_credit(lambda_return(rewards, 0.5), rewards, 4)
    more = torch.cat([rewards, torch.full((4, 4), NAN)])
    torch.testing.assert_close(fitted_credit(lambda_return(more, 0.5), more, 4)[:-4], alone)


# Transitions that are drawn


def test_drawn_transitions_keep_the_mean_of_each_advantage() -> None:
    advantages = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) ** 3
    draws = torch.stack([draw_transitions(advantages, 0.4, seed) for seed in range(4000)])
    errors = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - advantages).abs() <= 4 * errors + 1e-4).all()
    assert {int((draw != 0).sum()) for draw in draws} == {19, 20}  # 0.4 of 48 is 19.2
    certain = (draws != 0).all(0)
    assert certain.any()
    torch.testing.assert_close(draws[0][certain], advantages[certain])
    sizes = draws.abs()[:, ~certain].flatten()
    sizes = sizes[sizes > 0]
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))  # drawn by size, so all weigh the same


def test_a_gradient_of_drawn_transitions_is_that_of_all_on_the_mean() -> None:
    """Of `E[x]` for `x ~ N(m, 1)`, whose gradient by `m` is 1 and whose score is `x - m`."""
    sampled = torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    advantages = sampled - sampled.mean()
    whole = (advantages * sampled).mean()
    drawn = torch.stack([(draw_transitions(advantages, 0.25, seed) * sampled).mean() for seed in range(2000)])
    assert abs(whole - 1) < 0.2
    assert abs(drawn.mean() - whole) < 4 * drawn.std() / 2000**0.5
    assert drawn.std() < 0.05


@pytest.mark.parametrize("advantages", [torch.zeros(3, 2), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]])])
def test_of_few_transitions_some_may_be_drawn(advantages: Tensor) -> None:
    draws = [draw_transitions(advantages, 0.5, seed) for seed in range(40)]
    assert all(torch.isfinite(draw).all() for draw in draws)
    assert all(int((draw != 0).sum()) <= 1 for draw in draws)
    torch.testing.assert_close(torch.stack(draws).mean(0), advantages, atol=1.0, rtol=0.0)


def test_a_table_draws_the_same_transitions_each_time_it_is_asked() -> None:
    rewards, rule = noisy_walks(5, 4, 3), CreditRule("incremental", share=0.5)
    tables = [RewardTable(rewards[:, None], torch.ones(1), 4, 3, rule, seed=seed) for seed in (7, 7, 8)]
    drawn = [table.trained_advantages for table in tables]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert int((drawn[0] != 0).sum()) == 30
    assert int((tables[0].advantages != 0).sum()) == 60


# A reward of pass or fail


@pytest.mark.parametrize("trend", TRENDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_a_pass_or_fail_reward_has_no_turning_point_that_counts(num_steps: int, trend: str) -> None:
    """For rewards of 0 and 1 no consistent turning point exists, and plain ones have `A_j = r_j`."""
    rewards = torch.tensor(list(product((0.0, 1.0), repeat=num_steps + 1)))
    assert not turning(rewards, trend="remaining").any()
    own = step_rewards(rewards)
    for name in ("turning_point", "consistent"):
        rule = CreditRule(name, trend=trend, balanced=False)
        expected = torch.where(turning(rewards, name == "consistent", trend=trend), aggregated_rewards(rewards), own)
        assert torch.equal(credit(rewards, rule, num_steps), expected)
        if trend == "remaining":
            assert torch.equal(credit(rewards, rule, num_steps), own)
