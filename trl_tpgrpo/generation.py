"""From prompts to images: encoding, rollout and decoding, each with its models where they belong and in batches that fit."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .algorithm.completion import CompletionRule
from .algorithm.rollout import Rollout, Window, fastest_batch_size, roll_out
from .config import TPGRPOConfig
from .policies.base import Conditioning, FlowPolicy, to_images
from .policies.embeddings import PromptEmbeddings


SWEEP = 64
"""At least so many trajectories are sampled together, so that batches are full, and not many more, so that memory and the number of
images at a time do not grow with the rollout."""

LARGEST_BATCH = 256
"""The largest batch that is tried where the batch size of rollouts is measured."""


class ImageGenerator:
    """Makes images with a policy as a config says.

    Args:
        policy: On its device, but for the text encoders.
        args: The settings.
        embeddings: The encoded prompts.
        accelerator: Of the run.

    Attributes:
        batch_sizes: How many samples the `model` and the `vae` are given at once; measured at the first use if absent.
    """

    def __init__(self, policy: FlowPolicy, args: TPGRPOConfig, embeddings: PromptEmbeddings, accelerator: Accelerator):
        self.policy, self.args, self.embeddings, self.accelerator = policy, args, embeddings, accelerator
        fixed = args.rollout_batch_size
        self.batch_sizes = {} if fixed is None else {"model": fixed, "vae": fixed}

    def roll_out(
        self,
        model: torch.nn.Module,
        conditioning: Conditioning,
        prompts: Tensor,
        generators: list[torch.Generator],
        window: Window | None,
        completion: CompletionRule | None,
        on_step: Callable[[], object] | None = None,
    ) -> Rollout:
        """One trajectory for each of B prompts, see [`~trl_tpgrpo.algorithm.rollout.roll_out`].

        Args:
            model: Predicts the velocities.
            conditioning: The distinct prompts.
            prompts: (B,), their places among them.
            generators: B; under `share_initial_noise` the first of a group draws the group's noise.
            window: The SDE steps of `num_inference_steps`; `None` takes `num_inference_steps_eval` ODE steps.
            completion: How states in the window are completed; `None`: not at all.
            on_step: Called after each denoising step.
        """
        schedule, device = self.policy.schedule(self.num_steps(window)), self.policy.device
        prompts = prompts.to(device)

        def velocity(latents: Tensor, step: int, rows: Tensor) -> Tensor:
            return self.policy.velocity(model, latents, schedule.timesteps[step], conditioning[prompts[rows]])

        sharing = self.args.num_generations if self.args.share_initial_noise and window is not None else 1
        noise = self.policy.initial_noise(generators[::sharing])
        if "model" not in self.batch_sizes:
            rows = torch.zeros(LARGEST_BATCH, dtype=torch.long, device=device)
            self.batch_sizes["model"] = _measure_batch_size(
                lambda size: velocity(noise[:1].expand(size, *noise.shape[1:]), 0, rows[:size]), self.accelerator
            )
        return roll_out(
            velocity,
            noise,
            schedule.sigmas,
            window,
            generators,
            completion,
            self.batch_sizes["model"],
            on_step,
            offload_states=self.args.offload_trajectories,
        )

    @torch.no_grad()
    def sample(
        self, model: torch.nn.Module, prompts: list[str], generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """An image of each of N distinct prompts, by the ODE in `num_inference_steps_eval` steps."""
        if not prompts:
            return []
        places = torch.arange(len(prompts))
        rollout = self.roll_out(model, self.embeddings(prompts), places, generators, None, None)
        return to_images(self.decode(rollout.final_latents))

    def num_steps(self, window: Window | None) -> int:
        """Denoising steps of a rollout with a window, or, without one, of an evaluation."""
        return self.args.num_inference_steps_eval if window is None else self.args.num_inference_steps

    def decode(
        self, latents: Tensor, on_batch: Callable[[int], object] | None = None, keep_on_device: bool = False
    ) -> Tensor:
        """The pixels of final latents (M, ...), see [`~trl_tpgrpo.policies.FlowPolicy.decode`]."""
        with on_device([self.policy.pipeline.vae], self.policy.device, self.args.offload_between_phases):
            if "vae" not in self.batch_sizes:
                self.batch_sizes["vae"] = _measure_batch_size(
                    lambda size: self.policy.decode(latents[:1].expand(size, *latents.shape[1:])), self.accelerator
                )
            return self.policy.decode(latents, self.batch_sizes["vae"], on_batch, keep_on_device)


def sweeps(num_rows: int, args: TPGRPOConfig) -> list[slice]:
    """The rows of a rollout, cut into those that are sampled together: whole groups that fill a batch of the model."""
    at_least = max(SWEEP, args.rollout_batch_size or LARGEST_BATCH)
    size = -(-at_least // args.num_generations) * args.num_generations
    return [slice(start, start + size) for start in range(0, num_rows, size)]


@contextmanager
def on_device(modules: list[Any], device: torch.device, offload: bool) -> Iterator[None]:
    """With `offload` the modules are on `device` inside and on the CPU afterwards; without it they stay where they are."""
    moved = modules if offload else []
    try:
        for module in moved:
            module.to(device)
        yield
    finally:
        for module in moved:
            module.to(torch.device("cpu"))


@torch.no_grad()
def _measure_batch_size(run: Callable[[int], object], accelerator: Accelerator) -> int:
    """The batch size at which `run` takes the least time a sample, the same on all processes."""

    def seconds(batch_size: int) -> float:
        try:
            # the first of them warms up
            fastest = min(_seconds(run, batch_size, accelerator.device) for _ in range(6))
        except torch.OutOfMemoryError:
            fastest = float("inf")
        return accelerator.reduce(torch.tensor(fastest, device=accelerator.device), "mean").item()

    return fastest_batch_size(seconds, LARGEST_BATCH)


def _seconds(run: Callable[[int], object], batch_size: int, device: torch.device) -> float:
    start = time.perf_counter()
    run(batch_size)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
