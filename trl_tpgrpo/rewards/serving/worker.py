"""Requests made into calls: a bounded queue of images, and one thread that scores them in batches.

All but the calls themselves runs in the server's event loop, so that nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .functions import Outcome, ServedReward
from .protocol import Refusal, ScoreRequest


MAX_RETRY_AFTER = 60


class Job:
    """A request on its way; `answer` becomes what the client gets, or raises the `Refusal` that it gets instead."""

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
        """Give up the whole request; the first reason counts."""
        if not self.answer.done():
            self.answer.set_exception(refusal)


class Item:
    """One image that waits, and its row of the request; items with the same key may share a call."""

    def __init__(self, job: Job, request: ScoreRequest, row: int, image_type: str):
        self.job, self.row, self.image, self.prompt = job, row, request.images[row], request.prompts[row]
        self.columns = {name: values[row] for name, values in request.columns.items()}
        self.key = (sorted(self.columns), self.image.size if image_type == "pt" else None)


class Worker:
    """Scores what is submitted in the order of submission, one call of the function after the other, in one thread."""

    def __init__(self, reward: ServedReward, max_queue: int):
        self.reward, self.max_queue = reward, max_queue
        self.num_scored = 0
        self.waiting: deque[Item] = deque()
        self._seconds_per_image = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=reward.name)
        self._task: asyncio.Future | None = None

    def submit(self, request: ScoreRequest) -> Job:
        """Queue a request, or raise a `Refusal`: 503 if the queue has no room now, 413 if it never has."""
        number, num_waiting = len(request.images), len(self.waiting)
        if number > self.max_queue:
            message = f"The request has {number} images; the queue holds {self.max_queue} (--max_queue)."
            raise Refusal(413, "too_many_images", message)
        if num_waiting + number > self.max_queue:
            message = f"The queue of {self.reward.name!r} is full: {num_waiting} images wait for their turn."
            seconds = math.ceil(num_waiting / 2 * self._seconds_per_image)  # until half of them are scored
            retry_after = str(max(1, min(MAX_RETRY_AFTER, seconds)))
            raise Refusal(503, "queue_full", message, headers={"Retry-After": retry_after})
        job = Job(request)
        self.waiting.extend(Item(job, request, row, self.reward.image_type) for row in range(number))
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._work())
        return job

    async def _work(self) -> None:
        while self.waiting:
            items = self._next_batch()
            if items:
                start = time.monotonic()
                for part in await asyncio.get_running_loop().run_in_executor(self._thread, self._score, items):
                    _deliver(*part)
                self._seconds_per_image = (time.monotonic() - start) / len(items)
                self.num_scored += len(items)

    def _next_batch(self) -> list[Item]:
        """Take the images that have waited longest, without those of requests that have failed already."""
        items: list[Item] = []
        limit = self.reward.batch_size or self.max_queue
        while self.waiting and len(items) < limit and (not items or self.waiting[0].key == items[0].key):
            item = self.waiting.popleft()
            if not item.job.answer.done():
                items.append(item)
        return items

    def _score(self, items: list[Item]) -> list[tuple[list[Item], Outcome | Refusal]]:
        """Score a batch, or one by one if the function raises on it, to serve the requests that are not the cause."""
        columns = {name: [item.columns[name] for item in items] for name in items[0].columns}
        try:
            return [(items, self.reward.call([i.image for i in items], [i.prompt for i in items], columns))]
        except Refusal as refusal:
            return [(items, refusal.at(items[0].row) if len(items) == 1 else refusal)]
        except (Exception, SystemExit) as error:  # whatever a function raises is reported to those who asked
            if len(items) == 1:
                return [(items, self.reward.raised(error).at(items[0].row))]
            one_by_one = [part for item in items for part in self._score([item])]
            if any(isinstance(outcome, Refusal) for _, outcome in one_by_one):
                return one_by_one
            # Batches of this size are what fails, and nobody should have to guess that from a slow server.
            return [(items, self.reward.raised(error, f" (on a batch of {len(items)} images, on none alone)"))]


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
