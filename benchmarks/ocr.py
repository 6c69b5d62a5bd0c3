"""Accuracy of the OCR reward on 50 rendered texts, by size, noise and ground: `python benchmarks/ocr.py > table.md`.

Each text is drawn at a random place in an image of 512 x 512 in one of five fonts (those that matplotlib ships). Where
the text that was asked for is in the image, the score should be 1; the last row asks for another text than the one
drawn.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trl_tpgrpo.rewards.ocr import OCRReward


IMAGE_SIZE = 512
FONTS = ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "STIXGeneralItalic")
TEXTS = (
    "Hello World", "Open 24 Hours", "STOP", "Fresh Bread", "No Parking", "Happy Birthday", "SALE 50% OFF", "Chapter 7",
    "Exit", "Coffee & Tea", "Room 101", "Welcome Home", "Beware of Dog", "Platform 9", "Just Married",
    "Speed Limit 35", "Thank You", "Grand Opening", "Made in Italy", "Do Not Disturb", "Season's Greetings",
    "Live Music Tonight", "Gate B12", "Est. 1984", "Out of Order", "Wet Paint", "Mind the Gap", "Taxi", "Library",
    "Pizza", "Lost Cat", "Final Boss", "Game Over", "Level 42", "Quiet Zone", "Zebra Crossing", "Best Before 2030",
    "Keep Left", "Recycle", "Hot Soup", "Moon Base Alpha", "Vote Today", "Mango Juice", "The End", "Time Machine",
    "Robot Repair", "Dragon Eggs", "Ice Cream", "Free Wifi", "Yellow Submarine",
)  # fmt: skip


def render(
    text: str, font: str, size: int, noise: float, plain: bool = True, rng: np.random.Generator | None = None
) -> Image.Image:
    """The text at a random place, dark on light or light on dark, with noise.

    Args:
        text: What to draw, on one line.
        font: A font of matplotlib's.
        size: Of the font, in pixels.
        noise: Standard deviation of Gaussian noise, in grey levels.
        plain: One colour behind the text; else a photograph-like ground of soft random blobs.
        rng: Draws place, colours and noise.
    """
    rng = rng or np.random.default_rng(0)
    face = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf", size)
    light, dark = rng.integers(190, 256, 3), rng.integers(0, 60, 3)
    ground, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
    pixels = np.broadcast_to(ground, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float64)
    if not plain:
        blobs = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((IMAGE_SIZE, IMAGE_SIZE), 3)
        pixels = 0.5 * pixels + 0.5 * np.asarray(blobs)
    image = Image.fromarray(pixels.astype(np.uint8))
    left, top, right, bottom = face.getbbox(text)
    place = rng.integers(8, [max(IMAGE_SIZE - (right - left) - 8, 9), IMAGE_SIZE - (bottom - top) - 8])
    ImageDraw.Draw(image).text((int(place[0]) - left, int(place[1]) - top), text, tuple(map(int, ink)), font=face)
    noisy = np.asarray(image) + rng.normal(0, noise, (IMAGE_SIZE, IMAGE_SIZE, 3)) if noise else np.asarray(image)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_texts", type=int, default=len(TEXTS))
    num_texts = parser.parse_args().num_texts
    reward = OCRReward(num_threads=1)
    settings = [(size, 0, True) for size in (8, 12, 24, 48)]
    settings += [(24, 50, True), (24, 100, True), (24, 0, False), (24, 50, False)]
    print("| size | noise | ground | exact | mean score | CPU-s an image |\n|---|---|---|---|---|---|")  # noqa: T201
    for size, noise, plain in settings:
        rng = np.random.default_rng(0)
        images = [
            render(text, FONTS[row % len(FONTS)], size, noise, plain, rng)
            for row, text in enumerate(TEXTS[:num_texts])
        ]
        report(reward, images, list(TEXTS[:num_texts]), f"{size} px | {noise} | {'plain' if plain else 'blobs'}")
    others = [*TEXTS[1:num_texts], TEXTS[0]]
    report(reward, images, others, "24 px | 50 | another text is drawn")


def report(reward: OCRReward, images: list[Image.Image], texts: list[str], label: str) -> None:
    """Print a row: share of scores of 1, mean score, CPU time."""
    start = time.process_time()
    scores = np.array(reward(images, [f'A sign that says "{text}"' for text in texts]))
    seconds = (time.process_time() - start) / len(images)
    print(f"| {label} | {(scores == 1).mean():.2f} | {scores.mean():.3f} | {seconds:.2f} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
