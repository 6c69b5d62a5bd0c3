"""Terminal output of a run: one line per rollout, and a live bar with the current phase."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerState

from .terminal import Stream, show


ITEMS = {
    "turning_points/rate": "turns {:.1%}", "clip_ratio": "clip {:.1%}", "kl": "kl {:.2g}", "grad_norm": "grad {:.2g}",
    "seconds/rollout": "rollout {:.1f} s", "seconds/train": "train {:.1f} s", "seconds/score": "score {:.1f} s",
    "seconds/decode": "decode {:.1f} s", "seconds/encode": "encode {:.1f} s",
    "ratio/max_deviation": "|ratio-1| {:.2g}", "learning_rate": "lr {:.2g}",
}  # fmt: skip
"""Items of a line after the rewards, if logged; the last ones are left out if the line is too long."""

BAR = "update {n_fmt}/{total_fmt} |{bar:16}| {desc}{postfix} | {rate_inv_fmt}, {remaining} left"


def duration(seconds: float) -> str:
    """Return `3.1 s`, `3:41` minutes or `2:05:09` hours."""
    return f"{seconds:.1f} s" if seconds < 59.95 else tqdm.format_interval(round(seconds)).lstrip("0")


def log_line(logs: dict[str, Any], state: TrainerState, left: str = "", num_updates: int = 1) -> str:
    """Return the line of a log: of the last updates (with the time `left`), of an evaluation, or of the end."""
    kind = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
    if kind == "train_":
        ended = "finished" if state.global_step >= state.max_steps else "stopped"
        return f"{ended} after update {state.global_step}, in {duration(logs['train_runtime'])}"
    title = f"updates {state.global_step - num_updates + 1}-" if num_updates > 1 else "update "
    parts = [f"{title}{state.global_step}/{state.max_steps}", *([left] if left else [])]
    if kind:  # "eval_", or "eval_{name}_" for one of several datasets
        name, images = kind.partition("_")[2].rstrip("_"), logs.get(f"{kind}num_scored_images", 0)
        title = f"evaluation{' of ' if name else ''}{name} after update {state.global_step}"
        parts = [f"{title} ({images:.0f} images in {duration(logs[f'{kind}runtime'])})"]
    if {f"{kind}reward", f"{kind}reward_std"} <= set(logs):
        parts.append(f"reward {logs[f'{kind}reward']:.3f} +- {logs[f'{kind}reward_std']:.3f}")
    functions = [name for name in logs if name.startswith(f"{kind}rewards/") and name.endswith("/mean")]
    parts += [f"{name.split('/')[1]} {logs[name]:.3f}" for name in functions if len(functions) > 1]
    parts += [text.format(logs[kind + name]) for name, text in ITEMS.items() if kind + name in logs]
    while len(parts) > 1 and len("  ".join(parts)) > shutil.get_terminal_size((120, 24)).columns:
        parts.pop()
    return "  ".join(parts)


def merged(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the logs of several updates: sum of seconds, maximum of maxima, mean of other values."""
    values = {name: [log[name] for log in logs if name in log] for name in chain(*logs)}
    kinds = [sum if name.startswith("seconds/") else max if "max" in name else fmean for name in values]
    return {name: kind(values[name]) for name, kind in zip(values, kinds, strict=True)}


class LogLines(PrinterCallback):
    """Prints one line for all updates on a rollout, without constant values, and one per evaluation."""

    def __init__(self, shows_time_left: bool = True) -> None:
        self._shows_time_left, self._began, self._first_step = shows_time_left, time.perf_counter(), 0
        self._pending: list[dict[str, Any]] = []  # logs of updates on a rollout that has more of them
        self._constant: dict[str, Any] = {}  # values in the first line; None: changed since

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._began, self._first_step = time.perf_counter(), state.global_step
        self._pending, self._constant = [], {}

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs, num_updates = logs or {}, 1
        if "loss" in logs and args.logging_steps == 1:
            self._pending.append(logs)
            updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
            goes_on = state.global_step < state.max_steps and not control.should_training_stop
            if state.global_step % max(1, updates) and goes_on:
                return
            logs, num_updates, self._pending = merged(self._pending), len(self._pending), []
        if "loss" in logs:
            constant = {name for name in ITEMS.keys() & logs.keys() if self._constant.get(name) == logs[name]}
            shown = ITEMS.keys() & logs.keys() - constant
            self._constant |= {name: None if name in self._constant else logs[name] for name in shown}
            logs = {name: value for name, value in logs.items() if name not in constant}
        done, remaining = state.global_step - self._first_step, state.max_steps - state.global_step
        seconds = (time.perf_counter() - self._began) / max(1, done) * remaining
        left = f"{duration(seconds)} left" if self._shows_time_left and done > 0 and remaining > 0 else ""
        if state.is_world_process_zero:
            show(log_line(logs, state, left, num_updates))


class ProgressDisplay(ProgressCallback):
    """A live bar with the current phase, and `LogLines`, instead of transformers' ProgressCallback."""

    def __init__(self, shows_bar: bool | None = None) -> None:
        super().__init__()
        shows_bar = sys.stderr.isatty() if shows_bar is None else shows_bar  # on terminals by default
        self._lines = LogLines(shows_time_left=not shows_bar)
        # Without smoothing, which would count each redraw as an update.
        self._new_bar = partial(
            tqdm, disable=not shows_bar, leave=False, dynamic_ncols=True, miniters=0, smoothing=0,
            file=Stream(sys.stderr),
        )  # fmt: skip
        self._bar = tqdm(disable=True)  # as a bar that has been closed
        self._part, self._index = "", 0  # the current sweep, micro-batch or evaluation batch
        self.is_evaluating = False
        self.watch()

    def watch(self) -> None:
        """Record from now on the time of the last progress and the longest pause."""
        self.moved_at, self.longest_pause = time.monotonic(), 0.0

    @contextmanager
    def phase(self, name: str, total: int, alone: bool = False) -> Iterator[Callable[..., None]]:
        """Show a phase of `total` units; yield the function to call with the number of finished units (default: 1)."""
        if alone:  # outside of training and evaluation
            with self._new_bar(desc=name, total=total) as bar:
                yield bar.update
            return
        done = 0

        def advance(number: int = 1) -> None:
            nonlocal done
            done += number
            now = time.monotonic()
            self.moved_at, self.longest_pause = now, max(self.longest_pause, now - self.moved_at)
            self._bar.set_description_str(f"{self._part}{name} {done}/{total}", refresh=number == 0)
            self._bar.update(0)  # draws the bar, at most every 0.1 seconds

        advance(0)
        yield advance

    def sweeps(self, parts: list[slice], title: str = "") -> Iterator[slice]:
        """Yield the parts of a rollout one after another, and show the current one after a title."""
        before = self._part
        for number, part in enumerate(parts, start=1):
            self._part = title + (f"sweep {number}/{len(parts)}, " if len(parts) > 1 else "")
            yield part
        self._part = before

    @contextmanager
    def evaluation(self, state: TrainerState) -> Iterator[None]:
        """Show that an evaluation is running, from its beginning on."""
        part, bar = self._part, self._bar
        self._part, self._index, self.is_evaluating = "evaluation, ", 0, True
        if self._bar.disable and state.is_world_process_zero:
            self._bar = self._new_bar(bar_format="{desc} [{elapsed}]")
        try:
            yield
        finally:
            self.is_evaluating = False
            if self._bar is not bar:
                self._bar.close()
            self._part, self._bar = part, bar

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._lines.on_train_begin(args, state, control)
        if state.is_world_process_zero:
            self._bar = self._new_bar(total=state.max_steps, initial=state.global_step, unit="update", bar_format=BAR)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._index = 0
        self.on_substep_end(args, state, control)

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._index, number = self._index + 1, args.gradient_accumulation_steps  # from 1
        self._part = f"micro-batch {self._index}/{number}, " if number > 1 else ""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._index += 1
        self._part = f"evaluation {self._index}/{len(kwargs['eval_dataloader'])}, "

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._lines.on_log(args, state, control, logs)
        if "reward" in (logs or {}):
            self._bar.set_postfix_str(f"reward {logs['reward']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar.close()
