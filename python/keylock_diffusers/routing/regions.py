"""Where a row's words may be seen from: masks and words as the two bitfields of localized attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keylock_diffusers.masks import inside
from keylock_diffusers.routing.rows import RowRegions

# Bit 0 is every pixel's, bit 1 that of pixels outside all regions; the others are the regions'.
_EVERYWHERE, _OUTSIDE, _FIRST = 1, 2, 2
LIMIT = 32 - _FIRST


class RegionRouting:
    """A batch's regions as bitfields: a token is seen from a pixel where theirs have a bit in common.

    Args:
        rows: per row of the batch, its regions.
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
            for mask in (mask for use in regions.uses for mask in use.masks):
                if id(mask) not in resized:
                    resized[id(mask)] = inside(mask, size)
            for number, use in enumerate(regions.uses):
                where = torch.ones(height * width, dtype=torch.bool)
                for mask in (*([] if use.mask is None else [use.mask]), *use.within):
                    where = where & resized[id(mask)]
                for mask in use.without:
                    where = where & ~resized[id(mask)]
                bits[row] |= where.long() << (_FIRST + number)
                outside &= ~where
            bits[row] |= outside.long() * _OUTSIDE
        return bits.to(torch.int32)
