"""What a request and its answer look like: JSON, with images as PNG in base64 (docs/remote_rewards.md)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

from PIL import Image


PROTOCOL = 1
MAX_ID_LENGTH = 128


@dataclass(eq=False)
class Refusal(Exception):
    """A request that gets no rewards: the HTTP status, a word for programs, and a sentence for people."""

    status: int
    kind: str
    message: str
    row: int | None = None  # the row of the request that it is about, if it is about one
    exception: str | None = None  # the name of its type, if a reward function has raised
    headers: dict[str, str] | None = None

    def at(self, row: int) -> Refusal:
        return replace(self, row=row)

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "message": self.message, "row": self.row, "exception": self.exception}}


@dataclass(frozen=True)
class ScoreRequest:
    """N images to be scored."""

    id: str  # chosen by the client; a request that comes again has the id that it had
    images: list[Image.Image]  # N, decoded
    prompts: list[str]  # N
    columns: dict[str, list]  # the other columns of the dataset, N values each
    digest: bytes  # SHA-256 of the body


def parse_request(body: bytes, max_image_pixels: int) -> ScoreRequest:
    """Read a request, or raise a `Refusal`: 400 if it is not of the documented form, 413 if an image is too large."""
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _malformed("the body must be an object")
    request_id, images = fields.get("id"), fields.get("images")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_LENGTH:
        raise _malformed(f"`id` must be a string of 1 to {MAX_ID_LENGTH} characters")
    if not isinstance(images, list) or not images:
        raise _malformed("`images` must be a list of at least one image")
    number, prompts, columns = len(images), fields.get("prompts", []), fields.get("columns", {})
    if not _is_list(prompts, number) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _malformed(f"`prompts` must be a list of as many strings as there are images, {number}")
    if not isinstance(columns, dict) or not all(_is_list(values, number) for values in columns.values()):
        raise _malformed(f"`columns` must be an object of lists of as many values as there are images, {number}")
    decoded = [_decode(image, row, max_image_pixels) for row, image in enumerate(images)]
    return ScoreRequest(request_id, decoded, prompts, columns, hashlib.sha256(body).digest())


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _is_list(values: Any, number: int) -> bool:
    return isinstance(values, list) and len(values) == number


def _decode(text: Any, row: int, max_image_pixels: int) -> Image.Image:
    if not isinstance(text, str):
        raise _malformed("an image must be a string, PNG in base64", row)
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        width, height = image.size
        if width * height > max_image_pixels:
            message = f"An image has {width} x {height} pixels; at most {max_image_pixels} are taken"
            raise Refusal(413, "image_too_large", f"{message} (--max_image_pixels).", row)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _malformed(f"an image is no PNG in base64: {error}", row) from error
    return image


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _malformed(what: str, row: int | None = None) -> Refusal:
    return Refusal(400, "malformed_request", f"The request is not of the protocol's form: {what}.", row)
