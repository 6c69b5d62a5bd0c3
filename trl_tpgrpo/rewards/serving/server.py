"""The HTTP server: `GET /health`, `POST /{reward}`, tokens, limits, and answers kept for repeated requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ... import __version__
from .functions import ServedReward
from .protocol import PROTOCOL, Limits, Refusal, parse_request
from .worker import Job, Worker


NUM_READERS = 4  # threads in which bodies are read, and images decoded
MAX_BODIES = 16  # largest requests in memory before parsing
MAX_SECONDS = 120  # for receiving a request, and between two
GRACE_SECONDS = 5  # for telling the client about it


class RewardServer:
    """Serves reward functions at (host, port) from `__enter__` until `__exit__`; port 0: any free port."""

    def __init__(
        self, address: tuple[str, int], rewards: list[ServedReward], limits: Limits, token: str | None = None
    ):
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"Reward functions need different names, which are their URLs, got {names}.")
        self.limits = limits
        self._credentials = None if token is None else f"Bearer {token}".encode()
        self.workers = {reward.name: Worker(reward, limits) for reward in rewards}
        self._jobs: dict[tuple[str, str], Job] = {}
        self._bytes_held = 0
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reward-server")
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        health = Route("/health", self._health, methods=["GET"])
        score = Route("/{name:path}", self._score, methods=["POST"])
        app = Starlette(routes=[health, score], exception_handlers={Refusal: _refused, HTTPException: _refused})
        # With "auto", uvloop, httptools or websockets would change the server if installed.
        fixed: dict[str, Any] = {"loop": "asyncio", "ws": "none", "lifespan": "off", "log_config": None}
        fixed.update(http=_Connection, timeout_keep_alive=MAX_SECONDS)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, **fixed))
        # Not in the main thread, where uvicorn handles signals, differently by version.
        self._thread = threading.Thread(target=self._serve, name="reward-server", daemon=True)

    def __enter__(self) -> RewardServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Accept no more requests, answer accepted ones, and close."""
        self._uvicorn.should_exit = True
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        asyncio.run(self._uvicorn.serve(sockets=[self._socket]))

    async def _health(self, request: Request) -> Response:
        _check_length(request)
        self._check_token(request)
        rewards = {name: worker.health() for name, worker in self.workers.items()}
        status = "hanging" if any(reward["num_hanging"] for reward in rewards.values()) else "ok"
        about = {"status": status, "protocol": PROTOCOL, "version": __version__}
        return _answer({**about, "rewards": rewards, "limits": vars(self.limits)})

    async def _score(self, request: Request) -> Response:
        _check_length(request)
        self._check_token(request)
        name, headers, limit = request.path_params["name"].strip("/"), request.headers, self.limits.max_payload
        if name not in self.workers:
            raise Refusal(404, "not_found", f"There is no {request.url.path!r}, only {sorted(self.workers)}.")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "no_json", "The request's Content-Type must be application/json.")
        if "content-length" not in headers:
            raise Refusal(411, "no_length", "The request needs a Content-Length.")
        if int(headers["content-length"]) > limit:
            message = f"The request has {headers['content-length']} bytes, the limit is {limit} (--max_payload)."
            raise Refusal(413, "payload_too_large", message)
        job = await self._read(name, request)
        return _answer(await job.answer)

    def _check_token(self, request: Request) -> None:
        shown = request.headers.get("authorization", "").encode("latin-1")
        if self._credentials is not None and not hmac.compare_digest(shown, self._credentials):
            message = "The request has no valid token (--token_file)."
            raise Refusal(401, "bad_token", message, headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, name: str, request: Request) -> Job:
        """Queue a request, or find the earlier one with its id."""
        body, read = bytearray(), asyncio.get_running_loop().run_in_executor
        try:
            await asyncio.wait_for(self._receive(request, body), MAX_SECONDS)
            parsed = await read(self._readers, parse_request, bytes(body), self.limits)
        except (ClientDisconnect, asyncio.TimeoutError):  # noqa: UP041 - not the builtin before Python 3.11
            message = f"The request did not arrive within {MAX_SECONDS} seconds."
            raise Refusal(503, "cut_off", message, headers={"Retry-After": "1", "Connection": "close"}) from None
        finally:
            self._bytes_held -= len(body)
        key, worker = (name, parsed.id), self.workers[name]
        if key not in self._jobs:
            if self._uvicorn.should_exit:
                raise Refusal(503, "stopping", "The server is shutting down.", headers={"Retry-After": "1"})
            job = self._jobs[key] = worker.take(parsed)
            self._forget_answers()
            try:
                await read(self._readers, parsed.decode)
            except Refusal as refusal:
                job.refuse(refusal)
                del self._jobs[key]
            worker.submit(job, parsed)
            return job
        if self._jobs[key].digest != parsed.digest:
            raise Refusal(409, "id_in_use", f"Another request has used the id {parsed.id!r}.")
        return self._jobs[key]

    async def _receive(self, request: Request, body: bytearray) -> None:
        async for chunk in request.stream():
            body += chunk
            self._bytes_held += len(chunk)
            if self._bytes_held > MAX_BODIES * self.limits.max_payload:
                message = f"Requests of {self._bytes_held} bytes are already being received."
                raise Refusal(503, "busy", message, headers={"Retry-After": "1", "Connection": "close"})

    def _forget_answers(self) -> None:
        """Drop the oldest answers beyond the limit."""
        number = len(self._jobs) - self.limits.num_kept_answers
        if number > 0:
            for key in [key for key, job in self._jobs.items() if job.answer.done()][:number]:
                del self._jobs[key]


class _Connection(H11Protocol):
    """Connection that is closed if a request does not arrive completely in time."""

    _deadline: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:
            self._begin()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._deadline.cancel()
            self._deadline = None

    def _begin(self) -> None:
        self._deadline = self.loop.call_later(MAX_SECONDS + GRACE_SECONDS, self.transport.abort)


def _check_length(request: Request) -> None:
    """Reject a request whose length is ambiguous, and close its connection."""
    named = {"content-length", "transfer-encoding"} & set(request.headers.keys())
    has_body = bool(named) and request.headers.get("content-length") != "0"
    if len(named) > 1 or (has_body and request.method != "POST"):
        message = f"{request.method} with {' and '.join(sorted(named))}: the end of the request is ambiguous."
        raise Refusal(400, "ambiguous_length", message, headers={"Connection": "close"})


def _answer(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


async def _refused(request: Request, error: Any) -> Response:
    if isinstance(error, HTTPException):  # Starlette's, for another method
        message, close = f"{request.method} {request.url.path}: {error.detail}.", {"Connection": "close"}
        error = Refusal(error.status_code, "bad_request", message, headers=close)  # a body may follow, or none
    return _answer(error.body(), error.status, error.headers)
