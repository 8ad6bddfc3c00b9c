"""What a batch's rows read: prompts and their regions' own wordings, encoded in one call of each text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keylock_diffusers.concepts import AddedConcept
from keylock_diffusers.denoisers.projections import projections
from keylock_diffusers.denoisers.unet import are_compiled, uncompiled
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.fusion import FusionUse, SubjectFusion, fuse
from keylock_diffusers.encoding.tokens import TokenizedPrompt, plain
from keylock_diffusers.processors import verify_routes
from keylock_diffusers.processors.routed import adapting
from keylock_diffusers.routing.adapters import AdapterRouting, AdapterUse, LoraCapacity, Store
from keylock_diffusers.routing.rows import ConceptUse, LoraUse, Phases, State, TextLayout

_POOLED = "text_projection"  # what reads one vector of a prompt, where no word stands


@dataclass(frozen=True, eq=False)
class Wordings:
    """What one row reads: its prompt, and after it the wordings that its regions have of their own.

    Args:
        prompts: per wording, as each text encoder has it; none where encodings are given.
        embeds: encodings [T, D] instead.
        pooled: the pooled encoding [P] that goes with them.
        uses: the concepts whose learned words stand in them.
        subjects: words, and the encoding [D] of what is fused into them.
        loras: the LoRAs that the text encoders have for them.
        copies: where encodings are given, how many wordings there are beside the prompt, all of them it.
        words: what textual inversion taught: by the names in the prompts, vectors [n, W] per text encoder.
    """

    prompts: tuple[tuple[TokenizedPrompt, ...], ...] = ()
    embeds: Tensor | None = None  # [T, D]
    pooled: Tensor | None = None  # [P]
    uses: tuple[ConceptUse, ...] = ()
    subjects: tuple[tuple[str, Tensor], ...] = ()
    loras: tuple[LoraUse, ...] = ()
    copies: int = 0
    words: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)  # [n, W]

    @property
    def tokens(self) -> int:
        """Of one wording."""
        return len(self.prompts[0][0].ids) if self.embeds is None else len(self.embeds)

    @property
    def own(self) -> int:
        """How many wordings there are beside the prompt."""
        return len(self.prompts) - 1 if self.prompts else self.copies

    def __getitem__(self, wording: int) -> tuple[TokenizedPrompt, ...] | None:
        """One wording; the prompt where there are not so many; None where encodings are given."""
        if not self.prompts:
            return None
        return self.prompts[wording if wording < len(self.prompts) else 0]


class PhaseText(NamedTuple):
    """The encodings of a batch's pictures in one phase, one after another, of both halves of guidance."""

    read: Tensor  # [B, T * wordings, D], what values read
    keys: Tensor  # the same, what keys read: under a global lock the super-class in the concept's place
    uncond: Tensor | None  # the same, of the unconditional half
    pooled: Mapping[str, Tensor]  # per half [B, P], "cond" and "uncond"

    def rows(self, variant: Tensor, parts: Sequence[str]) -> Tensor:  # [B * parts, T * wordings, D]
        """One variant in a row layout."""
        return torch.cat([self.uncond if part == "uncond" else variant for part in parts])  # type: ignore[misc]


class BatchText(NamedTuple):
    """What a batch's pictures read in each of their phases."""

    layout: TextLayout
    phases: tuple[PhaseText, ...]

    @property
    def last(self) -> PhaseText:
        """What they read in the end."""
        return self.phases[-1]

    def pooled(self, at: Sequence[int]) -> Mapping[str, Tensor]:
        """The pooled encodings of pictures in these phases: of the conditional half, then of the unconditional one."""
        count = len(self.last.read)
        halves = {"cond": at[:count], "uncond": at[count:]}
        return {
            name: torch.stack([self.phases[phase].pooled[name][row] for row, phase in enumerate(halves[name])])
            for name in self.last.pooled
        }


def encode_batch(
    denoiser: Any,
    positives: Sequence[Wordings],
    negatives: Sequence[Wordings],
    capacity: int,
    phases: Phases,
    fusion: SubjectFusion | None = None,
    store: Store | None = None,
    lora_capacity: LoraCapacity | None = None,
) -> BatchText:
    """Encodes all that a batch's rows read, in one call of each text encoder for each of their phases.

    A call's size depends on the number of rows and the capacity for regions alone, never on what a row wants: how a
    product of several rows rounds may depend on their number.

    Args:
        denoiser: the pipeline's description.
        positives: the conditional rows.
        negatives: the unconditional rows, as many; none without guidance.
        capacity: how many wordings of their own the regions of one row have room for.
        phases: of the conditional rows, and after them the unconditional ones.
        fusion: mixes the rows' subjects into their words.
        store: gives the pools of the text encoders' LoRAs.
        lora_capacity: the room for them.
    """
    layout = TextLayout(positives[0].tokens, 1 + capacity)
    count = len(positives)
    subjects = [_fused(denoiser, row, layout) for row in positives] if fusion is not None else []

    def encoded(states: Sequence[State]) -> PhaseText:
        jobs = [
            _Job(row, wording, state, keys)
            for keys in (False, True)
            for wording in range(layout.wordings)
            for row, state in zip(positives, states[:count], strict=True)
        ]
        jobs += [
            _Job(row, wording, state, None)
            for wording in range(layout.wordings)
            for row, state in zip(negatives, states[count:], strict=True)
        ]
        found, pooled = _encoded(denoiser, jobs, store, lora_capacity)

        def rows(first: int, rows: int) -> Tensor:  # [B, T * wordings, D]
            parts = [torch.stack(found[first + n * rows :][:rows]) for n in range(layout.wordings)]
            return torch.cat(parts, 1)

        span = count * layout.wordings
        variants = [rows(0, count), rows(span, count)]
        if fusion is not None:
            uses = [own if state.subjects else [] for own, state in zip(subjects, states[:count], strict=True)]
            variants = [fuse(fusion, variant, uses) for variant in variants]
        read, keys = variants
        halves = {"cond": pooled[:count], "uncond": pooled[2 * span :][:count]}
        held = {name: torch.stack(half) for name, half in halves.items() if half and half[0] is not None}
        return PhaseText(read, keys, rows(2 * span, count) if negatives else None, held)

    return BatchText(layout, tuple(encoded(phases.states(phase)) for phase in range(phases.count)))


class _Job(NamedTuple):
    """One prompt to encode."""

    row: Wordings
    wording: int
    state: State
    keys: bool | None  # whether it is for keys; None: it is of the unconditional half

    def learned(self, encoder: int) -> Mapping[str, Tensor]:
        """The vectors of its learned words by name: those of concepts where they count, and all others."""
        if self.row.embeds is not None:  # in whose place another row's prompt is encoded
            return {}
        concepts = {
            use.concept.placeholder: use.concept.word_embeddings[encoder]
            for use, counts in self._uses()
            if counts and use.concept.word_embeddings and (use.lock == "local" or not self.keys)
        }
        return concepts | {name: vectors[encoder] for name, vectors in self.row.words.items()}

    def moved(self, states: Tensor) -> Tensor:  # [T, D]
        """Its encodings with what concepts add to them at their words."""
        prompt = self.row[self.wording]
        if prompt is None:
            return states
        for use, counts in self._uses():
            concept = use.concept
            if not counts or not isinstance(concept, AddedConcept):
                continue
            for position, name, word in prompt[0].words:
                if name == concept.placeholder and word < len(concept.encodings):
                    more = use.strength * concept.encodings[word].to(states.device, torch.float32)
                    moved = (states[position].float() + more).to(states)[None]
                    states = states.index_copy(0, torch.tensor([position], device=states.device), moved)
        return states

    def unread(self) -> Mapping[str, bool]:
        """The placeholders of concepts of several words in whose place their super-classes are read: which count."""
        return {
            use.concept.placeholder: counts
            for use, counts in self._uses()
            if use.concept.words > 1 and not (counts and use.concept.word_embeddings)
        }

    def _uses(self) -> Iterator[tuple[ConceptUse, bool]]:
        """The row's concepts, and which of them count; none has an unconditional row."""
        return zip(self.row.uses, self.state.concepts if self.keys is not None else (), strict=self.keys is not None)


def _encoded(
    denoiser: Any, jobs: Sequence[_Job], store: Store | None, capacity: LoraCapacity | None
) -> tuple[list[Tensor], list[Any]]:
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
            plainly = {n: names for n, job in enumerate(jobs) if job.row.embeds is None and (names := job.unread())}
            orders = {}
            for n, names in plainly.items():
                copied = [name for name, counts in names.items() if counts]
                prompts[n], orders[n] = plain(encoder.tokenizer, prompts[n], names, copied)
            words = [job.learned(number) for job in jobs]
            skips = [denoiser.options["clip_skip"] if job.keys is not None else None for job in jobs]
            with _adapted(encoder.model, number, jobs, orders, prompts[0], device, store, capacity):
                states, last = text.encode_rows(encoder, prompts, words, skips)
            parts.append(
                torch.stack([row[list(orders[n])] if n in orders else row for n, row in enumerate(states)])
                if orders
                else states
            )
            if last is not None and denoiser.pooled_width is not None:
                pooled = [
                    own if job.row.embeds is not None else vector
                    for job, own, vector in zip(jobs, pooled, last, strict=True)
                ]
        encoded = torch.stack([job.moved(row) for job, row in zip(jobs, torch.cat(parts, -1), strict=True)])
        given = [own if own is not None else row for own, row in zip(given, encoded, strict=True)]
    moved = [embeds.to(device, dtype) for embeds in given]  # type: ignore[union-attr]
    return moved, [None if vector is None else vector.to(device, dtype) for vector in pooled]


@contextmanager
def _adapted(
    model: Any,
    number: int,
    jobs: Sequence[_Job],
    orders: Mapping[int, Sequence[int]],
    prompt: TokenizedPrompt,
    device: torch.device,
    store: Store | None,
    capacity: LoraCapacity | None,
) -> Iterator[None]:
    """While it lasts, a text encoder has each job's own LoRAs."""
    if store is None:
        yield
        return
    modules = projections(uncompiled(model))
    chunks, size = prompt.chunks, len(prompt.ids) // prompt.chunks  # as all jobs have them
    rows: list[list[AdapterUse]] = []
    for n, job in enumerate(jobs):
        on = zip(job.row.loras, job.state.loras, strict=True)
        halves = [half for use, active in on if active and (half := use.in_text(number, job.wording)) is not None]
        rows += [[_in_chunk(half, orders.get(n), chunk, size) for half in halves] for chunk in range(chunks)]
    bound = any(use.bound is not None for row in rows for use in row)
    # Regions read whole prompts of their own; what is bound to a word counts at its tokens.
    room = None if capacity is None else replace(capacity, regions=bound)
    adapters = AdapterRouting(rows, store, room)
    tokens = torch.zeros(size, dtype=torch.int64)
    try:
        adapters.prepare(
            modules,
            device,
            model.dtype,
            wordings=lambda name: tokens if bound and not name.endswith(_POOLED) else None,
        )
        if any(rows):
            verify_routes(modules, adapters.updates)
        whole = uncompiled(model)
        in_graphs = whole is not model or are_compiled(whole.modules())
        with adapting(whole, modules, adapters.updates, in_graphs=in_graphs):
            yield
    finally:
        adapters.release()


def _in_chunk(use: AdapterUse, order: Sequence[int] | None, chunk: int, size: int) -> AdapterUse:
    """An adapter in one chunk of so many tokens; `order` says where each of the wording's tokens is read."""
    if use.bound is None:
        return use
    places = use.bound.places[0] if use.bound.places else ()
    read = dict.fromkeys(places if order is None else [order[place] for place in places])
    own = tuple(place % size for place in read if place // size == chunk)
    return replace(use, bound=replace(use.bound, places=(own,)))


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
