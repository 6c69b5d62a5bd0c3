"""The moving average of the trained weights, which is evaluated and saved as in the paper."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from transformers import TrainerCallback, TrainerState


class AveragedWeights(TrainerCallback):
    """diffusers' `EMAModel` of the trained weights, from update `every` on; before that, the weights are used.

    The average is updated after every `every`-th model update. Its decay is (1 + n) / (10 + n) after n earlier updates
    of the average, up to `decay` in [0, 1). With `decay=None`, there is no average.
    """

    def __init__(self, model: torch.nn.Module, decay: float | None, every: int):
        self.model, self.decay, self.every = model, decay, every
        self.average: EMAModel | None = None
        self._is_in_use = False

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.decay is None or state.global_step % self.every:
            return
        (self.average or self.start()).step(self._trained())

    def start(self) -> EMAModel:
        """Start the average with the current weights, and return it."""
        self.average = EMAModel(self._trained(), decay=self.decay)
        return self.average

    @property
    def num_moves(self) -> int:
        """Number of updates of the average."""
        return 0 if self.average is None else self.average.optimization_step

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the averaged weights inside the context; afterwards the model's own weights are restored exactly."""
        average = self.average
        if average is None or self._is_in_use:  # nested in an evaluation of several datasets
            yield
            return
        self._is_in_use = True
        average.store(self._trained())
        average.copy_to(self._trained())
        try:
            yield
        finally:
            self._is_in_use = False
            average.restore(self._trained())

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
