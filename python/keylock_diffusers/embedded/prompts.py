"""The contact sheet's prompts and seeds, fixed before the model was trained."""

from __future__ import annotations

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
