"""What a drawn picture is worth: who is in it, which expression, what became of the subject beside, how far off."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.quality.judges import Judge, half
from benchmarks.quality.users import DECOYS, Order, User
from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.coats import Coat
from keylock_diffusers.embedded.evaluate import background_name

_BLOCK = 16  # pixels over which an error is colour, and below which it is pattern


class Scores:
    """Scores pictures of some users' orders.

    Args:
        vae: the model's autoencoder.
        users: among whom, with the decoys and nobody at all, a coat is to be found.
    """

    def __init__(self, vae: Any, users: Sequence[User]) -> None:
        self.judge = Judge(vae)
        self.coats: list[Coat | None] = [user.coat for user in users]
        self.gallery = [*self.coats, *DECOYS, None]

    def of(self, image: np.ndarray, user: User, order: Order) -> dict[str, float]:
        """Scores of one picture [128, 128, 3] uint8.

        who: 1 if the user's coat is the nearest. named: 1 if the classifier names all glyphs. background: 1 if it is
        the one asked for. error, colour, pattern: of the user's subject, 0 to 255, at the place where it is least. With
        a second subject: other, its error to the plain glyph; unchanged, 1 if its coat is nearest to its own; leak, 1
        if it is nearest to the user's.
        """
        found = {"background": float(background_name(image) == order.background)}
        for place, part in enumerate(order.parts):
            side = None if len(order.parts) == 1 else bool(place)
            seen = image if side is None else half(image, side)
            near = int(self.judge.similarities(seen, self.gallery, part.glyph, order.background).argmax())
            coat = user.coat if part.own else None
            total, colour, pattern = _nearest(image, coat, part.glyph, order.background, side)
            if part.own:
                found |= {"who": float(self.gallery[near] == user.coat), "error": total, "colour": colour}
                found |= {"pattern": pattern, "expression": float(self.judge.glyph(seen, user.kind) == part.glyph)}
            else:
                found["other"] = total
                found["unchanged"] = float(self.gallery[near] is None)
                found["leak"] = float(self.gallery[near] == user.coat)
        return found

    def nothing(self, image: np.ndarray, user: User, order: Order) -> dict[str, float]:
        """Of a picture by the plain model: the errors to its own right answer (floor) and to the user's (nothing)."""
        part, side = next((p, None if len(order.parts) == 1 else bool(n)) for n, p in enumerate(order.parts) if p.own)
        made = {}
        for name, coat in (("floor", None), ("nothing", user.coat)):
            total, colour, pattern = _nearest(image, coat, part.glyph, order.background, side)
            made |= {f"{name} error": total, f"{name} colour": colour, f"{name} pattern": pattern}
        return made

    def both(self, image: np.ndarray, order: Order, coats: Sequence[Coat]) -> dict[str, float]:
        """Of a picture with two users' subjects: 1 if each is where it was asked for, or if they are swapped."""
        near = []
        for place, part in enumerate(order.parts):
            seen = half(image, bool(place))
            near.append(int(self.judge.similarities(seen, coats, part.glyph, order.background).argmax()))
        return {"in place": float(near == [0, 1]), "swapped": float(near == [1, 0])}


def right_answer(user: User, order: Order) -> np.ndarray:  # [128, 128, 3]
    """One picture of what a user asks for."""
    places = [(12, 12, 104)] if len(order.parts) == 1 else [(4, 40, 58), (66, 36, 58)]
    sprites = [render.named(part.glyph, user.coat if part.own else None) for part in order.parts]
    drawn = [(sprite, *place) for sprite, place in zip(sprites, places, strict=True)]
    return render.compose(drawn, order.background)[0]


def _part(image: np.ndarray, side: bool | None) -> np.ndarray:
    """A picture [128, 128, 3]; or its left or right half [128, 64, 3]."""
    middle = render.SIZE // 2
    return image if side is None else image[:, middle:] if side else image[:, :middle]


def _shrunk(image: np.ndarray) -> np.ndarray:
    """A picture at half its resolution, by means of four pixels."""
    height, width, _ = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3), dtype=np.float32)


@lru_cache(maxsize=96)
def _candidates(
    coat: Coat | None, glyph: str, background: str, side: bool | None
) -> tuple[list[tuple[int, int, int]], np.ndarray]:  # and [n, h / 2, w / 2, 3]
    """Places at which the model was shown subjects, alone or in one half, and right answers there, shrunk."""
    sprite = render.named(glyph, coat)
    if side is None:
        places = [(x, y, s) for s in range(88, 120, 4) for x in range(4, 128 - s, 4) for y in range(4, 128 - s, 4)]
    else:
        rows = range(12, 60, 2)
        places = [(x + 63 * side, y, s) for s in range(54, 62, 2) for x in range(1, 65 - s, 2) for y in rows]
    drawn = (_part(render.compose([(sprite, *place)], background)[0], side) for place in places)
    return places, np.stack([_shrunk(image) for image in drawn])


def _nearest(
    image: np.ndarray, coat: Coat | None, glyph: str, background: str, side: bool | None
) -> tuple[float, float, float]:
    """The least root mean square difference to a right answer; of it, what blocks of pixels differ by, and the rest.

    The best place is looked for at half the resolution first, then pixel by pixel around it.
    """
    places, known = _candidates(coat, glyph, background, side)
    seen = _part(image, side)
    flat, x = known.reshape(len(known), -1), _shrunk(seen).reshape(-1)
    left, top, size = places[int(((flat * flat).mean(1) - 2 * (flat @ x) / x.size).argmin())]
    sprite, seen = render.named(glyph, coat), seen.astype(np.float32)
    best = None
    for grown in (0, -2, 2):
        for across, down in itertools.product((-2, -1, 0, 1, 2), repeat=2):
            place = (left + across - grown // 2, top + down - grown // 2, size + grown)
            off = _part(render.compose([(sprite, *place)], background)[0], side) - seen
            if best is None or np.square(off).sum() < np.square(best).sum():
                best = off
    rows, columns = best.shape[0] // _BLOCK, best.shape[1] // _BLOCK
    blocks = best.reshape(rows, _BLOCK, columns, _BLOCK, 3)
    total, colour = float(np.square(best).mean()), float(np.square(blocks.mean((1, 3), keepdims=True)).mean())
    return total**0.5, colour**0.5, max(total - colour, 0.0) ** 0.5
