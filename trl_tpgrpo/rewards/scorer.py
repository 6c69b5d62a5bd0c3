"""Running reward functions: each in batches of its own size, beside the model where it may, never longer than its timeout.

A function that waits for something else (a server, native code that releases the interpreter) declares `runs_in = "thread"` or is `async`: its
calls are under way while the next images are sampled and decoded. The others are called as images are handed in.
"""

import asyncio
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .contract import RewardError, RewardFunc, RewardUnavailable, checked, declared, is_async, reward_name


FAILURES = ("stop", "skip")
POLL = 0.02
"""Seconds between two looks at a call that has a timeout."""


@dataclass(frozen=True)
class ImageBatch:
    """N images to be scored, and what they are of.

    Attributes:
        images: N images.
        pixels: uint8, (N, 3, H, W), the same images where the model is; `None` if no function asks for tensors.
        prompts: N prompts.
        columns: The other columns of the dataset, N values each.
    """

    images: list[Image.Image]
    pixels: Tensor | None
    prompts: list[str]
    columns: dict[str, list]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> "ImageBatch":
        pixels = None if self.pixels is None else self.pixels[rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return ImageBatch(self.images[rows], pixels, self.prompts[rows], columns)

    def arguments(self, reward_func: RewardFunc) -> dict[str, Any]:
        """What a function is called with, its images as it has declared them."""
        images: Any = self.images
        if declared(reward_func).image_type == "pt":
            assert self.pixels is not None
            images = self.pixels.float() / 255
        return {"images": images, "prompts": self.prompts, **self.columns}


@dataclass(frozen=True)
class Scores:
    """What F functions gave N images.

    Attributes:
        rewards: float32, (F, N), on the CPU; NaN where a function does not apply, or failed.
        failed: bool, (N,), on the CPU: where one of them failed, if failures are skipped.
        errors: What they failed with.
        extra: Columns that functions have logged beside their rewards, N values each; `None` where one has not.
    """

    rewards: Tensor
    failed: Tensor
    errors: list[RewardError] = field(default_factory=list)
    extra: dict[str, list] = field(default_factory=dict)


class Scorer:
    """Calls reward functions.

    Args:
        failures: `"stop"`: a function that fails is an error. `"skip"`: the images that it fails on are marked.
    """

    def __init__(self, failures: str = "stop"):
        self.failures = failures
        self._workers: dict[int, _Worker] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(
        self,
        reward_funcs: list[RewardFunc],
        batch: ImageBatch,
        extra: dict[str, Any],
        on_function: Callable[[], object] = lambda: None,
    ) -> "Scoring":
        """Begin to score a batch with each function; those that do not run beside the model are done when this returns.

        Args:
            reward_funcs: F functions.
            batch: N images.
            extra: Passed on to each, such as `trainer_state`.
            on_function: Called after each has begun, for a progress bar.
        """
        scoring = Scoring(self, reward_funcs, batch, extra)
        beside = [runs_beside(function) for function in reward_funcs]
        for number in sorted(range(len(reward_funcs)), key=lambda number: not beside[number]):
            scoring.begin(number)
            on_function()
        return scoring

    def submit(self, reward_func: RewardFunc, arguments: dict[str, Any]) -> Future:
        """Call a function where it runs."""
        options = declared(reward_func)
        if is_async(reward_func):
            return asyncio.run_coroutine_threadsafe(
                _awaited(reward_func, arguments, options.timeout), self._event_loop()
            )
        if options.runs_in == "thread" or options.timeout is not None:
            if id(reward_func) not in self._workers:
                self._workers[id(reward_func)] = _Worker()
            return self._workers[id(reward_func)].submit(lambda: reward_func(**arguments))
        return _called(lambda: reward_func(**arguments))

    def give_up_if_hung(self, reward_func: RewardFunc, timeout: float) -> None:
        """Leave a worker whose call takes longer than that to itself; another makes the calls that wait."""
        worker = self._workers.get(id(reward_func))
        if worker is not None and worker.gives_up(timeout):
            self._workers[id(reward_func)] = worker.successor()

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            _start_thread(self._loop.run_forever)
        return self._loop


@dataclass(frozen=True)
class _Call:
    """A call under way, and what its function logs until it has returned: metrics are the main thread's to record."""

    rows: slice
    future: Future
    metrics: list[tuple[str, float]]
    extra: dict[str, list]


class Scoring:
    """A batch that is being scored.

    Args:
        scorer: Runs the functions.
        reward_funcs: F functions.
        batch: N images.
        extra: Passed on to each.
    """

    def __init__(self, scorer: Scorer, reward_funcs: list[RewardFunc], batch: ImageBatch, extra: dict[str, Any]):
        self.scorer, self.reward_funcs, self.batch, self.extra = scorer, reward_funcs, batch, extra
        self._under_way: list[tuple[int, _Call]] = []
        self._rewards = torch.full((len(reward_funcs), len(batch)), torch.nan)
        self._failed = torch.zeros(len(batch), dtype=torch.bool)
        self._errors: list[RewardError] = []
        self._logged: dict[str, list] = {}

    def begin(self, number: int) -> None:
        """Start the calls of one function, and end them too unless they run beside the model."""
        size = declared(self.reward_funcs[number]).batch_size or max(len(self.batch), 1)
        for start in range(0, len(self.batch), size):
            rows = slice(start, min(start + size, len(self.batch)))
            if runs_beside(self.reward_funcs[number]):
                self._under_way.append((number, self._call(number, rows)))
            elif not self._has_stopped:
                self._collect(number, self._call(number, rows))

    def result(self) -> Scores:
        """Wait for the functions that are under way.

        Raises:
            RewardError: If one fails, unless that is skipped: with its name, the row, the prompt and the image.
        """
        while self._under_way and not self._has_stopped:
            self._collect(*self._under_way.pop(0))
        if self._has_stopped:
            raise self._errors[0]
        self._rewards[:, self._failed] = torch.nan
        return Scores(self._rewards, self._failed, self._errors, self._logged)

    @property
    def _has_stopped(self) -> bool:
        return bool(self._errors) and self.scorer.failures == "stop"

    def _call(self, number: int, rows: slice) -> _Call:
        function, metrics, extra = self.reward_funcs[number], [], {}

        def log_metric(name: str, value: float) -> None:
            metrics.append((name, value))

        def log_extra(name: str, values: Sequence) -> None:
            extra[name] = list(values)

        logging = {"log_metric": log_metric, "log_extra": log_extra}
        arguments = {**self.batch[rows].arguments(function), **self.extra, **logging}
        return _Call(rows, self.scorer.submit(function, arguments), metrics, extra)

    def _collect(self, number: int, call: _Call) -> None:
        """Take what one call has given, or note what it has failed on."""
        try:
            self._rewards[number, call.rows] = self._rewards_of(number, call)
        except RewardError as error:
            self._errors.append(self._explained(error, number, call.rows))

    def _explained(self, error: RewardError, number: int, rows: slice) -> RewardError:
        """The error of a call, with the row that it is due to, and what can be saved of the call."""
        cause = error.__cause__
        raised = (
            error.row is None and cause is not None and not error.hung and not isinstance(cause, RewardUnavailable)
        )
        if error.row is None and not raised:  # it hung, or the number or kind of its answers is wrong: no row's doing
            self._failed[rows] = True
            return error
        if error.row is not None and self.scorer.failures == "stop":
            return error
        return self._one_by_one(number, rows) or _on_none_alone(error, rows)

    def _one_by_one(self, number: int, rows: slice) -> RewardError | None:
        """Ask again for each image of a call that has failed, to tell which it was; the first error."""
        first: RewardError | None = None
        for row in range(rows.start, rows.stop):
            alone = slice(row, row + 1)
            try:
                self._rewards[number, row] = self._rewards_of(number, self._call(number, alone))[0]
            except RewardError as error:
                first = first or error.at(row, self.batch.prompts[row], self.batch.images[row])
                self._failed[row : rows.stop if error.hung else row + 1] = True
                if error.hung or self.scorer.failures == "stop":
                    break
        return first

    def _rewards_of(self, number: int, call: _Call) -> Tensor:
        """Those of one call, (N,); what it has logged is kept."""
        function, rows = self.reward_funcs[number], call.rows
        part = self.batch[rows]
        try:
            rewards = checked(function, self._wait(function, call.future), part.prompts, part.images)
        except RewardError as error:
            if error.row is None:
                raise
            row = rows.start + error.row
            raise error.at(row, self.batch.prompts[row], self.batch.images[row]) from error.__cause__
        for name, values in call.extra.items():
            if len(values) != len(part):
                what = f"logged {len(values)} values of {name!r} for {len(part)} images"
                raise RewardError(reward_name(function), what)
            self._logged.setdefault(name, [None] * len(self.batch))[rows] = values
        for name, value in call.metrics:
            self.extra["log_metric"](name, value)
        return rewards

    def _wait(self, function: RewardFunc, call: Future) -> Any:
        """What a call returns. Calls of a worker are made one after the other, and each has its own time."""
        timeout, name = declared(function).timeout, reward_name(function)
        try:
            while not (finished := wait([call], POLL if timeout is not None else None)).done:
                assert timeout is not None and finished.not_done
                self.scorer.give_up_if_hung(function, timeout)
            return call.result()
        except _Hung as error:
            what = f"has not returned within its timeout of {timeout} seconds"
            raise RewardError(name, what, hung=True) from error
        except Exception as error:  # whatever a user's function raises is reported with its row
            raise RewardError(name, f"raised {type(error).__name__}: {error}") from error


class _Hung(Exception):
    """A call takes longer than its timeout."""


class _Worker:
    """A thread that makes calls one after the other, and does not keep the interpreter alive if one hangs."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        self._current: tuple[Future, float] | None = None
        self._is_left = False
        _start_thread(self._work)

    def submit(self, call: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._queue.put((future, call))
        return future

    def gives_up(self, timeout: float) -> bool:
        """Whether the call under way takes longer than that; it has failed then."""
        current = self._current
        if current is None or time.monotonic() - current[1] <= timeout:
            return False
        self._is_left = True
        _settle(current[0], error=_Hung())
        return True

    def successor(self) -> "_Worker":
        """A worker for the calls that have not begun."""
        other = _Worker()
        while True:
            try:
                other._queue.put(self._queue.get_nowait())
            except queue.Empty:
                return other

    def _work(self) -> None:
        while not self._is_left:
            future, call = self._queue.get()
            self._current = (future, time.monotonic())
            _called(call, future)
            self._current = None
            del future, call  # or the images would be kept until the next call


def _called(call: Callable[[], Any], future: Future | None = None) -> Future:
    """A future that holds what a call returns or raises."""
    future = future or Future()
    try:
        _settle(future, result=call())
    except BaseException as error:  # noqa: BLE001  # raised again where the result is asked for, SystemExit too
        if isinstance(error, KeyboardInterrupt):
            raise
        _settle(future, error=error if isinstance(error, Exception) else RuntimeError(repr(error)))
    return future


def _settle(future: Future, result: Any = None, error: Exception | None = None) -> None:
    """Give a future its outcome, unless it has one: a call that was given up may return after all."""
    try:
        future.set_result(result) if error is None else future.set_exception(error)
    except InvalidStateError:
        pass


def _start_thread(target: Callable[[], object]) -> None:
    """A thread that computes without gradients on this process's device, as the main one does when it scores."""
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        torch.set_grad_enabled(False)
        if device is not None:
            torch.accelerator.set_device_index(device)
        target()

    threading.Thread(target=run, name="reward functions", daemon=True).start()


async def _awaited(reward_func: RewardFunc, arguments: dict[str, Any], timeout: float | None) -> Any:
    try:
        async with asyncio.timeout(timeout) as clock:
            return await reward_func(**arguments)
    except TimeoutError:
        if clock.expired():
            raise _Hung from None
        raise


def runs_beside(reward_func: RewardFunc) -> bool:
    """Whether its calls may be under way while the next images are sampled."""
    return is_async(reward_func) or declared(reward_func).runs_in == "thread"


def save_evidence(error: RewardError, folder: Path, step: int, process: int) -> None:
    """Write the image that a function has failed on, if it is known which, and what is known of the failure.

    Args:
        error: Is told where the image is.
        folder: To write into.
        step: The update that the run is at.
        process: The number of this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step:06d}_{error.name.replace('/', '_')}" + (f"_{process}" if process else "")
    told = {"reward_func": error.name, "what": error.what, "row": error.row, "prompt": error.prompt, "update": step}
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1))
    if error.image is not None:
        error.saved_to = folder / f"{name}.png"
        error.image.save(error.saved_to)


def _on_none_alone(error: RewardError, rows: slice) -> RewardError:
    number = rows.stop - rows.start
    shown = RewardError(error.name, f"{error.what} (on a batch of {number} images, on none alone)")
    shown.__cause__ = error.__cause__
    return shown
