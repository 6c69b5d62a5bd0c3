"""What a rollout hands to the loss: trajectories, their prompts and the rewards of their generation batch.

Shapes: `B` trajectories of this process, `N` of all processes, `K` SDE steps, `...` the dimensions of a latent.
"""

from dataclasses import dataclass

from torch import Tensor

from .credit import RewardTable
from .policies import Conditioning
from .rollout import Window


@dataclass(frozen=True)
class Transitions:
    """One SDE step of B trajectories: the unit of the loss.

    Attributes:
        latents: float32, (B, ...), before the step.
        next_latents: float32, (B, ...), after it.
        old_log_probs: float32, (B,), when it was sampled.
        step: Its number in the schedule.
        position: Its number in the window, 0 to K - 1.
        window: The SDE window.
        sigmas: float32, (T + 1,), on the CPU.
        timestep: 0-dimensional, on the CPU.
        conditioning: The B prompts.
        rows: (B,), the trajectories' places in the reward table.
        table: The rewards of all N trajectories.
    """

    latents: Tensor
    next_latents: Tensor
    old_log_probs: Tensor
    step: int
    position: int
    window: Window
    sigmas: Tensor
    timestep: Tensor
    conditioning: Conditioning
    rows: Tensor
    table: RewardTable


@dataclass(frozen=True)
class Trajectories:
    """B trajectories, with all that training on them needs.

    Attributes:
        states: float32, (B, K + 1, ...).
        log_probs: float32, (B, K).
        window: The SDE window.
        sigmas: float32, (T + 1,), on the CPU.
        timesteps: float32, (T,), on the CPU.
        conditioning: The B prompts.
        rows: (B,), the trajectories' places in the reward table.
        table: The rewards of all N trajectories.
    """

    states: Tensor
    log_probs: Tensor
    window: Window
    sigmas: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    rows: Tensor
    table: RewardTable

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, chosen: Tensor) -> "Trajectories":
        """The trajectories at the places `chosen`, of the same table."""
        return Trajectories(
            self.states[chosen],
            self.log_probs[chosen],
            self.window,
            self.sigmas,
            self.timesteps,
            self.conditioning[chosen],
            self.rows[chosen],
            self.table,
        )

    def transitions(self, position: int) -> Transitions:
        """The SDE step at `position` of the window."""
        step = self.window.start + position
        return Transitions(
            latents=self.states[:, position],
            next_latents=self.states[:, position + 1],
            old_log_probs=self.log_probs[:, position],
            step=step,
            position=position,
            window=self.window,
            sigmas=self.sigmas,
            timestep=self.timesteps[step],
            conditioning=self.conditioning,
            rows=self.rows,
            table=self.table,
        )
