"""One step of a sampler: the distribution of the next state, a draw from it, and how likely a given one is.

Shapes: `B` samples, `...` the dimensions of a latent. `sigma` and `sigma_next` are 0-dimensional float32 tensors on the
CPU (the noise level before and after the step, 1 is pure noise), so that no step waits for the device. Everything that
enters a density is computed in float32.

One function, `transition`, serves the rollout and the loss, so a policy that has not moved has a probability ratio of 1.
"""

from dataclasses import dataclass
from math import log, pi, sin

import torch
from torch import Tensor


SDE_TYPES = ("flow_sde", "cps", "dance_sde")
PURE_NOISE = 1 - 1e-6
"""From here on `sigma` means 1: schedulers that shift their sigmas round the first one up or down."""

LOG_PROB_TYPES = ("gaussian", "squared_error")


@dataclass(frozen=True)
class Transition:
    """The Gaussian from which an SDE step draws the next state.

    Attributes:
        mean: float32, (B, ...).
        std: float32, 0-dimensional; 0 where the step is deterministic and has no density.
    """

    mean: Tensor
    std: Tensor


def ode_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Euler step of the probability-flow ODE, to the bit as diffusers' `FlowMatchEulerDiscreteScheduler.step`.

    The product with the 0-dimensional float32 `sigma` keeps the velocity's dtype and so does the result: a bfloat16 model
    takes the roundings that its pipeline takes.

    Args:
        latents: (B, ...), any float dtype.
        velocity: (B, ...), in the model's dtype.
        sigma: 0-dimensional.
        sigma_next: 0-dimensional.

    Returns:
        (B, ...) in the velocity's dtype.
    """
    return (latents.float() + (sigma_next - sigma) * velocity).to(velocity.dtype)


def extrapolated_steps(
    latents: Tensor, velocity: Tensor, velocity_before: Tensor, sigma_before: Tensor, sigmas: Tensor
) -> Tensor:
    """Euler steps over several sigmas from one evaluation, their velocities extrapolated linearly from this and the last.

    It is Adams and Bashforth's two-step rule, as an approximation to the sampler's own steps rather than to the ODE: where
    there is one step to take, it is `ode_step`.

    Args:
        latents: (B, ...), any float dtype, at `sigmas[0]`.
        velocity: (B, ...), there, in the model's dtype.
        velocity_before: (B, ...), of the evaluation before.
        sigma_before: 0-dimensional, where that was.
        sigmas: (n + 1,), those to step over.

    Returns:
        (B, ...), at `sigmas[-1]`, in the velocity's dtype.
    """
    lever = ((sigmas[:-1] - sigmas[0]) * sigmas.diff()).sum() / (sigmas[0] - sigma_before)
    step = (sigmas[-1] - sigmas[0]) * velocity.float() + lever * (velocity.float() - velocity_before.float())
    return (latents.float() + step).to(velocity.dtype)


def transition(
    sde_type: str, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float
) -> Transition:
    """Distribution of the state after an SDE step that has the marginals of the ODE.

    Args:
        sde_type: `"flow_sde"` (Flow-GRPO, arXiv 2505.05470), `"cps"` (coefficients-preserving sampling, arXiv
            2509.05952) or `"dance_sde"` (DanceGRPO, arXiv 2505.07818).
        latents: (B, ...).
        velocity: (B, ...), the model's prediction at `latents` and `sigma`.
        sigma: 0-dimensional. At 1, `flow_sde` divides by `1 - sigma_next` instead of 0.
        sigma_next: 0-dimensional, below `sigma`.
        noise_level: How much noise a step adds; 0 gives the ODE step.

    Raises:
        ValueError: If `sde_type` is not one of the three.
    """
    latents, velocity = latents.float(), velocity.float()
    if sde_type == "flow_sde":
        return _flow_sde(latents, velocity, sigma, sigma_next, noise_level)
    if sde_type == "cps":
        return _cps(latents, velocity, sigma, sigma_next, noise_level)
    if sde_type == "dance_sde":
        return _dance_sde(latents, velocity, sigma, sigma_next, noise_level)
    raise ValueError(f"sde_type must be one of {SDE_TYPES}, got {sde_type!r}.")


def _flow_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, alpha: float) -> Transition:
    dt = sigma_next - sigma
    s = alpha * torch.sqrt(sigma / (1 - (sigma_next if sigma > PURE_NOISE else sigma)))
    drift = s**2 / (2 * sigma)
    mean = x * (1 + drift * dt) + v * ((1 + drift * (1 - sigma)) * dt)
    return Transition(mean, s * torch.sqrt(-dt))


def _cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, alpha: float) -> Transition:
    std = sigma_next * sin(alpha * pi / 2)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - sigma_next) * x0 + torch.sqrt(sigma_next**2 - std**2) * x1
    return Transition(mean, std)


def _dance_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, alpha: float) -> Transition:
    dt = sigma_next - sigma
    x0 = x - sigma * v
    minus_score = (x - (1 - sigma) * x0) / sigma**2
    mean = x + (v + alpha**2 / 2 * minus_score) * dt
    return Transition(mean, alpha * torch.sqrt(-dt))


def sample(step: Transition, noise: Tensor) -> Tensor:
    """The state that `noise` (standard normal, (B, ...)) draws from `step`: float32, (B, ...)."""
    return step.mean + step.std * noise


def log_prob(step: Transition, latents: Tensor, log_prob_type: str = "gaussian") -> Tensor:
    """Log-probability of arriving at `latents`, averaged over all but the batch dimension: (B,).

    Args:
        step: The distribution of the next state.
        latents: (B, ...), the state arrived at.
        log_prob_type: `"gaussian"` is the log-density. `"squared_error"` is `-(latents - mean)**2`, without variance and
            constants, as the published code computes it under `cps`; it weighs the steps differently.

    Raises:
        ValueError: If `log_prob_type` is neither.
    """
    squared_error = (latents.float() - step.mean) ** 2
    if log_prob_type == "gaussian":
        density = -squared_error / (2 * step.std**2) - torch.log(step.std) - log(2 * pi) / 2
    elif log_prob_type == "squared_error":
        density = -squared_error
    else:
        raise ValueError(f"log_prob_type must be one of {LOG_PROB_TYPES}, got {log_prob_type!r}.")
    return density.flatten(1).mean(1)


def kl_divergence(step: Transition, reference: Transition) -> Tensor:
    """KL divergence between two transitions of the same std, averaged over all but the batch dimension: (B,)."""
    return ((step.mean - reference.mean) ** 2 / (2 * step.std**2)).flatten(1).mean(1)
