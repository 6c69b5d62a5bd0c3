"""The HTTP side: `GET /health`, `POST /{reward}`, tokens, limits, and answers kept for those who lost theirs."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .functions import ServedReward
from .protocol import PROTOCOL, Refusal, parse_request
from .worker import Job, Worker


logger = logging.getLogger(__name__)

CHUNK = 1 << 16
MAX_DISCARDED = 1 << 30
NUM_READING = 16


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_queue: Images that may wait, for each function.
        max_payload: Bytes of a request's body.
        max_image_pixels: Width times height.
        num_kept_answers: Of the last requests, for clients that ask again.
    """

    max_queue: int = 512
    max_payload: int = 128 * 2**20
    max_image_pixels: int = 2**24
    num_kept_answers: int = 1024


class RewardServer(ThreadingHTTPServer):
    """Serves reward functions; `serve_forever` until `drain`.

    Args:
        address: Host and port; port 0 takes a free one.
        rewards: What is served.
        limits: What is taken.
        token: What clients must show; `None` lets everyone in.
        version: Shown by `/health`.

    Raises:
        ValueError: If two functions have the same name.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        rewards: list[ServedReward],
        limits: Limits = Limits(),  # noqa: B008  # it is frozen
        token: str | None = None,
        version: str = "",
    ):
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"Reward functions need different names, which are their URLs, got {names}.")
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)
        self.limits, self.version = limits, version
        self.workers = {reward.name: Worker(reward, limits.max_queue) for reward in rewards}
        self.reading = threading.BoundedSemaphore(NUM_READING)
        self._credentials = None if token is None else f"Bearer {token}".encode()
        self._jobs: OrderedDict[tuple[str, str], tuple[bytes, Job]] = OrderedDict()
        self._jobs_lock = threading.Lock()
        self._num_answering = 0
        self._answered = threading.Condition()

    def is_authorized(self, header: str | None) -> bool:
        """Compare in constant time."""
        return self._credentials is None or hmac.compare_digest((header or "").encode("latin-1"), self._credentials)

    def submit(self, name: str, body: bytes) -> Job:
        """Queue a request, or find it where it is if it has come before.

        Raises:
            Refusal: If it is malformed, or there is no room, or its id is that of another request.
        """
        request = parse_request(body, self.limits.max_image_pixels)
        key, digest = (name, request.id), hashlib.sha256(body).digest()
        with self._jobs_lock:
            if key in self._jobs:
                known, job = self._jobs[key]
                if known != digest:
                    raise Refusal(409, "id_in_use", f"Another request had the id {request.id!r}.")
                return job
            job = self.workers[name].submit(request)
            self._jobs[key] = (digest, job)
            self._forget()
        return job

    def _forget(self) -> None:
        """Drop the oldest answers over the limit; what is not answered yet stays."""
        while len(self._jobs) > self.limits.num_kept_answers:
            oldest = next(iter(self._jobs))
            if not self._jobs[oldest][1].done.is_set():
                return
            del self._jobs[oldest]

    def health(self) -> dict[str, Any]:
        rewards = {
            name: {
                "batch_size": worker.reward.batch_size,
                "num_waiting": worker.num_waiting,
                "num_scored": worker.num_scored,
            }
            for name, worker in self.workers.items()
        }
        return {
            "status": "ok",
            "protocol": PROTOCOL,
            "version": self.version,
            "rewards": rewards,
            "limits": vars(self.limits),
        }

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What `drain` waits for."""
        with self._answered:
            self._num_answering += 1
        try:
            yield
        finally:
            with self._answered:
                self._num_answering -= 1
                self._answered.notify_all()

    def drain(self) -> None:
        """Take no more requests, answer those that have been taken, and close."""
        self.shutdown()
        for worker in self.workers.values():
            worker.close()
        with self._answered:
            self._answered.wait_for(lambda: self._num_answering == 0)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("A connection from %s ended early.", client_address[0], exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # seconds that a client may be silent

    def do_GET(self) -> None:
        with self.server.answering():
            self._answer(self._health)

    def do_POST(self) -> None:
        with self.server.answering():
            self._answer(self._score)

    def _answer(self, make: Any) -> None:
        try:
            status, body, headers = 200, make(), {}
        except Refusal as refusal:
            status, body = refusal.status, refusal.body()
            headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self._send(status, body, headers)

    def _health(self) -> dict[str, Any]:
        self._check_token()
        if self.path != "/health":
            raise self._not_found()
        return self.server.health()

    def _score(self) -> dict[str, Any]:
        length = self._content_length()
        try:
            self._check_token()
            name = self.path.strip("/")
            if name not in self.server.workers:
                raise self._not_found()
            if self.headers.get_content_type() != "application/json":
                raise Refusal(415, "no_json", "The request's Content-Type must be application/json.")
            if length > self.server.limits.max_payload:
                limit = self.server.limits.max_payload
                message = f"The request has {length} bytes; at most {limit} are taken (--max_payload)."
                raise Refusal(413, "payload_too_large", message)
        except Refusal:
            self._discard(length)
            raise
        with self.server.reading:
            body = self.rfile.read(length)
            if len(body) < length:
                self.close_connection = True
                raise Refusal(400, "malformed_request", "The connection ended within the request.")
            job = self.server.submit(name, body)
        del body
        job.done.wait()
        return job.answer()

    def _content_length(self) -> int:
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            self.close_connection = True
            raise Refusal(411, "no_length", "The request needs a Content-Length.")
        return int(text)

    def _check_token(self) -> None:
        if not self.server.is_authorized(self.headers.get("Authorization")):
            raise Refusal(401, "bad_token", "The request has no token, or not the right one (--token_file).")

    def _not_found(self) -> Refusal:
        return Refusal(404, "not_found", f"There is no {self.path!r} here, only {sorted(self.server.workers)}.")

    def _discard(self, length: int) -> None:
        """Read a body that is not wanted, since a client that is cut off while it sends does not see the answer."""
        left = length
        while left > 0 and length - left < MAX_DISCARDED:
            part = self.rfile.read(min(left, CHUNK))
            if not part:
                break
            left -= len(part)
        self.close_connection = self.close_connection or left > 0

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = json.dumps(body, allow_nan=False).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the form of all refusals."""
        self.close_connection = True
        refusal = Refusal(int(code), "bad_request", message or explain or "The request cannot be read.")
        self._send(refusal.status, refusal.body(), {})

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
