"""Regions of a request: masks and words as what a row carries, and each region's own wording of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from keylock_diffusers.checks import listed, shown
from keylock_diffusers.encoding.text import find, with_own_words
from keylock_diffusers.encoding.tokens import TokenizedPrompt, extended
from keylock_diffusers.masks import region_mask
from keylock_diffusers.pictures import PictureLimits
from keylock_diffusers.requests import ENDINGS, Region
from keylock_diffusers.routing.regions import LIMIT
from keylock_diffusers.routing.rows import RegionUse, RowRegions, TextLayout


@dataclass(frozen=True, eq=False)
class PromptRegions:
    """The regions of a prompt: where its tokens are seen, and each region's own wording of the prompt, if it has one.

    The row reads them after the prompt itself: see `TextLayout`.
    """

    row: RowRegions = RowRegions()
    own: tuple[tuple[TokenizedPrompt, ...], ...] = ()  # per region, per text encoder


def resolve(
    regions: Sequence[Region],
    prompts: Sequence[TokenizedPrompt] | None,
    tokens: int,
    tokenizers: Sequence[Any],
    endings: str,
    name: str = "regions",
    chunks: int | None = None,
    limits: PictureLimits = PictureLimits(),
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
        chunks: how many chunks a wording of a region's own has; default as many as it needs.
        limits: of the masks.

    Raises:
        TypeError, ValueError: what is wrong with a region.
    """
    listed(regions, name, LIMIT)
    if not isinstance(endings, str) or endings not in ENDINGS:
        raise ValueError(f"endings must be one of {', '.join(ENDINGS)}, got {shown(endings)}")
    uses = []
    for region in regions:
        if not isinstance(region, Region):
            raise TypeError(f"{name} must be Region objects, got {type(region).__name__}")
        if (region.prompt is None) == (region.tokens is None):
            got = "neither" if region.tokens is None else "both"
            raise ValueError(f"give either prompt or tokens of a Region, got {got}")
        mask = region_mask(region.mask, "mask of a Region", limits)
        if region.prompt is not None:
            if prompts is None:
                raise ValueError("a Region of given encodings takes tokens, not a prompt")
            found = tuple(
                {place: None for places in find(tokenizers[0], prompts[0], region.prompt) for place in places}
            )
            if not found:
                raise ValueError(f"the words {shown(region.prompt)} of a Region are not in the prompt")
        else:
            if not isinstance(region.tokens, (list, tuple, range)):
                raise TypeError(f"tokens of a Region must be a list, got {type(region.tokens).__name__}")
            found = tuple(region.tokens[: tokens + 1])
            wrong = [t for t in found if isinstance(t, bool) or not isinstance(t, Integral) or not 0 <= t < tokens]
            if wrong or not found:
                raise ValueError(
                    f"tokens of a Region must be positions from 0 to {tokens - 1}, got {shown(list(found))}"
                )
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
        tuple(
            extended(t, with_own_words(t, prompt, use.tokens, named, chunks=None), chunks or 1)
            for t, prompt in zip(tokenizers, prompts, strict=True)
        )
        for use in uses
    )
    layout = TextLayout(tokens, 1 + len(uses))
    blocks = [RegionUse(use.mask, tuple(layout.positions(wording))) for wording, use in enumerate(uses, 1)]
    unnamed = tuple(token for token in range(tokens) if token not in named)
    placeholders = tuple(frozenset(word for _, word, _ in wording[0].words) for wording in own)
    return PromptRegions(RowRegions(tuple(blocks), unnamed, named, layout.length, placeholders), own)


def with_loras(
    half: PromptRegions, prompts: tuple[TokenizedPrompt, ...] | None, tokens: int, masks: Sequence[Tensor], name: str
) -> PromptRegions:
    """The regions of a prompt beside those of LoRAs, each of which reads wordings of its own.

    What is read outside of all those regions stands first, then the same again for each of them, and is seen inside of
    it alone; a region of words is, in each, where both are.

    Args:
        half: what `resolve` made.
        prompts: the prompt for each text encoder; None for given encodings.
        tokens: how many one wording has.
        masks: of the LoRAs.
        name: of the argument that gave regions, for errors.

    Raises:
        ValueError: there are more wordings and regions than a row has room for.
    """
    if not masks:
        return half
    row, span = half.row, tokens * (1 + len(half.own))
    words = tuple(use.mask for use in row.uses if use.mask is not None)
    named = {token for use in row.uses for token in use.tokens}
    rest = tuple(t for t in range(row.tokens or span) if t not in named.union(row.outside, row.hidden))
    uses: list[RegionUse] = []
    hidden: list[int] = []
    for number, mask in enumerate([None, *masks]):
        where = {"within": (), "without": tuple(masks)} if mask is None else {"within": (mask,), "without": ()}

        def moved(places: Sequence[int], first: int = number * span) -> tuple[int, ...]:
            return tuple(first + place for place in places)

        uses += [RegionUse(use.mask, moved(use.tokens), **where) for use in row.uses]
        if row.outside:
            uses.append(RegionUse(None, moved(row.outside), where["within"], (*where["without"], *words)))
        if rest:
            uses.append(RegionUse(None, moved(rest), **where))
        hidden += moved(row.hidden)
    if len(uses) > LIMIT:
        raise ValueError(
            f"{name} and the regions of {len(masks)} LoRAs make {len(uses)} regions together, "
            f"at most {LIMIT} are possible"
        )
    base = frozenset(word for _, word, _ in prompts[0].words) if prompts else frozenset()
    placeholders = (*row.placeholders, *[base, *row.placeholders] * len(masks))
    own = half.own if prompts is None else (*half.own, *[prompts, *half.own] * len(masks))
    return PromptRegions(RowRegions(tuple(uses), (), tuple(hidden), span * (1 + len(masks)), placeholders), own)
