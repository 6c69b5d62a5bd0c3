"""What a request and its answer look like: JSON, with images as PNG in base64 (docs/remote_rewards.md)."""

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
PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes of texts within an image, unpacked; Pillow takes 64 times as many


@dataclass(frozen=True)
class Limits:
    """What a server takes, and for how long."""

    max_queue: int = 512  # images that may wait, for each function
    max_payload: int = 128 * 2**20  # bytes of a request's body
    max_image_pixels: int = 2**24  # width times height
    max_unpacked: int = 256 * 2**20  # bytes of a request, or of a call, with its values read and its images decoded
    num_kept_answers: int = 1024  # for clients that ask again
    call_timeout: float = 3600  # seconds after which a call counts as hung, where a function does not say


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
    images: list[Image.Image]  # N, opened; `decode` reads their pixels
    prompts: list[str]  # N
    columns: dict[str, list]  # the other columns of the dataset, N values each
    digest: bytes  # SHA-256 of the body
    bytes_per_image: int  # that it takes with its images decoded, at most

    def decode(self) -> None:
        """Read the pixels, or raise a `Refusal` (400) for an image that is damaged."""
        for row, image in enumerate(self.images):
            try:
                image.load()
            except Exception as error:  # whatever Pillow raises on a damaged file
                raise _no_image(error, row) from error


def parse_request(body: bytes, limits: Limits) -> ScoreRequest:
    """Read a request, of images their sizes alone, or raise a `Refusal`: 400 if it is malformed, 413 if too large."""
    num_bytes = VALUE_BYTES * sum(map(body.count, (b",", b"[", b"{")))  # before they take them
    _check_size(num_bytes, limits)
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
    if len(images) > limits.max_queue:
        message = f"The request has {len(images)} images; the queue holds {limits.max_queue} (--max_queue)."
        raise Refusal(413, "too_many_images", message)
    number, prompts, columns = len(images), fields.get("prompts", []), fields.get("columns", {})
    if not _is_list(prompts, number) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _malformed(f"`prompts` must be a list of as many strings as there are images, {number}")
    if not isinstance(columns, dict) or not all(_is_list(values, number) for values in columns.values()):
        raise _malformed(f"`columns` must be an object of lists of as many values as there are images, {number}")
    if RESERVED_COLUMNS & set(columns):
        raise _malformed(f"`columns` has {sorted(RESERVED_COLUMNS & set(columns))}, which functions get otherwise")
    opened = [_opened(image, row, limits.max_image_pixels) for row, image in enumerate(images)]
    num_bytes += PIXEL_BYTES * sum(image.width * image.height for image in opened)
    _check_size(num_bytes, limits)
    return ScoreRequest(request_id, opened, prompts, columns, hashlib.sha256(body).digest(), num_bytes // number + 1)


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _check_size(num_bytes: int, limits: Limits) -> None:
    if num_bytes > limits.max_unpacked:
        size, most = num_bytes / 2**20, limits.max_unpacked / 2**20
        message = f"The request takes {size:.0f} MiB with its images decoded; at most {most:g} are taken"
        raise Refusal(413, "too_large_unpacked", f"{message} (--max_unpacked).")


def _is_list(values: Any, number: int) -> bool:
    return isinstance(values, list) and len(values) == number


def _opened(text: Any, row: int, max_image_pixels: int) -> Image.Image:
    if not isinstance(text, str):
        raise _malformed("an image must be a string, PNG in base64", row)
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except Exception as error:  # whatever Pillow raises on what is no image
        raise _no_image(error, row) from error
    if image.width * image.height > max_image_pixels:
        message = f"An image has {image.width} x {image.height} pixels; at most {max_image_pixels} are taken"
        raise Refusal(413, "image_too_large", f"{message} (--max_image_pixels).", row)
    return image


def _no_image(error: Exception, row: int) -> Refusal:
    return _malformed(f"an image is no PNG in base64: {error}", row)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _malformed(what: str, row: int | None = None) -> Refusal:
    return Refusal(400, "malformed_request", f"The request is not of the protocol's form: {what}.", row)
