"""Where ranges of rows fit among others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

FIXED = sys.maxsize


class Range(NamedTuple):
    """Rows that are taken."""

    first: int
    end: int
    used: int  # when, last; FIXED where they must stay


def place(sizes: Sequence[int], taken: Sequence[Range], height: int) -> list[int] | None:
    """Where ranges fit among those that are taken.

    Each goes to the smallest gap that holds it; where none does, to the stretch whose most recently used range was used
    longest ago. The largest come first.

    Args:
        sizes: of the ranges to be placed.
        taken: what lies in the rows, not overlapping.
        height: how many rows there are.

    Returns:
        Where each range begins, over taken ones that need not stay; None if one does not fit.

    Example:
        >>> place([4, 2], [Range(0, 3, FIXED), Range(5, 8, 7)], 12)
        [8, 3]
    """
    taken, found = list(taken), [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size, best = sizes[number], None
        if not size:
            continue
        for first in {0, *(one.end for one in taken)}:
            inside = [one.used for one in taken if one.first < first + size and first < one.end]
            used = max(inside, default=-1)
            if first + size > height or used == FIXED:
                continue
            gap = min((one.first for one in taken if one.first >= first + size), default=height) - first
            best = min(best or (used, gap, first), (used, gap, first))
        if best is None:
            return None
        first = found[number] = best[2]
        taken = [one for one in taken if one.end <= first or first + size <= one.first]
        taken.append(Range(first, first + size, FIXED))
    return found
