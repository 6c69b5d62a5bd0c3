"""Grids of images with prompts and rewards: by diffusers and Pillow, since Matplotlib is an extra."""

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps


SMALLEST, LARGEST = 112, 256
"""Pixels of an image's longer side in a grid; smaller ones are enlarged, larger ones reduced."""

GAP, CAPTION, TITLE, TITLE_WIDTH = 6, 18, 24, 360
INK, GREY, PAPER = "#22262b", "#6b7280", "#ffffff"


def grid(prompts: list[str], images: list[list[Image.Image]], rewards: list[list[float]]) -> Image.Image:
    """Return P prompts, each above rows of at most 4 of its images, with each image's reward below it."""
    cells, titles = [], []
    columns = max(min(4, max(map(len, images))), -(-TITLE_WIDTH // resized(images[0][0]).width))
    for prompt, shown, values in zip(prompts, images, rewards, strict=True):
        row = [_cell(image, f"{value:.3f}") for image, value in zip(shown, values, strict=True)]
        cells += row + [Image.new("RGB", row[0].size, PAPER)] * (-len(row) % columns)
        titles += [prompt] + [""] * ((len(row) - 1) // columns)
    picture = make_image_grid(cells, len(titles), columns)
    longest = picture.width // 8  # characters
    for index, title in enumerate(titles):
        text = title if len(title) <= longest else f"{title[: longest - 3]}..."
        corner = (GAP, index * cells[0].height + 2)
        ImageDraw.Draw(picture).text(corner, text, INK, ImageFont.load_default(15))
    return picture


def resized(image: Image.Image) -> Image.Image:
    """Return an image of a size that can be seen: small ones keep their pixels, large ones are averaged."""
    if max(image.size) > LARGEST:
        return ImageOps.contain(image, (LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return ImageOps.scale(image, -(-SMALLEST // max(image.size)), Image.Resampling.NEAREST)


def _cell(image: Image.Image, caption: str) -> Image.Image:
    cell = ImageOps.expand(resized(image.convert("RGB")), (GAP, TITLE, GAP, CAPTION), PAPER)
    top = (cell.width / 2, cell.height - CAPTION + 2)
    ImageDraw.Draw(cell).text(top, caption, GREY, ImageFont.load_default(12), anchor="ma")
    return cell
