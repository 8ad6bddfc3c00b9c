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
    images: Sequence[np.ndarray],  # row by row, each [64, 64, 3] in 0..1
    given: Mapping[str, Sequence[Image.Image]],
) -> Image.Image:
    """A labelled grid; the first row holds the pictures that the columns' people gave."""
    width = _LEFT + len(columns) * (_CELL + _GAP)
    sheet = Image.new("RGB", (width, _HEAD + (len(rows) + 1) * (_CELL + _GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(columns):
        pen.text((_x(place) + _CELL / 2, _HEAD / 2), name, fill=INK, font_size=16, anchor="mm")
        own = given.get(name, ())
        for n, picture in enumerate(own[:4]):
            half = _CELL // 2
            left, top = _x(place) + n % 2 * half, _y(0) + n // 2 * half
            sheet.paste(picture.resize((half - 2, half - 2), Image.Resampling.LANCZOS), (left, top))
        if not own:
            centre = (_x(place) + _CELL / 2, _y(0) + _CELL / 2)
            pen.text(centre, "no pictures", fill=QUIET, font_size=14, anchor="mm")
    for line, label in enumerate(["pictures they gave", *rows]):
        pen.multiline_text(
            (_LEFT - 12, _y(line) + _CELL / 2), _wrapped(label), fill=INK, font_size=14, anchor="rm", align="right"
        )
    for number, image in enumerate(images):
        line, place = divmod(number, len(columns))
        picture = Image.fromarray((image * 255).round().astype(np.uint8)).resize(
            (_CELL, _CELL), Image.Resampling.LANCZOS
        )
        sheet.paste(picture, (_x(place), _y(line + 1)))
    return sheet


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
    """A line of the second grid."""

    label: str
    prompt: str
    given: Image.Image | None  # its image prompt
    picture: np.ndarray  # [64, 64, 3] in 0..1
    overlays: Mapping[str, Image.Image]  # by word


def draw_lines(lines: Sequence[Line]) -> Image.Image:
    """Line by line: what was asked for, the image prompt, the picture, and where its words were attended to."""
    columns = 2 + max(len(line.overlays) for line in lines)
    sheet = Image.new("RGB", (_LEFT + columns * (_CELL + _GAP), len(lines) * (_CELL + _HEAD)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        top = number * (_CELL + _HEAD)
        label = (_LEFT - 12, top + _HEAD + _CELL / 2)
        pen.multiline_text(
            label, _wrapped(f"{line.label}: {line.prompt}"), fill=INK, font_size=14, anchor="rm", align="right"
        )
        picture = Image.fromarray((line.picture * 255).round().astype(np.uint8))
        cells = [line.given, picture, *line.overlays.values()]
        names = ["image prompt" if line.given is not None else "", "", *line.overlays]
        for place, (cell, name) in enumerate(zip(cells, names, strict=True)):
            if cell is None:
                continue
            sheet.paste(cell.resize((_CELL, _CELL), Image.Resampling.LANCZOS), (_x(place), top + _HEAD))
            pen.text((_x(place), top + _HEAD / 2), name, fill=QUIET, font_size=13, anchor="lm")
    return sheet
