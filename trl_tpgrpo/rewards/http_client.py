"""Asking a server for JSON: some requests at once, again after what passes, with an end to it."""

import asyncio
import ipaddress
import random
import weakref
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2


FIRST_PAUSE = 0.5
MAX_PAUSE = 30.0
PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)


class Unanswered(Exception):
    """A server has not answered, or with a status that passes, as often as it was asked.

    Args:
        what: Happened at last.
        num_attempts: How often it was asked.
    """

    def __init__(self, what: str, num_attempts: int):
        super().__init__(f"{what} ({num_attempts} attempts)" if num_attempts > 1 else what)
        self.num_attempts = num_attempts


class HTTPClient:
    """Posts JSON to one server.

    Args:
        url: Of the server, to see whether it is this machine: requests to it do not go through a proxy.
        headers: Sent with each request.
        timeout: Seconds for one attempt, from the connection to the last byte.
        num_retries: Further attempts after connection errors, timeouts and `retried_statuses`.
        concurrency: Requests under way at once, over all calls.
        retried_statuses: Statuses that pass.
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        timeout: float,
        num_retries: int,
        concurrency: int,
        retried_statuses: frozenset[int],
    ):
        for name, value, least in (("num_retries", num_retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}.")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}.")
        self.headers, self.timeout, self.num_retries = headers, timeout, num_retries
        self.concurrency, self.retried_statuses = concurrency, retried_statuses
        self._trust_env = not _is_this_machine(url)
        self._random = random.Random()  # the global one is the training's
        self._slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Connections, for the requests of one call."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        async with httpx2.AsyncClient(
            headers=self.headers, timeout=None, limits=limits, trust_env=self._trust_env
        ) as connections:
            yield connections

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the `concurrency` places; what a request needs is made in it, so that no more of it is in memory."""
        async with self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency)):
            yield

    async def post(self, connections: httpx2.AsyncClient, url: str, content: bytes) -> tuple[httpx2.Response, int]:
        """An answer with a status that does not pass, and the number of attempts that it took.

        Raises:
            Unanswered: If there is none after all retries.
        """
        failure = ""
        for attempt in range(self.num_retries + 1):
            pause = min(MAX_PAUSE, FIRST_PAUSE * 2**attempt)
            try:
                async with asyncio.timeout(self.timeout):
                    response = await connections.post(
                        url, content=content, headers={"Content-Type": "application/json"}
                    )
            except TimeoutError:
                failure = f"no answer within {self.timeout:g} seconds"
            except PASSING_ERRORS as error:
                failure = f"no connection: {type(error).__name__} {error}".rstrip()
            else:
                if response.status_code not in self.retried_statuses:
                    return response, attempt + 1
                failure = f"status {response.status_code}: {error_message(response)}"
                asked = response.headers.get("Retry-After", "")
                pause = min(MAX_PAUSE, float(asked)) if asked.isascii() and asked.isdigit() else pause
            if attempt < self.num_retries:
                await asyncio.sleep(pause * self._random.uniform(1, 1.25))
        raise Unanswered(failure, self.num_retries + 1)


def error_message(response: httpx2.Response) -> str:
    """What an answer says is wrong, in the form of reward servers and of OpenAI's API, or as it begins."""
    try:
        return str(response.json()["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return f"it said {response.text[:200]!r}."


async def gather(coroutines: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all, or the first error, after which none goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def bearer(name: str, secret: str | None) -> dict[str, str]:
    """The header that shows a token or key.

    Raises:
        ValueError: If a header cannot have it, without showing it.
    """
    if secret is None:
        return {}
    if not secret or not secret.isascii() or not secret.isprintable() or secret != secret.strip():
        raise ValueError(
            f"{name} must be printable ASCII characters without spaces around them; it is not shown here."
        )
    return {"Authorization": f"Bearer {secret}"}


def checked_url(name: str, url: str) -> str:
    """An HTTP URL without a slash at its end.

    Raises:
        ValueError: If it is none, or has a password or a query, which would be shown in messages.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must be an URL such as http://127.0.0.1:8000, got {parts.scheme or url!r}.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{name} must have no user, password, query or fragment; a token is given by itself.")
    return url.rstrip("/")


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
