"""Size of the JPEG file: a reward without a model, for first tests of a setup."""

import io
from typing import Any

from PIL import Image


def jpeg_compressibility(images: list[Image.Image], **columns: Any) -> list[float]:
    """Reward simple pictures: minus the size of the JPEG file of quality 95, in kB (arXiv 2305.13301).

    Below 0; about -150 for a photograph of 512 x 512. An image of one colour has the maximum, and a policy that is
    trained on this reward ends there.
    """
    return [-_size_in_kilobytes(image) for image in images]


def jpeg_incompressibility(images: list[Image.Image], **columns: Any) -> list[float]:
    """Reward busy pictures: the size of the JPEG file of quality 95, in kB. Noise has the maximum."""
    return [_size_in_kilobytes(image) for image in images]


def _size_in_kilobytes(image: Image.Image) -> float:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=95)
    return file.tell() / 1000
