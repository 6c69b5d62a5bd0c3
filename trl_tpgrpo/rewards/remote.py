"""Reward functions served over HTTP by `trl-tpgrpo serve-reward`, or by anything that speaks docs/remote_rewards.md."""

import asyncio
import base64
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
from PIL import Image

from .contract import RewardUnavailable
from .http_client import HTTPClient, Unanswered, bearer, checked_url, error_message, gather


TOKEN_VARIABLE = "TRL_TPGRPO_REWARD_TOKEN"
RETRIED_STATUSES = frozenset({502, 503, 504})
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

REMEDIES = {
    401: "Give the token of the server's --token_file as `token`, or in the environment variable " + TOKEN_VARIABLE,
    404: "Look at GET {server}/health for what is served",
    413: "Take a smaller `batch_size` (now {batch_size}), or raise the server's limits",
    422: "The reward function has failed on this row; the server's log has the traceback",
    500: "The fault is in the reward function; the server's log may tell more",
}


class RemoteRewardError(RuntimeError):
    """A reward server has given no rewards."""


class ServerUnavailable(RemoteRewardError, RewardUnavailable):
    """A reward server has not answered, whatever the images."""


class RemoteReward:
    """A reward function on another machine or in another environment.

    What it computes, its range and its licence are those of the function that is served. It is asynchronous: in a
    script, `asyncio.run(reward(images, prompts))`.

    Args:
        url: Of the server, such as `"http://127.0.0.1:8000"`.
        reward: The name that the server has for the function, and its name in metrics.
        token: What the server asks for; the environment variable `TRL_TPGRPO_REWARD_TOKEN` if `None`.
        timeout: Seconds for one attempt of a request, the time in the server's queue included.
        num_retries: Further attempts after a lost connection, a timeout, and the statuses 502, 503 and 504. Pauses grow
            from half a second to half a minute; 10 retries last over two minutes, in which a server may be started
            again.
        batch_size: Images a request.
        concurrency: Requests under way at once.
        columns: Columns of the dataset that are sent; all if `None`.

    Raises:
        ValueError: If one of these is none of what it may be.
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
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
        if not reward.isidentifier():
            raise ValueError(f"reward must be a name that the server has, such as 'pick_score', got {reward!r}.")
        self.server = checked_url("url", url)
        self.url = f"{self.server}/{reward}"
        self.__name__ = reward
        self.num_images_per_request = batch_size  # `batch_size` would have the trainer split the calls
        self.columns = None if columns is None else tuple(columns)
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._client = HTTPClient(
            self.server, bearer("The token", token), timeout, num_retries, concurrency, RETRIED_STATUSES
        )

    async def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: list,
    ) -> list[float | None]:
        """Score N images.

        Raises:
            RemoteRewardError: If the server gives no rewards.
            ValueError: If an image or a column cannot be sent.
        """
        columns = self._sendable(columns)
        size = self.num_images_per_request
        async with self._client.connected() as connections:
            answers = await gather(
                [
                    self._ask(connections, start, images[start : start + size], prompts[start : start + size], part)
                    for start in range(0, len(images), size)
                    for part in [{name: values[start : start + size] for name, values in columns.items()}]
                ]
            )
        if log_metric is not None:
            for name, value in ((name, value) for answer in answers for name, value in answer["metrics"]):
                log_metric(name, value)
        if log_extra is not None:
            for name in dict.fromkeys(name for answer in answers for name in answer["extra"]):
                missing = [[None] * len(answer["rewards"]) for answer in answers]
                parts = [answer["extra"].get(name, none) for answer, none in zip(answers, missing, strict=True)]
                log_extra(name, [value for part in parts for value in part])
        return [reward for answer in answers for reward in answer["rewards"]]

    def _sendable(self, columns: dict[str, list]) -> dict[str, list]:
        """The columns that are sent.

        Raises:
            ValueError: If one is missing, or has something that JSON would not give back as it is.
        """
        names = tuple(columns) if self.columns is None else self.columns
        for name in names:
            if name not in columns:
                raise ValueError(f"There is no column {name!r} to send to {self.url}, only {list(columns)}.")
            for row, value in enumerate(columns[name]):
                if not _is_json(value):
                    raise ValueError(
                        f"The column {name!r} cannot be sent to {self.url}: JSON does not have {value!r} "
                        f"({type(value).__name__}, row {row}). Name the columns that the reward needs: columns=[...]."
                    )
        return {name: columns[name] for name in names}

    async def _ask(
        self,
        connections: httpx2.AsyncClient,
        first_row: int,
        images: list[Image.Image],
        prompts: list[str],
        columns: dict[str, list],
    ) -> dict[str, Any]:
        async with self._client.slot():
            content = await asyncio.to_thread(self._encoded, first_row, images, prompts, columns)
            try:
                response, _ = await self._client.post(connections, self.url, content)
            except Unanswered as error:
                raise ServerUnavailable(
                    f"The reward server {self.url} has not scored rows {first_row} to {first_row + len(images) - 1}: "
                    f"{error}. Is it running, and is its queue long enough for all its clients? "
                    "Longer `timeout` and more `num_retries` wait longer."
                ) from error
        if response.status_code != 200:
            raise self._refused(response, first_row, prompts)
        return self._parsed(response, len(images))

    def _encoded(
        self, first_row: int, images: list[Image.Image], prompts: list[str], columns: dict[str, list]
    ) -> bytes:
        for row, image in enumerate(images, first_row):
            if image.mode not in PNG_MODES:
                raise ValueError(
                    f"The image of row {row} has mode {image.mode!r}, which PNG does not have: convert it."
                )
        body = {
            "id": uuid.uuid4().hex,  # the same in all attempts, so that the server does not score twice
            "images": [base64_png(image) for image in images],
            "prompts": prompts,
            "columns": columns,
        }
        return json.dumps(body, allow_nan=False).encode()

    def _refused(self, response: httpx2.Response, first_row: int, prompts: list[str]) -> RemoteRewardError:
        """The server's error, with the row of the call and its prompt."""
        try:
            row = response.json()["error"]["row"]
        except (ValueError, KeyError, TypeError):  # a proxy's, for example
            row = None
        known = isinstance(row, int) and 0 <= row < len(prompts)
        where = f" (row {first_row + row}, prompt {prompts[row]!r})" if known else ""
        remedy = REMEDIES.get(response.status_code, "See docs/remote_rewards.md for what the server's answers mean")
        remedy = remedy.format(server=self.server, batch_size=self.num_images_per_request)
        return RemoteRewardError(
            f"The reward server {self.url} answered with status {response.status_code}{where}: "
            f"{error_message(response)} {remedy}."
        )

    def _parsed(self, response: httpx2.Response, number: int) -> dict[str, Any]:
        """The rewards, metrics and extra columns of an answer.

        Raises:
            RemoteRewardError: If it is not of the protocol's form.
        """
        try:
            answer = response.json()
            rewards, metrics, extra = answer["rewards"], answer.get("metrics", {}), answer.get("extra", {})
            if len(rewards) != number:
                raise ValueError(f"{len(rewards)} rewards for {number} images")
            for reward in rewards:
                if reward is not None and (type(reward) not in (int, float) or not math.isfinite(reward)):
                    raise ValueError(f"{reward!r} is no reward")
            for name, values in extra.items():
                if len(values) != number:
                    raise ValueError(f"{len(values)} values of {name!r} for {number} images")
            logged = [
                (name, math.nan if value is None else float(value))
                for name, values in metrics.items()
                for value in values
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RemoteRewardError(
                f"The reward server {self.url} answered with what is no answer of protocol 1: "
                f"{type(error).__name__}: {error}. "
                f"It began with {response.text[:100]!r}. See docs/remote_rewards.md."
            ) from error
        return {"rewards": rewards, "metrics": logged, "extra": extra}


def remote_reward_from_url(url: str) -> RemoteReward:
    """The remote reward of an URL such as `http://127.0.0.1:8000/pick_score`, with the token of the environment.

    Raises:
        ValueError: If the URL has no path, or is no URL.
    """
    server, _, reward = checked_url("A remote reward", url).rpartition("/")
    if not reward.isidentifier() or server in ("http:/", "https:/"):
        raise ValueError(f"A remote reward is http://HOST:PORT/REWARD, got {url!r}.")
    return RemoteReward(server, reward)


def base64_png(image: Image.Image) -> str:
    """An image without loss, compressed as little as is quick."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _is_json(value: Any) -> bool:
    """Whether it comes back from JSON as it is."""
    if type(value) is list:
        return all(_is_json(item) for item in value)
    if type(value) is dict:
        return all(type(name) is str and _is_json(item) for name, item in value.items())
    return value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value))
