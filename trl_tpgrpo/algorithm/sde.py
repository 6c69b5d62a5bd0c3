"""One sampler step: the distribution of the next latent, a sample from it, and the log-probability of a given latent.

Shapes: `B` samples, `...` the dimensions of a latent. `sigma` and `sigma_next`, the noise levels before and after the
step (1 is pure noise), are 0-dimensional float32 tensors on the CPU, so that no step waits for the device. Rollout and
loss compute densities in float32 with the same function: before the first update, the ratio is exactly 1.
"""

from dataclasses import dataclass
from math import log, pi, sin

import torch
from torch import Tensor


SDE_TYPES = ("flow_sde", "cps", "dance_sde")
LOG_PROB_TYPES = ("gaussian", "squared_error")
PURE_NOISE = 1 - 1e-6  # sigmas above count as 1, because schedulers that shift sigmas round the first one


@dataclass(frozen=True)
class Transition:
    """The Gaussian distribution of the next latent in an SDE step, in float32."""

    mean: Tensor  # (B, ...)
    std: Tensor  # 0-dimensional; 0 where the step is deterministic and has no density


def ode_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return latents (B, ...) after an Euler step, bit-identical to diffusers' `FlowMatchEulerDiscreteScheduler.step`.

    Step, product and result have the dtype of the velocity (B, ...), so rounding is that of the pipeline in bfloat16,
    on a GPU too, where a float32 scalar from the CPU would not be rounded.
    """
    return (latents.float() + (sigma_next - sigma).to(velocity.dtype) * velocity).to(velocity.dtype)


def extrapolated_steps(
    latents: Tensor, velocity: Tensor, velocity_before: Tensor, sigma_before: Tensor, sigmas: Tensor
) -> Tensor:
    """Return latents (B, ...) after Euler steps over several sigmas, with a velocity extrapolated from the last two.

    This is the two-step Adams-Bashforth rule for the sampler's own Euler steps, not for the ODE: over one step it
    equals `ode_step`. Latents and velocity (B, ...) are at `sigmas[0]`, the result is at `sigmas[-1]` in the
    velocity's dtype, and `velocity_before` was evaluated at `sigma_before`, above `sigmas[0]`.
    """
    lever = ((sigmas[:-1] - sigmas[0]) * sigmas.diff()).sum() / (sigmas[0] - sigma_before)
    step = (sigmas[-1] - sigmas[0]) * velocity.float() + lever * (velocity.float() - velocity_before.float())
    return (latents.float() + step).to(velocity.dtype)


def transition(
    sde_type: str, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float
) -> Transition:
    """Return the distribution of the latent after an SDE step with the marginals of the ODE.

    Args:
        sde_type: `"flow_sde"` (Flow-GRPO, arXiv 2505.05470), `"cps"` (coefficients-preserving sampling, arXiv
            2509.05952) or `"dance_sde"` (DanceGRPO, arXiv 2505.07818).
        latents: (B, ...).
        velocity: (B, ...), the model's prediction at `latents` and `sigma`.
        sigma: Sigma at `latents`. At 1, `flow_sde` divides by `1 - sigma_next` instead of 0.
        noise_level: Noise level; with 0, the step is the ODE step.

    Raises:
        ValueError: If `sde_type` is not one of the three.
    """
    x, v, dt = latents.float(), velocity.float(), sigma_next - sigma
    if sde_type == "flow_sde":
        s = noise_level * torch.sqrt(sigma / (1 - (sigma_next if sigma > PURE_NOISE else sigma)))
        drift = s**2 / (2 * sigma)
        mean = x * (1 + drift * dt) + v * ((1 + drift * (1 - sigma)) * dt)
        return Transition(mean, s * torch.sqrt(-dt))
    x0 = x - sigma * v
    if sde_type == "cps":
        std, x1 = sigma_next * sin(noise_level * pi / 2), x + (1 - sigma) * v
        return Transition((1 - sigma_next) * x0 + torch.sqrt(sigma_next**2 - std**2) * x1, std)
    if sde_type == "dance_sde":
        minus_score = (x - (1 - sigma) * x0) / sigma**2
        return Transition(x + (v + noise_level**2 / 2 * minus_score) * dt, noise_level * torch.sqrt(-dt))
    raise ValueError(f"sde_type must be one of {SDE_TYPES}, got {sde_type!r}.")


def sample(step: Transition, noise: Tensor) -> Tensor:
    """Return the sample of `step` for standard normal `noise` (B, ...): float32, (B, ...)."""
    return step.mean + step.std * noise


def log_prob(step: Transition, latents: Tensor, log_prob_type: str = "gaussian") -> Tensor:
    """Return the log-probability of `latents`, averaged over all but the batch dimension: (B,).

    `"gaussian"` is the log-density. `"squared_error"` is `-(latents - mean)**2`, without variance and constants, as in
    the published code for `cps`; it weights the steps differently.

    Raises:
        ValueError: If `log_prob_type` is neither.
    """
    density = -((latents.float() - step.mean) ** 2)
    if log_prob_type == "gaussian":
        density = density / (2 * step.std**2) - torch.log(step.std) - log(2 * pi) / 2
    elif log_prob_type != "squared_error":
        raise ValueError(f"log_prob_type must be one of {LOG_PROB_TYPES}, got {log_prob_type!r}.")
    return density.flatten(1).mean(1)


def kl_divergence(step: Transition, reference: Transition) -> Tensor:
    """Return the KL divergence of two transitions of equal std, averaged over all but the batch dimension: (B,)."""
    return ((step.mean - reference.mean) ** 2 / (2 * step.std**2)).flatten(1).mean(1)
