"""Requests to the reward server that are wrong in a random way: each must get a clear answer, and soon.

python benchmarks/fuzz_requests.py --num_requests 4000

There are four kinds: values of the JSON object, bytes of the body, an image's PNG, HTTP heads. An answer is "scored"
(200, N finite rewards), "refused" (an error of docs/remote_rewards.md), or, for heads alone, "no HTTP" (uvicorn's 400
in plain text, or a connection that ends). All else is "deep", and so is an error in the server's log; "hang" is no
answer within 10 seconds, or an honest request in between that is not scored. With either the exit status is 1.
"""

import argparse
import base64
import copy
import io
import json
import logging
import math
import random
import re
import socket
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from PIL import Image

from trl_tpgrpo.rewards.serving import server as server_module
from trl_tpgrpo.rewards.serving.functions import ServedReward
from trl_tpgrpo.rewards.serving.protocol import Limits
from trl_tpgrpo.rewards.serving.server import RewardServer


SECONDS = 10
PAGE = (Path(__file__).parents[1] / "docs/remote_rewards.md").read_text()
REFUSALS = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (?:[345]\d\d|other).*?\|.*?\|", PAGE, re.MULTILINE))))
FAULTS_OF_THE_FUNCTION = {"reward_raised", "reward_hung", "no_reward"}  # which is honest here
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, math.nan, math.inf, "", "x", "\x00", "\ud800", "x" * 100_000, "iVBORw0KGgo=", [],
    [[]], [None], ["", ""], [0] * 100_000, {}, {"": None}, {"a": [1, 2]}, {"images": [1, 2]}, {"log_metric": [1, 2]},
    {"self": [1, 2]},
]  # fmt: skip
ODD_NAMES = ["id", "images", "prompts", "columns", "trainer_state", "log_extra", "self", "", "a b", "\ud800"]
ODD_HEADERS = [
    "Content-Length: 5", "Content-Length: -1", "Content-Length: " + "9" * 20, "Content-Length: 1e3", "Content-Length:",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding : chunked", "Host: b",
    "Content-Encoding: gzip", "Content-Type: text/plain", "Content-Type:", "Expect: 100-continue", "Connection: close",
    "Connection: Upgrade\r\nUpgrade: websocket", "Authorization: Bearer \xff", "X: " + "y" * 70_000, ": x", "no colon",
    "A\x00: b", " folded", "X-Forwarded-For: ,,,", "X-Forwarded-Proto: \xff", "Range: bytes=0-", "Trailer: x",
]  # fmt: skip
TARGETS = ["/fuzzed", "/health", "/", "//", "/fuzzed/", "/none", "*", "http://x/fuzzed", "/%00", "/%ff%fe", "/fuzzed?",
           "/" + "a" * 70_000, "/../fuzzed", "x", "/\xff", "/fuzzed#a", "/a b", ""]  # fmt: skip
METHODS = ["POST", "GET", "HEAD", "PUT", "OPTIONS", "CONNECT", "TRACE", "post", "PO ST", "", "\x00", "PRI"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_requests", type=int, default=4000, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    server_module.MAX_SECONDS, server_module.GRACE_SECONDS = 1, 1  # many requests end too early
    logged: list[str] = []
    logging.getLogger().addHandler(Errors(logged))
    totals: Counter[tuple[str, str]] = Counter()
    with RewardServer(("127.0.0.1", 0), [ServedReward(fuzzed)], Limits(max_payload=2**20)) as server:
        with ThreadPoolExecutor(8) as pool:
            kinds = list(cases(random.Random(args.seed), args.num_requests))
            for (kind, request), outcome in zip(
                kinds, pool.map(lambda case: ask(server.port, case), kinds), strict=True
            ):
                totals[kind, outcome] += 1
                if outcome in ("deep", "hang"):
                    show(f"{outcome}, {kind}: {request[:300]!r} ... {request[-300:]!r}")
    for line in logged:
        show(f"logged: {line}")
    for (kind, outcome), number in sorted(totals.items()):
        show(f"{kind:>6} {outcome:>8}: {number}")
    num_bad = len(logged) + sum(number for (_, outcome), number in totals.items() if outcome in ("deep", "hang"))
    show(f"{args.num_requests} requests, seed {args.seed}: {num_bad} deep errors or hangs")
    return int(num_bad > 0)


def fuzzed(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """Use what is given, as an honest function does."""
    assert all(len(values) == len(images) for values in columns.values() if isinstance(values, list))
    colours = [image.convert("RGB").resize((1, 1)).getpixel((0, 0)) for image in images]
    return [float(sum(colour)) + len(prompt) for colour, prompt in zip(colours, prompts, strict=True)]


class Errors(logging.Handler):
    """Collector of what the server logs as an error."""

    def __init__(self, found: list[str]):
        super().__init__(logging.ERROR)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record)[-600:])


def cases(rng: random.Random, number: int) -> Iterator[tuple[str, bytes]]:
    """Make requests, every 50th of them honest."""
    for index in range(number):
        fields = {
            "id": f"{index}",
            "images": [in_base64(png(rng)), in_base64(png(rng))],
            "prompts": ["a red circle", "two dogs"],
            "columns": {"target": ["circle", {"boxes": [[0, 1.5], None]}]},
        }
        kind = "honest" if index % 50 == 0 else rng.choice(["values", "bytes", "image", "head"])
        if kind == "values":
            for _ in range(rng.randint(1, 2)):
                fields = with_odd_value(rng, fields)
        if kind == "image":
            fields["images"][1] = in_base64(damaged_png(rng, png(rng)))
        body = json.dumps(fields).encode()
        if kind == "bytes":
            body = damaged(rng, body)
        head = f"POST /fuzzed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        yield kind, odd_head(rng, head) + body if kind == "head" else f"{head}\r\n\r\n".encode() + body


def with_odd_value(rng: random.Random, node: Any) -> Any:
    """Replace, add, leave out or double something at a random depth."""
    if not isinstance(node, dict | list) or not node or rng.random() < 0.2:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key, action = rng.choice(keys), rng.random()
    if action < 0.1:
        del node[key]
    elif action < 0.2 and isinstance(node, dict):
        node[rng.choice(ODD_NAMES)] = rng.choice([node[key], [1, 2], 0])
    elif action < 0.2:
        node *= 2
    else:
        node[key] = with_odd_value(rng, node[key])
    return node


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Change, take out, put in, repeat or cut bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, length = rng.randrange(len(changed) + 1), rng.choice([1, 1, 4, 100])
        part = [rng.randbytes(length), b"", changed[place : place + length] * 3, b'"\\{}[],:'[:length]]
        changed[place : place + rng.choice([0, length])] = rng.choice(part)
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.2 else changed)


def png(rng: random.Random) -> bytes:
    file = io.BytesIO()
    mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    Image.effect_noise((9, 7), 60).convert(mode).save(file, "PNG")
    return file.getvalue()


def damaged_png(rng: random.Random, data: bytes) -> bytes:
    """Damage bytes, or put in a chunk, or damage one, with a checksum that is right."""
    if rng.random() < 0.3:
        return damaged(rng, data)
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += length + 12
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    kinds = b"tEXt zTXt iTXt iCCP PLTE tRNS gAMA cHRM pHYs eXIf acTL fcTL fdAT IDAT IHDR sRGB xxxx".split()
    contents = [b"", b"a\0\0" + zlib.compress(bytes(2**22)), rng.randbytes(20), struct.pack(">IIBBBBB", *size(rng))]
    if rng.random() < 0.5:
        chunks.insert(index, (rng.choice(kinds), rng.choice(contents)))
    elif name == b"IHDR":
        chunks[index] = (name, struct.pack(">IIBBBBB", *size(rng)))
    else:
        chunks[index] = (rng.choice([name, rng.choice(kinds)]), damaged(rng, content))
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def size(rng: random.Random) -> tuple[int, ...]:
    """Return width, height, bits, colour type, compression, filter and interlacing of a header, right or wrong."""
    sides = [0, 1, 9, 4096, 4097, 2**31 - 1, 2**32 - 1]
    return rng.choice(sides), rng.choice(sides), rng.choice([0, 1, 8, 16]), rng.randrange(8), 0, 0, rng.randrange(3)


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def odd_head(rng: random.Random, head: str) -> bytes:
    lines = head.split("\r\n")
    if rng.random() < 0.4:
        version = rng.choice(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""])
        lines[0] = f"{rng.choice(METHODS)} {rng.choice(TARGETS)} {version}"
    if rng.random() < 0.2:
        del lines[rng.randrange(len(lines))]
    for _ in range(rng.randrange(3)):
        lines.insert(rng.randint(1, len(lines) or 1), rng.choice(ODD_HEADERS))
    data = (rng.choice(["\r\n", "\r\n", "\r\n", "\n"]).join(lines) + "\r\n\r\n").encode("latin-1")
    return damaged(rng, data) if rng.random() < 0.2 else data


def ask(port: int, case: tuple[str, bytes]) -> str:
    """Send a request and say what came of it."""
    kind, request = case
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        try:
            connection.sendall(request)
            response = HTTPResponse(connection, method=request.split(b" ")[0].decode("latin-1"))
            response.begin()
            outcome = judged(response.status, response.read(), request)
        except TimeoutError:
            return "hang"
        except (HTTPException, OSError):  # it ended before an answer, or within it
            outcome = "no HTTP"
    if kind == "honest":
        return "scored" if outcome == "scored" else "hang"
    return outcome if outcome != "no HTTP" or kind == "head" else "deep"


def judged(status: int, body: bytes, request: bytes) -> str:
    if status == 400 and body == b"Invalid HTTP request received.":
        return "no HTTP"
    if request.startswith((b"HEAD ", b"GET ")) and (not body or b'"protocol"' in body):
        return "scored" if status == 200 else "refused"
    try:
        answer = json.loads(body)
        if status == 200:
            return "scored" if all(map(math.isfinite, answer["rewards"])) else "deep"
        error = answer["error"]
        return "refused" if error["type"] in REFUSALS - FAULTS_OF_THE_FUNCTION and error["message"] else "deep"
    except (ValueError, KeyError, TypeError):
        return "deep"


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
