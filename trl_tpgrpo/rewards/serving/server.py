"""The HTTP side: `GET /health`, `POST /{reward}`, tokens, limits, and answers kept for those who lost theirs."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ... import __version__
from .functions import ServedReward
from .protocol import PROTOCOL, Refusal, parse_request
from .worker import Job, Worker


MAX_READING = 16
MAX_SILENCE = 60


@dataclass(frozen=True)
class Limits:
    """What a server takes."""

    max_queue: int = 512  # images that may wait, for each function
    max_payload: int = 128 * 2**20  # bytes of a request's body
    max_image_pixels: int = 2**24  # width times height
    num_kept_answers: int = 1024  # for clients that ask again


class RewardServer:
    """Serves reward functions at (host, port) from `__enter__` until `__exit__`; port 0 takes a free one."""

    def __init__(
        self, address: tuple[str, int], rewards: list[ServedReward], limits: Limits, token: str | None = None
    ):
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"Reward functions need different names, which are their URLs, got {names}.")
        self.limits = limits
        self._credentials = None if token is None else f"Bearer {token}".encode()
        self.workers = {reward.name: Worker(reward, limits.max_queue) for reward in rewards}
        self._jobs: dict[tuple[str, str], Job] = {}
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        health = Route("/health", self._health, methods=["GET"])
        score = Route("/{name:path}", self._score, methods=["POST"])
        app = Starlette(routes=[health, score], exception_handlers={Refusal: _refused, HTTPException: _refused})
        # With "auto", uvloop, httptools or websockets would change the server where they happen to be installed.
        fixed: dict[str, Any] = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off", "log_config": None}
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, timeout_keep_alive=MAX_SILENCE, **fixed))
        # Not in the main thread: there uvicorn takes the signals, differently in each of its versions.
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="reward-server", daemon=True)

    def __enter__(self) -> RewardServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take no more requests, answer those that have been taken, and close."""
        self._uvicorn.should_exit = True
        self._thread.join()
        self._socket.close()

    async def _serve(self) -> None:
        self._reading = asyncio.Semaphore(MAX_READING)  # in Python 3.8 it belongs to the loop it is made in
        await self._uvicorn.serve(sockets=[self._socket])

    async def _health(self, request: Request) -> Response:
        self._check_token(request)
        rewards = {
            name: {"batch_size": one.reward.batch_size, "num_waiting": len(one.waiting), "num_scored": one.num_scored}
            for name, one in self.workers.items()
        }
        about = {"status": "ok", "protocol": PROTOCOL, "version": __version__}
        return _answer({**about, "rewards": rewards, "limits": vars(self.limits)})

    async def _score(self, request: Request) -> Response:
        self._check_token(request)
        name, headers, limit = request.path_params["name"].strip("/"), request.headers, self.limits.max_payload
        if name not in self.workers:
            raise Refusal(404, "not_found", f"There is no {request.url.path!r} here, only {sorted(self.workers)}.")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "no_json", "The request's Content-Type must be application/json.")
        if "content-length" not in headers or "transfer-encoding" in headers:
            raise Refusal(411, "no_length", "The request needs a Content-Length.")
        if int(headers["content-length"]) > limit:
            message = f"The request has {headers['content-length']} bytes; at most {limit} are taken (--max_payload)."
            raise Refusal(413, "payload_too_large", message)
        async with self._reading:
            job = await self._read(name, request)
        return _answer(await job.answer)

    def _check_token(self, request: Request) -> None:
        shown = request.headers.get("authorization", "").encode("latin-1")
        if self._credentials is not None and not hmac.compare_digest(shown, self._credentials):
            message = "The request has no token, or not the right one (--token_file)."
            raise Refusal(401, "bad_token", message, headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, name: str, request: Request) -> Job:
        """Queue a request, or find it where it is if it has come before."""

        async def receive() -> Any:
            return await asyncio.wait_for(request.receive(), MAX_SILENCE)

        try:
            body = await Request(request.scope, receive).body()
        except (ClientDisconnect, asyncio.TimeoutError):  # noqa: UP041 - not the builtin before Python 3.11
            message = f"The rest of the request has not come, or nothing of it for {MAX_SILENCE} seconds."
            raise Refusal(503, "cut_off", message, headers={"Retry-After": "1", "Connection": "close"}) from None
        parsed = await run_in_threadpool(parse_request, body, self.limits.max_image_pixels)
        key = (name, parsed.id)
        if key not in self._jobs:
            if self._uvicorn.should_exit:
                raise Refusal(503, "stopping", "The server is being stopped.", headers={"Retry-After": "1"})
            self._jobs[key] = self.workers[name].submit(parsed)
            while len(self._jobs) > self.limits.num_kept_answers and next(iter(self._jobs.values())).answer.done():
                del self._jobs[next(iter(self._jobs))]  # the oldest
        elif self._jobs[key].digest != parsed.digest:
            raise Refusal(409, "id_in_use", f"Another request had the id {parsed.id!r}.")
        return self._jobs[key]


def _answer(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


async def _refused(request: Request, error: Any) -> Response:
    if isinstance(error, HTTPException):  # Starlette's, for another method
        error = Refusal(error.status_code, "bad_request", f"{request.method} {request.url.path}: {error.detail}.")
    return _answer(error.body(), error.status, error.headers)
