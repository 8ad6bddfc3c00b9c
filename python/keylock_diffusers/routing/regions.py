"""Where a row's words may be seen from: masks and words as the two bitfields of localized attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keylock_diffusers.masks import inside

# Bit 0 is every pixel's, bit 1 that of pixels outside all regions; the others are the regions'.
_EVERYWHERE, _OUTSIDE, _FIRST = 1, 2, 2
LIMIT = 32 - _FIRST


@dataclass(frozen=True, eq=False)
class RegionUse:
    """One region of a row: a mask, and the positions of the tokens that may be seen from inside alone."""

    mask: Tensor  # [height, width]
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RowRegions:
    """All regions of one row of the U-Net's batch.

    Args:
        uses: the regions.
        outside: the positions of tokens that are seen only where no region is.
        hidden: those of tokens that are seen nowhere.
        tokens: how many the row has; those after them are nowhere seen. None: all there are.
        placeholders: those in each wording that the row reads after its prompt.
    """

    uses: tuple[RegionUse, ...] = ()
    outside: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    tokens: int | None = None
    placeholders: tuple[frozenset[str], ...] = ()

    def has(self, wording: int, placeholder: str) -> bool:
        """Whether a placeholder of the prompt (wording 0) is also in a wording of its own; they count from 1."""
        return wording == 0 or (wording <= len(self.placeholders) and placeholder in self.placeholders[wording - 1])


class RegionRouting:
    """A batch's regions as bitfields: a token is seen from a pixel where theirs have a bit in common.

    Args:
        rows: per row of the U-Net's batch, its regions.
    """

    def __init__(self, rows: Sequence[RowRegions]) -> None:
        self.rows = list(rows)
        self.any = any(row.uses for row in self.rows)

    def key_regions(self, tokens: int) -> Tensor:  # [B, T] int32
        """Which regions each token may be seen from.

        Raises:
            ValueError: a position beyond the row's tokens.
        """
        bits = torch.full((len(self.rows), tokens), _EVERYWHERE, dtype=torch.int64)
        for row, regions in enumerate(self.rows):
            if regions.tokens is not None:
                bits[row, regions.tokens :] = 0
            if not regions.uses:
                continue
            last = max((token for use in regions.uses for token in use.tokens), default=0)
            if last >= tokens:
                raise ValueError(f"Personalization: a region names token {last}, but there are {tokens}")
            bits[row, list(regions.outside)] = _OUTSIDE
            bits[row, [*regions.hidden, *(token for use in regions.uses for token in use.tokens)]] = 0
            for number, use in enumerate(regions.uses):
                bits[row, list(use.tokens)] |= 1 << (_FIRST + number)
        return bits.to(torch.int32)  # the last region's bit is the sign

    def query_regions(self, size: tuple[int, int]) -> Tensor:  # [B, N] int32
        """Which regions each pixel of a layer of (height, width) lies in."""
        height, width = size
        bits = torch.full((len(self.rows), height * width), _EVERYWHERE, dtype=torch.int64)
        resized: dict[int, Tensor] = {}
        for row, regions in enumerate(self.rows):
            if not regions.uses:
                continue
            outside = torch.ones(height * width, dtype=torch.bool)
            for number, use in enumerate(regions.uses):
                if id(use.mask) not in resized:
                    resized[id(use.mask)] = inside(use.mask, size)
                where = resized[id(use.mask)]
                bits[row] |= where.long() << (_FIRST + number)
                outside &= ~where
            bits[row] |= outside.long() * _OUTSIDE
        return bits.to(torch.int32)
