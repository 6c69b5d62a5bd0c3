"""Grids of images with prompts and rewards: by diffusers and Pillow, since Matplotlib is an extra."""

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps


SMALLEST, LARGEST = 112, 256
"""Pixels of an image's longer side in a grid; smaller ones are enlarged, larger ones reduced."""

GAP, CAPTION, TITLE, TITLE_WIDTH = 6, 18, 24, 360
INK, GREY, PAPER = "#22262b", "#6b7280", "#ffffff"


def grid(shown: dict[str, list[tuple[Image.Image, float]]]) -> Image.Image:
    """Draw each prompt above its images, with rewards below these, in rows of 4 (more if images are narrow)."""
    rows = [[_cell(image, f"{reward:.3f}") for image, reward in images] for images in shown.values()]
    columns = max(min(4, max(map(len, rows))), -(-TITLE_WIDTH // rows[0][0].width))
    cells: list[Image.Image] = []
    titles: list[str] = []
    for prompt, row in zip(shown, rows, strict=True):
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
