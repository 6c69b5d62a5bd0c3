"""Servers on the loopback interface that tests start and that end with them."""

import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from starlette.applications import Starlette

from trl_tpgrpo.rewards.serving import server as serving_module
from trl_tpgrpo.rewards.serving.functions import ServedReward
from trl_tpgrpo.rewards.serving.server import Limits, RewardServer


Reply = tuple[int, dict[str, str], bytes] | None
"""Status, headers and body, or `None` to close the connection without an answer."""


@contextmanager
def serving(
    *functions: Callable[..., Any], token: str | None = None, port: int = 0, **limits: int
) -> Iterator[RewardServer]:
    """Start a reward server; what it has taken is answered before it ends."""
    rewards = [ServedReward(function) for function in functions]
    with RewardServer(("127.0.0.1", port), rewards, Limits(**limits), token) as server:
        yield server


class Scripted(ThreadingHTTPServer):
    """A server that answers as a test says.

    Args:
        reply: From a request (its path, headers and JSON) and its number to the answer.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]):
        super().__init__(("127.0.0.1", 0), _ScriptedHandler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _ScriptedHandler(BaseHTTPRequestHandler):
    server: Scripted
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 10

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = {"path": self.path, "headers": dict(self.headers), "body": body}
        with self.server.lock:
            self.server.requests.append(request)
            number = len(self.server.requests) - 1
        reply = self.server.reply(request, number)
        if reply is None:
            self.close_connection = True
            return
        status, headers, data = reply
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Tests have nobody to read it."""


@contextmanager
def scripted(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Scripted]:
    """Start a server that answers as `reply` says."""
    server = Scripted(reply)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def dripping() -> Iterator[str]:
    """Start a server whose answers never end, though a byte of them comes now and then; yield its URL."""

    def drip(opened: socket.socket) -> None:
        with opened, suppress(OSError):
            opened.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n")
            while True:
                opened.sendall(b" ")
                time.sleep(0.05)

    def listen() -> None:
        with suppress(OSError):
            while True:
                drip(listening.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def as_json(value: object, status: int = 200, **headers: str) -> Reply:
    return status, {name.replace("_", "-"): text for name, text in headers.items()}, json.dumps(value).encode()


def before_answers(monkeypatch: Any, act: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Let `act` see the body of each answer before it is sent; if it raises, the connection ends within the answer."""

    def application(**arguments: Any) -> Callable[..., Any]:
        app = Starlette(**arguments)

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            async def send_after(message: Any) -> None:
                if message["type"] == "http.response.body":
                    await act(json.loads(message["body"]))
                await send(message)

            await app(scope, receive, send_after)

        return watched

    monkeypatch.setattr(serving_module, "Starlette", application)


def request(
    server: RewardServer | int, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, Any, Any]:
    """Ask a server, or a port, once; return status, JSON and headers of the answer."""
    port = server if isinstance(server, int) else server.port
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    try:
        connection.request(method, path, data, sent)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()
