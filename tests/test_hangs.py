"""Reward functions that raise what ends a program, hang in whatever way, or change what is not theirs: the run stops
with their name, the process can be ended, and what they have changed is put back."""

import asyncio
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Python
from test_scorer import BATCH, NUMBER, first_value
from test_trainer import build

from trl_tpgrpo.callbacks import checkpoints
from trl_tpgrpo.rewards import RewardError
from trl_tpgrpo.rewards.scorer import Scorer
from trl_tpgrpo.rewards.surroundings import settings


# Whatever is raised


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit("no words")


RAISED = [
    KeyboardInterrupt(), asyncio.CancelledError("by itself"), SystemExit(3), GeneratorExit(), StopIteration(), Mute(),
]  # fmt: skip
KINDS = ["main", "timeout", "thread", "async", "task"]


def failing(kind: str, fail: Callable[[], object]) -> Callable:
    """A function that calls another for the image of row 3, and where it runs."""

    def mine(images, prompts: list[str], bonus: list[int], **columns: object) -> list[float]:
        if "prompt 3" in prompts:
            fail()
        return first_value(images, bonus)

    async def awaited(*args: object, **columns: object) -> list[float]:
        if kind == "task":
            return await asyncio.create_task(awaited_task(*args, **columns))
        return mine(*args, **columns)

    async def awaited_task(*args: object, **columns: object) -> list[float]:
        return mine(*args, **columns)

    function = awaited if kind in ("async", "task") else mine
    function.__name__, function.batch_size = "mine", 2
    if kind == "timeout":
        function.timeout = 20.0
    if kind == "thread":
        function.runs_in = "thread"
    return function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_is_raised_is_reported_with_its_row_and_others_go_on(error: BaseException, kind: str) -> None:
    def fail() -> None:
        raise error

    function, scorer = failing(kind, fail), Scorer()
    with pytest.raises(RewardError, match=r"'mine' raised \w+: .* for row 3, prompt 'prompt 3'"):
        scorer.start([function], BATCH, {}).result()
    scorer.failures = "skip"  # the thread or loop lives on
    assert scorer.start([function], BATCH, {}).result().failed.tolist() == [False, False, False, True, False]


def test_values_that_raise_are_the_functions_failure() -> None:
    class Value:
        def __float__(self) -> float:
            raise SystemExit(1)

    def lazy(images, **columns: object) -> list[object]:
        return [Value()] * len(images)

    with pytest.raises(RewardError, match="'lazy' returned a value whose conversion to a number raises SystemExit: 1"):
        Scorer().start([lazy], BATCH, {}).result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_signal_raises_is_no_failure_of_the_function(number: int) -> None:
    """Ctrl-C outside of training, and SIGTERM in a script that makes it an exit."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Scorer().start([failing("main", lambda: os.kill(os.getpid(), number))], BATCH, {}).result()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


# Whatever hangs


def swallow() -> None:
    """Hang, and let nothing that is raised meanwhile end it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except BaseException:
            pass


async def swallow_cancellation(**columns: object) -> list[float]:
    while True:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass


@pytest.mark.parametrize("how", ["timeout", "thread", "async", "swallows"])
def test_a_hang_is_reported_within_its_timeout_and_by_the_name_of_its_function(how: str) -> None:
    """The async ones block the event loop; another async function has a loop of its own and is not blamed."""
    release = threading.Event()
    hanging = swallow_cancellation if how == "swallows" else failing(how, lambda: release.wait(60))
    hanging.__name__, hanging.timeout = "hanging", 0.3

    async def fine(images, bonus: list[int], **columns: object) -> list[float]:
        await asyncio.sleep(0.01)
        return first_value(images, bonus)

    fine.timeout, start = 5.0, time.monotonic()
    with pytest.raises(RewardError, match="'hanging' has not returned within its timeout of 0.3 seconds"):
        Scorer().start([fine, hanging], BATCH, {}).result()
    assert time.monotonic() - start < 4
    release.set()


def test_after_a_blocked_event_loop_another_one_awaits_the_next_calls(monkeypatch) -> None:
    monkeypatch.setattr("trl_tpgrpo.rewards.threads.GRACE", 0.2)
    release, threads, scorer = threading.Event(), [], Scorer("skip")

    def block_once() -> None:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            release.wait(60)

    blocking = failing("async", block_once)
    blocking.timeout = 3.0
    assert scorer.start([blocking], BATCH, {}).result().failed[3]
    assert not scorer.start([blocking], BATCH, {}).result().failed.any()
    assert threads[1] is not threads[0]
    release.set()


# A process that can be ended

HUNG = """
import asyncio, ctypes, os, signal, sys, threading
from pathlib import Path
from test_hangs import swallow
from test_trainer import build
from trl_tpgrpo.callbacks import checkpoints

checkpoints.PATIENCE = 3.0
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock

def hanging(images, **columns):
    os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[2] == "native":  # where no handler of Python is called
        lock(mutex)
        lock(mutex)
    swallow()

async def blocking(images, **columns):
    hanging(images)

build(Path(sys.argv[1]), reward_funcs=blocking if sys.argv[2] == "async" else hanging).train()
"""


@pytest.mark.parametrize("kind", ["main", "native", "async"])
def test_sigterm_ends_a_process_whose_reward_hangs_and_shows_where(kind: str, tmp_path: Path) -> None:
    """A function without a timeout, which swallows what is raised in it."""
    process = Python("-c", HUNG, tmp_path, kind)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Timeout (0:00:03)!" in errors and " in hanging\n" in errors


LEFT_BEHIND = """
import asyncio, sys, time
from pathlib import Path
from test_trainer import build
from trl_tpgrpo.rewards import threads

threads.GRACE_AT_END = 2.0

async def hanging(images, **columns):
    await asyncio.to_thread(time.sleep, 500)

hanging.timeout = 0.5
build(Path(sys.argv[1]), reward_funcs=hanging).train()
"""


def test_a_thread_that_a_hung_call_has_left_behind_does_not_keep_the_process(tmp_path: Path) -> None:
    """Python waits for it at the end."""
    process = Python("-c", LEFT_BEHIND, tmp_path)
    process.wait(120)
    assert process.returncode == 1
    assert "'hanging' has not returned within its timeout of 0.5 seconds" in process.stderr.read()


def test_a_run_that_moves_on_after_a_signal_is_not_ended(tmp_path: Path, monkeypatch) -> None:
    """The time begins anew with each call of a reward function, and is none any more at the end."""
    done: list[str] = []
    monkeypatch.setattr(checkpoints.faulthandler, "dump_traceback_later", lambda *_, **__: done.append("begin"))
    monkeypatch.setattr(checkpoints.faulthandler, "cancel_dump_traceback_later", lambda: done.append("cancel"))
    calls = []

    def slow(images, **columns: object) -> list[float]:
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(len(images))
        while len(calls) <= 3 and len(done) < len(calls):
            time.sleep(0.01)
        return [float(np.asarray(image).mean()) for image in images]

    slow.batch_size = 1
    trainer = build(tmp_path, reward_funcs=slow)
    trainer.train()
    assert trainer.stop_on_signal.stopped == signal.SIGTERM and trainer.state.global_step == 1
    assert done.count("begin") >= 3 and done[-1] == "cancel"


def test_a_process_that_a_reward_forks_ends_by_sigterm_and_its_signal_is_not_the_runs(tmp_path: Path) -> None:
    ended = []

    def forking(images, **columns: object) -> list[float]:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(20)
        ended.append(process.exitcode)
        return [float(np.asarray(image).mean()) for image in images]

    trainer = build(tmp_path, reward_funcs=forking, max_steps=1)
    trainer.train()
    assert set(ended) == {-signal.SIGTERM} and trainer.stop_on_signal.stopped is None


# What is not a function's own


def change_everything(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.autocast("cpu", torch.float16).__enter__()
    torch.set_grad_enabled(not torch.is_grad_enabled())
    torch.inference_mode().__enter__()
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def state() -> list[object]:
    """What `change_everything` changes."""
    handler = signal.getsignal(signal.SIGTERM)
    return [*settings().values(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), handler]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("with_grad", [False, True])
def test_what_a_function_changes_is_put_back(fails: bool, with_grad: bool, tmp_path: Path) -> None:
    seen = []

    def changing(images, bonus: list[int], **columns: object) -> list[float]:
        seen.append(state())
        values = first_value(images, bonus)
        change_everything(tmp_path)
        if fails:
            raise KeyError("after all")
        return values

    changing.batch_size = 3
    with torch.set_grad_enabled(with_grad):
        before = state()
        scored = Scorer("skip").start([changing], BATCH, {}).result()
        assert state() == before
    assert scored.failed.all() == fails
    assert all(one[:-1] == before[:-1] for one in seen) and len(seen) == (2 + NUMBER if fails else 2)


@pytest.mark.parametrize("runs_in", ["thread", "async"])
def test_what_a_function_in_a_thread_changes_is_refused_by_name_and_put_back(runs_in: str, tmp_path: Path) -> None:
    """As the model is sampled meanwhile; what the thread alone has, such as the mode of gradients, is its own."""
    kind = failing(runs_in, lambda: (torch.set_default_dtype(torch.float64), os.chdir(tmp_path)))
    before = state()
    with pytest.raises(RewardError, match="'mine' changed torch's default dtype and the working directory while"):
        Scorer().start([kind], BATCH, {}).result()
    assert state() == before


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_random_states_do_not_depend_on_what_a_function_draws_or_seeds() -> None:
    """They are moved for one that does, not for others; its own numbers differ from call to call."""
    drawn = []

    def drawing(images, bonus: list[int], **columns: object) -> list[float]:
        drawn.append(draw())
        return first_value(images, bonus)

    def seeding(images, bonus: list[int], **columns: object) -> list[float]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return drawing(images, bonus)

    after = []
    for function in (None, first_value, drawing, seeding):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        if function is not None:
            function.batch_size = 3
            Scorer().start([function], BATCH, {}).result()
        after.append(draw())
    assert after[0] == after[1] and after[2] == after[3]
    assert all(one != other for one, other in zip(after[0], after[2], strict=True))
    assert drawn[0] != drawn[1] and drawn[2] == drawn[3]
