"""Calls of reward functions, in the batch sizes that they declare, and in parallel with the model if possible.

A function that waits for something else (a server, native code that releases the GIL) declares `runs_in = "thread"` or
is `async`: its calls run while the next images are sampled and decoded. Other functions are called immediately.
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .contract import RewardError, RewardFunc, RewardUnavailable, checked, declared, is_async, reward_name
from .serving.functions import text_of
from .surroundings import put_back, settings, unchanged
from .threads import EventLoop, Worker, call_here


@dataclass(frozen=True)
class ImageBatch:
    """N images to score, or their latents, or noisy states.

    Functions that score groups receive `group_sizes` neighbours at once. Unused items may be missing.
    """

    images: list[Image.Image]
    pixels: Tensor | None  # uint8, (N, 3, H, W), the same where the model is
    prompts: list[str]
    columns: dict[str, list]  # the other columns of the dataset, N values each
    latents: Tensor | None = None  # float32, (N, ...), final, where the model is
    states: tuple[Tensor, Tensor] | None = None  # latents, float32, (N, ...), and their sigmas, float32, (N,)
    group_sizes: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def view(self, reward_func: RewardFunc, rows: slice) -> dict[str, Any]:
        """Return the items that a function scores; tensors are copies."""
        declaration = declared(reward_func)
        if declaration.scores_states:
            assert self.states is not None
            return {name: value[rows].clone() for name, value in zip(declaration.scored, self.states, strict=True)}
        if declaration.image_type == "latent":
            assert self.latents is not None
            return {"latents": self.latents[rows].clone()}
        if declaration.image_type == "pt":
            assert self.pixels is not None
            return {"images": self.pixels[rows].float() / 255}
        return {"images": self.images[rows]}

    def parts(self, reward_func: RewardFunc) -> Iterator[slice]:
        """Return the rows of each call of a function."""
        size = declared(reward_func).batch_size or len(self)
        by_size = [*range(size, len(self), size), len(self)]
        ends = list(accumulate(self.group_sizes)) if declared(reward_func).scores_groups else by_size
        return map(slice, [0, *ends], ends)


@dataclass(frozen=True)
class Scores:
    """Results of F functions for N images."""

    rewards: Tensor  # float32, (F, N), on the CPU; NaN where a function does not apply or failed
    failed: Tensor  # bool, (N,), on the CPU; true where a function failed (and failures are skipped)
    errors: list[RewardError] = field(default_factory=list)
    extra: dict[str, list] = field(default_factory=dict)  # logged columns, N values each; None if not logged


class Scorer:
    """Calls reward functions; failures are errors (`"stop"`) or mark images (`"skip"`)."""

    def __init__(self, failures: str = "stop"):
        self.failures = failures
        self._workers: dict[int, Worker] = defaultdict(Worker)
        self._event_loops: dict[int, EventLoop] = defaultdict(EventLoop)  # one per function; it may block its own
        self._beside: list[Future] = []
        self.settings: dict[str, Any] = {}  # of the process, before any call

    def start(
        self, reward_funcs: list[RewardFunc], batch: ImageBatch, extra: dict, advance: Callable = lambda number: None
    ) -> "Scoring":
        """Start to score images; functions with `runs_in="main"` are finished on return.

        `extra` are further arguments of each function, such as `trainer_state`; `advance` is called with 1 after each
        function, and with 0 after each call.
        """
        if not self.is_under_way:
            self.settings = settings()
        scoring = Scoring(self, reward_funcs, batch, extra, advance)
        for index in sorted(range(len(reward_funcs)), key=lambda index: not runs_beside(reward_funcs[index])):
            scoring.begin(index)
            advance(1)
        return scoring

    def submit(self, reward_func: RewardFunc, arguments: dict[str, Any]) -> Future:
        """Call a function in its thread or loop; the future is cancelled if the call exceeds its timeout.

        Changes of process settings by a call that the main thread waits for are undone.
        """
        timeout, call = declared(reward_func).timeout, partial(_call_on_copies, reward_func, arguments)
        if runs_beside(reward_func):
            threads = self._event_loops if is_async(reward_func) else self._workers
            future = threads[id(reward_func)].submit(call, timeout)
            self._beside = [*(one for one in self._beside if not one.done()), future]
            return future
        with unchanged(self.settings):
            future = call_here(call) if timeout is None else self._workers[id(reward_func)].submit(call, timeout)
            with suppress(CancelledError):
                future.exception()  # waits
        return future

    @property
    def is_under_way(self) -> bool:
        """Whether a call in another thread is still running and was not given up."""
        return not all(future.done() for future in self._beside)


@dataclass(frozen=True)
class _Call:
    index: int  # of the function
    rows: slice
    future: Future
    metrics: list[tuple[str, float]]  # kept until the function returns, because they are recorded in the main thread
    extra: dict[str, list]


class Scoring:
    """Batch while it is scored; arguments as in `Scorer.start`."""

    def __init__(
        self, scorer: Scorer, reward_funcs: list[RewardFunc], batch: ImageBatch, extra: dict, advance: Callable
    ):
        self.reward_funcs, self.batch = reward_funcs, batch
        self._scorer, self._extra, self._advance = scorer, extra, advance
        self._pending: list[_Call] = []
        rewards = torch.full((len(reward_funcs), len(batch)), torch.nan)
        self._scores = Scores(rewards, torch.zeros(len(batch), dtype=torch.bool))

    def begin(self, index: int) -> None:
        """Start the calls of one function, and wait for them unless they run in parallel with the model."""
        function = self.reward_funcs[index]
        for rows in self.batch.parts(function):
            if runs_beside(function):
                self._pending.append(self._call(index, rows))
            elif not self._has_stopped:
                self._collect(self._call(index, rows))

    def result(self) -> Scores:
        """Wait for running functions; raise the first `RewardError` unless failures are skipped."""
        while self._pending and not self._has_stopped:
            self._collect(self._pending.pop(0))
        beside = [reward_name(function) for function in self.reward_funcs if runs_beside(function)]
        if beside and not self._scorer.is_under_way and (changed := put_back(self._scorer.settings)):
            what = f"changed {' and '.join(changed)} while the model was running; use runs_in='main' for this"
            self._scores.errors.append(RewardError(" or ".join(beside), what))
        if self._has_stopped:
            raise self._scores.errors[0]
        self._scores.rewards[:, self._scores.failed] = torch.nan
        return self._scores

    @property
    def _has_stopped(self) -> bool:
        return bool(self._scores.errors) and self._scorer.failures == "stop"

    def _call(self, index: int, rows: slice) -> _Call:
        function, columns = self.reward_funcs[index], {"prompts": self.batch.prompts, **self.batch.columns}
        arguments = self.batch.view(function, rows)
        arguments |= {name: values[rows] for name, values in columns.items()}
        metrics: list[tuple[str, float]] = []
        extra: dict[str, list] = {}
        arguments |= self._extra
        arguments["log_metric"] = lambda name, value: metrics.append((name, value))
        arguments["log_extra"] = lambda name, values: extra.update({name: list(values)})
        return _Call(index, rows, self._scorer.submit(function, arguments), metrics, extra)

    def _collect(self, call: _Call) -> None:
        """Store the rewards of a call, or its failure."""
        try:
            self._scores.rewards[call.index, call.rows] = self._rewards(call)
        except RewardError as error:
            if declared(self.reward_funcs[call.index]).scores_groups:
                self._scores.failed[call.rows] = True  # if one image is the cause, others were compared with it
                error.prompt = self.batch.prompts[call.rows.start]
            elif error.row is None and isinstance(error.__cause__, RewardUnavailable | None):
                self._scores.failed[call.rows] = True  # it hung, or the cause is not an image
            elif error.row is None or self._scorer.failures == "skip":
                error = self._one_by_one(call, error)
            self._scores.errors.append(error)

    def _one_by_one(self, call: _Call, failure: RewardError) -> RewardError:
        """Repeat a failed call image by image and store the rewards; return the first error."""
        first: RewardError | None = None
        for row in range(call.rows.start, call.rows.stop):
            alone = self._call(call.index, slice(row, row + 1))
            try:
                self._scores.rewards[call.index, row] = self._rewards(alone)[0]
            except RewardError as error:
                error.row, error.prompt = row, self.batch.prompts[row]
                error.image = self.batch.images[row] if self.batch.images else None
                first = first or error
                hung = alone.future.cancelled()
                self._scores.failed[row : call.rows.stop if hung else row + 1] = True
                if hung or self._scorer.failures == "stop":
                    break
        if first is None:
            failure.what += f" (on a batch of {call.rows.stop - call.rows.start} images, on no single image)"
            failure.row = failure.prompt = failure.image = None
        return first or failure

    def _rewards(self, call: _Call) -> Tensor:
        """Wait for a call and return its rewards, (N,); store its logs if it succeeded."""
        function, batch, rows = self.reward_funcs[call.index], self.batch, call.rows
        name = reward_name(function)
        try:
            error = call.future.exception()
        except CancelledError:
            timeout = declared(function).timeout
            raise RewardError(name, f"has not returned within its timeout of {timeout} seconds") from None
        self._advance(0)
        if error is not None:  # any exception of a user's function is reported with its row
            raise RewardError(name, f"raised {type(error).__name__}: {text_of(error)}") from error
        values = call.future.result()
        numbers = call_here(partial(checked, function, values, batch.prompts[rows], batch.images[rows], rows.start))
        if (error := numbers.exception()) is not None:
            what = f"returned a value whose conversion to a number raises {type(error).__name__}: {text_of(error)}"
            raise error if isinstance(error, RewardError) else RewardError(name, what)
        rewards = numbers.result()
        for column, values in call.extra.items():
            if len(values) != len(rewards):
                raise RewardError(name, f"logged {len(values)} values of {column!r} for {len(rewards)} images")
            self._scores.extra.setdefault(column, [None] * len(batch))[rows] = values
        for metric, value in call.metrics:
            self._extra["log_metric"](metric, value)
        return rewards


def _call_on_copies(reward_func: RewardFunc, arguments: dict[str, Any]) -> Any:
    """Call a function on copies of images and columns, so that its changes affect no other function and no log."""
    own = {name: copy.deepcopy(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return reward_func(**own)


def runs_beside(reward_func: RewardFunc) -> bool:
    """Check whether calls of a function can run while the next images are sampled."""
    return is_async(reward_func) or declared(reward_func).runs_in == "thread"


def save_evidence(error: RewardError, folder: Path, step: int, process: int) -> None:
    """Save the description of a failure at an update (`step`), and its image if any, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    function = re.sub(r"[^\w.-]+", "_", error.name)  # "<lambda>" is not a valid file name
    name = f"step_{step:06d}_{function}" + (f"_{process}" if process else "")
    told = {"reward_func": error.name, "what": error.what, "row": error.row, "prompt": error.prompt, "update": step}
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1))
    if error.image is not None:
        error.saved_to = folder / f"{name}.png"
        error.image.save(error.saved_to)
