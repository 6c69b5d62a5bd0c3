"""The words world: pictures of three characters, whose place, size, weight and colours vary.

A prompt is the characters with spaces between them, "K 8 M", so that each is a token. The fonts are DejaVu Sans and
its bold, as matplotlib ships them (licence of Bitstream Vera; DejaVu's changes are in the public domain).
"""

import itertools
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


HEIGHT, WIDTH = 32, 64
CHARACTERS = "ABEFHKMNPRTXY34689"
LENGTH = 3
WEIGHTS = Path(__file__).parent / "weights"  # by pretrain.py --world words
FONTS = ("DejaVuSans", "DejaVuSans-Bold")
SIZES = range(13, 20)  # pixels an em; a capital has 0.73 of it
MARGIN = 3
SUPERSAMPLING = 4


def all_prompts() -> list[str]:
    """Return the prompts of all 5,832 words."""
    return [" ".join(word) for word in itertools.product(CHARACTERS, repeat=LENGTH)]


def split_prompts(seed: int = 0) -> dict[str, list[str]]:
    """Split all prompts into `train` (70%), `tuning` (15%) and `heldout` (15%), in random order.

    Held-out words never appear in the base model's pretraining.
    """
    prompts = all_prompts()
    shuffled = [prompts[index] for index in np.random.default_rng(seed).permutation(len(prompts))]
    part = round(0.15 * len(prompts))
    return {"heldout": shuffled[:part], "tuning": shuffled[part : 2 * part], "train": shuffled[2 * part :]}


def draw(prompt: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one random picture of a prompt's word, dark on light or light on dark: uint8, (32, 64, 3)."""
    word = prompt.replace(" ", "")
    font = load_font(FONTS[rng.integers(len(FONTS))], int(rng.choice(SIZES)) * SUPERSAMPLING)
    left, top, right, bottom = font.getbbox(word)
    free = np.array([WIDTH, HEIGHT]) - 2 * MARGIN - np.array([right - left, bottom - top]) / SUPERSAMPLING
    x, y = (MARGIN + rng.random(2) * free) * SUPERSAMPLING
    mask = Image.new("L", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING))
    ImageDraw.Draw(mask).text((round(x) - left, round(y) - top), word, 255, font=font)
    blocks = np.asarray(mask, dtype=np.float64).reshape(HEIGHT, SUPERSAMPLING, WIDTH, SUPERSAMPLING)
    ink = blocks.mean((1, 3))[..., None] / 255
    light, dark = rng.integers(160, 256, 3), rng.integers(0, 96, 3)
    colour, ground = (light, dark) if rng.random() < 0.5 else (dark, light)
    return (ground + (colour - ground) * ink).round().astype(np.uint8)


@lru_cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf", size)


def draw_prompted_pictures(number: int, rng: np.random.Generator) -> tuple[list[str], torch.Tensor]:
    """Draw pictures of words that are not held out.

    Returns:
        The prompts and the pictures in [-1, 1], (number, 3, 32, 64).
    """
    splits = split_prompts()
    known = splits["train"] + splits["tuning"]
    chosen = [known[rng.integers(len(known))] for _ in range(number)]
    pictures = np.stack([draw(prompt, rng) for prompt in tqdm(chosen, desc="Drawing pictures")])
    return chosen, torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
