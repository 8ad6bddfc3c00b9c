"""Who the users are, what they show of their subjects, and what is asked of them: fixed before anything was tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.coats import Coat
from keylock_diffusers.embedded.evaluate import subjects
from keylock_diffusers.training import Subject

# Of four pictures: words, background, left, top and side. No expression in them is asked for again.
_PLACES = (("blue", 12, 10, 104), ("white", 20, 16, 92), ("green", 8, 18, 100), ("purple", 16, 8, 108))
_SHOWN = {
    "cat": ("{}", "a grinning {}", "a crying {}", "a smirking {}"),
    "face": ("a grinning {}", "a winking {}", "a crying {}", "a thinking {}"),
}
_OTHERS_SHOWN = ("{}", "a {}", "{}", "a {}")
_ASKED = {
    "cat": (
        "{} on yellow",
        "a {} on red",
        "{} with tears of joy on pink",
        "kissing {} on blue",
        "a pouting {} on green",
        "a scared {} on purple",
        "a {} with heart eyes on teal",
        "a {} and a dog on blue",
        "a fox and a {} on green",
        "a tiger next to a kissing {} on pink",
        "a {} and a smirking cat on white",
        "a scared cat next to a {} on yellow",
    ),
    "face": (
        "a grinning {} on yellow",
        "a winking {} on red",
        "{} with tears of joy on pink",
        "kissing {} on blue",
        "a sleeping {} on green",
        "a {} with sunglasses on purple",
        "a {} with heart eyes on teal",
        "a grinning {} and a dog on blue",
        "a fox and a winking {} on green",
        "a tiger next to a kissing {} on pink",
        "a grinning {} and a crying face on white",
        "a sleeping face next to a winking {} on yellow",
    ),
}
_OTHERS_ASKED = (
    "{} on yellow",
    "a {} on red",
    "{} on pink",
    "a {} on teal",
    "{} on white",
    "a {} on green",
    "a {} and a fox on blue",
    "a cat and a {} on green",
    "a tiger next to a {} on pink",
    "a {} and a kissing cat on purple",
    "a {} and a NEAR on white",
    "a NEAR next to a {} on yellow",
)
_NEAR = {"dog": "wolf", "bear": "panda", "car": "taxi", "house": "church"}
# What is asked of a user in training alone, where settings are chosen: other words than the test's.
_TUNED = {
    "cat": (
        "{} on pink",
        "a {} with tears of joy on white",
        "a pouting {} on purple",
        "a kissing {} on yellow",
        "scared {} on green",
        "{} with heart eyes on red",
        "a {} and a wolf on teal",
        "a dog next to a {} on pink",
        "a pouting {} and a panda on blue",
        "a lion and a scared {} on white",
        "a {} and a crying cat on green",
        "a smirking cat and a {} on purple",
    )
}
SEEDS = (0, 1)


class Part(NamedTuple):
    """One of a picture's subjects."""

    glyph: str  # its caption
    own: bool  # whether it wears the user's coat


@dataclass(frozen=True)
class Order:
    """One prompt, and what the right answer shows, from left to right."""

    prompt: str  # {} is where the subject is named
    parts: tuple[Part, ...]
    background: str

    @classmethod
    def of(cls, prompt: str, kind: str) -> Order:
        """What a prompt asks for, whose placeholder stands for a kind."""
        glyphs, background = subjects(prompt.format(kind))
        scene = prompt.rsplit(" on ", 1)[0].replace(" next to ", " and ").split(" and ")
        own = ["{}" in words for words in scene]
        return cls(prompt, tuple(map(Part, glyphs, own)), background)


@dataclass(frozen=True)
class User:
    """Somebody with a subject of their own."""

    name: str
    kind: str  # the super-class
    coat: Coat
    asked: tuple[str, ...]

    @property
    def placeholder(self) -> str:
        return f"<{self.name}>"

    @property
    def orders(self) -> tuple[Order, ...]:
        """What is asked of them, with the right answers."""
        return tuple(Order.of(prompt, self.kind) for prompt in self.asked)

    def subject(self, seed: int = 0, placeholder: str | None = None) -> Subject:
        """Four pictures with captions and masks."""
        named = self.placeholder if placeholder is None else placeholder
        images, masks, captions = [], [], []
        for words, (background, *place) in zip(_SHOWN.get(self.kind, _OTHERS_SHOWN), _PLACES, strict=True):
            caption = f"{words} on {background}"
            (part,) = Order.of(caption, self.kind).parts
            image, mask = render.compose([(render.named(part.glyph, self.coat), *place)], background)
            images.append(Image.fromarray(image))
            masks.append(Image.fromarray((mask[0] * 255).astype(np.uint8)))
            captions.append(caption.format(named))
        plain = "" if "<" not in named else self.kind
        return Subject(named, plain, images, captions, masks, seed=seed)


def _user(group: str, number: int, kind: str, coat: Coat | None = None, asked: tuple[str, ...] | None = None) -> User:
    if coat is None:
        coat = Coat.random(np.random.default_rng((2026, {"test": 0, "tune": 1, "decoy": 2}[group], number)))
    if asked is None:
        asked = _ASKED.get(kind, tuple(words.replace("NEAR", _NEAR.get(kind, "")) for words in _OTHERS_ASKED))
    return User(f"{group}-{number:02}", kind, coat, asked)


_TEST_KINDS = ("cat",) * 10 + ("face",) * 6 + ("dog",) * 3 + ("bear",) * 2 + ("car",) * 2 + ("house",)
TEST = tuple(_user("test", number, kind) for number, kind in enumerate(_TEST_KINDS))
# The pilots' five coats, and five others.
_PILOTS = (
    Coat("strands", ((130, 133, 144), (170, 173, 184))),
    Coat("patch", ((74, 72, 80), (244, 242, 238)), (0.76, 0.5, 0.17, 0.24)),
    Coat("tabby", ((244, 146, 66), (150, 72, 24)), (57.0,)),
    Coat("spots", ((235, 225, 205), (60, 40, 30)), (22.0, 0.0)),
    Coat("halves", ((240, 150, 70), (70, 70, 80)), (0.0,)),
)
_TUNE_KINDS = ("cat", "cat", "cat", "face", "dog")
TUNE = tuple(_user("tune", number, "cat", coat, _TUNED["cat"]) for number, coat in enumerate(_PILOTS)) + tuple(
    _user("tune", number, kind, asked=_TUNED.get(kind)) for number, kind in enumerate(_TUNE_KINDS, len(_PILOTS))
)
DECOYS = tuple(Coat.random(np.random.default_rng((2026, 2, number))) for number in range(40))
