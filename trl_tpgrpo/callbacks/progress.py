"""What a person sees of a run: one live bar with the phase under way, and one line for each log."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments


WIDTH = 120
"""Columns that a line may take."""

LINES_A_HEADER = 20
"""After so many lines the header is repeated."""

SECONDS_A_REFRESH = 0.1


@dataclass(frozen=True)
class Column:
    """A number that a line of the log shows.

    Attributes:
        title: Above it.
        metrics: Its names; the column is there once they have been logged.
        show: The text of their values.
        width: Characters.
        rank: Where a line would be too long, those of the highest rank are left out.
    """

    title: str
    metrics: tuple[str, ...]
    show: Callable[..., str]
    width: int
    rank: int = 0


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


def _small(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


COLUMNS = (
    Column("reward +- std", ("reward", "reward_std"), lambda mean, std: f"{mean:.3f} +- {std:.3f}", 15),
    Column("turns", ("turning_points/rate",), _percent, 5),
    Column("clip", ("clip_ratio",), _percent, 5),
    Column("kl", ("kl",), _small, 7),
    Column("|ratio-1|", ("ratio/max_deviation",), _small, 9),
    Column("grad", ("grad_norm",), _small, 7),
    Column("lr", ("learning_rate",), _small, 7, rank=5),
    Column("encode", ("seconds/encode",), _seconds, 6, rank=6),
    Column("rollout", ("seconds/rollout",), _seconds, 7),
    Column("decode", ("seconds/decode",), _seconds, 6, rank=4),
    Column("score", ("seconds/score",), _seconds, 5, rank=4),
    Column("train s", ("seconds/train",), _seconds, 7),
)


def duration(seconds: float) -> str:
    """`12 s`, `3:41` minutes or `2:05:09` hours."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Pace:
    """How fast updates go, since this process began with them."""

    def __init__(self) -> None:
        self._began, self._first = time.perf_counter(), 0

    def start(self, step: int) -> None:
        """Training goes on from update `step`."""
        self._began, self._first = time.perf_counter(), step

    def seconds_an_update(self, step: int) -> float:
        """On average; NaN before the first is done."""
        done = step - self._first
        return (time.perf_counter() - self._began) / done if done > 0 else math.nan

    def left(self, state: TrainerState) -> float:
        """Seconds until the last update; NaN before the first is done."""
        return self.seconds_an_update(state.global_step) * (state.max_steps - state.global_step)


class LogTable:
    """Turns logs into lines of a table whose header comes again when a column is new, and now and then."""

    def __init__(self, pace: Pace, shows_time_left: bool):
        self._pace, self._shows_time_left = pace, shows_time_left
        self._seen: dict[str, None] = {}
        self._since_header = 0

    def lines(self, logs: dict[str, Any], state: TrainerState) -> list[str]:
        """The line of a log, after a header if it needs one."""
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), None)
        if prefix == "train":
            return [f"finished after update {state.global_step}, in {duration(logs['train_runtime'])}"]
        return [self._of_evaluation(logs, prefix, state)] if prefix is not None else self._of_updates(logs, state)

    @staticmethod
    def _of_evaluation(logs: dict[str, Any], prefix: str, state: TrainerState) -> str:
        """That of `prefix`, which is `eval` or, of one of several datasets, `eval_name`."""
        name = prefix.partition("_")[2]
        parts = [f"evaluation{f' of {name}' if name else ''} after update {state.global_step}:"]
        if f"{prefix}_reward" in logs:
            parts.append(f"reward {logs[f'{prefix}_reward']:.3f}")
        functions = [key for key in logs if key.startswith(f"{prefix}_rewards/") and key.endswith("/mean")]
        for key in functions if len(functions) > 1 else []:
            parts.append(f"{_function(key)} {logs[key]:.3f}")
        images = logs.get(f"{prefix}_num_scored_images")
        of_images = f"{images:.0f} images in " if images is not None else ""
        return "  ".join([*parts, f"({of_images}{duration(logs[f'{prefix}_runtime'])})"])

    def _of_updates(self, logs: dict[str, Any], state: TrainerState) -> list[str]:
        known = len(self._seen)
        self._seen |= dict.fromkeys(name for name in logs if name not in self._seen)
        columns = self._columns(state)
        lines = []
        if len(self._seen) > known or self._since_header == LINES_A_HEADER:
            lines.append("  ".join(f"{column.title:>{column.width}}" for column in columns))
            self._since_header = 0
        self._since_header += 1
        values = {**logs, "update": state.global_step, "left": self._pace.left(state)}
        return [*lines, "  ".join(f"{_cell(column, values):>{column.width}}" for column in columns)]

    def _columns(self, state: TrainerState) -> list[Column]:
        """Those that something has been logged for, as far as they fit."""
        digits = len(str(state.max_steps))
        first = Column("update", ("update",), lambda step: f"{step}/{state.max_steps}", max(6, 2 * digits + 1))
        left = [Column("left", ("left",), _time_left, 7, rank=1)] if self._shows_time_left else []
        names = [key for key in self._seen if key.startswith("rewards/") and key.endswith("/mean")]
        functions = [
            Column(_function(key)[:14], (key,), "{:.3f}".format, max(6, len(_function(key)[:14])), rank=3)
            for key in (names if len(names) > 1 else [])
        ]
        measured = [column for column in COLUMNS if all(name in self._seen for name in column.metrics)]
        columns = [first, measured[0], *functions, *measured[1:], *left] if measured else [first, *left]
        while sum(column.width + 2 for column in columns) - 2 > WIDTH and any(column.rank for column in columns):
            worst = max(column.rank for column in columns)
            columns.remove([column for column in columns if column.rank == worst][-1])
        return columns


def _function(metric: str) -> str:
    """The reward function's name in that of its metric, `eval_rewards/{name}/mean`."""
    return metric.split("/")[1]


def _time_left(seconds: float) -> str:
    return "?" if math.isnan(seconds) else duration(seconds)


def _cell(column: Column, values: dict[str, Any]) -> str:
    """A dash where the log has nothing, as for rewards where an update takes a rollout that is there already."""
    if not all(name in values for name in column.metrics):
        return "-"
    return column.show(*(float(values[name]) if name != "update" else values[name] for name in column.metrics))


class LogLines(PrinterCallback):
    """One line for each log, in place of transformers' PrinterCallback, which prints the whole dictionary."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._table = LogTable(self._pace, shows_time_left=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.start(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for line in self._table.lines(logs or {}, state) if state.is_world_process_zero else []:
            tqdm.write(line)


class ProgressDisplay(ProgressCallback):
    """A live bar on a terminal, which shows the phase under way, and one line for each log anywhere.

    In place of transformers' ProgressCallback. Without a bar each line says how much time is left. Phases that are told of
    outside of training and evaluation are not shown.

    Args:
        shows_bar: `None`: if standard error is a terminal.
    """

    def __init__(self, shows_bar: bool | None = None) -> None:
        super().__init__()
        self._shows_bar = sys.stderr.isatty() if shows_bar is None else shows_bar
        self._pace = Pace()
        self._table = LogTable(self._pace, shows_time_left=not self._shows_bar)
        self._bar: tqdm | None = None
        self._state = TrainerState()
        self._phase = self._sweep = self._micro_batch = self._evaluation = ""
        self._done = self._total = self._num_done = 0
        self._reward, self._refreshed = math.nan, -math.inf

    # ------------------------------------------------------------------------------------------ told by the trainer

    @contextmanager
    def phase(self, name: str, total: int, alone: bool = False) -> Iterator[Callable[..., None]]:
        """Show that a phase of `total` units is under way; it gives a function to call when one, or several, are done.

        Args:
            name: Such as `"rollout"`.
            total: How many units it has.
            alone: Whether to show it outside of training and evaluation too.
        """
        self._phase, self._done, self._total = name, 0, total
        with self._open() if alone else nullcontext():
            self._refresh(at_once=True)
            try:
                yield self._advance
            finally:
                self._phase = ""

    def sweeps(self, parts: list[slice]) -> Iterator[slice]:
        """The parts of a rollout one after the other, and show which it is."""
        for number, part in enumerate(parts, start=1):
            self._sweep = f"sweep {number}/{len(parts)}, " if len(parts) > 1 else ""
            yield part
        self._sweep = ""

    @contextmanager
    def evaluation(self, state: TrainerState) -> Iterator[None]:
        """Show that an evaluation is under way; transformers tells of its batches when they are done, not of its beginning."""
        self._state, self._num_done, self._evaluation = state, 0, "evaluation: "
        try:
            with self._open():
                yield
        finally:
            self._evaluation = ""

    # ------------------------------------------------------------------------------------- transformers' own events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pace.start(state.global_step)
        self._state, self._reward = state, math.nan
        self._bar = _new_bar() if state.is_world_process_zero and self._shows_bar else None
        self._refresh(at_once=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._num_done = 0
        self._name_micro_batch(args)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._num_done += 1
        self._name_micro_batch(args)

    def _name_micro_batch(self, args: TrainingArguments) -> None:
        number = args.gradient_accumulation_steps
        self._micro_batch = f"micro-batch {self._num_done + 1}/{number}, " if number > 1 else ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._refresh()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._num_done += 1
        self._evaluation = f"evaluation {self._num_done}/{len(eval_dataloader)}: "
        self._refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self._reward = logs.get("reward", self._reward)
        for line in self._table.lines(logs, state) if state.is_world_process_zero else []:
            tqdm.write(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    # ---------------------------------------------------------------------------------------------------- the bar

    @contextmanager
    def _open(self) -> Iterator[None]:
        """A bar, inside of which there is one already that one."""
        is_ours = self._bar is None and self._shows_bar and self._state.is_world_process_zero
        if is_ours:
            self._bar = _new_bar()
        try:
            yield
        finally:
            if is_ours:
                self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _advance(self, number: int = 1) -> None:
        self._done += number
        self._refresh()

    def _refresh(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._bar is None or not (at_once or now - self._refreshed >= SECONDS_A_REFRESH):
            return
        self._refreshed = now
        before, after = self._texts()
        if self._state.max_steps > 0:
            self._bar.total, self._bar.n = self._state.max_steps, self._state.global_step
        else:
            self._bar.total, self._bar.n = max(1, self._total), self._done
        self._bar.bar_format = f"{before} |{{bar:16}}| {after}"
        self._bar.refresh()

    def _texts(self) -> tuple[str, str]:
        """What stands before and behind the bar."""
        state = self._state
        if self._phase:
            part = self._evaluation or (self._micro_batch if self._phase == "train" else self._sweep)
            under_way = f"{part}{self._phase} {min(self._done, self._total)}/{self._total}"
        else:
            under_way = self._evaluation.rstrip(": ")
        if state.max_steps == 0:
            return under_way, ""
        pace = self._pace.seconds_an_update(state.global_step)
        parts = [under_way, "" if math.isnan(self._reward) else f"reward {self._reward:.3f}"]
        parts += [] if math.isnan(pace) else [f"{_seconds(pace)} s/update", f"{duration(self._pace.left(state))} left"]
        return f"update {state.global_step}/{state.max_steps}", " | ".join(part for part in parts if part)


def _new_bar() -> tqdm:
    return tqdm(total=1, dynamic_ncols=True, leave=False, bar_format=" ", file=sys.stderr)
