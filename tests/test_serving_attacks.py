"""The reward server under attack: slow, ambiguous and huge requests, and functions that raise anything or hang."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loopback import request, serving
from PIL import Image, PngImagePlugin

from trl_tpgrpo.rewards.remote import base64_png
from trl_tpgrpo.rewards.serving import server as server_module
from trl_tpgrpo.rewards.serving import worker
from trl_tpgrpo.rewards.serving.functions import ServedReward
from trl_tpgrpo.rewards.serving.server import RewardServer


ROOT = Path(__file__).parents[1]
PICTURE = base64_png(Image.new("RGB", (4, 4)))
HEAD = "POST /plain HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def plain(images: list[Image.Image], **columns: object) -> list[float]:
    return [1.0] * len(images)


def body(number: int = 1, name: str = "one", image: str = PICTURE) -> dict:
    return {"id": name, "images": [image] * number, "prompts": ["a dog"] * number}


@contextmanager
def connection(server: RewardServer, sent: str | bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
        opened.sendall(sent.encode() if isinstance(sent, str) else sent)
        yield opened


def rest(opened: socket.socket) -> bytes:
    """Read until the server ends the connection."""
    return b"".join(iter(lambda: opened.recv(65536), b""))


def test_sixteen_slow_bodies_lock_nobody_out_and_are_cut_off(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "MAX_SECONDS", 0.8)
    with serving(plain) as server:
        slow = [connection(server, f"{HEAD}Content-Length: 99999\r\n\r\n" + "{") for _ in range(16)]
        opened = [one.__enter__() for one in slow]
        assert request(server, "POST", "/plain", body())[0] == 200
        start, dripping = time.monotonic(), opened[0]
        while time.monotonic() - start < 0.5:
            dripping.sendall(b" ")  # some bytes, now and then, are no excuse
            time.sleep(0.1)
        answers = [rest(one) for one in opened]
        assert time.monotonic() - start < 5
        assert all(b"HTTP/1.1 503" in answer and b'"cut_off"' in answer for answer in answers)
        for one in slow:
            one.__exit__(None, None, None)
        assert server._bytes_held == 0


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "POST /plain HT",
        "POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{",
        "POST /plain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["nothing", "half a head", "a refused body", "refused chunks"],
)
def test_what_never_comes_in_whole_ends_its_connection(sent: str, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 0.1)
    with serving(plain) as server, connection(server, sent) as opened:
        start = time.monotonic()
        try:
            rest(opened)
        except ConnectionResetError:
            pass
        assert time.monotonic() - start < 3


def test_bodies_that_come_in_are_bounded_by_what_has_come(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "MAX_BODIES", 1)
    with serving(plain, max_payload=100_000) as server:
        with connection(server, f"{HEAD}Content-Length: 100000\r\n\r\n" + " " * 90_000):
            while server._bytes_held < 90_000:
                time.sleep(0.01)
            status, answer, headers = request(server, "POST", "/plain", body() | {"columns": {"a": ["x" * 20_000]}})
            assert status == 503 and answer["error"]["type"] == "busy" and headers["Retry-After"] == "1"
            assert request(server, "POST", "/plain", body())[0] == 200
        assert request(server, "POST", "/plain", body(name="two"))[0] == 200


AMBIGUOUS = {
    "two lengths": f"{HEAD}Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    "a list of lengths": f"{HEAD}Content-Length: 5, 6\r\n\r\n123456",
    "a length and chunks": f"{HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": f"{HEAD}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "a body on GET": "GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12345",
    "chunks on GET": "GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a body on GET of a reward": "GET /plain HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12345",
}


@pytest.mark.parametrize("sent", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_ambiguous_lengths_are_refused_and_nothing_more_is_read(sent: str) -> None:
    second = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"  # as one smuggles a request past a proxy
    with serving(plain) as server, connection(server, sent + second) as opened:
        answer = rest(opened)
    if answer:  # uvicorn before 0.14 has none for what h11 refuses
        assert re.match(rb"HTTP/1.1 4\d\d ", answer) and b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1 ") <= 1 and b"num_scored" not in answer


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def raising(error: BaseException) -> Callable:
    def function(images: list, **columns: object) -> list[float]:
        raise error

    return function


def raising_later(error: BaseException) -> Callable:
    async def function(images: list, **columns: object) -> list[float]:
        await asyncio.sleep(0)
        raise error

    return function


ERRORS = [
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    GeneratorExit(),
    StopIteration(),
    Mute("x" * 9),
]


@pytest.mark.parametrize("make", [raising, raising_later])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_function_raises_is_an_answer_and_the_server_lives_on(error: BaseException, make: Callable) -> None:
    if isinstance(error, StopIteration) and make is raising_later:
        pytest.skip("Python makes a RuntimeError of it")
    with serving(make(error), plain) as server:
        for name in ("one", "two"):
            status, answer, _ = request(server, "POST", "/function", body(2, name))
            assert status == 422 and answer["error"]["exception"] == type(error).__name__
            assert f"'function' raised {type(error).__name__}" in answer["error"]["message"]
        assert request(server, "POST", "/plain", body(2))[0] == 200


@pytest.mark.parametrize("logged", [("a", float("inf")), ("a", "3"), ("a", 10**400), ("a", None), (None, 1.0)])
def test_a_metric_that_is_no_number_is_refused(logged: tuple) -> None:
    def careless(images: list, log_metric: Callable, **columns: object) -> list[float]:
        log_metric(*logged)
        return [1.0]

    with serving(careless) as server:
        status, answer, _ = request(server, "POST", "/careless", body())
    assert status == 422 and answer["error"]["type"] == "reward_raised"


def test_what_is_logged_is_what_it_was_when_it_was_logged() -> None:
    def changing(images: list, log_extra: Callable, **columns: object) -> list[float]:
        said: list = [["circle"]]
        log_extra("said", said)
        said[0].append(said)  # which JSON does not have
        return [1.0]

    with serving(changing) as server:
        assert request(server, "POST", "/changing", body())[1]["extra"] == {"said": [["circle"]]}


def test_rewards_of_the_wrong_kind_and_columns_of_reserved_names_are_refused() -> None:
    def endless(images: list, **columns: object) -> object:
        return iter(int, 1)

    def immense(images: list, **columns: object) -> list[int]:
        return [10**400]

    with serving(endless, immense, plain) as server:
        for name, message in (("endless", "a list of numbers, got callable_iterator"), ("immense", "not a number")):
            status, answer, _ = request(server, "POST", f"/{name}", body())
            assert status == 500 and message in answer["error"]["message"] and len(str(answer)) < 300
        status, answer, _ = request(server, "POST", "/plain", body() | {"columns": {"trainer_state": [1]}})
        assert status == 400 and "trainer_state" in answer["error"]["message"]


def test_a_function_that_hangs_is_named_and_the_next_call_is_made(monkeypatch) -> None:
    may_end = threading.Event()

    def hanging(images: list, prompts: list[str], **columns: object) -> list[float]:
        if prompts == ["hang"]:
            may_end.wait(20)
        return [1.0] * len(images)

    hanging.timeout = 0.3
    with serving(hanging, plain) as server:
        status, answer, _ = request(server, "POST", "/hanging", body() | {"prompts": ["hang"]})
        assert status == 500 and answer["error"]["type"] == "reward_hung"
        assert "'hanging' has not returned within 0.3 seconds" in answer["error"]["message"]
        health = request(server, "GET", "/health")[1]
        assert health["status"] == "hanging" and health["rewards"]["hanging"]["num_hanging"] == 1
        assert health["rewards"]["plain"]["num_hanging"] == 0
        assert request(server, "POST", "/hanging", body(name="two"))[0] == 200
        monkeypatch.setattr(worker, "MAX_HANGING", 1)
        status, answer, _ = request(server, "POST", "/hanging", body(name="three"))
        assert status == 500 and "1 calls of the reward function 'hanging' hang" in answer["error"]["message"]
        may_end.set()
        while request(server, "GET", "/health")[1]["status"] != "ok":
            time.sleep(0.01)
        assert request(server, "POST", "/hanging", body(name="four"))[0] == 200


@pytest.mark.parametrize(("name", "value"), [("timeout", 0), ("timeout", -1), ("batch_size", -3), ("timeout", 1e30)])
def test_declarations_that_mean_nothing_are_refused(name: str, value: float) -> None:
    function = raising(ValueError())
    setattr(function, name, value)
    with pytest.raises(ValueError, match=f"'function' has {name}=.*must be above 0, or None"):
        ServedReward(function)


REWARDS = """
import time
def plain(images, **columns):
    return [1.0] * len(images)
def endless(images, **columns):
    while True:
        time.sleep(0.1)
"""


@contextmanager
def program(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start the program itself, with `plain` and `endless`."""
    (folder / "my_rewards.py").write_text(REWARDS)
    names = ["--reward_funcs", "my_rewards.plain", "my_rewards.endless", "--port", "0"]
    command = [sys.executable, "-m", "trl_tpgrpo.rewards.serving", *names, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline().split(":")[-1].split("/")[0])
        finally:
            process.kill()


def peak(process: subprocess.Popen) -> int:
    """Return the most memory that a process has had, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_what_is_small_and_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    at_the_limit = base64_png(Image.new("RGBA", (4096, 4096)))
    nested = {"columns": {"a": ["@"]}}
    values = json.dumps(body() | nested).replace('"@"', "[" + "{}," * 8_000_000 + "0]").encode()
    with program(tmp_path) as (process, port):
        before = peak(process)
        for sent, size in ((json.dumps(body(40, image=at_the_limit)).encode(), "2560 MiB"), (values, " MiB")):
            status, answer, _ = request(port, "POST", "/plain", sent)
            assert status == 413 and answer["error"]["type"] == "too_large_unpacked"
            assert size in answer["error"]["message"] and "(--max_unpacked)" in answer["error"]["message"]
        assert peak(process) - before < 3 * len(values) // 2**20 + 30
        assert request(port, "POST", "/plain", body(3, "two", at_the_limit))[0] == 200


def test_texts_within_an_image_are_bounded() -> None:
    texts, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for number in range(5):
        texts.add_text(f"{number}", "x" * 2**19, zip=True)
    Image.new("L", (1, 1)).save(file, "PNG", pnginfo=texts)
    assert len(file.getvalue()) < 10_000
    with serving(plain) as server:
        image = base64.b64encode(file.getvalue()).decode()
        assert request(server, "POST", "/plain", body(1, image=image))[0] == 400
        assert request(server, "POST", "/plain", body(name="two"))[0] == 200


def test_the_queue_is_bounded_by_what_it_takes_in_memory_and_so_is_a_call() -> None:
    sizes: list[int] = []
    called, may_go_on = threading.Event(), threading.Event()

    def counting(images: list, **columns: object) -> list[float]:
        sizes.append(len(images))
        called.set()
        assert may_go_on.wait(10)
        return [1.0] * len(images)

    image = base64_png(Image.new("L", (32, 32)))  # 4 KiB
    with serving(counting, max_unpacked=10_000) as server:
        pool = [threading.Thread(target=request, args=(server, "POST", "/counting", body(2, "first", image)))]
        pool[0].start()
        assert called.wait(10)
        for number in range(8):
            pool.append(
                threading.Thread(target=request, args=(server, "POST", "/counting", body(2, f"{number}", image)))
            )
            pool[-1].start()
        while request(server, "GET", "/health")[1]["rewards"]["counting"]["num_waiting"] < 16:
            time.sleep(0.01)
        status, answer, _ = request(server, "POST", "/counting", body(2, "last", image))
        assert status == 503 and answer["error"]["type"] == "queue_full"
        may_go_on.set()
        for thread in pool:
            thread.join()
        assert request(server, "POST", "/counting", body(2, "last", image))[0] == 200
        assert server.workers["counting"]._bytes_waiting == 0
    assert sizes == [2] * 10, "two images are all that a call may take in memory"


def test_damaged_images_give_their_room_back() -> None:
    whole = base64.b64decode(base64_png(Image.effect_noise((64, 64), 50)))
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    with serving(plain, max_queue=4) as server:
        for number in range(3):
            assert request(server, "POST", "/plain", body(4, f"{number}", cut))[0] == 400
        assert request(server, "POST", "/plain", body(4, "0"))[0] == 200, "the id is free again, and so is the queue"


def test_sigterm_ends_a_server_whose_function_hangs(tmp_path: Path) -> None:
    with program(tmp_path, "--drain_timeout", "1") as (process, port):
        asked = threading.Thread(target=lambda: pytest.raises(OSError, request, port, "POST", "/endless", body()))
        asked.start()
        deadline = time.monotonic() + 10
        while not request(port, "GET", "/health")[1]["rewards"]["endless"]["seconds_in_call"]:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert "for at most 1 seconds (--drain_timeout)" in said and "in endless" in said
        asked.join()


def test_sigterm_ends_a_server_to_which_a_body_is_coming(tmp_path: Path) -> None:
    with program(tmp_path, "--drain_timeout", "0.5") as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as opened:
            opened.sendall(f"{HEAD}Content-Length: 99999\r\n\r\n".encode())
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_times_are_above_0(seconds: str, capsys) -> None:
    from trl_tpgrpo.rewards.serving import program as module

    with pytest.raises(SystemExit):
        module.make_parser().parse_args(["--reward_funcs", "a.b", "--drain_timeout", seconds])
    assert f"{seconds} is not above 0 seconds" in capsys.readouterr().err


def test_requests_that_are_wrong_at_random_get_clear_answers() -> None:
    command = [sys.executable, ROOT / "benchmarks/fuzz_requests.py", "--num_requests", "300", "--seed", "3"]
    ended = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "300 requests, seed 3: 0 deep errors or hangs" in ended.stdout
