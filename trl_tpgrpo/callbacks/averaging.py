"""The moving average of the trained weights, which the paper evaluates and saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from transformers import TrainerCallback, TrainerState


class AveragedWeights(TrainerCallback):
    """diffusers' `EMAModel` of trained weights, begun at update `every`; before it the weights themselves are used.

    The average moves after every `every`-th update, by a decay that rises as (1 + n) / (10 + n) with the number n of
    earlier moves, up to `decay` in [0, 1). With `None` for `decay` there is never an average.
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
        """Begin the average with the weights that the model has now, and return it."""
        self.average = EMAModel(self._trained(), decay=self.decay)
        return self.average

    @property
    def num_moves(self) -> int:
        """Number of the average's moves so far."""
        return 0 if self.average is None else self.average.optimization_step

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the model the averaged weights inside, and afterwards its own again, to the bit."""
        average = self.average
        if average is None or self._is_in_use:  # an evaluation of several datasets is one of each, inside
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
