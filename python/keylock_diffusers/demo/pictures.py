"""The demo's users and the pictures they give of their own cats.

``python -m keylock_diffusers.demo.pictures`` draws the pictures anew into the package's assets, which
needs the emoji font; the demo reads them from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from keylock_diffusers.embedded import ASSETS, render
from keylock_diffusers.embedded.coats import Coat

FOLDER = ASSETS / "demo"
STRENGTH = 0.9  # of the users' concepts in pictures: at 1, as they were taught, guidance overdoes patterns


@dataclass(frozen=True)
class User:
    """Somebody with a cat."""

    name: str
    placeholder: str
    coat: Coat


USERS = (
    User("Alice", "<alice-cat>", Coat("stripes", ((200, 204, 214), (84, 88, 100)), (0.6, 34.0, 0.0))),
    User("Bob", "<bob-cat>", Coat("patch", ((74, 72, 80), (244, 242, 238)), (0.76, 0.5, 0.17, 0.24))),
    User("Carol", "<carol-cat>", Coat("tabby", ((244, 146, 66), (150, 72, 24)), (57.0,))),
)
_PROMPTED = Coat("stripes", ((110, 190, 250), (40, 90, 190)), (0.46, 51.0, 0.0))  # the image prompt's cat
# What each user's pictures show: caption, background, left, top and side. "With tears of joy" is not among them.
_SCENES = (
    ("{}", "blue", 12, 10, 104),
    ("a grinning {}", "white", 20, 16, 92),
    ("a crying {}", "green", 8, 18, 100),
    ("a smirking {}", "purple", 16, 8, 108),
)
_SHARES = np.linspace(0.05, 0.95, 10)  # at which a coat's colours are taken
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
def coat_colours(user: User) -> np.ndarray:  # [10, 3]
    """The colours of the cat in a user's pictures, each channel from its darkest tenth to its lightest."""
    pictures, masks = load(user)
    return _colours(
        np.concatenate([np.asarray(p, np.float32)[np.asarray(m) > 127] for p, m in zip(pictures, masks, strict=True)])
    )


def _colours(pixels: np.ndarray) -> np.ndarray:
    """What a coat is told by, patterns of two colours too: the quantiles [10, 3] of pixels [n, 3]."""
    return np.quantile(pixels, _SHARES, axis=0)


def wearer(image: np.ndarray, where: np.ndarray | None = None) -> str | None:
    """Whose cat a picture [128, 128, 3] in 0..1 shows: whose coat is nearest in the shares of its colours.

    Args:
        image: the picture.
        where: bool [128, 128], the part of it to look at; default all.

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
    colours = _colours(pixels[subject])
    return min(USERS, key=lambda user: float(np.square(coat_colours(user) - colours).sum())).name


def draw(user: User) -> list[tuple[Image.Image, Image.Image]]:
    """A user's pictures with their masks; only the fur's colour differs from the plain cat's."""
    drawn = []
    for words, background, left, top, side in _SCENES:
        cat = render.named(words.removeprefix("a ").format("cat"), user.coat)
        image, masks = render.compose([(cat, left, top, side)], background)
        drawn.append((Image.fromarray(image), Image.fromarray((masks[0] * 255).astype(np.uint8))))
    return drawn


def draw_image_prompt() -> Image.Image:
    """A cat striped blue."""
    return Image.fromarray(render.compose([(render.named("cat", _PROMPTED), 12, 12, 104)], "green")[0])


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
