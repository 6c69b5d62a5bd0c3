"""The three SDEs: parity with published code, closed forms, and the densities against torch.distributions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl_divergence

from trl_tpgrpo.algorithm.sde import SDE_TYPES, Transition, kl_divergence, log_prob, ode_step, sample, transition


REFERENCE = json.loads((Path(__file__).parent / "reference" / "transitions.json").read_text())
CASES = [
    pytest.param(case, id=f"{name}-{case['dynamics']}-{case['noise_level']}-step{case['step']}")
    for name, schedule in REFERENCE.items()
    for case in schedule["cases"]
]
SHAPE = (3, 4, 2, 5)


def draw(seed: int = 0, number: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(number)]


def build(sde_type: str, sigma: float, sigma_next: float, noise_level: float = 0.7) -> Transition:
    latents, velocity = draw()
    return transition(sde_type, latents, velocity, torch.tensor(sigma), torch.tensor(sigma_next), noise_level)


def reference_transition(case: dict[str, Any]) -> Transition:
    sigma, sigma_next = torch.tensor(case["sigma"]), torch.tensor(case["sigma_next"])
    x, velocity = torch.tensor(case["x"]), torch.tensor(case["velocity"])
    return transition(case["dynamics"], x, velocity, sigma, sigma_next, case["noise_level"])


def test_reference_holds_every_sde_type() -> None:
    present = {case["dynamics"] for schedule in REFERENCE.values() for case in schedule["cases"]}
    assert present == set(SDE_TYPES)


@pytest.mark.parametrize("case", CASES)
def test_mean_equals_published_code(case: dict[str, Any]) -> None:
    torch.testing.assert_close(reference_transition(case).mean, torch.tensor(case["mean"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_std_equals_published_code(case: dict[str, Any]) -> None:
    released = torch.tensor(case["released_std"])
    if case["dynamics"] == "flow_sde":
        released = released * math.sqrt(case["sigma"] - case["sigma_next"])
    std = reference_transition(case).std
    torch.testing.assert_close(std.expand_as(released), released, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_log_prob_equals_published_code(case: dict[str, Any]) -> None:
    log_prob_type = "squared_error" if case["dynamics"] == "cps" else "gaussian"
    computed = log_prob(reference_transition(case), torch.tensor(case["x_next"]), log_prob_type)
    torch.testing.assert_close(computed, torch.tensor(case["released_log_prob"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ode_step_equals_scheduler_to_the_bit(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    latents, velocity = (value.to(dtype) for value in draw())
    sigmas = scheduler.sigmas
    for timestep, sigma, sigma_next in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
        expected = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        latents = ode_step(latents, velocity, sigma, sigma_next)
        assert latents.dtype == dtype
        assert torch.equal(latents, expected)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.6, 0.4), (0.1, 0.0)])
def test_without_noise_a_step_is_the_ode_step(sde_type: str, sigma: float, sigma_next: float) -> None:
    latents, velocity = draw()
    step = build(sde_type, sigma, sigma_next, noise_level=0.0)
    expected = ode_step(latents, velocity, torch.tensor(sigma), torch.tensor(sigma_next))
    torch.testing.assert_close(step.mean, expected, rtol=1e-5, atol=1e-6)
    assert step.std == 0


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_mean_approaches_the_ode_step_as_noise_vanishes(sde_type: str) -> None:
    latents, velocity = draw()
    expected = ode_step(latents, velocity, torch.tensor(0.6), torch.tensor(0.4))
    distances = [
        float((build(sde_type, 0.6, 0.4, noise_level).mean - expected).abs().max()) for noise_level in (0.4, 0.2, 0.1)
    ]
    assert distances[0] > 3 * distances[1] > 9 * distances[2] > 0


def test_last_step_under_cps_has_no_noise() -> None:
    assert build("cps", 0.1, 0.0).std == 0


@pytest.mark.parametrize("sigma_next", [0.99, 0.9, 0.5])
def test_flow_sde_is_finite_at_sigma_one_and_divides_by_the_next(sigma_next: float) -> None:
    step = build("flow_sde", 1.0, sigma_next, noise_level=0.7)
    assert torch.isfinite(step.mean).all()
    assert float(step.std) == pytest.approx(
        0.7 * math.sqrt(1 / (1 - sigma_next)) * math.sqrt(1 - sigma_next), rel=1e-5
    )


@pytest.mark.parametrize("shift", [1.18, 1.32])
def test_flow_sde_survives_a_first_sigma_that_is_rounded(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    sigma, sigma_next = scheduler.sigmas[:2].tolist()
    assert sigma == pytest.approx(1, abs=1e-6)
    exact, rounded = build("flow_sde", 1.0, sigma_next), build("flow_sde", sigma, sigma_next)
    torch.testing.assert_close(rounded.mean, exact.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rounded.std, exact.std, rtol=1e-4, atol=0)


def variance_after_step(sde_type: str, sigma: float, sigma_next: float) -> float:
    """Return the variance of a state of one data point: before the step it is N((1 - sigma) point, sigma^2)."""
    point, states = 0.3, torch.tensor([[0.0], [1.0]])
    velocity = (states - point) / sigma
    step = transition(sde_type, states, velocity, torch.tensor(sigma), torch.tensor(sigma_next), 0.7)
    slope = float(step.mean[1] - step.mean[0])  # the mean is linear in the state
    return slope**2 * sigma**2 + float(step.std) ** 2


def mean_after_step(sde_type: str, sigma: float, sigma_next: float) -> float:
    """Return the mean of that state, divided by the point."""
    state = torch.tensor([[(1 - sigma) * 0.3]])
    velocity = (state - 0.3) / sigma
    step = transition(sde_type, state, velocity, torch.tensor(sigma), torch.tensor(sigma_next), 0.7)
    return float(step.mean) / 0.3


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.8, 0.3), (0.2, 0.1)])
def test_cps_keeps_the_marginal_of_one_point_exactly(sigma: float, sigma_next: float) -> None:
    assert variance_after_step("cps", sigma, sigma_next) == pytest.approx(sigma_next**2, rel=1e-4)


@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize("sigma", [0.9, 0.5])
def test_other_sdes_keep_the_marginal_to_first_order(sde_type: str, sigma: float) -> None:
    long, short = (
        abs(variance_after_step(sde_type, sigma, sigma - step) - (sigma - step) ** 2) for step in (0.08, 0.04)
    )
    assert short < 0.02
    assert long / short == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.9, 0.8), (0.5, 0.3)])
def test_every_sde_keeps_the_mean_of_one_point(sde_type: str, sigma: float, sigma_next: float) -> None:
    assert mean_after_step(sde_type, sigma, sigma_next) == pytest.approx(1 - sigma_next, abs=1e-5)


@given(st.floats(0.01, 1.0), st.floats(0.0, 0.99), st.floats(0.0, 1.0))
def test_noise_of_cps_never_exceeds_the_next_sigma(sigma: float, fraction: float, noise_level: float) -> None:
    step = build("cps", sigma, sigma * fraction, noise_level)
    assert 0 <= step.std <= torch.tensor(sigma * fraction)
    assert torch.isfinite(step.mean).all()


def test_sample_scales_noise_by_std_around_the_mean() -> None:
    mean, noise = draw()
    step = Transition(mean, torch.tensor(0.25))
    assert torch.equal(sample(step, torch.zeros_like(noise)), mean)
    torch.testing.assert_close(sample(step, noise), mean + 0.25 * noise)


@pytest.mark.parametrize("std", [1e-3, 0.4, 3.5])
def test_gaussian_log_prob_is_the_density_averaged(std: float) -> None:
    mean, noise = draw()
    step = Transition(mean, torch.tensor(std))
    latents = sample(step, noise)
    expected = Normal(mean.double(), step.std.double()).log_prob(latents.double()).flatten(1).mean(1)
    computed = log_prob(step, latents)
    assert computed.shape == (SHAPE[0],)
    torch.testing.assert_close(computed, expected.float(), rtol=1e-4, atol=1e-5)


def test_squared_error_leaves_out_variance_and_constants() -> None:
    mean, latents = draw()
    expected = -((latents - mean) ** 2).flatten(1).mean(1)
    for std in (0.1, 2.0):
        computed = log_prob(Transition(mean, torch.tensor(std)), latents, "squared_error")
        torch.testing.assert_close(computed, expected)


@pytest.mark.parametrize("std", [0.05, 1.7])
def test_kl_divergence_is_that_of_two_gaussians_averaged(std: float) -> None:
    first, second = draw()
    deviation = torch.tensor(std)
    expected = torch_kl_divergence(Normal(first, deviation), Normal(second, deviation)).flatten(1).mean(1)
    torch.testing.assert_close(
        kl_divergence(Transition(first, deviation), Transition(second, deviation)), expected, rtol=1e-4, atol=1e-5
    )


def test_kl_divergence_from_itself_is_zero() -> None:
    step = build("flow_sde", 0.6, 0.4)
    assert torch.equal(kl_divergence(step, step), torch.zeros(SHAPE[0]))


def test_kl_divergence_passes_gradient_through_the_mean() -> None:
    first, second = draw()
    first.requires_grad_()
    kl_divergence(Transition(first, torch.tensor(0.5)), Transition(second, torch.tensor(0.5))).sum().backward()
    torch.testing.assert_close(first.grad, (first.detach() - second) / 0.25 / first[0].numel())


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_half_precision_inputs_are_scored_in_float32(sde_type: str) -> None:
    latents, velocity = (value.bfloat16() for value in draw())
    step = transition(sde_type, latents, velocity, torch.tensor(0.6), torch.tensor(0.4), 0.7)
    full = transition(sde_type, latents.float(), velocity.float(), torch.tensor(0.6), torch.tensor(0.4), 0.7)
    assert step.mean.dtype == torch.float32
    assert torch.equal(step.mean, full.mean)
    assert log_prob(step, latents).dtype == torch.float32


def test_unknown_sde_type_is_named() -> None:
    with pytest.raises(ValueError, match="sde_type.*'flow_sd'"):
        build("flow_sd", 0.6, 0.4)


def test_unknown_log_prob_type_is_named() -> None:
    with pytest.raises(ValueError, match="log_prob_type.*'laplace'"):
        log_prob(build("cps", 0.6, 0.4), draw()[0], "laplace")
