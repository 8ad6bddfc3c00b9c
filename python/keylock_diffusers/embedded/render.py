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

from .coats import WORDS, Coat
from .glyphs import BACKGROUNDS, DYES, GLYPHS, Glyph

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 128
_STRIKE = 109  # the one bitmap size that the font holds
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_DYE_NAMES = tuple(DYES)
# How often each group is drawn, per glyph: the demo is about cats, and expressions are fine detail. The others that are
# named are, with cats and faces, what the benchmark personalises.
_GROUP_WEIGHT = {"cat": 5.0, "animal": 1.2, "face": 1.5}
_OFTEN = {"dog": 3.0, "bear": 3.0, "car": 3.0, "house": 3.0}
_WEIGHTS = np.array([_OFTEN.get(glyph.caption, _GROUP_WEIGHT.get(glyph.group, 1.0)) for glyph in GLYPHS])
_WEIGHTS /= _WEIGHTS.sum()
# Of how many a coat is named in the caption.
_NAMED_COATS = {"cat": 0.45, "face": 0.4, "animal": 0.35}
_OTHER_COATS = 0.2
_COLOURED = ("green apple", "orange", *(glyph.caption for glyph in GLYPHS if glyph.group == "heart"))  # never in a coat
_UNNAMED_COLOURS = 0.2  # of the coats in patterns: how many have any colours, and a caption with the pattern alone


@dataclass(frozen=True)
class Picture:
    """A rendered scene."""

    image: np.ndarray  # [128, 128, 3] uint8
    masks: np.ndarray  # [subjects, 128, 128] float32 in 0..1, the subjects' alpha channels
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


@cache
def fur(codepoint: int) -> np.ndarray:
    """Where a glyph's sprite shows its dominant hue, 0..1 per pixel [side, side]: the coat, not eyes, mouth or ears."""
    rgba = np.asarray(sprite(codepoint), np.float32) / 255
    hue, saturation, value = _hsv(rgba[..., :3])
    solid = (rgba[..., 3] > 0.5) & (saturation > 0.35) & (value > 0.35)
    if solid.sum() < 0.05 * solid.size:
        return np.where(rgba[..., 3] > 0.5, np.clip((value - 0.25) * 4, 0, 1), 0.0)
    histogram, edges = np.histogram(hue[solid], bins=36, range=(0, 1), weights=saturation[solid])
    centre = edges[histogram.argmax()] + 0.5 / 36
    distance = np.abs((hue - centre + 0.5) % 1 - 0.5)
    return np.clip((0.09 - distance) / 0.03, 0, 1) * np.clip((saturation - 0.12) * 6, 0, 1)


def dye(codepoint: int, colour: np.ndarray) -> Image.Image:
    """A glyph's sprite with its coat in other colours [side, side, 3], in 0..255; shading is kept."""
    rgba = np.asarray(sprite(codepoint), np.float32).copy()
    where = fur(codepoint)[..., None]
    light = rgba[..., :3].max(-1, keepdims=True)
    reference = np.median(light[where[..., 0] > 0.5]) if (where > 0.5).any() else 255.0
    dyed = np.clip(np.asarray(colour, np.float32) * (light / reference), 0, 255)
    rgba[..., :3] = rgba[..., :3] * (1 - where) + dyed * where
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


def coated(coat: Coat | None, codepoint: int) -> Image.Image:
    """A glyph's sprite in a coat; None: in its own colours."""
    plain = sprite(codepoint)
    return plain if coat is None else dye(codepoint, coat.paint(plain.width))


def named(caption: str, coat: Coat | None = None) -> Image.Image:
    """`coated` of the glyph of that caption."""
    return coated(coat, find(caption).codepoint)


def compose(
    subjects: list[tuple[Image.Image, int, int, int]],  # sprite, left, top, side, in pixels
    background: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Sprites on a plain background: the picture [128, 128, 3] uint8 and one mask per subject [n, 128, 128]."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[background], 255))
    masks = []
    for picture, left, top, side in subjects:
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        masks.append(np.asarray(layer.getchannel("A"), np.float32) / 255)
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas.convert("RGB")), np.stack(masks)


def draw(seed: int, index: int, *, pairs: float = 0.35, coats: float = 0.0, take: int = 0) -> Picture:
    """The picture number `index` of the stream `seed`.

    A share `pairs` of the pictures has two subjects side by side. A third of the subjects has a coat that the caption
    names, "striped gray black cat"; of the others a share `coats` has one of any colours, which it does not mention.
    Another `take` shows the same subjects on another background, at other places and sizes.
    """
    random = np.random.default_rng((seed, index))
    background = _BACKGROUND_NAMES[random.integers(len(_BACKGROUND_NAMES))]
    pair = random.random() < pairs
    labels = tuple(int(n) for n in random.choice(len(GLYPHS), 2 if pair else 1, replace=False, p=_WEIGHTS))
    subjects, names = [], []
    for place, label in enumerate(labels):
        glyph, coat, name = GLYPHS[label], None, GLYPHS[label].caption
        if name not in _COLOURED and random.random() < _NAMED_COATS.get(glyph.group, _OTHER_COATS):
            coat, words = _named_coat(random)
            name = with_coat(name, words)
        if coats and coat is None and name not in _COLOURED and random.random() < coats:
            coat = Coat.random(random)
        subjects.append((coated(coat, glyph.codepoint), *_place(random, place if pair else None)))
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
        side = int(random.integers(92, 116))
        left, top = (int(random.integers(4, SIZE - 3 - side)) for _ in range(2))
        return left, top, side
    side = int(random.integers(56, 61))
    return int(random.integers(2, 64 - side)) + 63 * half, int(random.integers(16, 114 - side)), side


def _named_coat(random: np.random.Generator) -> tuple[Coat, str]:
    """A coat, and what a caption says of it: a colour; or a pattern, mostly with its two colours."""
    coat = Coat.random(random)
    first, second = (str(name) for name in random.choice(_DYE_NAMES, 2, replace=False))
    shades = random.integers(-14, 15, (2, 3)) + [DYES[first], DYES[second]]
    named = tuple((int(red), int(green), int(blue)) for red, green, blue in shades.clip(0, 255))
    if random.random() < 0.4 or coat.pattern == "plain":
        return Coat("plain", (named[0], named[1])), first
    if random.random() < _UNNAMED_COLOURS:
        return coat, WORDS[coat.pattern]
    return Coat(coat.pattern, (named[0], named[1]), coat.numbers), f"{WORDS[coat.pattern]} {first} {second}"


def with_coat(name: str, coat: str) -> str:
    """A glyph's caption with a coat's words, which stand before the noun."""
    noun = next((noun for noun in ("cat", "face") if noun in name.split()), name)
    return name.replace(noun, f"{coat} {noun}", 1)


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
