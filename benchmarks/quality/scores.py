"""What a drawn picture is worth: who is in it, which expression, what became of the subject beside, how far off."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.quality.coats import Coat, coated
from benchmarks.quality.judges import Judge, half
from benchmarks.quality.users import DECOYS, Order, User
from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.evaluate import background_name

_BLOCK = 8  # pixels over which an error is colour, and below which it is pattern


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
        """Scores of one picture [64, 64, 3] uint8.

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


def right_answer(user: User, order: Order) -> np.ndarray:  # [64, 64, 3]
    """One picture of what a user asks for."""
    places = [(6, 6, 52)] if len(order.parts) == 1 else [(2, 20, 29), (33, 18, 29)]
    sprites = [coated(user.coat if part.own else None, part.glyph) for part in order.parts]
    drawn = [(sprite, *place) for sprite, place in zip(sprites, places, strict=True)]
    return render.compose(drawn, order.background)[0]


@lru_cache(maxsize=96)
def _candidates(coat: Coat | None, glyph: str, background: str, side: bool | None) -> np.ndarray:  # [n, h, w, 3]
    """Right answers: at every place and size at which the model was shown subjects, alone or in one half."""
    sprite = coated(coat, glyph)
    if side is None:
        places = [(x, y, s) for s in range(44, 60, 2) for x in range(2, 64 - s, 2) for y in range(2, 64 - s, 2)]
        return np.stack([render.compose([(sprite, *place)], background)[0] for place in places]).astype(np.float32)
    across = 31 * side
    columns = slice(32, 64) if side else slice(0, 32)
    places = [(x + across, y, s) for s in range(27, 31) for x in range(1, 33 - s) for y in range(10, 55 - s)]
    drawn = (render.compose([(sprite, *place)], background)[0][:, columns] for place in places)
    return np.stack(list(drawn)).astype(np.float32)


def _nearest(
    image: np.ndarray, coat: Coat | None, glyph: str, background: str, side: bool | None
) -> tuple[float, float, float]:
    """The least root mean square difference to a right answer; of it, what blocks of pixels differ by, and the rest."""
    known = _candidates(coat, glyph, background, side)
    seen = image if side is None else image[:, 32:] if side else image[:, :32]
    flat, x = known.reshape(len(known), -1), seen.astype(np.float32).reshape(-1)
    squares = (flat * flat).mean(1) - 2 * (flat @ x) / x.size
    off = known[int(squares.argmin())] - seen
    rows, columns = off.shape[0] // _BLOCK, off.shape[1] // _BLOCK
    blocks = off.reshape(rows, _BLOCK, columns, _BLOCK, 3)
    mean = blocks.mean((1, 3), keepdims=True)
    total, colour = float(np.square(off).mean()), float(np.square(mean).mean())
    return total**0.5, colour**0.5, max(total - colour, 0.0) ** 0.5
