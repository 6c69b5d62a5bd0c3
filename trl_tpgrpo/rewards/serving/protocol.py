"""The protocol of requests and answers: JSON, with images as PNG in base64 (docs/remote_rewards.md)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

from PIL import Image, PngImagePlugin


PROTOCOL = 1
MAX_ID_LENGTH = 128
RESERVED_COLUMNS = {"images", "prompts", "trainer_state", "log_metric", "log_extra"}
PIXEL_BYTES, VALUE_BYTES = 4, 128  # of memory, at most
PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes of unpacked text in an image; Pillow allows 64 times as many


@dataclass(frozen=True)
class Limits:
    """Limits of a server."""

    max_queue: int = 512  # waiting images per function
    max_payload: int = 128 * 2**20  # bytes of a request's body
    max_image_pixels: int = 2**24  # width times height
    max_unpacked: int = 256 * 2**20  # bytes of a request, or a call, with parsed values and decoded images
    num_kept_answers: int = 1024  # answers kept for clients that retry
    call_timeout: float = 3600  # seconds after which a call counts as hung, if the function does not set it


@dataclass(eq=False)
class Refusal(Exception):
    """Rejection of a request: HTTP status, a word for programs, and a message for people."""

    status: int
    kind: str
    message: str
    row: int | None = None  # row of the request, if it is about one
    exception: str | None = None  # type name of an exception of a reward function
    headers: dict[str, str] | None = None

    def at(self, row: int) -> Refusal:
        return replace(self, row=row)

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "message": self.message, "row": self.row, "exception": self.exception}}


@dataclass(frozen=True)
class ScoreRequest:
    """N images to be scored."""

    id: str  # chosen by the client; the same for repeated requests
    images: list[Image.Image]  # N, opened but not decoded
    prompts: list[str]  # N
    columns: dict[str, list]  # the other columns of the dataset, N values each
    digest: bytes  # SHA-256 of the body
    bytes_per_image: int  # upper bound with decoded images

    def decode(self) -> None:
        """Decode the images; raise a `Refusal` (400) for a damaged image."""
        for row, image in enumerate(self.images):
            try:
                image.load()
            except Exception as error:  # any exception of Pillow for a damaged file
                raise _no_image(error, row) from error


def parse_request(body: bytes, limits: Limits) -> ScoreRequest:
    """Parse a request, without decoding images; raise a `Refusal`: 400 if malformed, 413 if too large."""
    num_bytes = VALUE_BYTES * sum(map(body.count, (b",", b"[", b"{")))  # before they are parsed
    _check_size(num_bytes, limits)
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _malformed("the body must be an object")
    request_id, images = fields.get("id"), fields.get("images")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_LENGTH:
        raise _malformed(f"`id` must be a string of 1 to {MAX_ID_LENGTH} characters")
    if not isinstance(images, list) or not images:
        raise _malformed("`images` must be a list of at least one image")
    if len(images) > limits.max_queue:
        message = f"The request has {len(images)} images; the queue holds {limits.max_queue} (--max_queue)."
        raise Refusal(413, "too_many_images", message)
    number, prompts, columns = len(images), fields.get("prompts", []), fields.get("columns", {})
    if not _is_list(prompts, number) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _malformed(f"`prompts` must be a list of as many strings as there are images, {number}")
    if not isinstance(columns, dict) or not all(_is_list(values, number) for values in columns.values()):
        raise _malformed(f"`columns` must be an object of lists of as many values as there are images, {number}")
    if RESERVED_COLUMNS & set(columns):
        raise _malformed(f"`columns` has {sorted(RESERVED_COLUMNS & set(columns))}, which are reserved names")
    opened = [_opened(image, row, limits.max_image_pixels) for row, image in enumerate(images)]
    num_bytes += PIXEL_BYTES * sum(image.width * image.height for image in opened)
    _check_size(num_bytes, limits)
    return ScoreRequest(request_id, opened, prompts, columns, hashlib.sha256(body).digest(), num_bytes // number + 1)


def is_loopback(host: str) -> bool:
    """Check whether only this machine can reach the host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _check_size(num_bytes: int, limits: Limits) -> None:
    if num_bytes > limits.max_unpacked:
        size, most = num_bytes / 2**20, limits.max_unpacked / 2**20
        message = f"The request has {size:.0f} MiB with decoded images; at most {most:g} are accepted"
        raise Refusal(413, "too_large_unpacked", f"{message} (--max_unpacked).")


def _is_list(values: Any, number: int) -> bool:
    return isinstance(values, list) and len(values) == number


def _opened(text: Any, row: int, max_image_pixels: int) -> Image.Image:
    if not isinstance(text, str):
        raise _malformed("an image must be a string, PNG in base64", row)
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except Exception as error:  # any exception of Pillow for an invalid image
        raise _no_image(error, row) from error
    if image.width * image.height > max_image_pixels:
        message = f"An image has {image.width} x {image.height} pixels; at most {max_image_pixels} are accepted"
        raise Refusal(413, "image_too_large", f"{message} (--max_image_pixels).", row)
    return image


def _no_image(error: Exception, row: int) -> Refusal:
    return _malformed(f"an image is not a PNG in base64: {error}", row)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _malformed(what: str, row: int | None = None) -> Refusal:
    return Refusal(400, "malformed_request", f"The request does not follow the protocol: {what}.", row)
