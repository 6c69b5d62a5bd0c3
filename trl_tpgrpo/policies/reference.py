"""The reference model of the KL divergence: the model before training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .base import FlowPolicy, on_device


@dataclass
class Reference:
    """The model with its adapter disabled, or a frozen copy of all weights."""

    policy: FlowPolicy
    accelerator: Accelerator
    model: torch.nn.Module  # the trained model
    copy: torch.nn.Module | None  # frozen copy of the model, if there is no adapter to disable
    keep: bool  # whether to keep velocities with their trajectories, which are trained on again
    record: Callable[[str, float, str], None]  # of a metric, for the function evaluations

    def velocity(self, inputs: Any) -> Tensor:
        """Return the velocity (B, ...) for [`~trl_tpgrpo.batches.Transitions`], predicted or stored."""
        velocity = inputs.reference.get(inputs.position)
        if velocity is None:
            velocity = self._evaluate(inputs)
            if self.keep:
                inputs.reference[inputs.position] = velocity
        return velocity.to(inputs.latents.device)

    @torch.no_grad()
    def _evaluate(self, inputs: Any) -> Tensor:
        self.record("nfe_train", len(inputs.latents), "sum")
        if self.copy is not None:
            with self.accelerator.autocast():
                return self.policy.velocity(self.copy, inputs.latents, inputs.step, inputs.conditioning)
        adapter = self.accelerator.unwrap_model(self.model)
        with adapter.disable_adapter():
            return self.policy.velocity(adapter, inputs.latents, inputs.step, inputs.conditioning)

    def precompute(self, trajectories: Iterable[Any], offload: bool) -> None:
        """Predict and store the velocities of all SDE steps of trajectories, with `offload` on the CPU."""
        with on_device([self.copy], self.policy.device):
            for chunk in trajectories:
                for position in range(len(chunk.window)):
                    velocity = self.velocity(chunk.transitions(position))
                    chunk.reference[position] = velocity.cpu() if offload else velocity
