"""Checkpoints that are whole or not taken for one, and runs that save before they stop."""

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""In a checkpoint while it is written, a name that transformers uses for the same."""


def is_complete(checkpoint: str | Path) -> bool:
    """Whether all of a checkpoint has been written."""
    return not (Path(checkpoint) / INCOMPLETE).exists() and (Path(checkpoint) / TRAINER_STATE_NAME).exists()


def last_complete(output_dir: str | Path) -> Path:
    """The latest checkpoint that is whole.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")}
    by_step = sorted((int(match[1]), path) for path, match in found.items() if match)
    for _, path in reversed(by_step):
        if is_complete(path):
            return path
        logger.warning("%s was not written to its end and is passed over.", path)
    raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from.")


@contextmanager
def being_written(checkpoint: Path, accelerator: Accelerator) -> Iterator[None]:
    """Mark a checkpoint as incomplete until all processes have written their part."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        (checkpoint / INCOMPLETE).write_text("This checkpoint has not been written to its end.\n")
    accelerator.wait_for_everyone()
    yield
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (checkpoint / INCOMPLETE).unlink()


class StopOnSignal(TrainerCallback):
    """On SIGTERM to any process, all finish their update, save a checkpoint and stop.

    Args:
        accelerator: Of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped = False
        self._received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is waited for inside. In threads other than the main one Python cannot do that, and nothing happens."""
        self.stopped = self._received = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)

    def _receive(self, *_: Any) -> None:
        logger.warning("SIGTERM: the run will stop after this update, with a checkpoint.")
        self._received = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor(int(self._received), device=self.accelerator.device)
        if self.accelerator.reduce(received, "sum").item():
            self.stopped = control.should_save = control.should_training_stop = True
