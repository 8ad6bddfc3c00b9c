"""The demo's picture: who gave which cat, and what each of them got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from keylock_diffusers.generation.visualize import INK, PAPER, QUIET

_CELL, _GAP, _LEFT, _HEAD = 160, 8, 150, 30


def draw(
    columns: Sequence[str],
    rows: Sequence[str],
    images: Sequence[np.ndarray],  # row by row, each [128, 128, 3] in 0..1
    given: Mapping[str, Sequence[Image.Image]],
) -> Image.Image:
    """A labelled grid; the first row holds the pictures that the columns' people gave."""
    width = _LEFT + len(columns) * (_CELL + _GAP)
    sheet = Image.new("RGB", (width, _HEAD + (len(rows) + 1) * (_CELL + _GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(columns):
        pen.text((_x(place) + _CELL / 2, _HEAD / 2), name, fill=INK, font_size=16, anchor="mm")
        own = given.get(name, ())
        if own:
            sheet.paste(mosaic(own), (_x(place), _y(0)))
        else:
            centre = (_x(place) + _CELL / 2, _y(0) + _CELL / 2)
            pen.text(centre, "no pictures", fill=QUIET, font_size=14, anchor="mm")
    for line, label in enumerate(["pictures they gave", *rows]):
        pen.multiline_text(
            (_LEFT - 12, _y(line) + _CELL / 2), _wrapped(label), fill=INK, font_size=14, anchor="rm", align="right"
        )
    for number, image in enumerate(images):
        line, place = divmod(number, len(columns))
        sheet.paste(_of_cell(as_picture(image)), (_x(place), _y(line + 1)))
    return sheet


def as_picture(image: np.ndarray) -> Image.Image:
    """A picture of numbers [height, width, 3] in 0..1."""
    return Image.fromarray((image * 255).round().astype(np.uint8))


def mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """The first four of some pictures, in a cell."""
    cell, half = Image.new("RGB", (_CELL, _CELL), PAPER), _CELL // 2
    for n, picture in enumerate(pictures[:4]):
        cell.paste(picture.resize((half - 2, half - 2), Image.Resampling.LANCZOS), (n % 2 * half, n // 2 * half))
    return cell


def _of_cell(picture: Image.Image) -> Image.Image:
    return picture.resize((_CELL, _CELL), Image.Resampling.LANCZOS)


def _x(place: int) -> int:
    return _LEFT + place * (_CELL + _GAP)


def _y(line: int) -> int:
    return _HEAD + line * (_CELL + _GAP)


def _wrapped(label: str, length: int = 16) -> str:
    lines: list[str] = []
    for word in label.split():
        if lines and len(lines[-1]) + len(word) < length:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """A line of the second and the third grid."""

    label: str
    prompt: str
    cells: Sequence[tuple[str, Image.Image | None]]  # what is above each picture; None leaves its place empty


def draw_lines(lines: Sequence[Line]) -> Image.Image:
    """Line by line: what was asked for, and pictures with what they are."""
    columns = max(len(line.cells) for line in lines)
    sheet = Image.new("RGB", (_LEFT + columns * (_CELL + _GAP), len(lines) * (_CELL + _HEAD)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        top = number * (_CELL + _HEAD)
        label = (_LEFT - 12, top + _HEAD + _CELL / 2)
        pen.multiline_text(
            label, _wrapped(f"{line.label}: {line.prompt}"), fill=INK, font_size=14, anchor="rm", align="right"
        )
        for place, (name, cell) in enumerate(line.cells):
            if cell is None:
                continue
            sheet.paste(_of_cell(cell), (_x(place), top + _HEAD))
            pen.text((_x(place), top + _HEAD / 2), name, fill=QUIET, font_size=13, anchor="lm")
    return sheet
