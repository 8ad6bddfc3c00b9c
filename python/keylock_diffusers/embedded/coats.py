"""Coats: two colours and where each of them is, on the fur of any glyph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]
_LEAST_CONTRAST = 110.0  # between a coat's two colours, as points of 0..255 cubed


def _patch(row: np.ndarray, column: np.ndarray, y: float, x: float, high: float, wide: float) -> np.ndarray:
    return ((row - y) / high) ** 2 + ((column - x) / wide) ** 2 < 1


def _stripes(row: np.ndarray, column: np.ndarray, angle: float, pitch: float, phase: float) -> np.ndarray:
    return np.cos(pitch * (row * np.sin(angle) + column * np.cos(angle)) + phase) > 0.3


def _spots(row: np.ndarray, column: np.ndarray, pitch: float, phase: float) -> np.ndarray:
    return np.cos(pitch * row + phase) * np.cos(pitch * column + phase) > 0.35


def _halves(row: np.ndarray, column: np.ndarray, angle: float) -> np.ndarray:
    return (row - 0.5) * np.sin(angle) + (column - 0.5) * np.cos(angle) < 0


def _tabby(row: np.ndarray, column: np.ndarray, pitch: float) -> np.ndarray:
    forehead = (np.cos(pitch * (column - 0.5)) > 0.45) & (row < 0.46)
    cheeks = (np.cos(pitch * (row - 0.62)) > 0.35) & (np.abs(column - 0.5) > 0.26) & (row > 0.52)
    return forehead | cheeks


def _rings(row: np.ndarray, column: np.ndarray, pitch: float, y: float) -> np.ndarray:
    return np.cos(pitch * np.hypot(row - y, column - 0.5)) > 0.2


def _fade(row: np.ndarray, column: np.ndarray, angle: float) -> np.ndarray:
    along = row * np.sin(angle) + column * np.cos(angle)
    return (along - along.min()) / (along.max() - along.min())


def _plain(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.zeros_like(row)


def _strands(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(70 * column + 5 * np.sin(9 * row))


# Each pattern: how much of the second colour there is, and the ranges of its numbers.
_PATTERNS: dict[str, tuple[Callable[..., np.ndarray], tuple[tuple[float, float], ...]]] = {
    "plain": (_plain, ()),
    "patch": (_patch, ((0.25, 0.8), (0.25, 0.75), (0.14, 0.35), (0.14, 0.35))),
    "stripes": (_stripes, ((0.0, np.pi), (20.0, 60.0), (0.0, 6.0))),
    "spots": (_spots, ((14.0, 26.0), (0.0, 3.0))),
    "halves": (_halves, ((0.0, np.pi),)),
    "tabby": (_tabby, ((45.0, 62.0),)),
    "rings": (_rings, ((22.0, 45.0), (0.3, 0.7))),
    "fade": (_fade, ((0.0, np.pi),)),
    "strands": (_strands, ()),
}

# What a caption says of a pattern.
WORDS = {
    "patch": "patched",
    "stripes": "striped",
    "spots": "spotted",
    "halves": "halved",
    "tabby": "tabby",
    "rings": "ringed",
    "fade": "shaded",
    "strands": "wavy",
}


@dataclass(frozen=True)
class Coat:
    """Two colours in a pattern.

    Args:
        pattern: one of those above.
        colours: the first is where the pattern is not.
        numbers: of the pattern.
    """

    pattern: str
    colours: tuple[Colour, Colour]
    numbers: tuple[float, ...] = ()

    @classmethod
    def random(cls, random: np.random.Generator) -> Coat:
        """Any coat whose colours can be told apart."""
        pattern = str(random.choice(list(_PATTERNS)))
        while True:
            colours = random.integers(30, 256, (2, 3))
            if np.linalg.norm(colours[0] - colours[1]) > _LEAST_CONTRAST:
                break
        numbers = tuple(float(random.uniform(*bounds)) for bounds in _PATTERNS[pattern][1])
        first, second = (tuple(int(n) for n in colour) for colour in colours)
        return cls(pattern, (first, second), numbers)  # type: ignore[arg-type]

    def paint(self, side: int) -> np.ndarray:  # [side, side, 3]
        """Its colours in 0..255."""
        row, column = np.mgrid[:side, :side] / side
        share = np.asarray(_PATTERNS[self.pattern][0](row, column, *self.numbers), np.float32)[..., None]
        first, second = (np.asarray(colour, np.float32) for colour in self.colours)
        return first * (1 - share) + second * share
