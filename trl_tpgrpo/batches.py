"""What a rollout hands to the loss: trajectories, their prompts and the rewards of their generation batch.

Shapes: `B` trajectories of this process, `N` of all processes, `K` SDE steps, `...` the dimensions of a latent.
"""

from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from .algorithm.credit import RewardTable
from .algorithm.rollout import Rollout, Window
from .policies.base import Conditioning, Schedule
from .rewards import RewardError
from .rewards.scorer import Scoring


@dataclass(frozen=True)
class Sampled:
    """What sampling and scoring B rows of a dataset gives.

    Attributes:
        rollout: The trajectories.
        images: M, one for each of `rollout.final_latents`.
        rewards: float32, (B, F, C + 1), on the CPU, of the images that `rollout.image_of` names; NaN where a function does
            not apply, and throughout where one has failed.
        failed: bool, (B,), on the CPU: trajectories that a function has failed on.
        extra: Columns that functions have logged beside their rewards, M values each.
        error: The failure that has to stop the run.
        num_failed_images: Of the M, those that a function has failed on.
        skipped: The failures that do not stop the run.
    """

    rollout: Rollout
    images: list[Image.Image]
    rewards: Tensor
    failed: Tensor
    extra: dict[str, list] = field(default_factory=dict)
    error: RewardError | None = None
    num_failed_images: int = 0
    skipped: list[RewardError] = field(default_factory=list)

    def without_images(self) -> "Sampled":
        """What training goes on with, which is small."""
        rollout = replace(self.rollout, final_latents=self.rollout.final_latents[:0])
        return replace(self, rollout=rollout, images=[], extra={})


@dataclass(frozen=True)
class Unscored:
    """Trajectories whose images are being scored.

    Attributes:
        rollout: The trajectories.
        images: M, one for each of `rollout.final_latents`.
        scoring: Of the images.
    """

    rollout: Rollout
    images: list[Image.Image]
    scoring: Scoring

    def scored(self) -> Sampled:
        """Wait for the rewards; a failure that has to stop the run is in the result, so that no process stops alone."""
        try:
            scores = self.scoring.result()
        except RewardError as error:
            shape = (len(self.rollout.image_of), len(self.scoring.reward_funcs), self.rollout.image_of.shape[1])
            nothing = torch.full(shape, torch.nan)
            return Sampled(self.rollout, self.images, nothing, torch.ones(len(nothing), dtype=torch.bool), error=error)
        rewards = scores.rewards[:, self.rollout.image_of].transpose(0, 1)
        failed = scores.failed[self.rollout.image_of].any(1)
        left = torch.where(failed[:, None, None], torch.nan, rewards)
        number = int(scores.failed.sum())
        return Sampled(self.rollout, self.images, left, failed, scores.extra, None, number, scores.errors)


@dataclass(frozen=True)
class Transitions:
    """One SDE step of B trajectories: the unit of the loss.

    Attributes:
        latents: float32, (B, ...), before the step.
        next_latents: float32, (B, ...), after it.
        old_log_probs: float32, (B,), when it was sampled; `None`: as the policy that is trained now has them.
        sigma: 0-dimensional, on the CPU, before the step.
        sigma_next: 0-dimensional, on the CPU, after it.
        timestep: 0-dimensional, on the CPU, before the step.
        position: Its number in the window, 0 to K - 1.
        window: The SDE window.
        conditioning: The B prompts.
        rows: (B,), on the CPU, the trajectories' places in the reward table.
        table: The rewards of all N trajectories.
        num_trajectories: How many the loss is the mean over: B and those left out because they add nothing to it.
        reference: The reference's velocities by position, where they are kept.
    """

    latents: Tensor
    next_latents: Tensor
    old_log_probs: Tensor | None
    sigma: Tensor
    sigma_next: Tensor
    timestep: Tensor
    position: int
    window: Window
    conditioning: Conditioning
    rows: Tensor
    table: RewardTable
    num_trajectories: int
    reference: dict[int, Tensor]

    @property
    def advantages(self) -> Tensor:
        """float32, (B,): of this step, from the table, which computes all of them at the first look."""
        return self.table.advantages[self.rows, self.position].to(self.latents.device)


@dataclass(frozen=True)
class Trajectories:
    """B trajectories, with all that training on them needs.

    Attributes:
        states: float32, (B, K + 1, ...), on the CPU if they are offloaded.
        log_probs: float32, (B, K); `None`: as the policy that is trained now has them.
        window: The SDE window.
        schedule: The noise levels.
        conditioning: The distinct prompts of the generation batch.
        prompts: (B,), on the CPU, the trajectories' places among them.
        rows: (B,), on the CPU, the trajectories' places in the reward table.
        table: The rewards of all N trajectories, on the CPU.
        reference: The reference's velocities by position, where they are kept.
    """

    states: Tensor
    log_probs: Tensor | None
    window: Window
    schedule: Schedule
    conditioning: Conditioning
    prompts: Tensor
    rows: Tensor
    table: RewardTable
    reference: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, chosen: Tensor) -> "Trajectories":
        """The trajectories at the places `chosen` (an index on the CPU), of the same table."""
        return replace(
            self,
            states=self.states[chosen],
            log_probs=None if self.log_probs is None else self.log_probs[chosen],
            prompts=self.prompts[chosen],
            rows=self.rows[chosen],
            reference={},
        )

    def to(self, device: torch.device, offload: bool) -> "Trajectories":
        """With log-probabilities and prompts on `device`, states and velocities too unless they are offloaded."""
        of_states = torch.device("cpu") if offload else device
        return replace(
            self,
            states=self.states.to(of_states),
            log_probs=None if self.log_probs is None else self.log_probs.to(device),
            conditioning=self.conditioning.to(device),
            reference={position: velocity.to(of_states) for position, velocity in self.reference.items()},
        )

    def advantages(self, position: int) -> Tensor:
        """float32, (B,), on the CPU: of the SDE step at `position` of the window."""
        return self.table.advantages[self.rows, position]

    def transitions(self, position: int, chosen: Tensor | None = None) -> Transitions:
        """The SDE step at `position` of the window, of all or of the trajectories at places `chosen` (on the CPU)."""
        chosen = torch.arange(len(self)) if chosen is None else chosen
        step, device = self.window.start + position, self.conditioning.prompt_embeds.device
        return Transitions(
            latents=self.states[chosen, position].to(device),
            next_latents=self.states[chosen, position + 1].to(device),
            old_log_probs=None if self.log_probs is None else self.log_probs[chosen, position],
            sigma=self.schedule.sigmas[step],
            sigma_next=self.schedule.sigmas[step + 1],
            timestep=self.schedule.timesteps[step],
            position=position,
            window=self.window,
            conditioning=self.conditioning[self.prompts[chosen]],
            rows=self.rows[chosen],
            table=self.table,
            num_trajectories=len(self),
            reference=self.reference,
        )
