"""Data from a rollout for the loss: trajectories, prompts and the rewards of the generation batch.

Shapes: `B` trajectories of this process, `N` of all processes, `K` SDE steps, `M` images, `F` reward functions, `C`
completed states, `...` the dimensions of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .algorithm.chunks import chunk_means, step_weights
from .algorithm.completion import CompletionRule
from .algorithm.credit import CreditBatch, CreditedSteps, CreditRule, RewardTable
from .algorithm.losses import LossRule, Surrogate, normalized_log_ratio
from .algorithm.rollout import Rollout, Window
from .algorithm.sde import Transition, log_prob, transition
from .policies.conditioning import Conditioning, Schedule, Step
from .rewards.contract import RewardError, RewardFunc, takes_images, takes_states_alone
from .rewards.scorer import Scoring


SWEEP = 64  # smallest number of trajectories sampled together: full batches, and memory independent of the rollout
LARGEST_BATCH = 256  # largest batch size that is tried when it is measured


@dataclass(frozen=True)
class Encoded:
    """The prompts of B rows, padded to one length."""

    conditioning: Conditioning  # of the distinct prompts
    prompts: Tensor  # (B,), on the CPU, the rows' indices among these

    def __getitem__(self, part: slice) -> "Encoded":
        """Select rows, with the same prompts."""
        return Encoded(self.conditioning, self.prompts[part])


@dataclass(frozen=True)
class Pending:
    """Trajectories while their M images are scored."""

    rollout: Rollout
    prompts: list[int]  # B, indices of the rows' prompts
    images: list[Image.Image]
    scoring: Scoring


@dataclass(frozen=True)
class Sampled:
    """Trajectories of B rows of a dataset with images and rewards."""

    rollout: Rollout
    images: list[Image.Image]  # M, one for each of `rollout.final_latents`; empty if no function uses images
    rewards: Tensor  # float32, (B, F, C + 1), on the CPU, as `rollout.image_of`; NaN: not applicable, or failed
    failed: Tensor  # bool, (B,), on the CPU: trajectories on which a function failed
    extra: dict[str, list] = field(default_factory=dict)  # columns logged beside the rewards, M values each
    error: RewardError | None = None  # stops the run
    num_failed_images: int = 0
    skipped: list[RewardError] = field(default_factory=list)  # do not stop the run

    def without_images(self) -> "Sampled":
        """Drop the images, which training does not need."""
        rollout = replace(self.rollout, final_latents=self.rollout.final_latents[:0])
        return replace(self, rollout=rollout, images=[], extra={})


@dataclass(frozen=True)
class Transitions:
    """One SDE step of B trajectories: the unit of the loss."""

    latents: Tensor  # float32, (B, ...), before the step
    next_latents: Tensor  # float32, (B, ...), after it
    old_log_probs: Tensor | None  # float32, (B,), at sampling time; None: those of the current policy
    step: Step
    position: int  # index of the step in the window, 0 to K - 1
    window: Window
    conditioning: Conditioning  # of the B prompts
    rows: Tensor  # (B,), on the CPU, the trajectories' rows in the reward table
    table: RewardTable  # rewards of all N trajectories
    num_trajectories: int  # B and those left out without effect on the loss, which is the mean over all
    reference: dict[int, Tensor]  # velocities of the reference by position, if kept
    old_means: Tensor | None  # float32, (B, ...), of the next latents at sampling time, as `old_log_probs`
    chunk_log_ratios: Tensor | None  # float32, (B,), means over the step's chunk; None: the step's own
    weight: float  # weight of the step's surrogate

    def transition(self, velocity: Tensor) -> Transition:
        """Return the distribution of the next latents for a predicted velocity (B, ...)."""
        noise_level = self.window.noise_of(self.window.start + self.position)
        return transition(self.window.sde_type, self.latents, velocity, *self.step.sigmas, noise_level)

    def log_prob(self, step: Transition) -> Tensor:
        """Return the log-probability (B,) of the next latents under `step`."""
        return log_prob(step, self.next_latents, self.window.log_prob_type)

    def surrogate(self, step: Transition, advantages: Tensor, rule: LossRule) -> Surrogate:
        """Return the weighted surrogate of transitions, currently `step`, with advantages (B,)."""
        old = Transition(step.mean.detach() if self.old_means is None else self.old_means, step.std)
        if rule.ratio_norm:
            log_ratio = normalized_log_ratio(step, old, self.next_latents)
        else:
            log_probs = self.log_prob(step)
            log_ratio = log_probs - (log_probs.detach() if self.old_log_probs is None else self.old_log_probs)
        if self.chunk_log_ratios is not None:  # with the gradient of this step only
            log_ratio = log_ratio + (self.chunk_log_ratios - log_ratio).detach()
        surrogate, (sigma, sigma_next) = rule.surrogate(log_ratio, advantages, step, old), self.step.sigmas
        weight = self.weight * (rule.step_weights[self.position] if rule.step_weights else 1)
        weight = weight / float(sigma - sigma_next) if rule.ratio_norm else weight
        return replace(surrogate, loss=weight * surrogate.loss)


@dataclass(frozen=True)
class Trajectories:
    """B trajectories with everything that training needs."""

    states: Tensor  # float32, (B, K + 1, ...), on the CPU if they are offloaded
    log_probs: Tensor | None  # float32, (B, K); None: those of the current policy
    window: Window
    schedule: Schedule
    conditioning: Conditioning  # of the distinct prompts of the generation batch
    prompts: Tensor  # (B,), on the CPU, the trajectories' indices among the prompts
    rows: Tensor  # (B,), on the CPU, the trajectories' rows in the reward table
    table: RewardTable  # rewards of all N trajectories, on the CPU
    reference: dict[int, Tensor] = field(default_factory=dict)  # velocities of the reference by position, if kept
    means: Tensor | None = None  # float32, (B, K, ...), on the states' device; None: not kept, or as `log_probs`
    chunks: tuple[int, ...] | None = None  # sizes of the chunks of steps that share a ratio; None: one ratio per step
    chunk_log_ratios: Tensor | None = None  # float32, (B, K), means over the steps' chunks

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, chosen: Tensor) -> "Trajectories":
        """Select the trajectories of the indices `chosen` (on the CPU), with the same table."""
        return replace(
            self,
            states=self.states[chosen],
            log_probs=None if self.log_probs is None else self.log_probs[chosen],
            prompts=self.prompts[chosen],
            rows=self.rows[chosen],
            reference={},
            means=None if self.means is None else self.means[chosen],
        )

    def to(self, device: torch.device, offload: bool) -> "Trajectories":
        """Move log-probabilities and prompts to `device`, and states and velocities unless offloaded."""
        states_device = torch.device("cpu") if offload else device
        return replace(
            self,
            states=self.states.to(states_device),
            log_probs=None if self.log_probs is None else self.log_probs.to(device),
            conditioning=self.conditioning.to(device),
            reference={position: velocity.to(states_device) for position, velocity in self.reference.items()},
            means=None if self.means is None else self.means.to(states_device),
        )

    def check_loss(self, args: Any) -> None:
        """Raise a `ValueError` if the loss of a `TPGRPOConfig` needs data that was not kept at sampling time."""
        lacks_means = args.loss_rule.needs_means and self.means is None and self.log_probs is not None
        has_no_chunks = args.importance_sampling_level != "step" and args.chunk_sizes is None and self.chunks is None
        if lacks_means or has_no_chunks:
            remedy = "resume from a checkpoint at the end of a rollout, or change the loss later"
            raise ValueError(f"The checkpoint is inside a rollout that was sampled for another loss: {remedy}.")

    def with_chunk_ratios(self, now: "Trajectories") -> "Trajectories":
        """Add the ratios of chunks of steps, from the log-probabilities `now` of the current policy.

        With known ratios, gradients are computed step by step, with the memory of one step.
        """
        assert self.chunks is not None and self.log_probs is not None and now.log_probs is not None
        return replace(self, chunk_log_ratios=chunk_means(now.log_probs - self.log_probs, self.chunks))

    def contributing(self, skip_zeros: bool, keep_steps: bool) -> dict[int, Tensor]:
        """Choose for each SDE step the trajectories that contribute to the loss, as indices on the CPU.

        With `skip_zeros` (no KL term), trajectories with an advantage of 0 are left out. A step without any left keeps
        one with `keep_steps`, because other processes wait for it. The last step always keeps one, so that there is a
        gradient and an update.
        """
        num_steps = len(self.window)
        if not skip_zeros:
            return dict.fromkeys(range(num_steps), torch.arange(len(self)))
        advantages = self.table.trained_advantages[self.rows]
        chosen = {step: advantages[:, step].nonzero().flatten() for step in range(num_steps)}
        needed = range(num_steps) if keep_steps else [num_steps - 1]
        chosen |= {step: torch.tensor([0]) for step in needed if not len(chosen[step])}
        return {step: rows for step, rows in chosen.items() if len(rows)}

    def transitions(self, position: int, chosen: Tensor | None = None) -> Transitions:
        """Return the SDE step at `position` of the window, of all trajectories or of those `chosen` (on the CPU)."""
        chosen = torch.arange(len(self)) if chosen is None else chosen
        device = self.conditioning.device
        return Transitions(
            latents=self.states[chosen, position].to(device),
            next_latents=self.states[chosen, position + 1].to(device),
            old_log_probs=None if self.log_probs is None else self.log_probs[chosen, position],
            step=self.schedule[self.window.start + position],
            position=position,
            window=self.window,
            conditioning=self.conditioning[self.prompts[chosen]],
            rows=self.rows[chosen],
            table=self.table,
            num_trajectories=len(self),
            reference=self.reference,
            old_means=None if self.means is None else self.means[chosen, position].to(device),
            chunk_log_ratios=None if self.chunk_log_ratios is None else self.chunk_log_ratios[chosen, position],
            weight=1.0 if self.chunks is None else step_weights(self.chunks)[position],
        )


# Classes in the file of a rollout that is in use when a checkpoint is saved, with those of version 0.1.0
SAVED_CLASSES: list[Any] = [
    Conditioning, CreditBatch, CreditedSteps, CreditRule, RewardTable, Schedule, Trajectories, Window,
]  # fmt: skip
FORMER: dict[str, tuple] = {
    "credit": (CreditRule, RewardTable), "trajectories": (Trajectories,), "rollout": (Window,),
    "policies.base": (Conditioning, Schedule),
}  # fmt: skip
SAVED_CLASSES += [(one, f"trl_tpgrpo.{module}.{one.__name__}") for module, known in FORMER.items() for one in known]


def scored_rule(rule: CompletionRule | None, reward_funcs: Sequence[RewardFunc]) -> CompletionRule | None:
    """Return the completion rule; if all functions score noisy states, nothing is completed."""
    return replace(rule, num_steps=0, at=None) if rule and takes_states_alone(reward_funcs) else rule


def what_is_scored(reward_funcs: Sequence[RewardFunc]) -> str:
    """Name the scored items of a rollout with these functions (none known: images)."""
    decodes = takes_images(reward_funcs) or not reward_funcs
    return "images decoded and scored" if decodes else "latents scored"


def eval_batch_size(args: Any) -> int | None:
    """Return the latents per model call in evaluation, for as many pixels as in a rollout; `None`: measure it."""
    pixels, evaluated = args.height * args.width, (args.eval_height or args.height) * (args.eval_width or args.width)
    size = args.rollout_batch_size
    return None if size is None else max(1, size * pixels // max(pixels, evaluated))


def sweeps(num_rows: int, args: Any) -> list[slice]:
    """Cut the rows of a rollout into sweeps, sampled together: whole groups that fill a batch of the model."""
    at_least = max(SWEEP, args.rollout_batch_size or LARGEST_BATCH)
    size = -(-at_least // args.num_generations) * args.num_generations
    return [slice(start, start + size) for start in range(0, num_rows, size)]
