"""What a rollout hands to the loss: trajectories, their prompts and the rewards of their generation batch.

Shapes: `B` trajectories of this process, `N` of all processes, `K` SDE steps, `...` the dimensions of a latent.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .credit import RewardTable
from .policies import Conditioning, Schedule
from .rollout import Window


@dataclass(frozen=True)
class Transitions:
    """One SDE step of B trajectories: the unit of the loss.

    Attributes:
        latents: float32, (B, ...), before the step.
        next_latents: float32, (B, ...), after it.
        old_log_probs: float32, (B,), when it was sampled.
        sigma: 0-dimensional, on the CPU, before the step.
        sigma_next: 0-dimensional, on the CPU, after it.
        timestep: 0-dimensional, on the CPU, before the step.
        position: Its number in the window, 0 to K - 1.
        window: The SDE window.
        conditioning: The B prompts.
        rows: (B,), on the CPU, the trajectories' places in the reward table.
        table: The rewards of all N trajectories.
    """

    latents: Tensor
    next_latents: Tensor
    old_log_probs: Tensor
    sigma: Tensor
    sigma_next: Tensor
    timestep: Tensor
    position: int
    window: Window
    conditioning: Conditioning
    rows: Tensor
    table: RewardTable

    @property
    def advantages(self) -> Tensor:
        """float32, (B,): of this step, from the table, which computes all of them at the first look."""
        return self.table.advantages[self.rows, self.position].to(self.latents.device)


@dataclass(frozen=True)
class Trajectories:
    """B trajectories, with all that training on them needs.

    Attributes:
        states: float32, (B, K + 1, ...).
        log_probs: float32, (B, K).
        window: The SDE window.
        schedule: The noise levels.
        conditioning: The B prompts.
        rows: (B,), on the CPU, the trajectories' places in the reward table.
        table: The rewards of all N trajectories, on the CPU.
    """

    states: Tensor
    log_probs: Tensor
    window: Window
    schedule: Schedule
    conditioning: Conditioning
    rows: Tensor
    table: RewardTable

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, chosen: Tensor) -> "Trajectories":
        """The trajectories at the places `chosen` (an index on the CPU), of the same table."""
        return replace(
            self,
            states=self.states[chosen],
            log_probs=self.log_probs[chosen],
            conditioning=self.conditioning[chosen],
            rows=self.rows[chosen],
        )

    def to(self, device: torch.device) -> "Trajectories":
        """With states, log-probabilities and prompts on `device`; the rest stays on the CPU."""
        return replace(
            self,
            states=self.states.to(device),
            log_probs=self.log_probs.to(device),
            conditioning=self.conditioning.to(device),
        )

    def transitions(self, position: int) -> Transitions:
        """The SDE step at `position` of the window."""
        step = self.window.start + position
        return Transitions(
            latents=self.states[:, position],
            next_latents=self.states[:, position + 1],
            old_log_probs=self.log_probs[:, position],
            sigma=self.schedule.sigmas[step],
            sigma_next=self.schedule.sigmas[step + 1],
            timestep=self.schedule.timesteps[step],
            position=position,
            window=self.window,
            conditioning=self.conditioning,
            rows=self.rows,
            table=self.table,
        )
