"""Complete checkpoints, resuming, and saving before a run stops."""

import faulthandler
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..batches import SAVED_CLASSES
from .progress import ProgressDisplay
from .resuming import LAYOUT, SETTINGS, check_settings
from .storage import NoRoom, check_files, in_main_process, is_full, write_checksums
from .terminal import show


logger = logging.getLogger(__name__)

INCOMPLETE = "checkpoint-is-incomplete.txt"  # in a checkpoint while it is written, as transformers has it too
PROGRESS = "rollout_{}.pt"  # state of the process with that number
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAUNCHER_REPEATS = 2.0  # seconds in which a launcher repeats a signal that the terminal has already sent
PATIENCE = 300.0  # seconds without progress after a signal, or twice the longest pause if longer
LAST = "last"  # folder of the trained weights, if those next to it are averaged


def is_complete(checkpoint: str | Path) -> bool:
    """Check whether a checkpoint is complete."""
    return not (Path(checkpoint) / INCOMPLETE).exists() and (Path(checkpoint) / TRAINER_STATE_NAME).exists()


def refuse_used_folder(output_dir: str | Path) -> None:
    """Raise a `ValueError` if a folder has checkpoints, which a new run would mix with its own."""
    used = [path.name for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(path)]
    if used:
        what = f"output_dir={str(output_dir)!r} has checkpoints of an earlier run ({', '.join(sorted(used)[:3])})"
        raise ValueError(f"{what}: resume it by resume_from_checkpoint=True, or choose another folder.")


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder with their updates, in order."""
    found = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*")}
    return sorted((int(match[1]), path) for path, match in found.items() if match)


def last_complete(output_dir: str | Path) -> Path:
    """Return the latest complete checkpoint; raise FileNotFoundError if there is none."""
    for _, path in reversed(numbered(output_dir)):
        if is_complete(path):
            return path
        logger.warning("%s is incomplete and is skipped.", path)
    raise FileNotFoundError(f"{output_dir} has no complete checkpoint to resume from.")


def to_resume(trainer: Any, resume_from_checkpoint: str | bool | None) -> Path | None:
    """Return the checkpoint to resume from, after comparing settings; `None`: a new run."""
    folder, accepted = trainer.args.output_dir, trainer.args.resume_with_changes
    if not resume_from_checkpoint:
        refuse_used_folder(folder)
        if accepted:
            raise ValueError("resume_with_changes is for a resumed run: set resume_from_checkpoint too.")
        return None
    checkpoint = last_complete(folder) if resume_from_checkpoint is True else Path(resume_from_checkpoint).absolute()
    if not is_complete(checkpoint):
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint, or is incomplete.")
    in_main_process(trainer.accelerator, lambda: check_files(checkpoint))
    unpickled = [*checkpoint.rglob(".metadata"), *checkpoint.rglob("*_states.pt")]  # of sharded FSDP2, and DeepSpeed
    if unpickled and Path(folder) not in checkpoint.parents:
        logger.warning("%s: reading it runs any code in it. Use only trusted files. See SECURITY.md.", unpickled[0])
    now, hide = trainer.describe_run(), trainer.args.without_secrets
    for name, value in check_settings(checkpoint, now, accepted, hide).items():
        setattr(trainer.args, name, value)
    if trainer.is_world_process_zero():
        show(f"Resuming from {checkpoint}, after update {saved_state(checkpoint).global_step}.")
    return checkpoint


def saved_state(checkpoint: Path) -> TrainerState:
    """Read transformers' trainer state from a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def is_finished(checkpoint: Path, args: Any) -> bool:
    """Check whether the run of a checkpoint has made all updates of the settings."""
    state = saved_state(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0) >= args.num_train_epochs


def restore_finished(trainer: Any, checkpoint: Path) -> TrainOutput:
    """Restore the weights and log of a finished run; there is nothing to train."""
    if trainer.is_world_process_zero():
        show(f"{checkpoint} has made all updates: there is nothing to train.")
    trainer.state = saved_state(checkpoint)
    trainer.state.is_local_process_zero = trainer.is_local_process_zero()
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return TrainOutput(trainer.state.global_step, 0.0, {})


@contextmanager
def being_written(trainer: Any, checkpoint: Path) -> Iterator[None]:
    """Mark a checkpoint as incomplete until all processes have written their parts; delete none before."""
    accelerator, args, limit = trainer.accelerator, trainer.args, trainer.args.save_total_limit
    args.save_total_limit = None
    try:
        if accelerator.is_main_process:
            if checkpoint != trainer._saved:  # also at the end of an epoch
                set_aside(checkpoint.parent, trainer.state.global_step)
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / INCOMPLETE).write_text("This checkpoint is incomplete.\n")
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_checksums(checkpoint, besides=INCOMPLETE)
            (checkpoint / INCOMPLETE).unlink()
        trainer._saved = checkpoint
    except Exception as error:
        if accelerator.is_main_process and is_full(checkpoint, error):
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    finally:
        args.save_total_limit = limit


def set_aside(run: Path, step: int) -> None:
    """Move checkpoints of update `step` and later to another folder, after resuming from an earlier one.

    Rotation and resuming compare update numbers, so they would treat these as the newest. Incomplete checkpoints are
    deleted.
    """
    later = [path for number, path in numbered(run) if number >= step]
    for path in [path for path in later if (path / INCOMPLETE).exists()]:
        later.remove(path)
        shutil.rmtree(path)
    if later:
        target = next(path for number in count(1) if not (path := run / f"abandoned-{number}").exists())
        target.mkdir()
        names = ", ".join(path.rename(target / path.name).name for path in later)
        logger.warning("%s was moved to %s: the run was resumed from an earlier checkpoint.", names, target)


@contextmanager
def room(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """Raise an OSError for errors of a full disk of `folder`, with a list of complete checkpoints."""
    try:
        yield
    except NoRoom:
        raise
    except Exception as error:
        if not is_full(folder, error):
            raise
        whole = [path.name for _, path in numbered(output_dir) if is_complete(path)]
        kept = f"Complete checkpoints in {output_dir}: {', '.join(whole) or 'none'}"
        remedy = "Free space (or set save_total_limit), and resume by resume_from_checkpoint=True"
        raise NoRoom(f"The disk of {folder} is full ({error}). {kept}. {remedy if whole else 'Free it'}.") from error


def rotate(trainer: Any) -> None:
    """Delete the oldest checkpoints over `save_total_limit`, unless a push may still need them."""
    if trainer.args.should_save and not trainer.hub.is_busy:
        run, best = trainer._get_output_dir(trial=None), trainer.state.best_model_checkpoint
        best = best and str(Path(run) / Path(best).name)  # whose folder may have moved
        rotate_checkpoints(run, trainer.args.save_total_limit, best)


def save_progress(trainer: Any, checkpoint: Path) -> None:
    """Save the state of this process of a `TPGRPOTrainer`, in addition to transformers' files and the weights."""
    is_used_up = trainer._step % trainer._generate_every == 0
    progress = {
        "step": trainer._step,
        "layout": layout(trainer.args, trainer.accelerator.num_processes),
        "buffered_inputs": None if is_used_up else trainer._buffered_inputs,
        "num_moves_of_average": trainer.averaged.num_moves,
        "guard_rails": trainer.guard_rails and trainer.guard_rails.state_dict(),
        **trainer.rollouts.state_dict(),
    }
    torch.save(progress, checkpoint / PROGRESS.format(trainer.accelerator.process_index))
    if trainer.accelerator.is_main_process:
        (checkpoint / SETTINGS).write_text(json.dumps(trainer.describe_run(), indent=1, default=str))


def load_progress(trainer: Any, checkpoint: Path) -> None:
    """Restore the state of `save_progress`, if it is complete and the layout is the same; execute nothing."""
    for part in () if trainer.is_deepspeed_enabled else ("optimizer", "scheduler"):
        if not any(checkpoint.glob(f"*{part}*")):
            hint = "(saved with save_only_model?): it cannot be resumed"
            raise FileNotFoundError(f"{checkpoint} has no {part} {hint}.")
    path = checkpoint / PROGRESS.format(trainer.accelerator.process_index)
    if not path.exists():
        hint = "Resume on the number of processes of the saved run."
        raise FileNotFoundError(f"{path} is missing. It has the rollout in use at the checkpoint. ({hint})")
    with torch.serialization.safe_globals([*SAVED_CLASSES, (_as_list, "collections.deque")]):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in layout(trainer.args, trainer.accelerator.num_processes).items():
        if (before := saved["layout"][name]) != value:
            hint = "resume with the batch sizes, processes and seed of the saved run"
            raise ValueError(f"{checkpoint} was saved with {before} for {name}, and this run has {value}: {hint}.")
    if saved["num_moves_of_average"] and not (checkpoint / LAST).exists():
        raise FileNotFoundError(f"{checkpoint / LAST} is missing. It has the trained weights (not the average).")
    trainer._step = saved["step"]
    if trainer.averaged.average is not None:
        trainer.averaged.average.optimization_step = saved["num_moves_of_average"]
    if trainer.guard_rails is not None and saved["guard_rails"] is not None:
        trainer.guard_rails.load_state_dict(saved["guard_rails"])
    trainer.rollouts.load_state_dict(saved)
    device, offload = trainer.args.device, trainer.args.offload_trajectories
    buffered = saved["buffered_inputs"]
    if buffered and trainer._step % trainer._generate_every:  # and not used up
        buffered[0].check_loss(trainer.args)
    trainer._buffered_inputs = buffered and [trajectories.to(device, offload) for trajectories in buffered]


def layout(args: Any, num_processes: int) -> dict[str, int]:
    """Return the values that must be equal in a resumed run."""
    return {"processes": num_processes} | {name: getattr(args, name) for name in LAYOUT}


def _as_list(values: Iterable = (), maxlen: int | None = None) -> list:
    """Replace the deque in guard rails saved by version 0.1.0, which torch does not load."""
    return list(values)


_is_listening = threading.Event()


def _hold_signals() -> None:
    if _is_listening.is_set():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals_come() -> None:
    if _is_listening.is_set():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_forked_process() -> None:
    """Let a forked process (of a reward function, for example) end by SIGTERM."""
    if _is_listening.is_set():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _let_signals_come()


os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_come, after_in_child=_in_forked_process)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C, all processes finish the update, save a checkpoint and stop; a second signal ends at once.

    If there is no progress, for example because a reward function never returns, the process is ended.
    """

    def __init__(self, accelerator: Accelerator, progress: ProgressDisplay):
        self.accelerator, self._progress = accelerator, progress
        self.stopped: signal.Signals | None = None  # signal that stopped the run
        self._received, self._received_at = 0, 0.0
        self._former: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the context, in the main thread only (a limit of Python)."""
        self.stopped, self._received, self._former = None, 0, {}
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._progress.watch()
        is_over, (reader, writer) = threading.Event(), os.pipe()
        os.set_blocking(writer, False)
        watcher = threading.Thread(target=self._watch, args=(reader, is_over), name="signals", daemon=True)
        watcher.start()
        former_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        _is_listening.set()
        try:
            yield
        finally:
            _is_listening.clear()
            for number, handler in self._former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_writer)
            is_over.set()
            os.write(writer, b"\0")
            watcher.join()
            os.close(reader)
            os.close(writer)

    def _watch(self, reader: int, is_over: threading.Event) -> None:
        """End the process, and print where it hangs, if there is no progress for too long after a signal.

        This runs in another thread, because Python's handlers wait while the main one hangs in native code. The time
        to save the last checkpoint is not counted.
        """
        while (received := os.read(reader, 1)[0]) not in SIGNALS and not is_over.is_set():
            pass
        while not is_over.is_set():
            faulthandler.dump_traceback_later(self._patience, exit=True, file=2)
            moved_at = self._progress.moved_at
            while not is_over.wait(1.0) and self._progress.moved_at == moved_at and not self._is_saving:
                pass
        if received in SIGNALS:
            faulthandler.cancel_dump_traceback_later()

    @property
    def _patience(self) -> float:
        return max(PATIENCE, 2 * self._progress.longest_pause)

    @property
    def _is_saving(self) -> bool:
        return self.stopped is not None and not self._progress.is_evaluating

    def _receive(self, number: int, frame: Any) -> None:
        if not self._received:
            self._received, self._received_at = number, time.monotonic()
            what = "%s: the run stops after this update, with a checkpoint. A second signal ends it at once"
            name = signal.Signals(number).name
            logger.warning(f"{what}, as do %.0f seconds without progress.", name, self._patience)
        elif time.monotonic() - self._received_at > LAUNCHER_REPEATS:
            signal.signal(number, self._former[signal.Signals(number)])
            signal.raise_signal(number)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor(self._received, device=self.accelerator.device)
        if number := int(self.accelerator.gather(received.view(1)).max()):
            self.stopped = signal.Signals(number)
            control.should_save = control.should_training_stop = True
