"""The clipped surrogate against its formula, one transition at a time, and its gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trl_tpgrpo.algorithm.losses import clipped_surrogate, relative_difference


LOG_RATIOS = st.one_of(st.floats(-1.0, 1.0), st.floats(-1e-4, 1e-4))
NONZERO_ADVANTAGES = st.one_of(st.floats(1e-2, 5.0), st.floats(-5.0, -1e-2))
ADVANTAGES = st.one_of(st.just(0.0), NONZERO_ADVANTAGES)
EPSILONS = st.sampled_from([1e-5, 1e-3, 0.2])
ROWS = st.lists(st.tuples(LOG_RATIOS, ADVANTAGES), min_size=1, max_size=8)
ROWS_THAT_TRAIN = st.lists(st.tuples(LOG_RATIOS, NONZERO_ADVANTAGES), min_size=1, max_size=8)


def tensors(rows: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    log_ratios, advantages = zip(*rows, strict=True)
    return torch.tensor(log_ratios, requires_grad=True), torch.tensor(advantages)


def surrogate_of_one(ratio: float, advantage: float, epsilon: float, epsilon_high: float) -> float:
    inside = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
    return -min(ratio * advantage, inside * advantage)


@given(ROWS, EPSILONS, EPSILONS)
def test_loss_equals_the_formula_element_by_element(
    rows: list[tuple[float, float]], epsilon: float, epsilon_high: float
) -> None:
    surrogate = clipped_surrogate(*tensors(rows), epsilon, epsilon_high)
    for loss, ratio, (log_ratio, advantage) in zip(surrogate.loss, surrogate.ratio, rows, strict=True):
        assert float(ratio) == pytest.approx(math.exp(log_ratio), rel=1e-6)
        expected = surrogate_of_one(float(ratio), advantage, epsilon, epsilon_high)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(ROWS_THAT_TRAIN, EPSILONS, EPSILONS)
def test_gradient_vanishes_exactly_where_clipped(
    rows: list[tuple[float, float]], epsilon: float, epsilon_high: float
) -> None:
    log_ratios, advantages = tensors(rows)
    surrogate = clipped_surrogate(log_ratios, advantages, epsilon, epsilon_high)
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), log_ratios)
    assert torch.equal(gradient == 0, surrogate.left_out)
    expected = torch.where(surrogate.left_out, 0.0, -surrogate.ratio * advantages)
    torch.testing.assert_close(gradient, expected)


def test_gradient_at_ratio_one_is_minus_the_advantage_times_that_of_the_log_probability() -> None:
    weight = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    features, advantages = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.5, -2.0, 0.0])
    log_probs = weight * features
    surrogate = clipped_surrogate(log_probs - log_probs.detach(), advantages, 1e-5, 1e-5)
    assert torch.equal(surrogate.ratio, torch.ones(3))
    assert not surrogate.left_out.any()
    surrogate.loss.sum().backward()
    torch.testing.assert_close(weight.grad, -advantages * features)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.5, 1.0, True),
        (1.5, -1.0, False),
        (0.5, 1.0, False),
        (0.5, -1.0, True),
        (1.05, 1.0, False),
        (0.95, -1.0, False),
    ],
)
def test_only_moves_that_profit_are_clipped(ratio: float, advantage: float, clipped: bool) -> None:
    surrogate = clipped_surrogate(torch.tensor([ratio]).log(), torch.tensor([advantage]), 0.1, 0.1)
    assert bool(surrogate.left_out) is clipped


def test_upper_and_lower_bound_are_separate() -> None:
    ratios, advantages = torch.tensor([1.25, 0.75]), torch.tensor([1.0, -1.0])
    surrogate = clipped_surrogate(ratios.log(), advantages, epsilon=0.1, epsilon_high=0.3)
    assert surrogate.left_out.tolist() == [False, True]
    torch.testing.assert_close(surrogate.loss, torch.tensor([-1.25, 0.9]))


def test_ratio_carries_no_gradient() -> None:
    log_probs = torch.zeros(2, requires_grad=True)
    surrogate = clipped_surrogate(log_probs, torch.ones(2), 0.2, 0.2)
    assert surrogate.loss.requires_grad
    assert not surrogate.ratio.requires_grad


def test_relative_difference_is_that_of_squares_row_by_row() -> None:
    reference = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert torch.equal(relative_difference(reference, reference), torch.zeros(2))
    torch.testing.assert_close(relative_difference(1.5 * reference, reference), torch.full((2,), 0.25))
    moved = reference + torch.tensor([[[0.0, 5.0]], [[1.0, 0.0]]])
    torch.testing.assert_close(relative_difference(moved.bfloat16(), reference.bfloat16()), torch.tensor([1.0, 0.25]))
