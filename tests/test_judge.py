"""Judges against a real server on the loopback interface that speaks chat completions as far as they need them."""

import asyncio
import base64
import gzip
import importlib
import io
import json
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable

import pytest
from loopback import Reply, as_json, dripping, scripted
from PIL import Image

from trl_tpgrpo.rewards import judge as judge_module
from trl_tpgrpo.rewards.judge import VLMJudge, VLMJudgeError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def shade(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, 0, 0))


def seen(request: dict) -> tuple[Image.Image, str]:
    """The image and the text of a request, whose form is checked as a strict server does."""
    assert request["path"] == "/v1/chat/completions"
    body = request["body"]
    assert body.keys() == {"model", "messages", "response_format", "temperature", "max_tokens"}
    (message,) = body["messages"]
    image, text = message["content"]
    assert (message["role"], image["type"], text["type"]) == ("user", "image_url", "text")
    head, encoded = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) and schema["additionalProperties"] is False
    return Image.open(io.BytesIO(base64.b64decode(encoded))), text["text"]


def completion(content: object, reason: str = "stop", **more: object) -> Reply:
    text = content if isinstance(content, str | None) else json.dumps(content)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return as_json({"object": "chat.completion", "choices": [choice], "usage": usage} | more)


def by_redness(request: dict, number: int) -> Reply:
    image, _ = seen(request)
    return completion({"score": 1 + image.getpixel((0, 0))[0] / 100})


def ask(judge: VLMJudge, images: list[Image.Image], prompts: list[str] | None = None, **columns: object) -> list:
    return asyncio.run(judge(images=images, prompts=prompts or [""] * len(images), **columns))


def test_each_image_gets_its_own_score_and_costs_are_counted() -> None:
    metrics: dict[str, float] = {}
    with scripted(by_redness) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", concurrency=5)
        levels = [5 * number for number in range(50)]
        scores = ask(judge, [shade(level) for level in levels], log_metric=metrics.__setitem__, trainer_state=None)
    assert scores == [1 + level / 100 for level in levels]
    assert judge.__name__ == "vlm_quality" and not {"batch_size", "timeout"} & set(vars(judge))
    assert metrics == {
        "vlm_quality/num_requests_per_image": 1,
        "vlm_quality/num_retries_per_image": 0,
        "vlm_quality/prompt_tokens_per_image": 100,
        "vlm_quality/completion_tokens_per_image": 7,
    }
    assert vars(judge.usage) == {
        "num_requests": 50, "num_retries": 0, "prompt_tokens": 5000, "completion_tokens": 350
    }  # fmt: skip


def test_what_the_model_is_asked() -> None:
    texts = []

    def reply(request: dict, number: int) -> Reply:
        texts.append(seen(request)[1])
        assert request["body"]["model"] == "a-model" and request["body"]["temperature"] == 0
        assert request["body"]["max_tokens"] == 64
        return completion({"score": 3})

    own = "How {style} is this picture of {prompt}?"
    with scripted(reply) as server:
        for template in ("quality", "alignment", own):
            ask(
                VLMJudge(f"{server.url}/v1", "a-model", template, low=0, high=10),
                [shade(1)],
                ["{style} dog"],
                style=["odd"],
            )
    quality, alignment, asked = texts
    assert "dog" not in quality and alignment.split("\n\n")[1] == "Caption: {style} dog"
    assert asked.startswith("How odd is this picture of {style} dog?\n\n")
    assert all('{"score": number}, a number from 0 to 10' in text for text in texts)


def test_questions_are_scored_by_the_share_of_expected_answers() -> None:
    def reply(request: dict, number: int) -> Reply:
        image, text = seen(request)
        question = re.search("Question: (.*)", text)[1]
        is_red = image.getpixel((0, 0))[0] > 100
        return completion({"answer": "yes" if ("red" in question) == is_red else "no"})

    questions = [
        ["Is it red?", {"question": "Is it black?", "answer": "no"}, {"question": "Is it dark?", "answer": "yes"}],
        None,
        ["Is it red?"],
        [],
    ]
    with scripted(reply) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", "yes_no")
        scores = ask(judge, [shade(200), shade(0), shade(0), shade(0)], questions=questions)
        assert scores == [2 / 3, None, 0.0, None] and judge.usage.num_requests == 4
        with pytest.raises(ValueError, match="needs the column 'questions'"):
            ask(judge, [shade(0)])
        with pytest.raises(ValueError, match=r"'questions' has \{'question': 'Red\?', 'answer': 'maybe'\} in row 0"):
            ask(judge, [shade(0)], questions=[[{"question": "Red?", "answer": "maybe"}]])


@pytest.mark.parametrize(
    ("unusable", "message"),
    [
        (completion("very good"), "it said 'very good', not JSON"),
        (completion('```json\n{"score": 3}\n```'), "not JSON"),
        (completion(None), "it said None, not JSON"),
        (completion({"score": 5.5}), "it said 5.5, not a number from 1 to 5"),
        (completion({"score": 0}), "it said 0, not a number from 1 to 5"),
        (completion({"score": "3"}), "it said '3', not a number"),
        (completion({"score": True}), "it said True, not a number"),
        (completion('{"score": NaN}'), "it said nan, not a number"),
        (completion({"rating": 3}), "not an object with only the field 'score'"),
        (completion({"score": 3, "why": "nice"}), "not an object with only the field 'score'"),
        (completion([3]), "not an object with only the field 'score'"),
        (completion('{"score": 4', "length"), "truncated at max_tokens=64"),
        (as_json({"choices": []}), "not a chat completion"),
        ((200, {}, b"<html>"), "not a chat completion: '<html>'"),
        ((200, {"Content-Type": "application/json"}, b"<html>"), "not a chat completion: '<html>'"),
    ],
)
def test_answers_that_are_no_score_are_asked_for_again_and_then_an_error(unusable: Reply, message: str) -> None:
    def reply(request: dict, number: int) -> Reply:
        return unusable if number < 2 else by_redness(request, number)

    with scripted(reply) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", num_retries=2)
        assert ask(judge, [shade(100)]) == [2.0]
        assert [request["body"]["temperature"] for request in server.requests] == [0, 0.7, 0.7]
        assert (judge.usage.num_requests, judge.usage.num_retries) == (3, 2)
    with scripted(lambda request, number: unusable) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", num_retries=2)
        message = rf"judge 'a-model' at {server.url}/v1/chat/completions gave no .* row 0: .*{message}.*\(3 attempts\)"
        with pytest.raises(VLMJudgeError, match=message):
            ask(judge, [shade(100)])
        assert len(server.requests) == 3 == judge.usage.num_requests


@pytest.mark.parametrize("answer", ["maybe", "Yes", None, ["yes"]])
def test_answers_to_questions_are_yes_or_no(answer: object) -> None:
    with scripted(lambda request, number: completion({"answer": answer})) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", "yes_no", num_retries=0)
        with pytest.raises(VLMJudgeError, match=r"row 0, 'Red\?': it said .*, neither 'yes' nor 'no'"):
            ask(judge, [shade(0)], questions=[["Red?"]])


@pytest.mark.parametrize("fault", [None, (429, {"Retry-After": "0"}, b""), (500, {}, b""), (503, {}, b"")])
def test_what_passes_is_tried_again(fault: Reply) -> None:
    def reply(request: dict, number: int) -> Reply:
        return fault if number < 2 else by_redness(request, number)

    with scripted(reply) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model")
        assert ask(judge, [shade(100)]) == [2.0]
        assert (judge.usage.num_requests, judge.usage.num_retries) == (3, 2)
        assert [request["body"]["temperature"] for request in server.requests] == [0, 0, 0]
        server.requests.clear()
        server.reply = lambda request, number: fault
        with pytest.raises(
            VLMJudgeError, match=r"has not answered for row 0: .*\(4 attempts\).*concurrency=8 and timeout=60"
        ):
            ask(judge, [shade(100)])
        assert judge.usage.num_requests == 7


def test_a_judge_that_is_slow_or_not_there() -> None:
    def slow(request: dict, number: int) -> Reply:
        time.sleep(0.5)
        return None

    with scripted(slow) as server:
        with pytest.raises(VLMJudgeError, match=r"no answer within 0\.1 seconds"):
            ask(VLMJudge(f"{server.url}/v1", "a-model", num_retries=0, timeout=0.1), [shade(0)])
        url = server.url
    with pytest.raises(VLMJudgeError, match="no connection: ConnectError"):
        ask(VLMJudge(f"{url}/v1", "a-model", num_retries=1), [shade(0)])


def test_an_answer_that_drips_forever_ends_with_the_timeout_in_the_check_too() -> None:
    with dripping() as url:
        judge = VLMJudge(f"{url}/v1", "a-model", timeout=0.3, num_retries=0)
        for call in (judge.check_available, lambda: ask(judge, [shade(0)])):
            start = time.monotonic()
            with pytest.raises(VLMJudgeError, match=r"no answer within 0\.3 seconds"):
                call()
            assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(2**20))),
            "Content-Encoding 'gzip', which was not requested",
        ),
        ((200, {}, b" " * (16 * 2**20 + 1)), "with more than 16777216 bytes"),
        ((418, {"Content-Encoding": "gzip"}, gzip.compress(b"tea")), "with status 418"),
        ((307, {"Location": "http://127.0.0.1:1/elsewhere"}, b""), "with status 307"),
    ],
)
def test_answers_are_not_unpacked_nor_followed_and_have_a_size(reply: Reply, message: str) -> None:
    with scripted(lambda request, number: reply) as server:
        with pytest.raises(RuntimeError, match=f"{server.url}/v1.* answered .*{message}"):
            ask(VLMJudge(f"{server.url}/v1", "a-model", num_retries=0), [shade(0)])
        assert server.requests[0]["headers"]["accept-encoding"] == "identity"


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
        return completion({"answer": "yes"})

    async def two_calls(judge: VLMJudge) -> list:
        questions = [["a", "b", "c"]] * 4
        return await asyncio.gather(*(judge([shade(0)] * 4, [""] * 4, questions=questions) for _ in range(2)))

    with scripted(reply) as server:
        assert (
            asyncio.run(two_calls(VLMJudge(f"{server.url}/v1", "a-model", "yes_no", concurrency=4))) == [[1.0] * 4] * 2
        )
    assert most == 4


KEY = "sk-very-secret"


def headers(request: dict) -> dict[str, str]:
    return {name.lower(): value for name, value in request["headers"].items()}


@pytest.mark.parametrize("status", [400, 401, 429])
def test_the_key_is_sent_and_never_shown(status: int, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def refuse(request: dict, number: int) -> Reply:
        said = f"wrong key: {headers(request)['authorization']}"
        return as_json({"error": {"message": said, "type": "invalid_request_error"}}, status)

    with scripted(refuse) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", api_key_env="JUDGE_KEY", num_retries=1)
        with pytest.raises(VLMJudgeError, match=rf"status {status}: 'wrong key: Bearer \*\*\*'") as error:
            ask(judge, [shade(0)])
        assert headers(server.requests[0])["authorization"] == f"Bearer {KEY}"
        assert len(server.requests) == (2 if status == 429 else 1)
    chain: list[BaseException | None] = [error.value, error.value.__cause__]
    assert KEY not in "".join(map(repr, chain)) + repr(judge) + caplog.text and error.value.__cause__ is None


@pytest.mark.parametrize("key", [None, "JUDGE_KEY"])
def test_nothing_of_the_environment_is_sent_but_the_key_that_is_named(key: str | None, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-secret")
    with scripted(by_redness) as server:
        ask(VLMJudge(f"{server.url}/v1", "a-model", api_key_env=key), [shade(0)])
    (request,) = server.requests
    assert headers(request).get("authorization") == (f"Bearer {KEY}" if key else None)
    assert "another-secret" not in repr(request)


def test_a_key_that_no_header_can_have_is_refused_and_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    with pytest.raises(ValueError, match="The key in JUDGE_KEY .* must be printable ASCII") as error:
        VLMJudge("http://host/v1", "a-model", api_key_env="JUDGE_KEY")
    assert KEY not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_judge_on_this_machine_is_asked_past_a_proxy(host: str, monkeypatch) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with scripted(by_redness) as server:
        url = server.url.replace("127.0.0.1", host)
        assert ask(VLMJudge(f"{url}/v1", "a-model", num_retries=0), [shade(100)]) == [2.0]
    with pytest.raises(VLMJudgeError, match="no connection: ConnectError"):
        ask(VLMJudge("http://judge.invalid/v1", "a-model", num_retries=0), [shade(0)])


def test_a_missing_client_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-tpgrpo\[judge\]'"):
        importlib.reload(judge_module)


def test_a_server_that_counts_no_tokens_makes_no_zero() -> None:
    metrics: dict[str, float] = {}
    with scripted(lambda request, number: completion({"score": 2}, usage=None)) as server:
        ask(VLMJudge(f"{server.url}/v1", "a-model"), [shade(0)], log_metric=metrics.__setitem__)
    assert math.isnan(metrics["vlm_quality/prompt_tokens_per_image"])
    assert metrics["vlm_quality/num_requests_per_image"] == 1


def test_a_template_with_an_unknown_name_says_what_there_is() -> None:
    with scripted(by_redness) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", "Is this {style}?", name="style")
        assert judge.__name__ == "style"
        with pytest.raises(ValueError, match=r"template has \{style\}, but the values are \['prompt', 'colour'\]"):
            ask(judge, [shade(0)], colour=["red"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"template": "beauty"},
            r"template must be one of \['quality', 'alignment', 'yes_no', .*\] or a text with a .*, got 'beauty'",
        ),
        ({"low": 5.0}, "low must be below high, got 5.0 and 5.0"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"num_retries": -1}, "num_retries must be 0 or more"),
        ({"timeout": 0}, "timeout must be above 0 seconds"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
        ({"base_url": "host:8000"}, "base_url must be a URL"),
        ({"base_url": "http://user:secret@host"}, "base_url must be a URL .* without user, password and query.$"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env: the environment variable 'NO_SUCH_KEY' is not set"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    make: Callable[..., VLMJudge] = VLMJudge
    with pytest.raises(ValueError, match=message):
        make(**({"base_url": "http://host/v1", "model": "a-model"} | arguments))
