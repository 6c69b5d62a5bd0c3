"""Running reward functions: each in batches of its own size, beside the model where it may, never longer than its timeout.

A function that waits for something else (a server, native code that releases the interpreter) declares `runs_in = "thread"` or is `async`: its
calls are under way while the next images are sampled and decoded. The others are called as images are handed in.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .scoring import RewardError, RewardFunc, checked, declared, is_async, reward_name


FAILURES = ("stop", "skip")


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
        failures: `"stop"`: a function that fails is an error. `"skip"`: the images that it fails on are marked, and a batch of
            which it fails on every image is an error.
    """

    def __init__(self, failures: str = "stop"):
        self.failures = failures
        self._workers: dict[int, _Worker] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, reward_funcs: list[RewardFunc], batch: ImageBatch, extra: dict[str, Any]) -> "Scoring":
        """Begin to score a batch with each function; those that do not run beside the model are done when this returns.

        Args:
            reward_funcs: F functions.
            batch: N images.
            extra: Passed on to each, such as `trainer_state`.
        """
        scoring = Scoring(self, reward_funcs, batch, extra)
        beside = [_runs_beside(function) for function in reward_funcs]
        for number in sorted(range(len(reward_funcs)), key=lambda number: not beside[number]):
            scoring.begin(number)
        return scoring

    def submit(self, reward_func: RewardFunc, arguments: dict[str, Any]) -> Future:
        """Call a function where it runs."""
        options = declared(reward_func)
        if is_async(reward_func):
            return asyncio.run_coroutine_threadsafe(_awaited(reward_func, arguments), self._event_loop())
        if options.runs_in == "thread" or options.timeout is not None:
            if id(reward_func) not in self._workers:
                self._workers[id(reward_func)] = _Worker()
            return self._workers[id(reward_func)].submit(lambda: reward_func(**arguments))
        return _called(lambda: reward_func(**arguments))

    def give_up(self, reward_func: RewardFunc) -> None:
        """Leave a worker that hangs to itself; another makes the calls that wait."""
        if id(reward_func) in self._workers:
            self._workers[id(reward_func)] = self._workers[id(reward_func)].successor()

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="reward functions", daemon=True).start()
        return self._loop


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
        self._calls: list[list[tuple[slice, Future]]] = [[] for _ in reward_funcs]
        self._hung: set[Future] = set()
        self._logged: dict[str, list] = {}

    def begin(self, number: int) -> None:
        """Start the calls of one function, and end them too unless they run beside the model."""
        function, options = self.reward_funcs[number], declared(self.reward_funcs[number])
        size = options.batch_size or max(len(self.batch), 1)
        for start in range(0, len(self.batch), size):
            rows = slice(start, min(start + size, len(self.batch)))
            call = self._call(number, rows)
            self._calls[number].append((rows, call))
            if not _runs_beside(function) and not wait([call], options.timeout).done:
                self._hung.add(call)
                self.scorer.give_up(function)

    def _call(self, number: int, rows: slice) -> Future:
        function = self.reward_funcs[number]
        arguments = {**self.batch[rows].arguments(function), **self.extra, "log_extra": self._log_extra(rows)}
        return self.scorer.submit(function, arguments)

    def _log_extra(self, rows: slice) -> Callable[[str, Sequence], None]:
        def log_extra(name: str, values: Sequence) -> None:
            self._logged.setdefault(name, [None] * len(self.batch))[rows] = list(values)

        return log_extra

    def result(self) -> Scores:
        """Wait for all functions.

        Raises:
            RewardError: If one fails: with its name, the row, the prompt and the image. Under `"skip"` only if it fails on all of
                the batch.
        """
        rewards, failed = (
            torch.full((len(self.reward_funcs), len(self.batch)), torch.nan),
            torch.zeros(len(self.batch)).bool(),
        )
        errors: list[RewardError] = []
        for number in range(len(self.reward_funcs)):
            for rows, call in self._calls[number]:
                error = self._collect(number, rows, call, rewards, failed)
                errors += [error] if error else []
                if error and self.scorer.failures == "stop":
                    raise error
        if errors and bool(failed.all()):
            raise errors[0]
        rewards[:, failed] = torch.nan
        return Scores(rewards, failed, errors, self._logged)

    def _collect(self, number: int, rows: slice, call: Future, rewards: Tensor, failed: Tensor) -> RewardError | None:
        """Write what one call gave into `rewards`, or mark what it failed on in `failed` and return the error."""
        try:
            rewards[number, rows] = self._rewards(number, rows, call)
            return None
        except RewardError as error:
            first = error
        raised = first.row is None and first.__cause__ is not None and not first.hung
        if first.row is None and not raised:  # it hung, or the number or kind of its answers is wrong: no row's doing
            failed[rows] = True
            return first
        if first.row is not None and self.scorer.failures == "stop":
            return first
        return self._one_by_one(number, rows, rewards, failed) or _on_none_alone(first, rows)

    def _one_by_one(self, number: int, rows: slice, rewards: Tensor, failed: Tensor) -> RewardError | None:
        """Ask again for each image of a call that has failed, to tell which it was; the first error."""
        first: RewardError | None = None
        for row in range(rows.start, rows.stop):
            alone = slice(row, row + 1)
            try:
                rewards[number, row] = self._rewards(number, alone, self._call(number, alone))
            except RewardError as error:
                first = first or error.at(row, self.batch.prompts[row], self.batch.images[row])
                failed[row : rows.stop if error.hung else row + 1] = True
                if error.hung or self.scorer.failures == "stop":
                    break
        return first

    def _rewards(self, number: int, rows: slice, call: Future) -> Tensor:
        """The rewards of one call, (N,)."""
        function, part = self.reward_funcs[number], self.batch[rows]
        try:
            return checked(function, self._wait(function, call), part.prompts, part.images)
        except RewardError as error:
            if error.row is None:
                raise
            row = rows.start + error.row
            raise error.at(row, self.batch.prompts[row], self.batch.images[row]) from error.__cause__

    def _wait(self, function: RewardFunc, call: Future) -> Any:
        timeout, name = declared(function).timeout, reward_name(function)
        try:
            return call.result(0 if call in self._hung else timeout)
        except TimeoutError as error:
            if call.done():  # it is the function's own
                raise RewardError(name, f"raised TimeoutError: {error}") from error
            call.cancel()
            self.scorer.give_up(function)
            raise RewardError(name, f"has not returned within its timeout of {timeout} seconds", hung=True) from error
        except Exception as error:  # whatever a user's function raises is reported with its row
            raise RewardError(name, f"raised {type(error).__name__}: {error}") from error


class _Worker:
    """A thread that makes calls one after the other, and does not keep the interpreter alive if one hangs."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="reward function", daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._queue.put((future, call))
        return future

    def successor(self) -> "_Worker":
        """A worker for the calls that have not begun."""
        other = _Worker()
        while not self._queue.empty():
            other._queue.put(self._queue.get())
        return other

    def _work(self) -> None:
        while True:
            future, call = self._queue.get()
            if future.set_running_or_notify_cancel():
                _called(call, future)


def _called(call: Callable[[], Any], future: Future | None = None) -> Future:
    """A future that holds what a call returns or raises."""
    future = future or Future()
    try:
        future.set_result(call())
    except Exception as error:  # noqa: BLE001  # it is raised again where the result is asked for
        future.set_exception(error)
    return future


async def _awaited(reward_func: RewardFunc, arguments: dict[str, Any]) -> Any:
    return await reward_func(**arguments)


def _runs_beside(reward_func: RewardFunc) -> bool:
    return is_async(reward_func) or declared(reward_func).runs_in == "thread"


def _on_none_alone(error: RewardError, rows: slice) -> RewardError:
    number = rows.stop - rows.start
    shown = RewardError(error.name, f"{error.what} (on a batch of {number} images, on none alone)")
    shown.__cause__ = error.__cause__
    return shown
