"""Reward functions over HTTP, served by `trl-tpgrpo serve-reward` or with the protocol of docs/remote_rewards.md."""

import asyncio
import base64
import io
import json
import logging
import math
import os
import random
import reprlib
import uuid
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from .contract import RewardUnavailable
from .serving.protocol import is_loopback
from .threads import Worker


try:
    import httpx2
    import tenacity
except ImportError as error:
    raise ImportError(f"Remote rewards need {error.name}: pip install 'trl-tpgrpo[remote]'.") from error


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_TPGRPO_REWARD_TOKEN"
RETRIED_STATUSES = (502, 503, 504)
RETRIED_ERRORS = (TimeoutError, httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
RETRIED = tenacity.retry_if_exception_type(RETRIED_ERRORS) | tenacity.retry_if_result(
    lambda answer: answer.status in RETRIED_STATUSES
)
FIRST_PAUSE = 0.5
MAX_PAUSE = 30.0
MAX_ANSWER = 16 * 2**20  # bytes, which may need 25 times as many when parsed
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

REMEDIES = {
    401: "Pass the token of the server's --token_file as `token`, or in the environment variable " + TOKEN_VARIABLE,
    404: "GET {server}/health lists the served rewards",
    413: "Use a smaller `batch_size` (now {batch_size}), or raise the server's limits",
    422: "The reward function failed on this row; the server's log has the traceback",
    500: "The error is in the reward function; see the server's log",
}


class RemoteRewardError(RuntimeError):
    """A reward server returned no rewards."""


class ServerUnavailable(RemoteRewardError, RewardUnavailable):
    """A reward server did not answer, for any image."""


class Answer(NamedTuple):
    """Answer of a server."""

    status: int
    retry_after: str
    body: bytes


class RemoteReward:
    """A reward function on another machine or in another environment.

    Value, range and licence are those of the served function. The call is asynchronous: in a script, use
    `asyncio.run(reward(images, prompts))`.

    Args:
        url: URL of the server, such as `"http://127.0.0.1:8000"`.
        reward: Name of the function on the server, and of the reward in metrics.
        token: Token for the server. `None`: the environment variable `TRL_TPGRPO_REWARD_TOKEN`.
        timeout: Seconds per attempt, including time in the server's queue.
        num_retries: Number of retries after a lost connection, a timeout, and the statuses 502, 503 and 504. Pauses
            grow from half a second to half a minute; 10 retries take over two minutes, enough to restart a server.
        batch_size: Images per request.
        concurrency: Number of concurrent requests.
        columns: Columns of the dataset to send. `None`: all.
    """

    def __init__(
        self,
        url: str,
        reward: str,
        token: str | None = None,
        timeout: float = 300.0,
        num_retries: int = 10,
        batch_size: int = 16,
        concurrency: int = 4,
        columns: Sequence[str] | None = None,
    ):
        check_numbers(timeout, batch_size=batch_size, num_retries=num_retries, concurrency=concurrency)
        if not reward.isidentifier():
            raise ValueError(f"reward must be a name on the server, such as 'pick_score', got {reward!r}.")
        self.server = _checked_url("url", url)
        self.url = f"{self.server}/{reward}"
        self.__name__ = reward
        # Not `batch_size` and `timeout`: with these attributes, the trainer would split and end calls.
        self.num_images_per_request, self.seconds_per_attempt = batch_size, timeout
        self.num_retries, self.concurrency = num_retries, concurrency
        self.columns = None if columns is None else tuple(columns)
        self._client_options: dict[str, Any] = {
            "headers": _headers(os.environ.get(TOKEN_VARIABLE) if token is None else token),
            "timeout": None,  # httpx2's are for single operations; `_post` limits the whole request
            "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            "trust_env": not is_loopback(urlsplit(url).hostname or ""),  # no proxy to this machine
        }
        self._random = random.Random()  # the global generator belongs to training
        self._slots: weakref.WeakKeyDictionary[Any, asyncio.Semaphore] = weakref.WeakKeyDictionary()

    async def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: list,
    ) -> list[float | None]:
        """Score N images; raise a `RemoteRewardError`, or a `ValueError` if an image or column cannot be sent."""
        sent, size = self._sendable(columns), self.num_images_per_request
        async with httpx2.AsyncClient(**self._client_options) as client:
            batches = (slice(start, start + size) for start in range(0, len(images), size))
            answers = await gathered(self._ask(client, rows, images, prompts, sent) for rows in batches)
        if log_metric is not None:
            for logged in [logged for answer in answers for logged in answer["metrics"]]:
                log_metric(*logged)
        if log_extra is not None:
            for name in dict.fromkeys(name for answer in answers for name in answer["extra"]):
                parts = [answer["extra"].get(name, [None] * len(answer["rewards"])) for answer in answers]
                log_extra(name, [value for part in parts for value in part])
        return [reward for answer in answers for reward in answer["rewards"]]

    def check_available(self) -> None:
        """Check that the server has the reward; raise a `RemoteRewardError` if not, or without an answer."""
        stop = tenacity.stop_after_attempt(self.num_retries + 1)
        retrying = tenacity.AsyncRetrying(retry=RETRIED, wait=self._pause, stop=stop, before_sleep=self._warn)

        async def asked() -> Answer:
            async with httpx2.AsyncClient(**self._client_options) as client:
                return await retrying(self._fetch, client, "GET", f"{self.server}/health")

        try:  # in a thread, because the caller's may have a running event loop
            answer: Answer = Worker().submit(lambda: asyncio.run(asked()), None).result()
        except tenacity.RetryError as error:
            what = f"does not answer: {self._last_failure(error)}. Is it running?"
            raise ServerUnavailable(f"The reward server {self.server} {what}") from error
        if answer.status == 401:
            raise self._refused(answer, 0, [])
        try:
            served = list(json.loads(answer.body)["rewards"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # another kind of server
        if self.__name__ not in served:
            raise RemoteRewardError(f"The reward server {self.server} has no {self.__name__!r}, only {served}.")

    def _warn(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1:
            logger.warning("The reward server %s does not answer yet; retrying.", self.server)

    def _sendable(self, columns: dict[str, list]) -> dict[str, list]:
        """Return the columns to send; raise a `ValueError` for one that is missing or that JSON cannot represent."""
        names = tuple(columns) if self.columns is None else self.columns
        for name in names:
            if name not in columns:
                raise ValueError(f"The column {name!r} to send to {self.url} is missing; there are {list(columns)}.")
            for row, value in enumerate(columns[name]):
                if not _is_json(value):
                    raise ValueError(
                        f"The column {name!r} cannot be sent to {self.url}: JSON cannot represent {value!r} "
                        f"({type(value).__name__}, row {row}). Name the columns that the reward needs: columns=[...]."
                    )
        return {name: columns[name] for name in names}

    async def _ask(
        self, client: httpx2.AsyncClient, rows: slice, images: list, prompts: list[str], columns: dict[str, list]
    ) -> dict[str, Any]:
        """Score the images of some rows."""
        first_row, images, prompts = rows.start, images[rows], prompts[rows]
        columns = {name: values[rows] for name, values in columns.items()}
        stop = tenacity.stop_after_attempt(self.num_retries + 1)
        retrying = tenacity.AsyncRetrying(retry=RETRIED, wait=self._pause, stop=stop)
        # A request is built within its slot, so that only requests in progress are in memory.
        async with self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency)):
            body = await asyncio.to_thread(_encoded, first_row, images, prompts, columns)
            try:
                answer: Answer = await retrying(self._fetch, client, "POST", self.url, body)
            except tenacity.RetryError as error:
                raise ServerUnavailable(
                    f"The reward server {self.url} has not scored rows {first_row} to {first_row + len(images) - 1}: "
                    f"{self._last_failure(error)}. Is it running, and is its queue long enough for all its clients? "
                    "Longer `timeout` and more `num_retries` wait longer."
                ) from error
        if answer.status != 200:
            raise self._refused(answer, first_row, prompts)
        return self._parsed(answer, len(images))

    async def _fetch(self, client: httpx2.AsyncClient, method: str, url: str, content: bytes | None = None) -> Answer:
        async with asyncio.timeout(self.seconds_per_attempt):
            async with client.stream(method, url, content=content) as response:
                body = await body_of(response)
        return Answer(response.status_code, response.headers.get("Retry-After", ""), body)

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Return the seconds until the next attempt, which the server may set."""
        pause, outcome = tenacity.wait_exponential(FIRST_PAUSE, MAX_PAUSE)(state), state.outcome
        if outcome is not None and not outcome.failed:
            asked = outcome.result().retry_after
            pause = min(MAX_PAUSE, float(asked)) if asked.isascii() and asked.isdigit() else pause
        return pause * self._random.uniform(1, 1.25)

    def _last_failure(self, retry: tenacity.RetryError) -> str:
        attempt = retry.last_attempt
        match attempt.exception():
            case None:
                what = f"status {attempt.result().status}: {_error(attempt.result())[1]}"
            case TimeoutError():
                what = f"no answer within {self.seconds_per_attempt:g} seconds"
            case error:
                what = f"no connection: {type(error).__name__} {error}".rstrip()
        return f"{what} ({attempt.attempt_number} attempts)" if attempt.attempt_number > 1 else what

    def _refused(self, answer: Answer, first_row: int, prompts: list[str]) -> RemoteRewardError:
        """Return the server's error, with the row of the call and its prompt."""
        row, message, kind = _error(answer)
        known = isinstance(row, int) and 0 <= row < len(prompts)
        where = f" (row {first_row + row}, prompt {prompts[row]!r})" if known else ""
        remedy = REMEDIES.get(answer.status, "docs/remote_rewards.md explains the server's answers")
        remedy = remedy.format(server=self.server, batch_size=self.num_images_per_request)
        answered = f"The reward server {self.url} answered with status {answer.status}{where}"
        # A hang does not depend on the images, so none is tried alone.
        return (ServerUnavailable if kind == "reward_hung" else RemoteRewardError)(f"{answered}: {message} {remedy}.")

    def _parsed(self, answer: Answer, number: int) -> dict[str, Any]:
        """Return the rewards, metrics and extra columns of an answer; raise an error for an invalid answer."""
        try:
            fields = json.loads(answer.body)
            rewards, metrics, extra = fields["rewards"], fields.get("metrics", {}), fields.get("extra", {})
            for what, values in [("rewards", rewards), *((f"values of {name!r}", extra[name]) for name in extra)]:
                if type(values) is not list or len(values) != number:
                    raise ValueError(f"{len(values)} {what} for {number} images, or not a list")
            logged = [(name, value) for name, values in metrics.items() for value in values]
            for what, value in [*(("reward", reward) for reward in rewards), *logged]:
                if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                    raise ValueError(f"{reprlib.repr(value)} is not a valid {what}")
            logged = [(name, math.nan if value is None else float(value)) for name, value in logged]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RemoteRewardError(
                f"The reward server {self.url} answered with an invalid body (protocol 1): {type(error).__name__}: "
                f"{error}. It began with {_beginning(answer, 100)!r}. See docs/remote_rewards.md."
            ) from error
        return {"rewards": rewards, "metrics": logged, "extra": extra}


async def body_of(response: httpx2.Response) -> bytes:
    """Read an answer up to `MAX_ANSWER` bytes, without decompression; else raise a `RemoteRewardError`."""
    body, title = bytearray(), f"The reward server {response.url} answered with"
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity" and response.status_code == 200:
        raise RemoteRewardError(f"{title} Content-Encoding {coding[:40]!r}, which was not requested.")
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_ANSWER:
            raise RemoteRewardError(f"{title} more than {MAX_ANSWER} bytes: use a smaller `batch_size`.")
    return bytes(body)


def remote_reward_from_url(url: str) -> RemoteReward:
    """Return the remote reward of a URL such as `http://127.0.0.1:8000/pick_score`, with the environment's token."""
    server, _, reward = _checked_url("A remote reward", url).rpartition("/")
    if not reward.isidentifier() or server in ("http:/", "https:/"):
        raise ValueError(f"A remote reward is http://HOST:PORT/REWARD, got {url!r}.")
    return RemoteReward(server, reward)


def check_numbers(timeout: float, **counts: int) -> None:
    """Raise a `ValueError` for a timeout of 0 or less, retries below 0 and other counts below 1."""
    for name, count in counts.items():
        least = 0 if name == "num_retries" else 1
        if count < least:
            raise ValueError(f"{name} must be {least} or more, got {count}.")
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}.")


async def gathered(calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await calls concurrently and return their results; the first error cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [task.result() for task in tasks]


def base64_png(image: Image.Image) -> str:
    """Encode an image as PNG in base64, with fast compression."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _encoded(first_row: int, images: list[Image.Image], prompts: list[str], columns: dict[str, list]) -> bytes:
    for row, image in enumerate(images, first_row):
        if image.mode not in PNG_MODES:
            raise ValueError(f"The image of row {row} has mode {image.mode!r}, not supported by PNG: convert it.")
    # All attempts have the same id, so that the server does not score twice.
    body = {"id": uuid.uuid4().hex, "images": list(map(base64_png, images)), "prompts": prompts, "columns": columns}
    return json.dumps(body, allow_nan=False).encode()


def _error(answer: Answer) -> tuple[Any, str, Any]:
    """Return row, message and type of an error, or the beginning of another answer, such as a proxy's."""
    try:
        error = json.loads(answer.body)["error"]
        return error.get("row"), str(error["message"])[:500], error.get("type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, f"it said {_beginning(answer, 200)!r}.", None


def _beginning(answer: Answer, number: int) -> str:
    """Return the first bytes as text, without the codec named by the server, which may be any of Python's."""
    return answer.body[:number].decode(errors="replace")


def _headers(token: str | None) -> httpx2.Headers:  # a dictionary would show the token if printed
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if token is None:
        return httpx2.Headers(headers)
    if not token or not token.isascii() or not token.isprintable() or token != token.strip():
        raise ValueError("The token must be printable ASCII characters without spaces around; it is not shown here.")
    return httpx2.Headers({**headers, "Authorization": f"Bearer {token}"})


def _checked_url(name: str, url: str) -> str:
    """Return the URL without a trailing slash; raise a `ValueError` for a password or query (shown in messages)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must be a URL such as http://127.0.0.1:8000, got {parts.scheme or url!r}.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{name} must have no user, password, query or fragment; pass a token separately.")
    return url.rstrip("/")


def _is_json(value: Any) -> bool:
    """Check whether JSON represents the value exactly."""
    if type(value) is list:
        return all(_is_json(item) for item in value)
    if type(value) is dict:
        return all(type(name) is str and _is_json(item) for name, item in value.items())
    return value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value))
