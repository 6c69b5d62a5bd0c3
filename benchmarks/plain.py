"""The plain way to the rewards along a trajectory, with which benchmarks compare the sweep.

A straightforward implementation samples a batch of trajectories, then completes each state but the first, one after
the other and each from an evaluation of its own, and then samples the image of pure ODE steps in a second rollout.
Every set of images is decoded and scored as it comes, the trajectories' own twice, as the score of their last state
and as the final one. T = 10 with a window of 9 takes 64 function evaluations a trajectory in 64 calls, as in the
paper's demo code.
"""

from dataclasses import dataclass, field

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from trl_tpgrpo.algorithm.rollout import Velocity, Window
from trl_tpgrpo.algorithm.sde import ode_step, sample, transition


@dataclass
class PlainRollout:
    """Final latents, (B, ...) each, by the number of SDE steps before them, and their costs."""

    ends: dict[int, Tensor] = field(default_factory=dict)
    nfe: int = 0
    num_calls: int = 0


@torch.no_grad()
def plain_rollout(
    velocity: Velocity, initial_noise: Tensor, sigmas: Tensor, window: Window, generators: list[torch.Generator]
) -> PlainRollout:
    """Sample trajectories, their completions one by one, and the ODE's own images."""
    result, rows = PlainRollout(), torch.arange(len(initial_noise), device=initial_noise.device)

    def predict(latents: Tensor, step: int) -> Tensor:
        result.nfe += len(latents)
        result.num_calls += 1
        return velocity(latents, step, rows)

    def complete(latents: Tensor, start: int) -> Tensor:
        for step in range(start, len(sigmas) - 1):
            latents = ode_step(latents, predict(latents, step), sigmas[step], sigmas[step + 1]).float()
        return latents

    latents, states = initial_noise.float(), []
    for step in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        predicted = predict(latents, step)
        if step in window:
            states.append(latents)
            drawn = transition(window.sde_type, latents, predicted, sigma, sigma_next, window.noise_of(step))
            latents = sample(drawn, randn_tensor(latents.shape, generators, latents.device, torch.float32))
        else:
            latents = ode_step(latents, predicted, sigma, sigma_next).float()
    result.ends[len(window)] = latents
    for position in range(1, len(window)):
        result.ends[position] = complete(states[position], window.start + position)
    result.ends[0] = complete(initial_noise.float(), 0)
    return result
