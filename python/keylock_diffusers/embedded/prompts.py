"""The prompts and seeds by which the model is measured, fixed before it was trained."""

from __future__ import annotations

import numpy as np

from .coats import WORDS
from .glyphs import BACKGROUNDS, DYES, GLYPHS
from .render import caption, with_coat

CONTACT_SHEET: tuple[str, ...] = (
    "a cat on blue",
    "a grinning cat on white",
    "a cat with tears of joy on pink",
    "a cat with heart eyes on green",
    "a pouting cat on yellow",
    "a crying cat on purple",
    "a kissing cat on teal",
    "a gray cat on pink",
    "a dog on green",
    "a fox on blue",
    "a panda on red",
    "an owl on yellow",
    "an octopus on teal",
    "an elephant on pink",
    "a ghost on purple",
    "a face with sunglasses on blue",
    "a robot on yellow",
    "a pizza on white",
    "a strawberry on teal",
    "a burger on blue",
    "an ice cream on pink",
    "a house on green",
    "a castle on blue",
    "a red heart on white",
    "a rocket on purple",
    "a taxi on pink",
    "a sailboat on yellow",
    "a rainbow on white",
    "a sunflower on blue",
    "a cat and a dog on white",
    "a cat next to a house on green",
    "an apple and a banana on blue",
)
SEEDS = (0, 1, 2, 3)  # the sheet shows the first; the classifier judges all four
STEPS = 30
GUIDANCE = 4.0
PERSONAL_GUIDANCE = 2.5  # where something learned is drawn: guidance counts that too, and 4 overdoes it
# By which it is measured how far pictures of a subject that is being learned still follow other words.
FOLLOWED = (
    "a {} on red",
    "a {} and a dog",
    "a house next to a {}",
    "{} with tears of joy",
    "a kissing {}",
    "a crying {}",
)
_COATED = ("cat", "dog", "bear", "car", "house", "fox", "kissing cat", "grinning face")


def pairs(count: int = 64) -> tuple[str, ...]:
    """Prompts of any two subjects side by side."""
    random, backgrounds, made = np.random.default_rng(64), list(BACKGROUNDS), []
    for _ in range(count):
        names = [GLYPHS[n].caption for n in random.choice(len(GLYPHS), 2, replace=False)]
        made.append(caption(names, backgrounds[random.integers(len(backgrounds))], 1))
    return tuple(made)


def coats(count: int = 64) -> tuple[str, ...]:
    """Prompts of what is personalised most, in coats of two colours."""
    random, backgrounds, made = np.random.default_rng(65), list(BACKGROUNDS), []
    for n in range(count):
        first, second = random.choice(list(DYES), 2, replace=False)
        coat = f"{random.choice(list(WORDS.values()))} {first} {second}"
        noun = _COATED[n % len(_COATED)]
        made.append(caption([with_coat(noun, coat)], backgrounds[random.integers(len(backgrounds))], 1))
    return tuple(made)
