"""Remote rewards against real servers on the loopback interface: under load, through faults, each with a message."""

import asyncio
import gzip
import math
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loopback import Reply, as_json, before_answers, dripping, request, scripted, serving
from PIL import Image

from trl_tpgrpo.rewards import remote
from trl_tpgrpo.rewards.contract import RewardError
from trl_tpgrpo.rewards.remote import TOKEN_VARIABLE, RemoteReward, RemoteRewardError, remote_reward_from_url
from trl_tpgrpo.rewards.scorer import ImageBatch, Scorer


ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "MAX_PAUSE", 0.1)


def numbered(number: int) -> Image.Image:
    """A picture that has its number in its pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels[0, 0] = (number >> 16, number >> 8 & 255, number & 255)
    return Image.fromarray(pixels)


def number_of(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))
    return red << 16 | green << 8 | blue


def score(reward: RemoteReward, numbers: range | list[int], **columns: object) -> list[float | None]:
    images, prompts = [numbered(number) for number in numbers], [f"number {number}" for number in numbers]
    return asyncio.run(reward(images=images, prompts=prompts, **columns))


def root(images, prompts, **columns) -> list[float]:
    assert prompts == [f"number {number_of(image)}" for image in images]
    return [math.sqrt(number_of(image)) for image in images]


def test_a_remote_reward_is_the_function_itself() -> None:
    def local(images, prompts, weight, log_metric, log_extra, trainer_state, **columns):
        assert trainer_state is None
        log_metric("mean_weight", sum(weight) / len(weight))
        log_metric("undefined", math.nan)
        log_extra("shown", [prompt.upper() for prompt in prompts])
        return [None if one is None else one / 3 * number_of(image) for image, one in zip(images, weight, strict=True)]

    def record(call: Callable) -> tuple:
        metrics: list[tuple[str, float]] = []
        extra: dict[str, list] = {}
        values = call(log_metric=lambda name, value: metrics.append((name, value)), log_extra=extra.__setitem__)
        return values, metrics, extra

    local.batch_size = 4
    weight = [0.1 * number for number in range(10)]
    images, prompts = [numbered(number) for number in range(10)], [f"number {number}" for number in range(10)]
    with serving(local) as server:
        reward = RemoteReward(f"http://127.0.0.1:{server.port}/", "local", batch_size=4)
        assert reward.__name__ == "local" and not {"batch_size", "timeout"} & set(vars(reward))
        remote, metrics, extra = record(lambda **log: score(reward, range(10), weight=weight, trainer_state=5, **log))
        assert record(lambda **log: asyncio.run(reward([], [], weight=[], **log))) == ([], [], {})
    there = record(lambda **log: local(images, prompts, weight, trainer_state=None, **log))
    assert remote == there[0] and extra == there[2]
    assert {name for name, _ in metrics} == {"mean_weight", "undefined"}
    assert all(math.isnan(value) == (name == "undefined") for name, value in metrics)


def test_a_thousand_images_from_eight_clients_through_a_server_that_loses_answers(monkeypatch) -> None:
    """Each is scored once and gets its own value, though one answer in five is lost and the queue is short."""
    calls: list[int] = []
    sent: Counter[str] = Counter()

    def counting(images, prompts, target, **columns):
        assert target == [number_of(image) for image in images]
        calls.extend(target)
        return root(images, prompts)

    async def lose(answer: dict) -> None:
        if "rewards" in answer:
            sent[answer["id"]] += 1
            if sent[answer["id"]] == 1 and int(answer["id"], 16) % 5 == 0:
                raise ConnectionError("this answer is lost")

    before_answers(monkeypatch, lose)
    counting.batch_size = 7
    with serving(counting, max_queue=100) as server:
        url = f"http://127.0.0.1:{server.port}"

        def client(number: int) -> list[float | None]:
            numbers = range(125 * number, 125 * number + 125)
            reward = RemoteReward(url, "counting", batch_size=6, num_retries=100)
            return score(reward, numbers, target=list(numbers))

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(client, range(8)))
    assert [value for answer in answers for value in answer] == [math.sqrt(number) for number in range(1000)]
    assert sorted(calls) == list(range(1000))
    assert max(sent.values()) > 1, "no answer was lost, and this test shows nothing"


SLOW = """
import os, time
def slow(images, prompts, **columns):
    open("calls", "a").write(f"{os.getpid()}\\n")
    time.sleep(0.4)
    return [len(prompt) for prompt in prompts]
"""


def start(folder: Path, port: int) -> tuple[subprocess.Popen, int]:
    command = [
        sys.executable,
        "-m",
        "trl_tpgrpo.rewards.serving",
        "--reward_funcs",
        "rewards.slow",
        "--port",
        str(port),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline().split(":")[-1].split("/")[0])


def called(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the server is in the middle of a request."""
    deadline = time.monotonic() + 20
    while not (folder / "calls").exists() or str(process.pid) not in (folder / "calls").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_killed_within_a_request_and_started_again_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(SLOW)
    first, port = start(tmp_path, 0)
    reward = RemoteReward(f"http://127.0.0.1:{port}", "slow", batch_size=2, concurrency=2, num_retries=200)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(score, reward, [1, 22, 333, 4444])
        called(tmp_path, first)
        first.kill()
        first.communicate()
        second, _ = start(tmp_path, port)
        try:
            assert asked.result(timeout=20) == [8, 9, 10, 11]
        finally:
            second.terminate()
            second.communicate()
    assert len(set((tmp_path / "calls").read_text().split())) == 2, "both servers were asked"


def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(SLOW)
    process, port = start(tmp_path, 0)
    reward = RemoteReward(f"http://127.0.0.1:{port}", "slow", num_retries=2)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(score, reward, [1, 2])
        called(tmp_path, process)
        process.kill()
        process.communicate()
        message = (
            rf"reward server http://127.0.0.1:{port}/slow has not scored rows 0 to 1: no connection: .*\(3 attempts\)"
        )
        with pytest.raises(RemoteRewardError, match=message):
            asked.result(timeout=20)


def test_a_slow_server_times_out_and_its_work_is_not_done_twice() -> None:
    calls = []
    may_go_on = threading.Event()

    def slow(images, **columns):
        calls.append(len(images))
        assert may_go_on.wait(10)
        return [1.0] * len(images)

    with serving(slow) as server:
        url = f"http://127.0.0.1:{server.port}"
        with pytest.raises(RemoteRewardError, match=r"no answer within 0\.1 seconds \(2 attempts\).*Longer `timeout`"):
            score(RemoteReward(url, "slow", timeout=0.1, num_retries=1), [1])
        threading.Timer(0.5, may_go_on.set).start()
        assert score(RemoteReward(url, "slow", timeout=0.1, num_retries=100), [1]) == [1.0]
    assert calls == [1, 1], "one for each call of the client, whatever it retried"


def good(rewards: object, **more: object) -> Reply:
    return as_json({"id": "x", "rewards": rewards, "metrics": {}, "extra": {}} | more)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (good([1.0]), "ValueError: 1 rewards for 2 images"),
        (good([1.0, "2"]), "'2' is not a valid reward"),
        (good([1.0, True]), "True is not a valid reward"),
        ((200, {}, b'{"rewards": [1.0, NaN]}'), "nan is not a valid reward"),
        ((200, {}, b'{"rewards": [1.0, 1' + b"0" * 400 + b"]}"), "invalid body \\(protocol 1\\): OverflowError"),
        ((200, {}, b"[" * 100_000), "an invalid body \\(protocol 1\\): RecursionError"),
        (good([1.0, 2.0], metrics={"a": ["3"]}), "ValueError: '3' is not a valid a"),
        ((200, {}, b'{"rewards": [1, 2], "metrics": {"a": [Infinity]}}'), "ValueError: inf is not a valid a"),
        (good([1.0, 2.0], extra={"text": "ab"}), "2 values of 'text' for 2 images, or not a list"),
        ((200, {}, b" " * (16 * 2**20 + 1)), "with more than 16777216 bytes: use a smaller `batch_size`"),
        ((200, {"Content-Encoding": "br"}, b""), "with Content-Encoding 'br', which was not requested"),
        ((418, {"Content-Type": "text/plain; charset=zlib_codec"}, b"tea"), "with status 418: it said 'tea'"),
        (good(None), "an invalid body \\(protocol 1\\): TypeError"),
        (good([1.0, 2.0], extra={"text": ["a"]}), "1 values of 'text' for 2 images"),
        (good([1.0, 2.0], metrics=[1]), "an invalid body \\(protocol 1\\): AttributeError"),
        ((200, {}, b'{"rewards": [1.0, '), "an invalid body \\(protocol 1\\): JSONDecodeError.*It began with"),
        (as_json([1.0, 2.0]), "an invalid body \\(protocol 1\\): TypeError"),
        (
            (500, {}, b"<html>Oops</html>"),
            "status 500: it said '<html>Oops</html>'. The error is in the reward function",
        ),
        ((302, {"Location": "http://127.0.0.1:1/x"}, b""), "with status 302: it said ''"),
        ((404, {}, b""), "status 404.*GET http://127.0.0.1:[0-9]+/health lists"),
    ],
)
def test_wrong_answers_are_errors_at_once(reply: Reply, message: str) -> None:
    with scripted(lambda request, number: reply) as server:
        with pytest.raises(RemoteRewardError, match=f"^The reward server {server.url}/judge answered .*{message}"):
            score(RemoteReward(server.url, "judge"), [1, 2])
        assert len(server.requests) == 1


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip"])
def test_a_bomb_is_not_unpacked(coding: str) -> None:
    bomb = zlib.compressobj(9, wbits=31)
    packed = b"".join([*(bomb.compress(bytes(2**20)) for _ in range(100)), bomb.flush()])
    if coding != "gzip":
        packed = gzip.compress(packed)
    with scripted(lambda request, number: (200, {"Content-Encoding": coding}, packed)) as server:
        tracemalloc.start()
        try:
            with pytest.raises(RemoteRewardError, match=f"with Content-Encoding {coding!r}"):
                score(RemoteReward(server.url, "judge"), [1, 2])
            assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
        finally:
            tracemalloc.stop()
        assert server.requests[0]["headers"]["Accept-Encoding"] == "identity"


def test_an_answer_that_drips_forever_ends_with_the_timeout_in_the_check_too() -> None:
    with dripping() as url:
        reward = RemoteReward(url, "judge", timeout=0.3, num_retries=0)
        start = time.monotonic()
        with pytest.raises(RemoteRewardError, match=r"does not answer: no answer within 0\.3 seconds"):
            reward.check_available()
        with pytest.raises(RemoteRewardError, match=r"no answer within 0\.3 seconds"):
            score(reward, [1])
        assert time.monotonic() - start < 5


def test_the_server_is_checked_where_an_event_loop_runs_already() -> None:
    async def check() -> None:
        RemoteReward(f"http://127.0.0.1:{server.port}", "root").check_available()

    with serving(root) as server:
        asyncio.run(check())


@pytest.mark.parametrize("fault", [None, (502, {}, b""), (503, {"Retry-After": "0"}, b""), (504, {}, b"x"), "cut"])
def test_what_passes_is_tried_again_with_the_same_id(fault: Reply | str) -> None:
    cut = (200, {"Content-Length": "1000", "Connection": "close"}, b'{"rewards": [1.0')
    faults = [cut if fault == "cut" else fault] * 3

    with scripted(lambda request, number: faults[number] if number < 3 else good([0.5, None])) as server:
        assert score(RemoteReward(server.url, "judge"), [1, 2]) == [0.5, None]
        assert len(server.requests) == 4
        assert len({request["body"]["id"] for request in server.requests}) == 1
        with pytest.raises(RemoteRewardError, match=r"\(3 attempts\)"):
            server.requests.clear()
            score(RemoteReward(server.url, "judge", num_retries=2), [1, 2])
        assert len(server.requests) == 3


def test_errors_of_the_function_name_row_and_prompt() -> None:
    def picky(images, prompts, **columns):
        if "number 13" in prompts:
            raise ValueError("thirteen brings bad luck")
        return root(images, prompts)

    with serving(picky) as server:
        reward = RemoteReward(f"http://127.0.0.1:{server.port}", "picky", batch_size=4)
        with pytest.raises(RemoteRewardError) as error:
            score(reward, [0, 1, 2, 3, 4, 13, 6])
        url = reward.url
    assert str(error.value).startswith(
        f"The reward server {url} answered with status 422 (row 5, prompt 'number 13'): "
        "The reward function 'picky' raised ValueError: thirteen brings bad luck. "
    )


def test_a_served_function_that_hangs_is_no_image_s_fault_and_asked_once() -> None:
    may_end, calls = threading.Event(), []

    def hanging(images, **columns):
        calls.append(len(images))
        may_end.wait(20)

    hanging.timeout = 0.3
    with serving(hanging) as server:
        reward = RemoteReward(f"http://127.0.0.1:{server.port}", "hanging")
        batch = ImageBatch([numbered(number) for number in range(3)], None, ["one", "two", "three"], {})
        scoring = Scorer().start([reward], batch, {"trainer_state": None, "log_metric": None, "log_extra": None})
        with pytest.raises(RewardError, match=r"'hanging' has not returned within 0\.3 seconds"):
            scoring.result()
        may_end.set()
    assert calls == [3]


def test_the_token_opens_and_is_not_shown(monkeypatch) -> None:
    with serving(root, token="se-cret") as server:
        url = f"http://127.0.0.1:{server.port}"
        assert score(RemoteReward(url, "root", token="se-cret"), [9]) == [3.0]
        for token in ("se-cre", None):
            with pytest.raises(RemoteRewardError, match=r"status 401.*`token`.*TRL_TPGRPO_REWARD_TOKEN") as error:
                score(RemoteReward(url, "root", token=token), [9])
            assert "se-cre" not in str(error.value)
        monkeypatch.setenv(TOKEN_VARIABLE, "se-cret")
        assert score(remote_reward_from_url(f"{url}/root"), [9]) == [3.0]
        assert "se-cret" not in repr(vars(RemoteReward(url, "root"))) + repr(RemoteReward(url, "root"))
    with pytest.raises(ValueError, match="The token must be printable") as wrong:
        RemoteReward(url, "root", token="se-cret\n")
    assert "se-cret" not in str(wrong.value)


def test_a_payload_that_is_too_large_names_the_remedy() -> None:
    with serving(root, max_payload=3000) as server:
        url = f"http://127.0.0.1:{server.port}"
        message = r"status 413: The request has \d+ bytes, the limit is 3000 .* Use a smaller `batch_size` \(now 16\)"
        with pytest.raises(RemoteRewardError, match=message):
            score(RemoteReward(url, "root"), range(16))
        assert score(RemoteReward(url, "root", batch_size=2), range(16)) == [math.sqrt(number) for number in range(16)]


def test_a_full_queue_is_waited_for_and_then_named(monkeypatch) -> None:
    monkeypatch.setattr(remote, "MAX_PAUSE", 0.05)  # the server asks for a second
    started, may_go_on = threading.Event(), threading.Event()

    def slow(images, prompts, **columns):
        started.set()
        assert may_go_on.wait(10)
        return root(images, prompts)

    slow.batch_size = 1
    with serving(slow, max_queue=2) as server, ThreadPoolExecutor() as pool:
        url = f"http://127.0.0.1:{server.port}"
        patient = RemoteReward(url, "slow", batch_size=1, concurrency=6, num_retries=1000)
        asked = pool.submit(score, patient, range(12))
        assert started.wait(10)  # taken out of the queue later, it would leave room there
        while request(server, "GET", "/health")[1]["rewards"]["slow"]["num_waiting"] < 2:
            time.sleep(0.01)
        try:
            message = r"status 503: The queue of 'slow' is full: 2 images .*queue long enough"
            with pytest.raises(RemoteRewardError, match=message):
                score(RemoteReward(url, "slow", num_retries=1), [1])
        finally:
            may_go_on.set()
        assert asked.result(timeout=20) == [math.sqrt(number) for number in range(12)]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, np.float32(2)], "2.0.*float32, row 1"),
        ([(1, 2), (3, 4)], "row 0"),
        ([{"a": 1}, {1: "a"}], "row 1"),
        ([1.0, math.nan], "nan"),
        ([["x"], [numbered(1)]], "row 1"),
    ],
)
def test_columns_that_json_cannot_carry_are_named(values: list, shown: str) -> None:
    with serving(root) as server:
        url = f"http://127.0.0.1:{server.port}"
        with pytest.raises(ValueError, match=rf"The column 'odd' cannot be sent to {url}/root.*{shown}.*columns=\["):
            score(RemoteReward(url, "root"), [1, 4], odd=values)
        assert score(RemoteReward(url, "root", columns=["fine"]), [1, 4], odd=values, fine=[{"a": [None]}, "x"]) == [
            1,
            2,
        ]
        with pytest.raises(ValueError, match="column 'fine' to send .* is missing; there are \\['odd'\\]"):
            score(RemoteReward(url, "root", columns=["fine"]), [1, 4], odd=values)


def test_images_that_png_cannot_carry_are_named() -> None:
    with serving(root) as server:
        reward = RemoteReward(f"http://127.0.0.1:{server.port}", "root")
        with pytest.raises(ValueError, match="image of row 1 has mode 'CMYK'"):
            asyncio.run(reward([numbered(1), Image.new("CMYK", (8, 8))], ["", ""]))


def test_requests_under_way_are_bounded_over_all_calls() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def reply(request: dict, number: int) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return good([1.0])

    async def three_calls(reward: RemoteReward) -> None:
        calls = [reward([numbered(number) for number in range(5)], [""] * 5) for _ in range(3)]
        assert await asyncio.gather(*calls) == [[1.0] * 5] * 3

    with scripted(reply) as server:
        reward = RemoteReward(server.url, "judge", batch_size=1, concurrency=3)
        asyncio.run(three_calls(reward))
        asyncio.run(three_calls(reward))  # in another event loop
    assert most == 3


def test_the_first_error_ends_the_other_requests() -> None:
    def reply(request: dict, number: int) -> Reply:
        return as_json({}, 404) if number == 2 else (503, {}, b"")

    with scripted(reply) as server:
        start = time.monotonic()
        with pytest.raises(RemoteRewardError, match="status 404"):
            score(RemoteReward(server.url, "judge", batch_size=1, num_retries=1000), range(4))
        time.sleep(0.3)
        number = len(server.requests)
        time.sleep(0.3)
        assert len(server.requests) == number and time.monotonic() - start < 5


def test_pauses_leave_the_randomness_of_the_training_alone() -> None:
    random.seed(5)
    before = random.getstate()
    with scripted(lambda request, number: (503, {}, b"") if number < 2 else good([1.0])) as server:
        score(RemoteReward(server.url, "judge"), [1])
    assert random.getstate() == before


def test_urls_name_server_and_reward() -> None:
    reward = remote_reward_from_url("https://rewards.example.org:8000/v1/pick_score/")
    assert reward.url == "https://rewards.example.org:8000/v1/pick_score" and reward.__name__ == "pick_score"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1/pick-score"])
def test_urls_without_a_reward_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"A remote reward is http://HOST:PORT/REWARD"):
        remote_reward_from_url(url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://host/x"}, "url must be a URL such as"),
        ({"url": "127.0.0.1:8000"}, "url must be a URL such as"),
        ({"url": "http://me:secret@host"}, "url must have no user, password"),
        ({"reward": "pick-score"}, "reward must be a name"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
        ({"num_retries": -1}, "num_retries must be 0 or more"),
        ({"timeout": 0}, "timeout must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RemoteReward(**({"url": "http://host", "reward": "judge"} | arguments))
    assert "secret" not in str(error.value)
