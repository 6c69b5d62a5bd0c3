"""The model before training, from which the KL divergence is measured."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .base import FlowPolicy, on_device


class Reference:
    """The model with its adapter switched off, or a frozen copy of all weights.

    Args:
        policy: Policy that predicts.
        accelerator: Accelerator of the run.
        model: Model that is trained.
        copy: Frozen copy of it, where no adapter can be switched off.
        keep: Whether velocities are kept with their trajectories, because these are trained on again.
        record: Recorder of a metric, for the number of function evaluations.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        accelerator: Accelerator,
        model: torch.nn.Module,
        copy: torch.nn.Module | None,
        keep: bool,
        record: Callable[[str, float, str], None],
    ):
        self.policy, self.accelerator, self.model, self.copy = policy, accelerator, model, copy
        self.keep, self.record = keep, record

    def velocity(self, inputs: Any) -> Tensor:
        """Predict the velocity (B, ...) of [`~trl_tpgrpo.batches.Transitions`], or take the one that was kept."""
        velocity = inputs.reference.get(inputs.position)
        if velocity is None:
            velocity = self._evaluate(inputs)
            if self.keep:
                inputs.reference[inputs.position] = velocity
        return velocity.to(inputs.latents.device)

    @torch.no_grad()
    def _evaluate(self, inputs: Any) -> Tensor:
        self.record("num_train_evaluations", len(inputs.latents), "sum")
        if self.copy is not None:
            with self.accelerator.autocast():
                return self.policy.velocity(self.copy, inputs.latents, inputs.timestep, inputs.conditioning)
        adapter = self.accelerator.unwrap_model(self.model)
        with adapter.disable_adapter():
            return self.policy.velocity(adapter, inputs.latents, inputs.timestep, inputs.conditioning)

    def precompute(self, chunks: Iterable[Any], offload: bool) -> None:
        """Predict the velocities of all SDE steps of [`~trl_tpgrpo.batches.Trajectories`], and leave the device again.

        Args:
            chunks: Micro-batches, which keep the velocities.
            offload: Whether the velocities are kept on the CPU.
        """
        with on_device([self.copy], self.policy.device):
            for chunk in chunks:
                for position in range(len(chunk.window)):
                    velocity = self.velocity(chunk.transitions(position))
                    chunk.reference[position] = velocity.cpu() if offload else velocity
