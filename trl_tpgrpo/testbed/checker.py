"""The rule-based judge of the shapes world: detects shapes and compares them with the caption.

Like GenEval, it finds the coloured shapes, matches them with the caption's, and checks count and position. `strict` is
1 for exactly the scene of the caption, else 0. `graded` is in [0, 1], with credit for parts of the scene.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .world import BACKGROUND, COLOURS, IMAGE_SIZE, SHAPES, Caption, inside, offset, parse_caption


try:
    from scipy import ndimage
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise ImportError("The testbed's checker needs SciPy: pip install 'trl-tpgrpo[testbed]'") from error


_SMALLEST_AREA = 6
_RECOGNISED = {"circle": 0.7, "square": 0.7, "triangle": 0.55}
"""Smallest quality of a recognised shape: blobs are below it, 99% of shapes decoded by the VAE above."""
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Detection:
    """Connected patch of one colour: most likely shape, its fit (IoU, 0 to 1), and centre (x, y)."""

    colour: str
    shape: str
    quality: float
    centre: tuple[float, float]


@dataclass(frozen=True)
class Score:
    """Agreement of a picture with a caption: `graded` in [0, 1], `strict` 0 or 1."""

    graded: float
    strict: float


def score_images(images: list[Image.Image], prompts: list[str]) -> list[Score]:
    """Score each image (32 x 32) for its prompt, a caption of the shapes world; others raise a `ValueError`."""
    captions = [parse_caption(prompt) for prompt in prompts]
    return [_score(caption, found) for caption, found in zip(captions, detect(images), strict=True)]


def shapes_reward(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """Return rewards in [0, 1]: the mean of the graded and the strict score."""
    return [(score.graded + score.strict) / 2 for score in score_images(images, prompts)]


def graded_reward(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """Return rewards in [0, 1]: the graded score."""
    return [score.graded for score in score_images(images, prompts)]


def strict_reward(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """Return rewards 0 or 1: the strict score."""
    return [score.strict for score in score_images(images, prompts)]


def detect(images: list[Image.Image]) -> list[list[Detection]]:
    """Find the coloured shapes of each image; patches smaller than 6 pixels are ignored."""
    found: list[list[Detection]] = [[] for _ in images]
    if not images:
        return found
    masks = _colour_masks(images)  # (N, 4, H, W)
    planes = masks.reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    within_plane = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))
    labels, _ = ndimage.label(planes, structure=within_plane)
    for label, (plane, rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        patch = labels[plane.start, rows, columns] == label
        if patch.sum() < _SMALLEST_AREA:
            continue
        image, colour = divmod(plane.start, len(_NAMES))
        shape, quality = _recognise(patch)
        centre = ((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2)
        found[image].append(Detection(_NAMES[colour], shape, quality, centre))
    return found


def _colour_masks(images: list[Image.Image]) -> np.ndarray:
    """Return masks (N, 4, H, W): a pixel belongs to the colour nearest in hue, if bright enough."""
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]) / 255
    if pixels.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"The shapes world is {IMAGE_SIZE} x {IMAGE_SIZE} pixels; got images of {images[0].size}.")
    directions = (np.stack(list(COLOURS.values())) - BACKGROUND).astype(np.float32)  # (4, 3)
    lengths = np.linalg.norm(directions, axis=1)
    along = (pixels - BACKGROUND.astype(np.float32)) @ (directions / lengths[:, None]).T  # (N, H, W, 4)
    nearest = along.argmax(-1)
    bright = along.max(-1) > 0.5 * lengths[nearest]
    masks = bright[..., None] & (nearest[..., None] == np.arange(len(lengths)))
    return masks.transpose(0, 3, 1, 2)


def _recognise(patch: np.ndarray) -> tuple[str, float]:
    """Return the best fitting shape, stretched to the patch's box, and the IoU times the box's aspect ratio."""
    height, width = patch.shape
    across = (np.arange(width)[None, :] + 0.5) / width * 2 - 1
    down = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
    aspect = min(height, width) / max(height, width)
    templates = {shape: inside(shape, across, down) for shape in SHAPES}
    qualities = {shape: aspect * (patch & one).sum() / (patch | one).sum() for shape, one in templates.items()}
    best = max(SHAPES, key=qualities.__getitem__)
    return best, float(qualities[best])


def _score(caption: Caption, found: list[Detection]) -> Score:
    if not found:
        return Score(graded=0.0, strict=0.0)
    same_colour = np.array([[thing.colour == one.colour for one in found] for thing in caption.things])
    same_shape = np.array([[thing.shape == one.shape for one in found] for thing in caption.things])
    quality = np.array([one.quality for one in found])
    fit = 0.5 * same_colour + 0.5 * same_shape * np.minimum(quality / 0.8, 1)  # (things, found)
    rows, columns = linear_sum_assignment(fit, maximize=True)
    superfluous = max(len(found) - len(caption.things), 0)  # costs as much as missing ones
    graded = max(fit[rows, columns].sum() - superfluous, 0) / len(caption.things)
    exact = len(found) == len(caption.things)
    recognised = quality >= np.array([_RECOGNISED[one.shape] for one in found])
    exact &= bool((same_colour & same_shape & recognised)[rows, columns].all())
    if caption.relation is not None:
        along, across = 0.0, 0.0
        if len(rows) == 2:  # in ascending order
            along, across = offset(caption.relation, *(np.array(found[column].centre) for column in columns))
        graded = 0.7 * graded + 0.3 * float(np.clip((along - 0.5 * across) / 6, 0, 1))
        exact &= along >= 4 and along > across
    return Score(graded=float(graded), strict=float(exact))
