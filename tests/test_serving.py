"""The reward server: what it answers, in which batches it calls, what it refuses, and how it ends."""

import ast
import asyncio
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import RemoteDisconnected
from json import JSONDecodeError
from pathlib import Path

import pytest
import torch
from loopback import before_answers, request, serving
from PIL import Image

from trl_tpgrpo import cli
from trl_tpgrpo.commands import serve_reward
from trl_tpgrpo.rewards.remote import base64_png
from trl_tpgrpo.rewards.serving import program
from trl_tpgrpo.rewards.serving import server as server_module
from trl_tpgrpo.rewards.serving.functions import ServedReward, find_function
from trl_tpgrpo.rewards.serving.server import Limits, RewardServer


ROOT = Path(__file__).parents[1]


def picture(red: int = 0, size: tuple[int, int] = (4, 4)) -> str:
    return base64_png(Image.new("RGB", size, (red, 0, 0)))


def body(*reds: int, name: str = "one", **columns: list) -> dict:
    return {
        "id": name,
        "images": [picture(red) for red in reds],
        "prompts": [str(r) for r in reds],
        "columns": columns,
    }


def redness(images: list[Image.Image], **columns: object) -> list[float]:
    return [image.getpixel((0, 0))[0] for image in images]


class Recorder:
    """`redness`, which keeps its calls, and waits in the first until it may go on."""

    batch_size: int | None = None

    def __init__(self, name: str = "recorder", batch_size: int | None = None, image_type: str = "pil"):
        self.__name__, self.batch_size, self.image_type = name, batch_size, image_type
        self.calls: list[dict] = []
        self.called, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, images, prompts, trainer_state, log_metric, log_extra, **columns) -> list[float]:
        self.calls.append({"images": images, "prompts": prompts, **columns})
        self.called.set()
        assert self.may_go_on.wait(20)
        return [float(prompt) for prompt in prompts]


def later(server: RewardServer, path: str, *bodies: dict) -> list:
    """New requests under way, one after the other in the queue."""
    pool, futures = ThreadPoolExecutor(len(bodies)), []
    for one in bodies:
        num_known, deadline = len(server._jobs), time.monotonic() + 10
        futures.append(pool.submit(request, server, "POST", path, one))
        while len(server._jobs) == num_known:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    pool.shutdown(wait=False)
    return futures


def test_rewards_columns_metrics_and_extra() -> None:
    def shifted(images, prompts, shift, log_metric, log_extra, **columns):
        log_metric("shift", sum(shift))
        log_metric("nothing", float("nan"))
        log_extra("said", [f"it is {prompt}" for prompt in prompts])
        values = [image.getpixel((0, 0))[0] + offset for image, offset in zip(images, shift, strict=True)]
        return [None if value > 200 else torch.tensor(value) for value in values]

    with serving(shifted) as server:
        status, answer, _ = request(server, "POST", "/shifted", body(1, 2, 201, shift=[0.5, 1, 0]))
    assert status == 200
    assert answer == {
        "id": "one",
        "rewards": [1.5, 3.0, None],
        "metrics": {"shift": [1.5], "nothing": [None]},
        "extra": {"said": ["it is 1", "it is 2", "it is 201"]},
    }


def test_health_tells_what_is_served() -> None:
    recorder = Recorder(batch_size=2)
    with serving(recorder, redness, max_queue=7) as server:
        first = later(server, "/recorder", body(1))
        assert recorder.called.wait(10)
        others = later(server, "/recorder", body(1, 2, 3, name="two"))
        status, health, _ = request(server, "GET", "/health")
        recorder.may_go_on.set()
        assert all(future.result()[0] == 200 for future in first + others)
    assert status == 200 and health["status"] == "ok" and health["protocol"] == 1
    assert health["rewards"]["recorder"]["seconds_in_call"] >= 0
    numbers = {"batch_size": 2, "timeout": 3600, "num_waiting": 3, "num_scored": 0, "num_hanging": 0}
    assert health["rewards"]["recorder"].items() >= numbers.items()
    assert health["rewards"]["redness"]["seconds_in_call"] is None
    assert health["rewards"].keys() == {"recorder", "redness"} and health["limits"]["max_queue"] == 7


def test_requests_share_calls_of_the_functions_own_size() -> None:
    recorder = Recorder(batch_size=4)
    with serving(recorder) as server:
        futures = later(server, "/recorder", body(0, name="0"))
        assert recorder.called.wait(10)
        futures += later(server, "/recorder", *(body(3 * n, 3 * n + 1, 3 * n + 2, name=str(n)) for n in range(1, 5)))
        recorder.may_go_on.set()
        answers = [future.result()[1] for future in futures]
    assert [len(call["prompts"]) for call in recorder.calls] == [1, 4, 4, 4]
    assert [answer["rewards"] for answer in answers] == [
        [0.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [9.0, 10.0, 11.0], [12.0, 13.0, 14.0]
    ]  # fmt: skip


def test_unlike_columns_do_not_share_a_call() -> None:
    recorder = Recorder()
    with serving(recorder) as server:
        futures = later(server, "/recorder", body(0))
        assert recorder.called.wait(10)
        futures += later(server, "/recorder", body(1, name="1", a=[1]), body(2, name="2"), body(3, name="3", a=[3]))
        recorder.may_go_on.set()
        assert [future.result()[1]["rewards"] for future in futures] == [[0.0], [1.0], [2.0], [3.0]]
    assert [(call["prompts"], call.get("a")) for call in recorder.calls[1:]] == [
        (["1"], [1]),
        (["2"], None),
        (["3"], [3]),
    ]


def test_tensors_are_of_one_size() -> None:
    recorder = Recorder(image_type="pt")
    recorder.may_go_on.set()
    images = [picture(255, (4, 2)), picture(51, (4, 2)), picture(0, (2, 2))]
    with serving(recorder) as server:
        status, answer, _ = request(server, "POST", "/recorder", {"id": "x", "images": images, "prompts": list("123")})
    assert status == 200 and answer["rewards"] == [1, 2, 3]
    tensors = [call["images"] for call in recorder.calls]
    assert [tensor.shape for tensor in tensors] == [(2, 3, 2, 4), (1, 3, 2, 2)]
    assert tensors[0].dtype == torch.float32 and tensors[0][:, 0, 0, 0].tolist() == pytest.approx([1, 0.2])


def test_asynchronous_functions_and_classes() -> None:
    async def patient(images, **columns):
        return redness(images)

    class Made:
        device = None

        def to(self, device: str) -> None:
            self.device = device

        def __call__(self, images, **columns):
            return [7] * len(images)

    made = ServedReward(Made, "cuda:1")
    assert made.function.device == "cuda:1" and made.name == "Made"
    with serving(patient, Made) as server:
        assert request(server, "POST", "/patient", body(5))[1]["rewards"] == [5]
        assert request(server, "POST", "/Made", body(5))[1]["rewards"] == [7]


def picky(images, prompts, **columns):
    if "13" in prompts:
        raise KeyError("thirteen")
    return redness(images)


def test_who_sent_the_bad_image_is_told_and_the_others_are_served() -> None:
    recorder = Recorder("picky")
    recorder.__class__ = type("Picky", (Recorder,), {"__call__": lambda self, **a: _both(self, a)})
    with serving(recorder) as server:
        futures = later(server, "/picky", body(0))
        assert recorder.called.wait(10)
        futures += later(server, "/picky", body(1, 2, name="1"), body(3, 13, 4, name="2"))
        recorder.may_go_on.set()
        _, good, bad = [future.result() for future in futures]
    assert (good[0], good[1]["rewards"]) == (200, [1, 2])
    assert bad[0] == 422
    message = "The reward function 'picky' raised KeyError: 'thirteen'."
    assert bad[1] == {"error": {"type": "reward_raised", "message": message, "row": 1, "exception": "KeyError"}}


def _both(recorder: Recorder, arguments: dict) -> list[float]:
    Recorder.__call__(recorder, **arguments)
    return picky(**arguments)


def crowded(images, **columns):
    if len(images) > 1:
        raise MemoryError("too many")
    return [0.0]


def leaving(images, **columns):
    raise SystemExit(3)


def returning(values: object):
    def function(images, **columns):
        return values

    return function


@pytest.mark.parametrize(
    ("function", "status", "row", "message"),
    [
        (crowded, 500, None, "'crowded' raised MemoryError: too many (on a batch of 2 images, on no single image)"),
        (leaving, 422, 0, "'leaving' raised SystemExit: 3"),
        (returning([1.0]), 500, None, "'function' returned 1 rewards for 2 images"),
        (returning(None), 500, None, "'function' must return a list of numbers, got NoneType"),
        (returning([1.0, float("nan")]), 500, 1, "'function' returned nan (return None where"),
        (returning([1.0, "2"]), 500, 1, "'function' returned '2', which is not a number"),
        (returning([{}, 1.0]), 500, 0, "'function' returned {}, which is not a number"),
    ],
)
def test_functions_that_fail(function, status: int, row: int | None, message: str, caplog) -> None:
    with serving(function, redness) as server:
        answer = request(server, "POST", f"/{function.__name__}", body(1, 2))
        assert answer[0] == status and message in answer[1]["error"]["message"] and answer[1]["error"]["row"] == row
        again = request(server, "POST", f"/{function.__name__}", body(1, 2, name="again"))
        assert again[0] == status, "the worker goes on"
    assert ("Traceback" in caplog.text) == (" raised " in message)


def test_what_is_logged_must_fit_the_images() -> None:
    def careless(images, log_extra, **columns):
        log_extra("text", ["one"])
        return [0.0] * len(images)

    with serving(careless) as server:
        status, answer, _ = request(server, "POST", "/careless", body(1, 2))
    assert status == 500 and "log_extra('text') got 1 values for 2 images" in answer["error"]["message"]


GOOD = body(1, 2)


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b'{"id": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        ([], "the body must be an object"),
        (GOOD | {"id": 3}, "`id` must be a string"),
        (GOOD | {"id": "x" * 200}, "`id` must be a string of 1 to 128"),
        (GOOD | {"images": []}, "`images` must be a list of at least one"),
        (GOOD | {"prompts": ["one"]}, "`prompts` must be a list of as many strings as there are images, 2"),
        (GOOD | {"prompts": ["one", 2]}, "`prompts` must be"),
        (GOOD | {"columns": {"a": [1]}}, "`columns` must be an object of lists of as many values"),
        (GOOD | {"images": [picture(), 5]}, "an image must be a string"),
        (GOOD | {"images": [picture(), "no base64!"]}, "an image is not a PNG in base64"),
        (GOOD | {"images": [picture(), "R0lGODlhAQABAAAAADs="]}, "an image is not a PNG"),
        (GOOD | {"images": [picture(), picture()[: len(picture()) // 8 * 4]]}, "an image is not a PNG"),
    ],
)
def test_malformed_requests(malformed: object, message: str) -> None:
    with serving(redness) as server:
        status, answer, _ = request(server, "POST", "/redness", malformed)
        assert status == 400 and answer["error"]["type"] == "malformed_request"
        assert message in answer["error"]["message"]
        assert request(server, "POST", "/redness", GOOD)[0] == 200


def test_limits_and_addresses() -> None:
    with serving(redness, max_payload=2000, max_image_pixels=16, max_queue=3) as server:
        status, answer, _ = request(server, "POST", "/redness", b" " * 5_000_000)
        assert status == 413 and "has 5000000 bytes, the limit is 2000" in answer["error"]["message"]
        large = {"id": "large", "images": [picture(), picture(size=(5, 4))], "prompts": ["", ""]}
        status, answer, _ = request(server, "POST", "/redness", large)
        assert status == 413 and answer["error"]["row"] == 1
        assert "has 5 x 4 pixels; at most 16 are accepted" in answer["error"]["message"]
        status, answer, _ = request(server, "POST", "/redness", body(1, 2, 3, 4))
        assert status == 413 and "has 4 images; the queue holds 3" in answer["error"]["message"]
        status, answer, _ = request(server, "POST", "/beauty", body(1))
        assert status == 404 and "no '/beauty', only ['redness']" in answer["error"]["message"]
        assert request(server, "POST", "/redness", body(1), Content_Type="text/plain")[0] == 415
        assert request(server, "POST", "/redness", iter([b"{}"]))[0] == 411
        for method in ("GET", "PUT"):
            status, answer, _ = request(server, method, "/redness", body(1))
            assert status == 405 and f"{method} /redness" in answer["error"]["message"]
            assert answer["error"]["type"] == "bad_request"
        with pytest.raises((JSONDecodeError, RemoteDisconnected)):  # in uvicorn's words, those of before 0.14 none
            request(server, "POST", "/redness", body(1), Content_Length="many")


@pytest.mark.parametrize(
    "header", ["", "Bearer wrong", "Bearer secret2", "secret", "Basic secret", "Bearer s\xe9cret"]
)
def test_without_the_token_nothing_is_told(header: str) -> None:
    with serving(redness, token="secret") as server:
        for method, path, sent in (("POST", "/redness", body(1)), ("GET", "/health", None), ("POST", "/other", {})):
            status, answer, headers = request(server, method, path, sent, Authorization=header)
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
            assert "redness" not in answer["error"]["message"]
        assert request(server, "POST", "/redness", body(1), Authorization="Bearer secret")[0] == 200


def test_a_full_queue_says_when_to_come_again() -> None:
    recorder = Recorder()
    with serving(recorder, max_queue=3) as server:
        futures = later(server, "/recorder", body(0))
        assert recorder.called.wait(10)
        futures += later(server, "/recorder", body(1, 2, name="1"))
        status, answer, headers = request(server, "POST", "/recorder", body(3, 4, name="2"))
        assert status == 503 and int(headers["Retry-After"]) >= 1
        assert answer["error"]["type"] == "queue_full" and "2 images are waiting" in answer["error"]["message"]
        recorder.may_go_on.set()
        assert all(future.result()[0] == 200 for future in futures)
        assert request(server, "POST", "/recorder", body(3, 4, name="2"))[1]["rewards"] == [3, 4]


def test_a_request_that_comes_again_is_not_scored_again() -> None:
    recorder = Recorder()
    with serving(recorder, num_kept_answers=2) as server:
        first = later(server, "/recorder", body(1))
        assert recorder.called.wait(10)
        threading.Timer(0.2, recorder.may_go_on.set).start()
        answers = [request(server, "POST", "/recorder", body(1)), first[0].result()]  # while it is in work
        answers.append(request(server, "POST", "/recorder", body(1)))  # and after
        assert [(status, answer["rewards"]) for status, answer, _ in answers] == [(200, [1])] * 3
        assert len(recorder.calls) == 1
        status, answer, _ = request(server, "POST", "/recorder", body(2))
        assert status == 409 and "Another request has used the id 'one'" in answer["error"]["message"]
        for name in ("two", "three"):
            request(server, "POST", "/recorder", body(2, name=name))
        request(server, "POST", "/recorder", body(1))
        assert len(recorder.calls) == 4, "only the last two answers are kept"


def test_the_end_answers_what_has_been_taken(monkeypatch) -> None:
    recorder, sent = Recorder(batch_size=1), []

    async def slowly(answer: dict) -> None:
        await asyncio.sleep(0.2)
        sent.append(answer)

    before_answers(monkeypatch, slowly)
    with serving(recorder) as server:
        futures = later(server, "/recorder", *(body(n, name=str(n)) for n in range(5)))
        threading.Timer(0.2, recorder.may_go_on.set).start()
    assert len(sent) == 5, "the program would have ended before it has answered"
    assert [future.result()[1]["rewards"] for future in futures] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    with pytest.raises(ConnectionRefusedError):
        request(server, "GET", "/health")


def test_a_request_that_stalls_is_told_so_and_does_not_keep_the_server_from_ending(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "MAX_SECONDS", 0.1)
    with serving(redness) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        head = "POST /redness HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        client.sendall(head.encode() + b"{")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 503") and b'"cut_off"' in answer and b"retry-after: 1" in answer.lower()


REWARDS = """
import time
def slow(images, **columns):
    time.sleep(0.7)
    return [image.getpixel((0, 0))[0] for image in images]
"""


def test_sigterm_ends_the_program_after_its_work(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "token").write_text("secret\n")
    options = ["--reward_funcs", "my_rewards.slow", "--port", "0", "--token_file", "token"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trl_tpgrpo", "serve-reward", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split(":")[-1].split("/")[0])
        process.stdout.close()  # who started it need not go on reading
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(request, port, "POST", "/slow", body(9), Authorization="Bearer secret")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert asked.result()[1]["rewards"] == [9]
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None and "Stopping" in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reachable from other machines: set a --token_file"),
        (["--host", "example.org"], "is reachable from other machines"),
        (["--token_file", "{empty}"], "must contain one line of printable ASCII"),
    ],
)
def test_open_doors_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    options = [option.format(empty=tmp_path / "empty") for option in options]
    with pytest.raises(ValueError, match=message):
        program.main(["--reward_funcs", "test_serving.redness", *options])


def test_names_must_be_urls() -> None:
    health = Recorder("health")
    for function, message in (
        (lambda images: [], "name '<lambda>' cannot be part"),
        (health, "'health' cannot be part"),
    ):
        with pytest.raises(ValueError, match=message):
            ServedReward(function)
    with pytest.raises(ValueError, match="image_type='np', not 'pil' or 'pt'"):
        ServedReward(Recorder(image_type="np"))
    with pytest.raises(ValueError, match=r"need different names, .* \['redness', 'redness'\]"):
        RewardServer(("127.0.0.1", 0), [ServedReward(redness), ServedReward(redness)], Limits())


def test_what_is_set_on_a_partial_comes_before_what_its_function_has() -> None:
    served = functools.partial(Recorder("inner", image_type="pt"), a=1)
    assert (ServedReward(served).name, ServedReward(served).image_type) == ("inner", "pt")
    served.__name__, served.batch_size, served.image_type = "outer", 3, "pil"
    outer = ServedReward(served)
    assert (outer.name, outer.batch_size, outer.image_type) == ("outer", 3, "pil")


def test_functions_are_found_by_path_and_built_in_name(tmp_path: Path, monkeypatch) -> None:
    from trl_tpgrpo import rewards
    from trl_tpgrpo.rewards import jpeg_compressibility

    assert all(callable(getattr(rewards, name)) for name in rewards.__all__)
    stub = Path(rewards.__file__).with_suffix(".pyi").read_text()
    names = sorted((module, name) for name, module in rewards.MODULES.items())
    assert re.findall(r"from \.(\w+) import (\w+) as", stub) == names
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    assert find_function("own_rewards.slow").__name__ == "slow"
    assert serve_reward.find_reward("jpeg_compressibility") is jpeg_compressibility
    assert serve_reward.find_reward("trl_tpgrpo.rewards.jpeg_compressibility") is jpeg_compressibility
    for name, message in (
        ("beauty", "must be an import path in the current folder"),
        ("own_rewards.fast", "'own_rewards' has no reward function 'fast'"),
        ("no_such_module.fast", "module of the reward function 'no_such_module.fast' cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            find_function(name)


def test_the_command_line_has_it(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve-reward", "--help"])
    assert "--reward_funcs" in capsys.readouterr().out


def test_the_page_on_the_protocol_has_every_refusal() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "trl_tpgrpo/rewards/serving").glob("*.py"))
    kinds = set(re.findall(r'Refusal\([^"]*?, "(\w+)"', sources))
    assert len(kinds) >= 15
    table = (ROOT / "docs/remote_rewards.md").read_text()
    assert not {kind for kind in kinds if f"`{kind}`" not in table}


def test_an_old_environment_suffices() -> None:
    """Python 3.8's grammar, and no package but Pillow, Starlette, uvicorn and what these need themselves."""
    package = ROOT / "trl_tpgrpo"
    for path in [
        package / "__init__.py",
        package / "rewards/__init__.py",
        *(package / "rewards/serving").glob("*.py"),
    ]:
        ast.parse(path.read_text(), feature_version=(3, 8))
        assert not re.search(r"\.(removeprefix|removesuffix|to_thread)\(|asyncio\.timeout\(|strict=", path.read_text())
    code = (
        "import sys; before = set(sys.modules); import trl_tpgrpo.rewards.serving.program; "
        "print(*set(sys.modules) - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    tops = {name.split(".")[0] for name in run.stdout.split()}
    needed = {"PIL", "anyio", "starlette", "trl_tpgrpo", "uvicorn"}
    assert needed <= tops
    theirs = {"click", "defusedxml", "h11", "idna", "sniffio", "typing_extensions"}
    assert tops - sys.stdlib_module_names - {"__mp_main__"} <= needed | theirs
