"""Grids of images with captions, drawn with Pillow alone."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


SMALLEST, LARGEST = 112, 256
"""Pixels of an image's longer side in a grid; smaller ones are enlarged, larger ones reduced."""

NARROWEST = 360
"""Pixels of a title's place."""

GAP, MARGIN, CAPTION, TITLE = 6, 12, 18, 24
INK, GREY, PAPER = "#22262b", "#6b7280", "#ffffff"


@dataclass(frozen=True)
class Row:
    """A row of a grid.

    Attributes:
        title: Above it, such as a prompt; cut off where it does not fit.
        images: Of the row, all of one size.
        captions: Below them.
    """

    title: str
    images: list[Image.Image]
    captions: list[str]


def wrapped(row: Row, columns: int) -> list[Row]:
    """The row in several of at most so many columns; the title is above the first."""
    starts = range(0, len(row.images), columns)
    parts = [slice(start, start + columns) for start in starts]
    return [Row(row.title if part.start == 0 else "", row.images[part], row.captions[part]) for part in parts]


def grid(rows: list[Row]) -> Image.Image:
    """The rows one below the other."""
    width, height = size_in_grid(rows[0].images[0])
    columns = max(len(row.images) for row in rows)
    tops, bottom = [], MARGIN
    for row in rows:
        tops.append(bottom)
        bottom += (TITLE if row.title else 0) + height + (CAPTION if any(row.captions) else 0) + GAP
    wide = max(NARROWEST, columns * (width + GAP) - GAP)
    picture = Image.new("RGB", (2 * MARGIN + wide, bottom + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for row, top in zip(rows, tops, strict=True):
        if row.title:
            draw.text((MARGIN, top), fitting(row.title, picture.width - 2 * MARGIN), INK, _font(15))
        top += TITLE if row.title else 0
        for column, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            left = MARGIN + column * (width + GAP)
            picture.paste(resized(image, (width, height)), (left, top))
            draw.text((left + width / 2, top + height + 2), caption, GREY, _font(12), anchor="ma")
    return picture


def first_row(picture: Image.Image, size: tuple[int, int], number: int) -> list[Image.Image]:
    """Cut the images of a titled first row out of a grid again: `number`, each of `size` in the grid."""
    width, height = size
    lefts = [MARGIN + column * (width + GAP) for column in range(number)]
    return [picture.crop((left, MARGIN + TITLE, left + width, MARGIN + TITLE + height)) for left in lefts]


def size_in_grid(image: Image.Image) -> tuple[int, int]:
    """Width and height that an image has in a grid."""
    longer = max(image.size)
    factor = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
    return round(image.width * factor), round(image.height * factor)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Small images keep their pixels; large ones are averaged."""
    enlarges = size[0] > image.width
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def fitting(text: str, width: float) -> str:
    """The text, cut off where it takes more than `width` pixels."""
    if _font(15).getlength(text) <= width:
        return text
    while text and _font(15).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
