"""Calls with a timeout, in a thread or on an event loop; a call that hangs blocks neither later calls nor the exit.

The result or exception of a call (`SystemExit` too) is in a `Future`, which is cancelled if the call exceeds its
timeout.
"""

import asyncio
import faulthandler
import queue
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import cache, partial
from types import FrameType
from typing import Any

import torch


GRACE = 5.0  # seconds in which an event loop must respond after a call was given up
GRACE_AT_END = 60.0  # seconds in which a program must end after one was
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def call_here(call: Callable[[], Any]) -> Future:
    """Make a call now and return its future; exceptions of a signal handler are raised here.

    A KeyboardInterrupt without a signal is a failure of the call.
    """
    future: Future = Future()
    arrived: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    former = {number: signal.getsignal(number) for number in SIGNALS if is_main}
    handlers = {number: handler for number, handler in former.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        handlers[signal.Signals(number)](number, frame)

    try:
        for number in handlers:
            signal.signal(number, note)
        _settle(future, call)
    finally:
        for number, former_handler in former.items():
            if former_handler is not None:  # otherwise it was not set by Python
                signal.signal(number, former_handler)
    error = future.exception()
    if arrived and error is not None and not isinstance(error, Exception):
        raise error
    return future


class Worker:
    """Thread that makes calls one after another; if one hangs, another thread makes the next calls."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any], float | None]] = queue.SimpleQueue()
        _thread(self._work).start()

    def submit(self, call: Callable[[], Any], timeout: float | None) -> Future:
        """Make a call after earlier calls; its timeout starts with it."""
        future: Future = Future()
        self._calls.put((future, call, timeout))
        return future

    def _work(self) -> None:
        successor = _thread(self._work)
        # A local variable for the queue's item would keep the images of the last call.
        while _ends_in_time(successor, *self._calls.get()):
            pass


def _ends_in_time(successor: threading.Thread, future: Future, call: Callable[[], Any], timeout: float | None) -> bool:
    def give_up() -> None:
        if future.cancel():
            successor.start()

    timer = _timer(timeout, give_up)
    try:
        _settle(future, call)
    except InvalidStateError:  # cancelled
        return False
    timer.cancel()
    return True


class EventLoop:
    """Thread that awaits calls concurrently; if one blocks the loop, a new thread awaits the next calls."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._loop, self._answered = asyncio.new_event_loop(), threading.Event()
        self._answered.set()
        _thread(partial(_run_forever, self._loop)).start()

    def submit(self, call: Callable[[], Awaitable], timeout: float | None) -> Future:
        """Await the result of a call; a call that exceeds its timeout is cancelled."""
        if not self._answered.wait(GRACE):
            self._begin()
        future: Future = Future()
        loop, answered = self._loop, self._answered

        async def awaited() -> None:
            with suppress(InvalidStateError):  # cancelled
                try:
                    future.set_result(await call())
                except BaseException as error:  # even SystemExit, which would end the loop
                    future.set_exception(error)

        task = asyncio.run_coroutine_threadsafe(awaited(), loop)

        def give_up() -> None:
            answered.clear()
            if future.cancel():
                task.cancel()
            loop.call_soon_threadsafe(answered.set)

        timer = _timer(timeout, give_up)

        def end(_: Future, kept: Future = task) -> None:  # the loop does not keep its tasks
            timer.cancel()

        future.add_done_callback(end)
        return future


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    """Restart the loop if a task ends it, for example by SystemExit; callers are told."""
    while True:
        with suppress(BaseException):
            loop.run_forever()


def _timer(timeout: float | None, give_up: Callable[[], object]) -> threading.Timer:
    """Return a daemon timer, started if there is a timeout.

    A program with abandoned calls can still exit.
    """

    def give_up_and_leave() -> None:
        _end_in_any_case()
        give_up()

    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, give_up_and_leave)
    timer.daemon = True
    if timeout is not None:
        timer.start()
    return timer


@cache
def _end_in_any_case() -> None:
    """Limit the time that Python waits at exit for threads left by a call."""
    end = partial(faulthandler.dump_traceback_later, GRACE_AT_END, exit=True, file=2)
    threading._register_atexit(end)  # type: ignore[attr-defined]  # the public `atexit` comes after the waiting


def _thread(target: Callable[[], object]) -> threading.Thread:
    """Return a thread that scores like the main one: without gradients, on the current device.

    It is a daemon, because the interpreter waits at exit for an executor's threads, even if one hangs.
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
    except BaseException as error:  # even SystemExit, which would end only the thread
        future.set_exception(error)
    else:
        future.set_result(result)
