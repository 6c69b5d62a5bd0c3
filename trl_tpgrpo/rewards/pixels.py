"""Rewards without a model, for first tests of a setup: brightness, colourfulness, size as a JPEG file."""

import io
from typing import Any

import numpy as np
from PIL import Image


def brightness(images: list[Image.Image], **columns: Any) -> list[float]:
    """Return the mean luma (ITU-R 601) of images, from 0 (black) to 1 (white). Training converges to white images."""
    return [float(np.asarray(image.convert("L"), dtype=np.float64).mean()) / 255 for image in images]


def colourfulness(images: list[Image.Image], **columns: Any) -> list[float]:
    """Compute the metric of Hasler and Suesstrunk, Measuring colourfulness in natural images (SPIE 5007, 2003).

    With rg = R - G and yb = (R + G) / 2 - B over the pixels of an 8-bit image, the metric is
    `sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)`. It is 0 for grey. In the paper, 15 is slightly, 45
    averagely and 82 highly colourful. Training converges to patterns of saturated complementary colours, up to 285.
    """
    return [_colourfulness(np.asarray(image.convert("RGB"), dtype=np.float64)) for image in images]


def _colourfulness(pixels: np.ndarray) -> float:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue]).reshape(2, -1)
    spread = np.sqrt(opponents.var(axis=1).sum())
    return float(spread + 0.3 * np.linalg.norm(opponents.mean(axis=1)))


def jpeg_compressibility(images: list[Image.Image], **columns: Any) -> list[float]:
    """Return minus the JPEG file size (quality 95) in kB, a reward for simple images (arXiv 2305.13301).

    Below 0; about -150 for a photograph of 512 x 512. Images of one colour have the maximum, to which training
    converges.
    """
    return [-_size_in_kilobytes(image) for image in images]


def jpeg_incompressibility(images: list[Image.Image], **columns: Any) -> list[float]:
    """Return the JPEG file size (quality 95) in kB, a reward for detailed images. Noise has the maximum."""
    return [_size_in_kilobytes(image) for image in images]


def _size_in_kilobytes(image: Image.Image) -> float:
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=95)
    return file.tell() / 1000
