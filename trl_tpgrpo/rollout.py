"""Trajectories and the ODE completions of their states, as one sweep over the sigmas.

At step k every trajectory and every completion that is under way stands at the same sigma, so all of them go through the
model together: `T` calls in all. A completion starts with the velocity that its trajectory has just computed at the same
state, so its first evaluation is free. That is the least that an exact scheme can take: each distinct pair of state and
sigma is evaluated once (T = 10 with a window of 9 takes 55 evaluations a trajectory in 10 calls).

Shapes: `B` trajectories, `K` SDE steps in the window, `...` the dimensions of a latent. States are kept in float32, in
which every dtype of a model fits without loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .sde import log_prob, ode_step, sample, transition


Velocity = Callable[[Tensor, int, Tensor], Tensor]
"""`velocity(latents, step, rows)`: the model's prediction at `latents` (N, ...) before `step`; row n belongs to trajectory
`rows[n]`, whose prompt it takes."""


@dataclass(frozen=True)
class Window:
    """The SDE steps `[start, stop)` of a schedule and how they add noise; the other steps are ODE steps."""

    start: int
    stop: int
    sde_type: str
    noise_level: float
    log_prob_type: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Rollout:
    """What a sweep leaves.

    Attributes:
        states: float32, (B, K + 1, ...): the trajectory before each SDE step and after the last.
        log_probs: float32, (B, K): of the SDE steps.
        final_latents: float32, (B, K + 1, ...): the ends of the completions from `states[:, 0]` to `states[:, K - 1]`,
            then the trajectory's own; without completions (B, 1, ...), the trajectory's own.
        num_evaluations: How often the model was evaluated, counted in samples.
        num_calls: How often the model was called, counted in batches.
    """

    states: Tensor
    log_probs: Tensor
    final_latents: Tensor
    num_evaluations: int
    num_calls: int


@torch.no_grad()
def roll_out(
    velocity: Velocity,
    initial_noise: Tensor,
    sigmas: Tensor,
    window: Window | None = None,
    generators: list[torch.Generator] | None = None,
    complete: bool = True,
    batch_size: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> Rollout:
    """Sample trajectories and, from each state in the window, the image that the ODE makes of it.

    Args:
        velocity: The model, see `Velocity`.
        initial_noise: (B, ...). The completion of the first state starts from the trajectory's own noise.
        sigmas: float32 on the CPU, (T + 1,), falling to 0.
        window: The SDE steps; `None` takes ODE steps alone, as the model's pipeline does.
        generators: B generators of the SDE steps' noise; needed with a window.
        complete: Whether to compute the completions.
        batch_size: How many samples the model is given at once; `None`: all.
        on_step: Called after each step, for a progress bar.

    Raises:
        ValueError: If the window does not lie in the schedule, or takes steps without noise.
        FloatingPointError: If a prediction is not finite.
    """
    num_steps = len(sigmas) - 1
    _check(window, sigmas, generators, len(initial_noise))
    trajectory = initial_noise.float()
    completions = trajectory.new_empty(0, *trajectory.shape)  # (started so far, B, ...)
    rows = torch.arange(len(trajectory), device=trajectory.device)
    states, log_probs, finite, num_evaluations, num_calls = [], [], [], 0, 0
    for step in range(num_steps):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        latents = torch.cat([trajectory, completions.flatten(0, 1)])
        predicted, calls = _predict(velocity, latents, step, rows.repeat(1 + len(completions)), batch_size)
        finite.append(torch.isfinite(predicted).all())
        num_evaluations, num_calls = num_evaluations + len(latents), num_calls + calls
        completed = ode_step(latents, predicted, sigma, sigma_next).float().unflatten(0, (-1, len(rows)))
        if window is not None and window.start <= step < window.stop:
            states.append(trajectory)
            drawn = transition(
                window.sde_type, trajectory, predicted[: len(rows)], sigma, sigma_next, window.noise_level
            )
            noise = randn_tensor(trajectory.shape, generators, trajectory.device, torch.float32)
            trajectory = sample(drawn, noise)
            log_probs.append(log_prob(drawn, trajectory, window.log_prob_type))
            completions = torch.cat([completed[1:], completed[:1]]) if complete else completions
        else:
            if window is not None and step == window.stop:
                states.append(trajectory)
            trajectory, completions = completed[0], completed[1:]
        if on_step is not None:
            on_step()
    _raise_if_not_finite(finite)
    return Rollout(
        states=torch.stack(states, 1) if states else trajectory[:, None][:, :0],
        log_probs=torch.stack(log_probs, 1) if log_probs else trajectory.new_empty(len(rows), 0),
        final_latents=torch.cat([completions, trajectory[None]]).transpose(0, 1),
        num_evaluations=num_evaluations,
        num_calls=num_calls,
    )


def _check(window: Window | None, sigmas: Tensor, generators: list[torch.Generator] | None, number: int) -> None:
    if window is None:
        return
    num_steps = len(sigmas) - 1
    if not 0 <= window.start < window.stop < num_steps:
        raise ValueError(
            f"The window [{window.start}, {window.stop}) must hold at least one of the first {num_steps - 1} steps of "
            f"{num_steps} and nothing else; the last step is never in it."
        )
    if window.noise_level <= 0:
        raise ValueError(f"An SDE step needs noise: noise_level must be above 0, got {window.noise_level}.")
    if generators is None or len(generators) != number:
        given = "none" if generators is None else len(generators)
        raise ValueError(f"SDE steps need generators, one for each of {number} trajectories; got {given}.")


def _predict(
    velocity: Velocity, latents: Tensor, step: int, rows: Tensor, batch_size: int | None
) -> tuple[Tensor, int]:
    """The velocity at `latents` in batches of `batch_size`, and the number of batches."""
    batches = zip(latents.split(batch_size or len(latents)), rows.split(batch_size or len(latents)), strict=True)
    predicted = [velocity(batch, step, batch_rows) for batch, batch_rows in batches]
    return torch.cat(predicted), len(predicted)


def _raise_if_not_finite(finite: list[Tensor]) -> None:
    """Looked at once, after the sweep, so that no step waits for the device."""
    flags = torch.stack(finite)
    if not flags.all():
        step = int((~flags).nonzero()[0])
        raise FloatingPointError(
            f"The model's prediction at sampling step {step} is not finite. Usual causes: weights that have diverged "
            "(learning_rate too high) or float16 overflow."
        )
