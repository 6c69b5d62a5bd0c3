"""Completion rules: their names, the steps before which the model is evaluated, costs and results in a sweep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rollout import BATCH, SHAPE, Recorder, ends, integrate, noise, rolled, schedule, seeded, velocity, window

from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.algorithm.rollout import fastest_batch_size, roll_out
from trl_tpgrpo.algorithm.sde import extrapolated_steps, ode_step


RULES = ["one_step", "euler_1", "euler_4", "ab2_2", "ab2_4", "at_1_2_4_7", "exact_every_2", "ab2_3_every_4", "at_8"]


def rule(name: str) -> CompletionRule:
    return CompletionRule.parse(name)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact", CompletionRule()),
        ("one_step", CompletionRule(num_steps=1)),
        ("euler_6", CompletionRule(num_steps=6)),
        ("ab2_4", CompletionRule(num_steps=4, extrapolate=True)),
        ("at_3_1_1", CompletionRule(at=(1, 3), extrapolate=True)),
        ("exact_every_3", CompletionRule(every=3)),
        ("one_step_every_2", CompletionRule(num_steps=1, every=2)),
        ("at_1_12_every_2", CompletionRule(at=(1, 12), extrapolate=True, every=2)),
        ("exact_from_1", CompletionRule(first=1)),
        ("one_step_from_1", CompletionRule(num_steps=1, first=1)),
        ("at_1_2_from_1", CompletionRule(at=(1, 2), extrapolate=True, first=1)),
    ],
)
def test_a_name_says_the_rule(name: str, expected: CompletionRule) -> None:
    assert rule(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "heun_4",
        "euler",
        "euler_0",
        "ab2_-1",
        "at",
        "at_",
        "exact_2",
        "exact_every_0",
        "every_2",
        "Exact",
        "exact_from_0",
        "exact_from_2",
    ],
)
def test_other_names_are_refused_with_the_forms_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"completion must be 'exact', 'at_P_Q.*got '{name}'"):
        rule(name)


# Where the model is evaluated


def test_stops_of_each_kind() -> None:
    assert rule("exact").stops(7, 10) == [7, 8, 9, 10]
    assert rule("one_step").stops(7, 10) == [7, 10]
    assert rule("euler_4").stops(2, 10) == [2, 4, 6, 8, 10]
    assert rule("ab2_4").stops(7, 10) == [7, 8, 9, 10]
    assert rule("at_1_2_5").stops(0, 10) == [0, 1, 2, 5, 10]
    assert rule("at_1_2_5").stops(2, 10) == [2, 5, 10]
    assert rule("at_1_2_5").stops(6, 10) == [6, 10]
    assert rule("at_1_2_5_every_2").stops(2, 10) == [2, 5, 10]


@given(st.sampled_from(["exact", "euler", "ab2"]), st.integers(1, 12), st.integers(2, 40), st.data())
def test_stops_lead_from_the_state_to_the_end(kind: str, number: int, num_steps: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_steps - 1))
    stops = rule("exact" if kind == "exact" else f"{kind}_{number}").stops(start, num_steps)
    assert (stops[0], stops[-1]) == (start, num_steps)
    assert stops == sorted(set(stops))
    if kind != "exact":
        assert len(stops) - 1 == min(number, num_steps - start)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("exact", 55), ("one_step", 10), ("euler_4", 34), ("euler_6", 45), ("ab2_4", 34), ("at_1_2_3_4_6", 26),
     ("at_1_2_3_4_5_7", 32), ("exact_every_3", 28)],
)  # fmt: skip
def test_evaluations_of_ten_steps_with_a_window_of_nine(name: str, evaluations: int) -> None:
    result = rolled(window(0, 9), completion=rule(name))
    assert (result.nfe, result.num_calls) == (BATCH * evaluations, 10)


def test_only_completions_at_a_stop_go_through_the_model() -> None:
    model = Recorder()
    roll_out(model, noise(), schedule(6), window(0, 5), seeded(0, 1, 2), rule("at_2_4"))
    assert [len(latents) // BATCH for latents, _, _ in model.calls] == [1, 1, 1 + 2, 1, 1 + 4, 1]


# What comes out


@pytest.mark.parametrize("name", RULES)
def test_trajectories_are_those_of_exact_completions(name: str) -> None:
    exact, cheap = rolled(window(1, 8)), rolled(window(1, 8), completion=rule(name))
    assert torch.equal(cheap.states, exact.states)
    assert torch.equal(cheap.log_probs, exact.log_probs)
    assert torch.equal(ends(cheap)[:, -1], ends(exact)[:, -1])


@pytest.mark.parametrize("name", ["euler_3", "one_step", "at_1_2_4_7", "ab2_3"])
def test_completions_equal_the_rule_carried_out_one_by_one(name: str) -> None:
    sigmas, result = schedule(10), rolled(window(1, 8), completion=rule(name))
    for position in range(7):
        latents, before = result.states[:, position], None
        stops = rule(name).stops(1 + position, 10)
        for here, there in zip(stops, stops[1:], strict=False):
            predicted = velocity(latents, here, torch.arange(BATCH))
            if before is None or there == here + 1 or not rule(name).extrapolate:
                latents = ode_step(latents, predicted, sigmas[here], sigmas[there])
            else:
                latents = extrapolated_steps(latents, predicted, *before, sigmas[here : there + 1])
            before = (predicted, sigmas[here])
        assert torch.equal(ends(result)[:, position], latents)


@pytest.mark.parametrize("name", ["euler_10", "ab2_10", "at_1_2_3_4_5_6_7_8_9"])
def test_rules_that_leave_nothing_out_are_exact(name: str) -> None:
    exact, result = rolled(window(0, 9)), rolled(window(0, 9), completion=rule(name))
    assert torch.equal(ends(result), ends(exact))
    assert result.nfe == exact.nfe


def test_every_second_state_has_the_exact_image() -> None:
    exact, result = rolled(window(2, 9)), rolled(window(2, 9), completion=rule("exact_every_2"))
    assert torch.equal(ends(result), ends(exact)[:, [0, 2, 4, 6, 7]])


def test_extrapolation_is_exact_where_the_velocity_is_linear_in_sigma() -> None:
    sigmas = schedule(9)
    start = torch.randn(BATCH, *SHAPE)

    def linear(sigma: torch.Tensor) -> torch.Tensor:
        return torch.full((BATCH, *SHAPE), 2.0) - 3 * sigma

    latents = start
    for step in range(4, 9):
        latents = ode_step(latents, linear(sigmas[step]), sigmas[step], sigmas[step + 1])
    jumped = extrapolated_steps(start, linear(sigmas[4]), linear(sigmas[2]), sigmas[2], sigmas[4:])
    torch.testing.assert_close(jumped, latents)


def test_extrapolation_over_one_step_is_the_ode_step() -> None:
    sigmas, latents = schedule(9), noise()
    predicted, before = torch.randn(2, BATCH, *SHAPE)
    expected = ode_step(latents, predicted, sigmas[4], sigmas[5])
    torch.testing.assert_close(extrapolated_steps(latents, predicted, before, sigmas[3], sigmas[4:6]), expected)


def test_more_steps_come_nearer_to_the_exact_image() -> None:
    exact = ends(rolled(window(0, 1)))[:, 0]
    for kind in ("euler", "ab2"):
        errors = [
            float((ends(rolled(window(0, 1), completion=rule(f"{kind}_{number}")))[:, 0] - exact).abs().mean())
            for number in (2, 4, 8)
        ]
        assert errors == sorted(errors, reverse=True)


# Initial noise that a group shares


def shared(start: int = 0, stop: int = 9, **options: object):
    return roll_out(velocity_of_pairs, noise(2), schedule(10), window(start, stop), seeded(0, 1, 2, 3), **options)


def velocity_of_pairs(latents: torch.Tensor, step: int, rows: torch.Tensor) -> torch.Tensor:
    """Return the velocity for prompts that rows 0 and 1 have in common, and rows 2 and 3."""
    return velocity(latents, step, rows // 2)


@pytest.mark.parametrize("start", [0, 3])
def test_what_a_group_shares_is_computed_once(start: int) -> None:
    together = shared(start)
    apart = roll_out(
        velocity_of_pairs, noise(2).repeat_interleave(2, 0), schedule(10), window(start), seeded(0, 1, 2, 3)
    )
    assert torch.equal(together.states, apart.states)
    assert torch.equal(together.log_probs, apart.log_probs)
    assert torch.equal(ends(together), ends(apart))
    saved = 2 * (start + 1) + 2 * (10 - start - 1)  # steps in common, and the completion of the first state
    assert together.nfe == apart.nfe - saved
    assert len(together.final_latents) == len(apart.final_latents) - 2


def test_a_shared_image_is_named_by_all_that_share_it() -> None:
    result = shared(2, 5)
    assert result.image_of[:, 0].tolist() == [0, 0, 1, 1]
    assert result.rows[:2].tolist() == [0, 2]
    assert result.image_of[:, 1:].flatten().unique().numel() == 4 * 3
    assert torch.equal(result.rows[result.image_of[:, -1]], torch.arange(4))
    assert torch.equal(ends(result)[::2, 0], integrate(noise(2), 0, schedule(10), lambda x, s, r: velocity(x, s, r)))


def test_the_example_of_the_docstring() -> None:
    result = roll_out(velocity_of_pairs, noise(1), schedule(10), window(0, 2), seeded(0, 1))
    assert result.image_of.tolist() == [[0, 1, 3], [0, 2, 4]]
    assert result.rows.tolist() == [0, 0, 1, 0, 1]


def test_generators_that_are_no_multiple_of_the_noises_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each of 2 trajectories or a multiple.*got 3"):
        roll_out(velocity, noise(2), schedule(10), window(), seeded(0, 1, 2))


# The batch size


def test_a_size_that_was_disturbed_once_gets_a_second_chance() -> None:
    measured: list[int] = []

    def seconds(size: int) -> float:
        measured.append(size)
        disturbed = size == 8 and measured.count(8) == 1
        return size * (9.0 if disturbed else 1 + abs(size - 8))

    assert fastest_batch_size(seconds, 64) == 8


@pytest.mark.parametrize(
    ("seconds_per_sample", "largest", "best"),
    [
        (lambda size: 1 + 10 / size + size / 50, 256, 32),  # a call has its price, and so has a large batch
        (lambda size: 1.0, 256, 4),  # it does not go on where nothing is gained
        (lambda size: 1 / size, 64, 64),
        (lambda size: 1 / size, 50, 48),
        (lambda size: {1: 4, 2: 3, 3: 3.1, 4: 3.2, 6: 1}.get(size, 2), 256, 6),  # two in vain are forgiven
    ],
)
def test_the_fastest_batch_size_is_found(seconds_per_sample, largest: int, best: int) -> None:
    measured = []

    def seconds(size: int) -> float:
        measured.append(size)
        return size * seconds_per_sample(size)

    assert fastest_batch_size(seconds, largest) == best
    measured = measured[: len(measured) // 2]
    assert measured == sorted(measured) and max(measured) <= largest
    times = [seconds_per_sample(size) for size in measured]
    assert all(min(times[index - 3 : index]) < min(times[: index - 3]) for index in range(4, len(times)))
