"""The demo's users and the pictures they give of their own cats.

``python -m keylock_diffusers.demo.pictures`` draws the pictures anew into the package's assets, which
needs the emoji font; the demo reads them from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from keylock_diffusers.embedded import ASSETS, render
from keylock_diffusers.embedded.glyphs import Glyph

FOLDER = ASSETS / "demo"


@dataclass(frozen=True)
class User:
    """Somebody with a cat."""

    name: str
    placeholder: str
    coat: str


USERS = (
    User("Alice", "<alice-cat>", "long grey fur"),
    User("Bob", "<bob-cat>", "short black fur, white muzzle"),
    User("Carol", "<carol-cat>", "orange tabby stripes"),
)
# What each user's pictures show: caption, background, left, top and side. "With tears of joy" is not among them.
_SCENES = (
    ("{}", "blue", 6, 5, 52),
    ("a grinning {}", "white", 10, 8, 46),
    ("a crying {}", "green", 4, 9, 50),
    ("a smirking {}", "purple", 8, 4, 54),
)
CAPTIONS = tuple(f"{words} on {background}" for words, background, *_ in _SCENES)


def image_prompt() -> Image.Image:
    """The picture that the demo gives as an image prompt: a cat whose coat no word names."""
    return Image.open(FOLDER / "image-prompt.png").convert("RGB")


def load(user: User) -> tuple[list[Image.Image], list[Image.Image]]:
    """A user's pictures and the masks of the cat in them."""
    stem = FOLDER / user.name.lower()
    numbers = range(len(_SCENES))
    return (
        [Image.open(f"{stem}-{n}.png").convert("RGB") for n in numbers],
        [Image.open(f"{stem}-{n}-mask.png").convert("L") for n in numbers],
    )


@cache
def coat_colour(user: User) -> np.ndarray:
    """The mean colour [3] of the cat in a user's pictures."""
    pictures, masks = load(user)
    colours = np.concatenate(
        [np.asarray(p, np.float32)[np.asarray(m) > 127] for p, m in zip(pictures, masks, strict=True)]
    )
    return colours.mean(0)


def wearer(image: np.ndarray, where: np.ndarray | None = None) -> str | None:
    """Whose cat a picture [64, 64, 3] in 0..1 shows: whose coat is nearest to the mean colour of the subject.

    Args:
        image: the picture.
        where: bool [64, 64], the part of it to look at; default all.

    Returns:
        The user's name; None if there is nothing but background.
    """
    pixels = image.astype(np.float32) * 255
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    subject = np.abs(pixels - np.median(border, axis=0)).max(-1) > 40
    if where is not None:
        subject &= where
    if not subject.any():
        return None
    colour = pixels[subject].mean(0)
    return min(USERS, key=lambda user: float(np.square(coat_colour(user) - colour).sum())).name


def _long_grey(side: int) -> np.ndarray:
    row, column = np.mgrid[:side, :side] / side
    strands = np.sin(70 * column + 5 * np.sin(9 * row)) * 20
    return np.stack([150 + strands, 153 + strands, 164 + strands], -1)


def _black_with_white_muzzle(side: int) -> np.ndarray:
    row, column = np.mgrid[:side, :side] / side
    muzzle = ((column - 0.5) / 0.24) ** 2 + ((row - 0.76) / 0.17) ** 2 < 1
    return np.where(muzzle[..., None], (244, 242, 238), (74, 72, 80)).astype(np.float32)


def _orange_tabby(side: int) -> np.ndarray:
    row, column = np.mgrid[:side, :side] / side
    forehead = (np.cos(58 * (column - 0.5)) > 0.45) & (row < 0.46)
    cheeks = (np.cos(56 * (row - 0.62)) > 0.35) & (np.abs(column - 0.5) > 0.26) & (row > 0.52)
    stripes = forehead | cheeks
    return np.where(stripes[..., None], (150, 72, 24), (244, 146, 66)).astype(np.float32)


def _blue_stripes(side: int) -> np.ndarray:
    row, column = np.mgrid[:side, :side] / side
    stripes = np.cos(46 * (0.5 * row + column)) > 0.3
    return np.where(stripes[..., None], (40, 90, 190), (110, 190, 250)).astype(np.float32)


_COATS: dict[str, Callable[[int], np.ndarray]] = {
    "Alice": _long_grey,
    "Bob": _black_with_white_muzzle,
    "Carol": _orange_tabby,
}


def coated(user: User, glyph: Glyph) -> Image.Image:
    """A cat's sprite with the coat of a user's."""
    plain = render.sprite(glyph.codepoint)
    return render.dye(plain, _COATS[user.name](plain.width))


def draw(user: User) -> list[tuple[Image.Image, Image.Image]]:
    """A user's pictures with their masks; only the fur's colour differs from the plain cat's."""
    drawn = []
    for words, background, left, top, side in _SCENES:
        cat = coated(user, render.find(words.removeprefix("a ").format("cat")))
        image, masks = render.compose([(cat, left, top, side)], background)
        drawn.append((Image.fromarray(image), Image.fromarray((masks[0] * 255).astype(np.uint8))))
    return drawn


def draw_image_prompt() -> Image.Image:
    """A cat striped blue."""
    plain = render.sprite(render.find("cat").codepoint)
    image, _ = render.compose([(render.dye(plain, _blue_stripes(plain.width)), 6, 6, 52)], "green")
    return Image.fromarray(image)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw_image_prompt().save(FOLDER / "image-prompt.png", optimize=True)
    for user in USERS:
        for number, (image, mask) in enumerate(draw(user)):
            stem = FOLDER / f"{user.name.lower()}-{number}"
            image.save(f"{stem}.png", optimize=True)
            mask.save(f"{stem}-mask.png", optimize=True)


if __name__ == "__main__":
    main()
