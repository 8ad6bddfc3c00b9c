"""Pictures of attention: overlays on what was drawn, and a grid of heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

if TYPE_CHECKING:
    from keylock_diffusers.generation.maps import WordMaps

INK, QUIET, PAPER = (28, 30, 36), (110, 114, 122), (255, 255, 255)
_GAP, _LABEL = 6, 20
_COLOURS = "inferno"


def heat_map(attention: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """A map [height, width] in colours, dark where it is lowest and bright where it is highest.

    Args:
        attention: the map.
        size: (width, height) of the picture; default a pixel per number.

    Raises:
        ValueError: it is no map, or not finite.
    """
    picture = Image.fromarray(
        (matplotlib.colormaps[_COLOURS](_unit(attention))[..., :3] * 255).round().astype(np.uint8)
    )
    return picture if size is None else picture.resize(size, Image.Resampling.BICUBIC)


def overlay(image: Any, attention: Tensor, strength: float = 0.65) -> Image.Image:
    """A picture, faded where a word was not attended to and coloured where it was.

    Args:
        image: a PIL image, or an array [height, width, 3] of uint8, or of numbers in 0..1.
        attention: the map, of any size; stretched over the picture.
        strength: of the colours, 0 to 1.

    Raises:
        ValueError: a map that is none, or a strength outside of [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"overlay: strength must lie in [0, 1], got {strength}")
    picture = _picture(image)
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, heat_map(attention, picture.size), strength)


def grid(
    images: Sequence[Any],
    maps: Sequence[WordMaps],
    words: Sequence[str] | None = None,
    *,
    cell: int = 160,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """A row per picture: the picture, and beside it an overlay for each of the words that its prompt has.

    Args:
        images: as for `overlay`.
        maps: their maps.
        words: which, and in which order; default all.
        cell: pixels of a picture's longer side.
        captions: what stands above each row; default the prompts.

    Raises:
        ValueError: not as many maps (or captions) as pictures, or no pictures.
    """
    captions = [recorded.prompt for recorded in maps] if captions is None else captions
    if not images or not len(images) == len(maps) == len(captions):
        raise ValueError(
            f"grid: images, maps and captions must be equally many, got {len(images)}, {len(maps)} and {len(captions)}"
        )
    shown = [
        [word for word in (recorded.maps if words is None else words) if word in recorded.maps] for recorded in maps
    ]
    step, head = cell + _GAP, 2 * _LABEL
    width = _GAP + step * (1 + max(len(row) for row in shown))
    sheet = Image.new("RGB", (width, (step + head) * len(images)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, (image, recorded, caption, row) in enumerate(zip(images, maps, captions, shown, strict=True)):
        top = line * (step + head)
        pen.text((_GAP, top + _LABEL / 2), _cut(pen, caption, width - 2 * _GAP), fill=INK, font_size=12, anchor="lm")
        picture = _picture(image)
        scale = cell / max(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
        sheet.paste(picture, (_GAP, top + head))
        for column, word in enumerate(row, 1):
            left = _GAP + column * step
            pen.text((left, top + 1.5 * _LABEL), _cut(pen, word, cell), fill=QUIET, font_size=12, anchor="lm")
            sheet.paste(overlay(picture, recorded.mean(word)), (left, top + head))
    return sheet


def _unit(attention: Tensor) -> np.ndarray:
    if not isinstance(attention, Tensor) or attention.ndim != 2 or not attention.numel():
        got = list(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(f"a map must be a tensor [height, width], got {got}")
    values = attention.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("a map must be finite, got NaN or infinity")
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _picture(image: Any) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            image = (image * 255).round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"a picture must be a PIL image or an array, got {type(image).__name__}")
    return image.convert("RGB")


def _cut(pen: ImageDraw.ImageDraw, words: str, width: int) -> str:
    """As much of the words as fits."""
    if pen.textlength(words, font_size=12) <= width:
        return words
    while words and pen.textlength(f"{words}…", font_size=12) > width:
        words = words[:-1]
    return f"{words}…"
