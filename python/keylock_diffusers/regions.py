"""Where a row's words may be seen from: masks and words as the two bitfields of localized attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from keylock_diffusers.text import TokenizedPrompt, find, with_own_words

ENDINGS = ("own", "everywhere", "outside", "hidden")
# Bit 0 is every pixel's, bit 1 that of pixels outside all regions; the others are the regions'.
_EVERYWHERE, _OUTSIDE, _FIRST = 1, 2, 2
LIMIT = 32 - _FIRST


@dataclass(frozen=True, eq=False)
class Region:
    """Words of a prompt that are attended to only inside a mask; all other words are attended to everywhere.

    Args:
        mask: where, a picture in greys or a tensor [height, width] of 0..1, which is stretched over the whole of what
            is drawn. A layer's pixel belongs to it where it covers at least half of the pixel, or covers it most.
        prompt: the words, as they stand in the prompt, placeholders included; wherever they stand.
        tokens: instead of `prompt`, the words' positions among the prompt's tokens, the start token being 0.

    Paper: regions as in localized attention, Xiao et al., FastComposer, arXiv 2305.10431.
    """

    mask: Any  # [height, width]
    prompt: str | None = None
    tokens: Sequence[int] | None = None


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


@dataclass(frozen=True, eq=False)
class PromptRegions:
    """The regions of a prompt: where its tokens are seen, and each region's own wording of the prompt, if it has one.

    Own wordings' tokens follow the prompt's own: region r's are T * (r + 1) to T * (r + 2) - 1.
    """

    row: RowRegions = RowRegions()
    own: tuple[tuple[TokenizedPrompt, ...], ...] = ()  # per region, per text encoder


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


def inside(mask: Tensor, size: tuple[int, int]) -> Tensor:  # [N] bool
    """The pixels of a layer that a mask [height, width] covers by half; if none, those that it covers most."""
    share = F.interpolate(mask.float().cpu()[None, None], size, mode="area").flatten()
    return share >= min(0.5, float(share.max()))


def read_mask(mask: Any, what: str) -> Tensor:  # [height, width] float32
    """A picture or tensor as weights.

    Args:
        mask: a PIL image (in greys, 255 is 1), an array or tensor [height, width]; uint8 counts 255 as 1.
        what: names it in errors.

    Raises:
        TypeError, ValueError: it is something else, or not finite.
    """
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what} must be a picture or a tensor, got {type(mask).__name__}")
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"{what} must be [height, width], got {list(mask.shape)}")
    if not mask.is_floating_point():
        mask = mask.float() / (255 if mask.dtype == torch.uint8 else 1)
    if not mask.isfinite().all():
        raise ValueError(f"{what} must hold finite numbers, got NaN or infinity")
    return mask.float()


def resolve(
    regions: Sequence[Region],
    prompts: Sequence[TokenizedPrompt] | None,
    tokens: int,
    tokenizers: Sequence[Any],
    endings: str,
    name: str = "regions",
) -> PromptRegions:
    """The regions of a request's prompt.

    Args:
        regions: what the request names.
        prompts: the prompt, tokenized for each text encoder, which makes the same tokens in every one; None for given
            encodings, in which there is no finding words, and no telling where they end.
        tokens: how many there are.
        tokenizers: find the words.
        endings: one of `ENDINGS`: see `keylock_diffusers.Request`.
        name: of the argument, for errors.

    Raises:
        TypeError, ValueError: what is wrong with a region.
    """
    if not isinstance(regions, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {type(regions).__name__}")
    if endings not in ENDINGS:
        raise ValueError(f"endings must be one of {', '.join(ENDINGS)}, got {endings!r}")
    if len(regions) > LIMIT:
        raise ValueError(f"{name} must be at most {LIMIT}, got {len(regions)}")
    uses = []
    for region in regions:
        if not isinstance(region, Region):
            raise TypeError(f"{name} must be Region objects, got {type(region).__name__}")
        if (region.prompt is None) == (region.tokens is None):
            got = "neither" if region.tokens is None else "both"
            raise ValueError(f"give either prompt or tokens of a Region, got {got}")
        mask = region_mask(region.mask, "mask of a Region")
        if region.prompt is not None:
            if prompts is None:
                raise ValueError("a Region of given encodings takes tokens, not a prompt")
            found = tuple(
                {place: None for places in find(tokenizers[0], prompts[0], region.prompt) for place in places}
            )
            if not found:
                raise ValueError(f"the words {region.prompt!r} of a Region are not in the prompt")
        else:
            if not isinstance(region.tokens, (list, tuple, range)):
                raise TypeError(f"tokens of a Region must be a list, got {type(region.tokens).__name__}")
            found = tuple(region.tokens)
            wrong = [t for t in found if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < tokens]
            if wrong or not found:
                raise ValueError(f"tokens of a Region must be positions from 0 to {tokens - 1}, got {list(found)}")
        uses.append(RegionUse(mask, found))
    if not uses:
        return PromptRegions(RowRegions(tokens=tokens))
    named = tuple(dict.fromkeys(token for use in uses for token in use.tokens))
    if prompts is None or endings == "everywhere":
        return PromptRegions(RowRegions(tuple(uses), tokens=tokens))
    if endings != "own":
        ending = tuple(token for token in prompts[0].ending if token not in named)
        outside, hidden = (ending, ()) if endings == "outside" else ((), ending)
        return PromptRegions(RowRegions(tuple(uses), outside, hidden, tokens))
    own = tuple(
        tuple(with_own_words(t, prompt, use.tokens, named) for t, prompt in zip(tokenizers, prompts, strict=True))
        for use in uses
    )
    blocks = [RegionUse(use.mask, tuple(range(tokens * (r + 1), tokens * (r + 2)))) for r, use in enumerate(uses)]
    unnamed = tuple(token for token in range(tokens) if token not in named)
    placeholders = tuple(frozenset(word for _, word in wording[0].words) for wording in own)
    return PromptRegions(RowRegions(tuple(blocks), unnamed, named, tokens * (1 + len(uses)), placeholders), own)


def region_mask(mask: Any, what: str) -> Tensor:
    """`read_mask`, and something must be in it.

    Raises:
        TypeError, ValueError: it is no mask, or empty.
    """
    read = read_mask(mask, what)
    if read.max() <= 0:
        raise ValueError(f"{what} must not be empty, got no value above 0")
    return read
