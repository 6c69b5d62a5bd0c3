"""A bounded queue of images, and one thread that scores them in batches.

Everything except the calls runs in the server's event loop, so that no lock is needed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from .functions import Outcome, ServedReward
from .protocol import Limits, Refusal, ScoreRequest


logger = logging.getLogger(__name__)

MAX_RETRY_AFTER = 60
MAX_WAITING = 8  # requests of the largest size
MAX_HANGING = 8  # calls, each of which keeps a thread


class Job:
    """A request in progress; `answer` becomes the client's answer, or raises a `Refusal`."""

    def __init__(self, request: ScoreRequest):
        self.digest, self.num_left = request.digest, len(request.images)
        self.body: dict[str, Any] = {"id": request.id, "rewards": [None] * self.num_left, "metrics": {}, "extra": {}}
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def accept(self, row: int, reward: float | None, extra: dict[str, Any]) -> None:
        for name, value in extra.items():
            self.body["extra"].setdefault(name, [None] * len(self.body["rewards"]))[row] = value
        self.body["rewards"][row] = reward
        self.num_left -= 1
        if self.num_left == 0:
            self.answer.set_result(self.body)

    def refuse(self, refusal: Refusal) -> None:
        """Reject the whole request; the first reason counts."""
        if not self.answer.done():
            self.answer.set_exception(refusal)


class Item:
    """One waiting image with its row of the request; items with the same key can share a call."""

    def __init__(self, job: Job, request: ScoreRequest, row: int, image_type: str):
        self.job, self.row, self.image, self.prompt = job, row, request.images[row], request.prompts[row]
        self.num_bytes = request.bytes_per_image
        self.columns = {name: values[row] for name, values in request.columns.items()}
        self.key = (sorted(self.columns), self.image.size if image_type == "pt" else None)


class Worker:
    """Scores submitted images in order, one call after another, in one thread.

    A call that exceeds its timeout is abandoned, and another thread makes the next calls.
    """

    def __init__(self, reward: ServedReward, limits: Limits):
        self.reward, self.limits = reward, limits
        self.timeout = limits.call_timeout if reward.timeout is None else reward.timeout
        self.num_waiting = self.num_scored = 0
        self._waiting: deque[Item] = deque()
        self._bytes_waiting = 0
        self._seconds_per_image = 0.0
        self._called_at: float | None = None
        self._hung: list[Future] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=reward.name)
        self._task: asyncio.Future | None = None

    def health(self) -> dict[str, Any]:
        """Return the entry of the function in `GET /health`."""
        seconds = None if self._called_at is None else round(time.monotonic() - self._called_at, 1)
        return {
            "batch_size": self.reward.batch_size,
            "timeout": self.timeout,
            "num_waiting": self.num_waiting,
            "num_scored": self.num_scored,
            "seconds_in_call": seconds,
            "num_hanging": self._num_hanging,
        }

    @property
    def _num_hanging(self) -> int:
        return sum(not call.done() for call in self._hung)

    def take(self, request: ScoreRequest) -> Job:
        """Reserve room for a request before decoding; raise a `Refusal` (503) if there is none."""
        number, num_bytes = len(request.images), len(request.images) * request.bytes_per_image
        most = MAX_WAITING * self.limits.max_unpacked
        if self.num_waiting + number > self.limits.max_queue or self._bytes_waiting + num_bytes > most:
            message = f"The queue of {self.reward.name!r} is full: {self.num_waiting} images are waiting."
            seconds = math.ceil(self.num_waiting / 2 * self._seconds_per_image)  # until half of them are scored
            retry_after = str(max(1, min(MAX_RETRY_AFTER, seconds)))
            raise Refusal(503, "queue_full", message, headers={"Retry-After": retry_after})
        self.num_waiting += number
        self._bytes_waiting += num_bytes
        return Job(request)

    def submit(self, job: Job, request: ScoreRequest) -> None:
        """Queue an accepted request (decoded, or rejected since); its room is freed at its turn."""
        self._waiting.extend(Item(job, request, row, self.reward.image_type) for row in range(len(request.images)))
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        while self._waiting:
            items = self._next_batch()
            if items:
                start = time.monotonic()
                for part in await self._score(items):
                    _deliver(*part)
                self._seconds_per_image = (time.monotonic() - start) / len(items)
                self.num_scored += len(items)

    def _next_batch(self) -> list[Item]:
        """Take the images that have waited longest, except those of failed requests."""
        items: list[Item] = []
        limit, num_bytes = self.reward.batch_size or self.limits.max_queue, self.limits.max_unpacked
        while self._waiting and len(items) < limit and (not items or self._waiting[0].key == items[0].key):
            if items and self._waiting[0].num_bytes > num_bytes:
                break
            item = self._waiting.popleft()
            self.num_waiting -= 1
            self._bytes_waiting -= item.num_bytes
            if not item.job.answer.done():
                items.append(item)
                num_bytes -= item.num_bytes
        return items

    async def _score(self, items: list[Item]) -> list[tuple[list[Item], Outcome | Refusal]]:
        """Score a batch; if the function raises, score one by one, to serve the other requests."""
        outcome = await self._call(items)
        if isinstance(outcome, Refusal) and len(items) == 1:
            outcome = outcome.at(items[0].row)
        elif isinstance(outcome, Refusal) and outcome.kind == "reward_raised":
            one_by_one = [part for item in items for part in await self._score([item])]
            if any(isinstance(alone, Refusal) for _, alone in one_by_one):
                return one_by_one
            # Only batches fail: say so, because the server is slow then.
            where = f" (on a batch of {len(items)} images, on no single image)."
            outcome = replace(outcome, status=500, message=outcome.message[:-1] + where)
        return [(items, outcome)]

    async def _call(self, items: list[Item]) -> Outcome | Refusal:
        images, prompts = [item.image for item in items], [item.prompt for item in items]
        columns = {name: [item.columns[name] for item in items] for name in items[0].columns}
        if self._num_hanging >= MAX_HANGING:
            what = f"{MAX_HANGING} calls of the reward function {self.reward.name!r} hang: no further calls are made."
            return Refusal(500, "reward_hung", what)
        call = self._thread.submit(self.reward.call, images, prompts, columns)
        self._called_at = time.monotonic()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(call), self.timeout)
        except asyncio.TimeoutError:  # noqa: UP041 - not the builtin before Python 3.11
            self._hung = [*(one for one in self._hung if not one.done()), call]
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.reward.name)
            what = f"The reward function {self.reward.name!r} has not returned within {self.timeout:g} seconds."
            logger.error(what)
            return Refusal(500, "reward_hung", what)
        finally:
            self._called_at = None


def _deliver(items: list[Item], outcome: Outcome | Refusal) -> None:
    if isinstance(outcome, Refusal):
        for item in items:
            item.job.refuse(outcome)
        return
    for job in {item.job for item in items}:
        for name, logged in outcome.metrics.items():
            job.body["metrics"].setdefault(name, []).extend(logged)
    for index, (item, reward) in enumerate(zip(items, outcome.rewards)):  # noqa: B905 - not in Python 3.8
        if isinstance(reward, Refusal):
            item.job.refuse(reward.at(item.row))
        else:
            item.job.accept(item.row, reward, {name: values[index] for name, values in outcome.extra.items()})
