"""The sweep over the sigmas, with a plain function instead of a model: cost, exactness and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trl_tpgrpo.algorithm.rollout import Rollout, Window, roll_out
from trl_tpgrpo.algorithm.sde import SDE_TYPES, log_prob, ode_step, transition


SHAPE = (2, 3)
BATCH = 3
WINDOWS = [(0, 9), (0, 4), (3, 7), (5, 6)]


def velocity(latents: Tensor, step: int, rows: Tensor) -> Tensor:
    """Return a nonlinear velocity that differs by step and trajectory, by exact operations, so that bits are equal."""
    offset = (rows.float() - 1).view(-1, *[1] * (latents.ndim - 1))
    return latents / (1 + latents * latents) + 0.25 * offset * latents - 0.125 * step


class Recorder:
    """`velocity` that remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, latents: Tensor, step: int, rows: Tensor) -> Tensor:
        self.calls.append((latents, step, rows))
        return velocity(latents, step, rows)


def schedule(num_steps: int) -> Tensor:
    """Return sigmas falling from 1 to 0, with a shift of 3."""
    even = torch.linspace(1, 0, num_steps + 1)
    return 3 * even / (1 + 2 * even)


def window(
    start: int = 0,
    stop: int = 9,
    sde_type: str = "flow_sde",
    noise_level: float = 0.7,
    log_prob_type: str = "gaussian",
) -> Window:
    return Window(start, stop, sde_type, noise_level, log_prob_type)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(7))


def rolled(taken: Window | None = None, num_steps: int = 10, batch: int = BATCH, **options: Any) -> Rollout:
    return roll_out(velocity, noise(batch), schedule(num_steps), taken, seeded(*range(batch)), **options)


def integrate(latents: Tensor, start: int, sigmas: Tensor, model: Callable[..., Tensor] = velocity) -> Tensor:
    """Integrate the ODE from `start` to the end, the plain way."""
    for step in range(start, len(sigmas) - 1):
        predicted = model(latents, step, torch.arange(len(latents)))
        latents = ode_step(latents, predicted, sigmas[step], sigmas[step + 1])
    return latents


def ends(rollout: Rollout) -> Tensor:
    """Return where completions and trajectories end, row by row: (B, C + 1, ...)."""
    return rollout.final_latents[rollout.image_of]


def assert_same(first: Rollout, second: Rollout) -> None:
    assert torch.equal(first.states, second.states)
    assert torch.equal(first.log_probs, second.log_probs)
    assert torch.equal(ends(first), ends(second))


# What it costs


def test_ten_steps_with_a_window_of_nine_take_55_evaluations_a_trajectory_in_10_calls() -> None:
    assert rolled(window(0, 9), batch=1).nfe == 55
    three = rolled(window(0, 9), batch=3)
    assert (three.nfe, three.num_calls) == (3 * 55, 10)


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 3), st.data())
def test_each_pair_of_state_and_sigma_is_evaluated_once(num_steps: int, batch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_steps - 2))
    stop = data.draw(st.integers(start + 1, num_steps - 1))
    model = Recorder()
    result = roll_out(model, noise(batch), schedule(num_steps), window(start, stop), seeded(*range(batch)))
    completions = sum(num_steps - step - 1 for step in range(start, stop))
    assert result.nfe == batch * (num_steps + completions)
    assert result.nfe == sum(len(latents) for latents, _, _ in model.calls)
    assert [step for _, step, _ in model.calls] == list(range(num_steps))
    assert result.num_calls == num_steps


def test_without_completions_a_trajectory_takes_one_evaluation_a_step() -> None:
    result = rolled(window(0, 9), completion=None)
    assert (result.nfe, result.num_calls) == (BATCH * 10, 10)
    assert ends(result).shape == (BATCH, 1, *SHAPE)


def test_without_window_a_trajectory_takes_one_evaluation_a_step() -> None:
    result = roll_out(velocity, noise(), schedule(6))
    assert (result.nfe, result.num_calls) == (BATCH * 6, 6)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 1000])
def test_smaller_batches_give_the_same_in_more_calls(batch_size: int) -> None:
    whole, model = rolled(window(2, 8)), Recorder()
    split = roll_out(model, noise(), schedule(10), window(2, 8), seeded(0, 1, 2), batch_size=batch_size)
    assert_same(split, whole)
    live = [BATCH * (1 + min(max(step - 2, 0), 6)) for step in range(10)]
    assert split.num_calls == len(model.calls) == sum(-(-number // batch_size) for number in live)
    assert max(len(latents) for latents, _, _ in model.calls) <= batch_size
    assert split.nfe == whole.nfe


@pytest.mark.parametrize("taken", [None, window(0, 4)])
def test_progress_is_reported_once_a_step(taken: Window | None) -> None:
    reports: list[None] = []
    rolled(taken, num_steps=7, on_step=lambda: reports.append(None))
    assert len(reports) == 7


# What comes out


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_shapes_and_dtypes(start: int, stop: int) -> None:
    length = stop - start
    result = rolled(window(start, stop))
    assert len(window(start, stop)) == length
    assert result.states.shape == ends(result).shape == (BATCH, length + 1, *SHAPE)
    assert result.log_probs.shape == (BATCH, length)
    assert {result.states.dtype, result.log_probs.dtype, result.final_latents.dtype} == {torch.float32}


def test_without_window_there_are_neither_states_nor_log_probs() -> None:
    result = roll_out(velocity, noise(), schedule(6))
    assert result.states.shape == (BATCH, 0, *SHAPE)
    assert result.log_probs.shape == (BATCH, 0)
    assert torch.equal(ends(result)[:, 0], integrate(noise(), 0, schedule(6)))


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_completions_equal_the_ode_from_each_state(sde_type: str, start: int, stop: int) -> None:
    result = rolled(window(start, stop, sde_type))
    for position in range(stop - start):
        expected = integrate(result.states[:, position], start + position, schedule(10))
        assert torch.equal(ends(result)[:, position], expected)


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_last_final_latents_are_the_trajectorys_own_end(start: int, stop: int) -> None:
    result = rolled(window(start, stop))
    assert torch.equal(ends(result)[:, -1], integrate(result.states[:, -1], stop, schedule(10)))
    alone = rolled(window(start, stop), completion=None)
    assert torch.equal(ends(alone)[:, 0], ends(result)[:, -1])
    assert torch.equal(alone.states, result.states)
    assert torch.equal(alone.log_probs, result.log_probs)


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_first_completion_is_the_pure_ode_image_of_the_same_noise(start: int, stop: int) -> None:
    result = rolled(window(start, stop))
    pure = roll_out(velocity, noise(), schedule(10))
    assert torch.equal(ends(result)[:, 0], ends(pure)[:, 0])
    assert not torch.equal(ends(result)[:, -1], ends(pure)[:, 0])


def test_a_window_that_starts_later_is_reached_by_ode_steps() -> None:
    result, sigmas = rolled(window(3, 7)), schedule(10)
    latents = noise()
    for step in range(3):
        latents = ode_step(latents, velocity(latents, step, torch.arange(BATCH)), sigmas[step], sigmas[step + 1])
    assert torch.equal(result.states[:, 0], latents)


def test_a_window_from_the_first_step_starts_at_the_noise() -> None:
    assert torch.equal(rolled(window(0, 4)).states[:, 0], noise())


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("log_prob_type", ["gaussian", "squared_error"])
def test_log_probs_are_those_of_the_stored_states(sde_type: str, log_prob_type: str) -> None:
    taken, sigmas = window(1, 8, sde_type, 0.7, log_prob_type), schedule(10)
    result = rolled(taken)
    for position in range(len(taken)):
        step, latents = taken.start + position, result.states[:, position]
        predicted = velocity(latents, step, torch.arange(BATCH))
        drawn = transition(sde_type, latents, predicted, sigmas[step], sigmas[step + 1], 0.7)
        scored = log_prob(drawn, result.states[:, position + 1], log_prob_type)
        assert torch.equal(result.log_probs[:, position], scored)


def test_noise_of_the_steps_has_unit_variance() -> None:
    taken, sigmas = window(2, 3), schedule(10)
    initial = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    result = roll_out(velocity, initial, sigmas, taken, seeded(*range(64)))
    before, after = result.states.unbind(1)
    drawn = transition("flow_sde", before, velocity(before, 2, torch.arange(64)), sigmas[2], sigmas[3], 0.7)
    standardised = (after - drawn.mean) / drawn.std
    assert float(standardised.mean()) == pytest.approx(0, abs=0.03)
    assert float(standardised.std()) == pytest.approx(1, abs=0.03)


# Whose noise and whose prompt


def test_same_seeds_give_the_same_trajectories_and_others_do_not() -> None:
    assert_same(rolled(window()), rolled(window()))
    other = roll_out(velocity, noise(), schedule(10), window(), seeded(10, 11, 12))
    assert not torch.equal(other.states[:, 1], rolled(window()).states[:, 1])
    assert torch.equal(ends(other)[:, 0], ends(rolled(window()))[:, 0])


def test_a_trajectory_does_not_depend_on_its_batch_mates() -> None:
    together = rolled(window(1, 6))
    for row in range(BATCH):

        def velocity_of_row(latents: Tensor, step: int, rows: Tensor, row: int = row) -> Tensor:
            return velocity(latents, step, rows + row)

        alone = roll_out(velocity_of_row, noise()[row : row + 1], schedule(10), window(1, 6), seeded(row))
        assert torch.equal(alone.states[0], together.states[row])
        assert torch.equal(alone.log_probs[0], together.log_probs[row])
        assert torch.equal(ends(alone)[0], ends(together)[row])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_every_completion_takes_the_prompt_of_its_trajectory(batch_size: int | None) -> None:
    model = Recorder()
    result = roll_out(model, noise(), schedule(6), window(1, 4), seeded(0, 1, 2), batch_size=batch_size)
    for step in range(6):
        calls = [(latents, rows) for latents, at, rows in model.calls if at == step]
        latents, rows = (torch.cat(values) for values in zip(*calls, strict=True))
        assert rows.tolist() == [0, 1, 2] * (len(rows) // BATCH)
        if 1 <= step < 4:
            assert torch.equal(latents[:BATCH], result.states[:, step - 1])


def test_bfloat16_predictions_round_the_ode_steps_and_leave_the_states_in_float32() -> None:
    def rounded(latents: Tensor, step: int, rows: Tensor) -> Tensor:
        return velocity(latents.bfloat16(), step, rows).bfloat16()

    result = roll_out(rounded, noise(), schedule(6), window(1, 4), seeded(0, 1, 2))
    assert torch.equal(result.final_latents, result.final_latents.bfloat16().float())
    assert torch.equal(result.states[:, 0], result.states[:, 0].bfloat16().float())
    assert not torch.equal(result.states[:, 1], result.states[:, 1].bfloat16().float())
    assert torch.equal(ends(result)[:, 0], integrate(noise(), 0, schedule(6), rounded).float())


# What is refused


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (2, 2), (3, 2), (0, 10), (9, 10), (0, 11), (12, 13)])
def test_a_window_outside_the_schedule_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"\[{start}, {stop}\).*first 9 steps of 10"):
        rolled(window(start, stop))


@pytest.mark.parametrize("noise_level", [0.0, -0.5])
def test_a_window_without_noise_is_refused(noise_level: float) -> None:
    with pytest.raises(ValueError, match=f"noise_level.*{noise_level}"):
        rolled(window(noise_level=noise_level))


def test_a_window_without_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="generators"):
        roll_out(velocity, noise(), schedule(10), window())
    with pytest.raises(ValueError, match=r"one for each of 3 trajectories.*got 1\."):
        roll_out(velocity, noise(), schedule(10), window(), [torch.Generator()])


def test_an_unknown_sde_type_is_named() -> None:
    with pytest.raises(ValueError, match="sde_type.*'euler'"):
        rolled(window(sde_type="euler"))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_prediction_that_is_not_finite_is_named_with_its_step(broken: float, at: int) -> None:
    def diverging(latents: Tensor, step: int, rows: Tensor) -> Tensor:
        predicted = velocity(latents, step, rows)
        if step == at:
            predicted[-1, 0, 0] = broken
        return predicted

    with pytest.raises(FloatingPointError, match=f"sampling step {at} is not finite"):
        roll_out(diverging, noise(), schedule(10), window(0, 4), seeded(0, 1, 2))


def test_no_gradient_is_recorded() -> None:
    weight = torch.ones(1, requires_grad=True)

    def trained(latents: Tensor, step: int, rows: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return weight * velocity(latents, step, rows)

    result = roll_out(trained, noise(), schedule(10), window(), seeded(0, 1, 2))
    assert not any(value.requires_grad for value in (result.states, result.log_probs, result.final_latents))
