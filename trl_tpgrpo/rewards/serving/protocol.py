"""What a request and its answer look like: JSON, with images as PNG in base64 (docs/remote_rewards.md)."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image


PROTOCOL = 1
MAX_ID_LENGTH = 128


class Refusal(Exception):
    """A request that gets no rewards.

    Args:
        status: Of the HTTP answer.
        kind: A word for programs.
        message: A sentence for people: what was wrong.
        row: Of the request's images, if it is about one.
        exception: The type's name, if a reward function has raised.
        retry_after: Seconds after which the same request may be taken.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        row: int | None = None,
        exception: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.message, self.row = status, kind, message, row
        self.exception, self.retry_after = exception, retry_after

    def at(self, row: int) -> Refusal:
        """The same, known to be of this row."""
        return Refusal(self.status, self.kind, self.message, row, self.exception, self.retry_after)

    def body(self) -> dict[str, Any]:
        return {
            "error": {"type": self.kind, "message": self.message, "row": self.row, "exception": self.exception},
        }


@dataclass(frozen=True)
class ScoreRequest:
    """N images to be scored.

    Attributes:
        id: Chosen by the client; a request that comes again has the id that it had.
        images: N images, decoded.
        prompts: N prompts.
        columns: The other columns of the dataset, N values each.
    """

    id: str
    images: list[Image.Image]
    prompts: list[str]
    columns: dict[str, list]


def parse_request(body: bytes, max_image_pixels: int) -> ScoreRequest:
    """Read a request.

    Raises:
        Refusal: With 400 if it is not of the documented form, with 413 if an image is too large.
    """
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _malformed("the body must be an object")
    request_id, images, prompts = (fields.get(name) for name in ("id", "images", "prompts"))
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_LENGTH:
        raise _malformed(f"`id` must be a string of 1 to {MAX_ID_LENGTH} characters")
    if not isinstance(images, list) or not images:
        raise _malformed("`images` must be a list of at least one image")
    number = len(images)
    if not isinstance(prompts, list) or len(prompts) != number or not all(isinstance(one, str) for one in prompts):
        raise _malformed(f"`prompts` must be a list of as many strings as there are images, {number}")
    columns = fields.get("columns", {})
    if not isinstance(columns, dict) or not all(_is_list_of(values, number) for values in columns.values()):
        raise _malformed(f"`columns` must be an object of lists of as many values as there are images, {number}")
    decoded = [_decode(image, row, max_image_pixels) for row, image in enumerate(images)]
    return ScoreRequest(request_id, decoded, prompts, columns)


def _is_list_of(values: Any, number: int) -> bool:
    return isinstance(values, list) and len(values) == number


def _decode(text: Any, row: int, max_image_pixels: int) -> Image.Image:
    if not isinstance(text, str):
        raise _malformed("an image must be a string, PNG in base64", row)
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        width, height = image.size
        if width * height > max_image_pixels:
            message = (
                f"An image has {width} x {height} pixels; at most {max_image_pixels} are taken (--max_image_pixels)."
            )
            raise Refusal(413, "image_too_large", message, row)
        image.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _malformed(f"an image is no PNG in base64: {error}", row) from error
    return image


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _malformed(what: str, row: int | None = None) -> Refusal:
    return Refusal(400, "malformed_request", f"The request is not of the protocol's form: {what}.", row)
