"""Requests made into calls: a bounded queue of images, and one thread that scores them in batches."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from .functions import Outcome, ServedReward
from .protocol import Refusal, ScoreRequest


MAX_RETRY_AFTER = 60


class Job:
    """A request on its way. The worker's thread alone writes to it until `done`."""

    def __init__(self, request: ScoreRequest):
        self.id = request.id
        self.done = threading.Event()
        self.refusal: Refusal | None = None
        self._rewards: list[float | None] = [None] * len(request.images)
        self._num_left = len(request.images)
        self._metrics: dict[str, list[float | None]] = {}
        self._extra: dict[str, list] = {}

    def accept(self, row: int, reward: float | None) -> None:
        self._rewards[row] = reward
        self._num_left -= 1
        if self._num_left == 0:
            self.done.set()

    def refuse(self, refusal: Refusal) -> None:
        """The first reason stands."""
        if not self.done.is_set():
            self.refusal = refusal
            self.done.set()

    def log(self, metrics: dict[str, list[float | None]]) -> None:
        for name, values in metrics.items():
            self._metrics.setdefault(name, []).extend(values)

    def log_extra(self, row: int, name: str, value: Any) -> None:
        self._extra.setdefault(name, [None] * len(self._rewards))[row] = value

    def answer(self) -> dict[str, Any]:
        """What the client gets.

        Raises:
            Refusal: If it gets no rewards.
        """
        if self.refusal is not None:
            raise self.refusal
        return {"id": self.id, "rewards": self._rewards, "metrics": self._metrics, "extra": self._extra}


@dataclass(frozen=True)
class Item:
    """One image that waits: row `row` of its request."""

    job: Job
    request: ScoreRequest
    row: int
    key: tuple  # items of one key may share a call


class Worker:
    """Scores what is submitted, in the order of submission.

    Args:
        reward: Called by one thread, one call after the other.
        max_queue: How many images may wait.
    """

    def __init__(self, reward: ServedReward, max_queue: int):
        self.reward, self.max_queue = reward, max_queue
        self.num_scored = 0
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_image = 0.0
        self._thread = threading.Thread(target=self._work, name=reward.name, daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: ScoreRequest) -> Job:
        """Queue a request.

        Raises:
            Refusal: With 503 if the queue has no room now or the server stops, with 413 if it never has.
        """
        number = len(request.images)
        if number > self.max_queue:
            message = f"The request has {number} images; the queue holds {self.max_queue} (--max_queue)."
            raise Refusal(413, "too_many_images", message)
        job = Job(request)
        sizes = [image.size if self.reward.image_type == "pt" else None for image in request.images]
        names = tuple(sorted(request.columns))
        with self._changed:
            if self._closed:
                raise Refusal(503, "stopping", "The server is being stopped.", retry_after=1)
            if len(self._waiting) + number > self.max_queue:
                message = (
                    f"The queue of {self.reward.name!r} is full: {len(self._waiting)} images wait for their turn."
                )
                raise Refusal(503, "queue_full", message, retry_after=self._retry_after())
            self._waiting.extend(Item(job, request, row, (names, size)) for row, size in enumerate(sizes))
            self._changed.notify()
        return job

    def close(self) -> None:
        """Take nothing more, and score what waits; returns when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _retry_after(self) -> int:
        """Seconds until about half of the queue is scored."""
        seconds = len(self._waiting) / 2 * self._seconds_per_image
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                items = self._next_batch()
            if items:
                start = time.monotonic()
                self._score(items)
                self._seconds_per_image = (time.monotonic() - start) / len(items)
                self.num_scored += len(items)

    def _next_batch(self) -> list[Item]:
        """The images that have waited longest, without those of requests that have failed already."""
        items: list[Item] = []
        limit = self.reward.batch_size or self.max_queue
        while self._waiting and len(items) < limit and (not items or self._waiting[0].key == items[0].key):
            item = self._waiting.popleft()
            if not item.job.done.is_set():
                items.append(item)
        return items

    def _call(self, items: list[Item]) -> Outcome:
        columns = {name: [item.request.columns[name][item.row] for item in items] for name in items[0].request.columns}
        images = [item.request.images[item.row] for item in items]
        return self.reward.call(images, [item.request.prompts[item.row] for item in items], columns)

    def _score(self, items: list[Item]) -> None:
        try:
            _deliver(items, self._call(items))
        except Refusal as refusal:
            for item in items:
                item.job.refuse(refusal)
        except (Exception, SystemExit) as error:  # whatever a function raises is reported to those who asked
            if len(items) == 1:
                items[0].job.refuse(self.reward.raised(error).at(items[0].row))
            else:
                self._score_one_by_one(items, error)

    def _score_one_by_one(self, items: list[Item], error: BaseException) -> None:
        """Find the images that a batch has failed on, so that the requests without one get their rewards."""
        num_failed = 0
        outcomes: list[tuple[Item, Outcome]] = []
        for item in items:
            try:
                outcomes.append((item, self._call([item])))
            except Refusal as refusal:
                num_failed += 1
                item.job.refuse(refusal.at(item.row))
            except (Exception, SystemExit) as alone:
                num_failed += 1
                item.job.refuse(self.reward.raised(alone).at(item.row))
        if not num_failed:  # it cannot do batches of this size, which nobody should have to guess from its slowness
            of_all = self.reward.raised(error, f" (on a batch of {len(items)} images, on none alone)")
            for item in items:
                item.job.refuse(of_all)
            return
        for item, outcome in outcomes:
            _deliver([item], outcome)


def _deliver(items: list[Item], outcome: Outcome) -> None:
    for job in {id(item.job): item.job for item in items}.values():
        job.log(outcome.metrics)
    for place, item in enumerate(items):
        for name, values in outcome.extra.items():
            item.job.log_extra(item.row, name, values[place])
        reward = outcome.rewards[place]
        if isinstance(reward, Refusal):
            item.job.refuse(reward.at(item.row))
        else:
            item.job.accept(item.row, reward)
