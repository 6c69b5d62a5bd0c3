"""Brightness and colourfulness against values worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from trl_tpgrpo.rewards.pixels import brightness, colourfulness


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def test_brightness_goes_from_black_to_white() -> None:
    scores = brightness(images=[plain(0, 0, 0), plain(51, 51, 51), plain(255, 255, 255)], prompts=["", "", ""])
    assert scores == pytest.approx([0, 0.2, 1])


def test_brightness_weights_colours_as_the_eye_does() -> None:
    red, green, blue = brightness([plain(255, 0, 0), plain(0, 255, 0), plain(0, 0, 255)])
    assert [red, green, blue] == pytest.approx([0.299, 0.587, 0.114], abs=1 / 255)


def test_grey_has_no_colour() -> None:
    ramp = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2))
    assert colourfulness([plain(90, 90, 90), ramp], prompts=["", ""]) == [0, 0]


def test_one_colour_counts_by_its_distance_from_grey() -> None:
    # rg = 255, yb = 127.5, no spread
    assert colourfulness([plain(255, 0, 0)]) == pytest.approx([0.3 * math.hypot(255, 127.5)])


def test_complementary_halves_count_by_their_spread() -> None:
    # red (rg 255, yb 127.5) and cyan (rg -255, yb -127.5): means 0, variances 255^2 and 127.5^2
    assert colourfulness([halves((255, 0, 0), (0, 255, 255))]) == pytest.approx([math.hypot(255, 127.5)])


def test_alpha_and_palette_images_are_converted() -> None:
    red = plain(255, 0, 0)
    assert colourfulness([red.convert("RGBA"), red.convert("P")]) == pytest.approx(colourfulness([red, red]), rel=0.02)
