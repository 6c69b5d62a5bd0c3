"""Calls with a timeout, in a thread or on an event loop, of which one that hangs stops neither the next nor the exit.

What a call returns or raises is in a `Future`, which is cancelled when the call takes longer than its timeout.
"""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import torch


def call_here(call: Callable[[], Any]) -> Future:
    """Return the future of a call that is made at once."""
    future: Future = Future()
    _settle(future, call)
    return future


class Worker:
    """Thread that makes calls in turn; where one hangs, another thread makes the next ones."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any], float | None]] = queue.SimpleQueue()
        _thread(self._work).start()

    def submit(self, call: Callable[[], Any], timeout: float | None) -> Future:
        """Make a call after those before it; the seconds of its timeout begin when it does."""
        future: Future = Future()
        self._calls.put((future, call, timeout))
        return future

    def _work(self) -> None:
        successor = _thread(self._work)
        # A local variable for what the queue gives would keep the images of the last call.
        while _ends_in_time(successor, *self._calls.get()):
            pass


def _ends_in_time(successor: threading.Thread, future: Future, call: Callable[[], Any], timeout: float | None) -> bool:
    def give_up() -> None:
        if future.cancel():
            successor.start()

    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, give_up)
    timer.start()
    try:
        _settle(future, call)
    except InvalidStateError:  # cancelled
        return False
    timer.cancel()
    return True


class EventLoop:
    """Thread that awaits calls, all at once."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        _thread(self._loop.run_forever).start()

    def submit(self, call: Callable[[], Awaitable], timeout: float | None) -> Future:
        """Await what a call returns."""

        async def awaited() -> Any:
            return await call()

        future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        if timeout is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, timeout, future.cancel)
        return future


def _thread(target: Callable[[], object]) -> threading.Thread:
    """Return a thread that computes as the main one does when it scores: without gradients, on the present device.

    It is a daemon: the interpreter waits for an executor's threads before it exits, and for one that hangs forever.
    """
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        torch.set_grad_enabled(False)
        if device is not None:
            torch.accelerator.set_device_index(device)
        target()

    return threading.Thread(target=run, name="reward functions", daemon=True)


def _settle(future: Future, call: Callable[[], Any]) -> None:
    try:
        result = call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too, which would end the thread and nothing else
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
    else:
        future.set_result(result)
