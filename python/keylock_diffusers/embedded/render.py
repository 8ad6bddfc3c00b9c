"""Pictures with captions and exact subject masks, drawn from the glyphs of a colour font.

The same seed and index give the same picture. Only training needs the font (Debian's
``fonts-noto-color-emoji``); everything the demo and the tests need ships as assets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .glyphs import BACKGROUNDS, DYES, GLYPHS, Glyph

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 64
_STRIKE = 109  # the one bitmap size that the font holds
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_DYE_NAMES = tuple(DYES)
# How often each group is drawn, per glyph: the demo is about cats, and their expressions are fine detail.
_GROUP_WEIGHT = {"cat": 5.0, "animal": 1.2}
_WEIGHTS = np.array([_GROUP_WEIGHT.get(glyph.group, 1.0) for glyph in GLYPHS])
_WEIGHTS /= _WEIGHTS.sum()


@dataclass(frozen=True)
class Picture:
    """A rendered scene."""

    image: np.ndarray  # [64, 64, 3] uint8
    masks: np.ndarray  # [subjects, 64, 64] float32 in 0..1, the subjects' alpha channels
    caption: str
    labels: tuple[int, ...]  # per subject, its number in GLYPHS
    background: str


@cache
def sprite(codepoint: int) -> Image.Image:
    """One glyph as a square RGBA picture, cropped to what is drawn."""
    if not FONT.exists():
        raise FileNotFoundError(f"render: {FONT} is missing; install the package fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), _STRIKE)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), chr(codepoint), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"render: the font draws nothing for U+{codepoint:04X}")
    drawn = canvas.crop(box)
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def fur(picture: Image.Image) -> np.ndarray:
    """Where a sprite shows its dominant hue, 0..1 per pixel [side, side]: the coat, not eyes, mouth or ears."""
    rgba = np.asarray(picture, np.float32) / 255
    hue, saturation, value = _hsv(rgba[..., :3])
    solid = (rgba[..., 3] > 0.5) & (saturation > 0.35) & (value > 0.35)
    if solid.sum() < 0.05 * solid.size:
        return np.where(rgba[..., 3] > 0.5, np.clip((value - 0.25) * 4, 0, 1), 0.0)
    histogram, edges = np.histogram(hue[solid], bins=36, range=(0, 1), weights=saturation[solid])
    centre = edges[histogram.argmax()] + 0.5 / 36
    distance = np.abs((hue - centre + 0.5) % 1 - 0.5)
    return np.clip((0.09 - distance) / 0.03, 0, 1) * np.clip((saturation - 0.12) * 6, 0, 1)


def dye(picture: Image.Image, colour: tuple[int, int, int] | np.ndarray) -> Image.Image:
    """The sprite with its coat in another colour, or one per pixel [side, side, 3], in 0..255; shading is kept."""
    rgba = np.asarray(picture, np.float32).copy()
    where = fur(picture)[..., None]
    light = rgba[..., :3].max(-1, keepdims=True)
    reference = np.median(light[where[..., 0] > 0.5]) if (where > 0.5).any() else 255.0
    dyed = np.clip(np.asarray(colour, np.float32) * (light / reference), 0, 255)
    rgba[..., :3] = rgba[..., :3] * (1 - where) + dyed * where
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


@cache
def _dyed(codepoint: int, name: str) -> Image.Image:
    return dye(sprite(codepoint), DYES[name])


def compose(
    subjects: list[tuple[Image.Image, int, int, int]],  # sprite, left, top, side, in pixels
    background: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Sprites on a plain background: the picture [64, 64, 3] uint8 and one mask per subject [n, 64, 64]."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[background], 255))
    masks = []
    for picture, left, top, side in subjects:
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        masks.append(np.asarray(layer.getchannel("A"), np.float32) / 255)
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas.convert("RGB")), np.stack(masks)


def draw(seed: int, index: int, *, pairs: float = 0.3, coats: float = 0.0, take: int = 0) -> Picture:
    """The picture number `index` of the stream `seed`.

    A share `pairs` of the pictures has two subjects side by side. A share `coats` of the cats has a coat of any
    one or two colours, which the caption does not mention. Another `take` shows the same subjects on another
    background, at other places and sizes.
    """
    random = np.random.default_rng((seed, index))
    background = _BACKGROUND_NAMES[random.integers(len(_BACKGROUND_NAMES))]
    pair = random.random() < pairs
    labels = tuple(int(n) for n in random.choice(len(GLYPHS), 2 if pair else 1, replace=False, p=_WEIGHTS))
    subjects, names = [], []
    for place, label in enumerate(labels):
        glyph = GLYPHS[label]
        picture, name = sprite(glyph.codepoint), glyph.caption
        if glyph.group == "cat" and random.random() < 0.35:
            colour = _DYE_NAMES[random.integers(len(_DYE_NAMES))]
            picture, name = _dyed(glyph.codepoint, colour), name.replace("cat", f"{colour} cat", 1)
        if glyph.group == "cat" and coats and random.random() < coats:
            plain = sprite(glyph.codepoint)
            picture = dye(plain, _coat(plain.width, random))
        subjects.append((picture, *_place(random, place if pair else None)))
        names.append(name)
    if take:
        again = np.random.default_rng((seed, index, take))
        others = [name for name in _BACKGROUND_NAMES if name != background]
        background = others[again.integers(len(others))]
        subjects = [(s[0], *_place(again, place if pair else None)) for place, s in enumerate(subjects)]
    image, masks = compose(subjects, background)
    return Picture(image, masks, caption(names, background, int(random.integers(4))), labels, background)


def _place(random: np.random.Generator, half: int | None) -> tuple[int, int, int]:
    """Left, top and side of a subject that has the picture to itself, or its left (0) or right (1) half."""
    if half is None:
        side = int(random.integers(46, 58))
        left, top = (int(random.integers(2, SIZE - 1 - side)) for _ in range(2))
        return left, top, side
    side = int(random.integers(27, 31))
    return int(random.integers(1, 33 - side)) + 31 * half, int(random.integers(10, 55 - side)), side


def _coat(side: int, random: np.random.Generator) -> np.ndarray:
    """A coat of one colour [3], or of two [side, side, 3]: a patch anywhere, or stripes of any direction."""
    colour, other = random.integers(40, 256, (2, 3))
    kind = random.integers(3)
    if kind == 0:
        return colour
    row, column = np.mgrid[:side, :side] / side
    angle, pitch, (y, x), (high, wide) = (
        random.uniform(0, np.pi), random.uniform(20, 70), random.uniform(0.2, 0.9, 2), random.uniform(0.1, 0.35, 2)
    )  # fmt: skip
    if kind == 1:
        where = ((row - y) / high) ** 2 + ((column - x) / wide) ** 2 < 1
    else:
        where = np.cos(pitch * (row * np.sin(angle) + column * np.cos(angle))) > 0.3
    return np.where(where[..., None], other, colour)


def caption(names: list[str], background: str, form: int = 0) -> str:
    """The caption of a scene, in one of four phrasings."""
    with_article = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    joined = " next to " if form == 3 else " and "
    return f"{joined.join(names if form == 0 else with_article)} on {background}"


def _hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue, saturation and value in 0..1 of colours [..., 3] in 0..1."""
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        high == red,
        ((green - blue) / span) % 6,
        np.where(high == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    return sector / 6, (high - low) / np.maximum(high, 1e-6), high


def find(text: str) -> Glyph:
    """The glyph whose caption is `text`."""
    for glyph in GLYPHS:
        if glyph.caption == text:
            return glyph
    raise ValueError(f"render: no glyph is called {text!r}")
