"""What a batch's rows read: prompts and their regions' own wordings, encoded in one call of each text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.fusion import FusionUse, SubjectFusion, fuse
from keylock_diffusers.encoding.tokens import TokenizedPrompt
from keylock_diffusers.routing.rows import ConceptUse, TextLayout


@dataclass(frozen=True, eq=False)
class Wordings:
    """What one row reads: its prompt, and after it the wordings that its regions have of their own.

    Args:
        prompts: per wording, as each text encoder has it; none where encodings are given.
        embeds: encodings [T, D] instead.
        pooled: the pooled encoding [P] that goes with them.
        uses: the concepts whose learned words stand in them.
        subjects: words, and the encoding [D] of what is fused into them.
    """

    prompts: tuple[tuple[TokenizedPrompt, ...], ...] = ()
    embeds: Tensor | None = None  # [T, D]
    pooled: Tensor | None = None  # [P]
    uses: tuple[ConceptUse, ...] = ()
    subjects: tuple[tuple[str, Tensor], ...] = ()

    @property
    def tokens(self) -> int:
        """Of one wording."""
        return len(self.prompts[0][0].ids) if self.embeds is None else len(self.embeds)

    @property
    def own(self) -> int:
        """How many wordings there are beside the prompt."""
        return max(len(self.prompts) - 1, 0)

    def __getitem__(self, wording: int) -> tuple[TokenizedPrompt, ...] | None:
        """One wording; the prompt where there are not so many; None where encodings are given."""
        if not self.prompts:
            return None
        return self.prompts[wording if wording < len(self.prompts) else 0]


class BatchText(NamedTuple):
    """The encodings of a batch's pictures, one after another: of the conditional and of the unconditional half."""

    layout: TextLayout
    read: Tensor  # [B, T * wordings, D], what values read
    keys: Tensor  # the same, what keys read: under a global lock the super-class in the concept's place
    early: Tensor  # the same, before rows' starts: no learned word, and nothing fused
    uncond: Tensor | None  # the same, of the unconditional half
    pooled: Mapping[str, Tensor]  # per half [B, P], "cond" and "uncond"

    def rows(self, variant: Tensor, parts: Sequence[str]) -> Tensor:  # [B * parts, T * wordings, D]
        """One variant in a row layout."""
        return torch.cat([self.uncond if part == "uncond" else variant for part in parts])  # type: ignore[misc]


# What a conditional row is encoded as, and which of its concepts' learned words each has.
_VARIANTS: tuple[Callable[[ConceptUse], bool], ...] = (
    lambda use: True,
    lambda use: use.lock == "local",
    lambda use: False,
)


def encode_batch(
    denoiser: Any,
    positives: Sequence[Wordings],
    negatives: Sequence[Wordings],
    capacity: int,
    fusion: SubjectFusion | None = None,
) -> BatchText:
    """Encodes all that a batch's rows read, in one call of each text encoder.

    Its size depends on the number of rows and the capacity for regions alone, never on what a row wants: how a product
    of several rows rounds may depend on their number.

    Args:
        denoiser: the pipeline's description.
        positives: the conditional rows.
        negatives: the unconditional rows, as many; none without guidance.
        capacity: how many wordings of their own the regions of one row have room for.
        fusion: mixes the rows' subjects into their words.
    """
    layout = TextLayout(positives[0].tokens, 1 + capacity)
    jobs = [
        _Job(row, wording, learned) for learned in _VARIANTS for wording in range(1 + capacity) for row in positives
    ]
    jobs += [_Job(row, wording, None) for wording in range(1 + capacity) for row in negatives]
    encoded, pooled = _encoded(denoiser, jobs)
    count = len(positives)

    def rows(first: int, rows: Sequence[Wordings]) -> Tensor:  # [B, T * wordings, D]
        return torch.cat([torch.stack(encoded[first + n * len(rows) :][: len(rows)]) for n in range(1 + capacity)], 1)

    span = count * (1 + capacity)
    variants = [rows(n * span, positives) for n in range(len(_VARIANTS))]
    if fusion is not None:
        uses = [_fused(denoiser, row, layout) for row in positives]
        variants[:2] = [fuse(fusion, variant, uses) for variant in variants[:2]]
    first = len(_VARIANTS) * span
    halves = {"cond": pooled[:count], "uncond": pooled[first : first + count]}
    found = {name: torch.stack(half) for name, half in halves.items() if half and half[0] is not None}
    read, keys, early = variants
    return BatchText(layout, read, keys, early, rows(first, negatives) if negatives else None, found)


class _Job(NamedTuple):
    """One prompt to encode."""

    row: Wordings
    wording: int
    learned: Callable[[ConceptUse], bool] | None  # None: of the unconditional half


def _encoded(denoiser: Any, jobs: Sequence[_Job]) -> tuple[list[Tensor], list[Any]]:
    """Encodings [T, D] and pooled encodings [P] of each job, in one call of each text encoder."""
    encoders = denoiser.encoders()
    device, dtype = denoiser.pipe._execution_device, denoiser.text_dtype
    given = [job.row.embeds for job in jobs]
    pooled: list[Any] = [job.row.pooled for job in jobs]
    if encoders and any(embeds is None for embeds in given):
        filler = next(job.row[0] for job in jobs if job.row.embeds is None)  # in the place of given encodings
        parts = []
        for number, encoder in enumerate(encoders):
            prompts = [(job.row[job.wording] or filler)[number] for job in jobs]  # type: ignore[index]
            words = [_learned(job, number) for job in jobs]
            skips = [denoiser.options["clip_skip"] if job.learned is not None else None for job in jobs]
            states, last = text.encode_rows(encoder, prompts, words, skips)
            parts.append(states)
            if last is not None and denoiser.pooled_width is not None:
                pooled = [
                    own if job.row.embeds is not None else vector
                    for job, own, vector in zip(jobs, pooled, last, strict=True)
                ]
        encoded = torch.cat(parts, -1)
        given = [own if own is not None else row for own, row in zip(given, encoded, strict=True)]
    moved = [embeds.to(device, dtype) for embeds in given]  # type: ignore[union-attr]
    return moved, [None if vector is None else vector.to(device, dtype) for vector in pooled]


def _learned(job: _Job, encoder: int) -> Mapping[str, Tensor]:
    if job.learned is None:
        return {}
    return {use.concept.placeholder: use.concept.word_embeddings[encoder] for use in job.row.uses if job.learned(use)}


def _fused(denoiser: Any, row: Wordings, layout: TextLayout) -> list[FusionUse]:
    """A row's subjects, each in the last token of its words in every wording."""
    tokenizer = denoiser.tokenizer
    uses = []
    for phrase, embeds in row.subjects:
        places = []
        for wording in range(layout.wordings):
            prompt = row[wording]
            spots = () if prompt is None else text.find(tokenizer, prompt[0], phrase)
            places += [layout.positions(wording)[spot[-1]] for spot in spots]
        uses.append(FusionUse(tuple(dict.fromkeys(places)), embeds))
    return uses
