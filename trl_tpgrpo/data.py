"""The order of the training prompts."""

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's `RepeatSampler`, with an order that depends on the epoch alone and so survives a resume."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch; accelerate's own way does not reach through its wrappers on several processes."""

    sampler: EpochSampler | None = None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self.sampler is not None
        self.sampler.epoch = int(state.epoch + 1e-6)
