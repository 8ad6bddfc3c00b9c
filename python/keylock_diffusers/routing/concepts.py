"""A batch's concepts as updates of projections: which row's keys and values are edited by what, from when on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keylock_diffusers.concepts import KeyLockedConcept
from keylock_diffusers.denoisers.unet import base_layer
from keylock_diffusers.processors.contract import RowUpdates
from keylock_diffusers.processors.projection import keys_and_values, project_vectors
from keylock_diffusers.routing import edits
from keylock_diffusers.routing.adapters import AdapterRouting
from keylock_diffusers.routing.added import AddedRouting
from keylock_diffusers.routing.rows import ConceptUse, Row, State, TextLayout

Pair = tuple[Tensor, Tensor]  # a layer's keys and values
Pairs = dict[str, Pair]
Held = tuple[tuple[int, ...], ...]  # per row, which of its concepts count, by their place in it


class _Entry(NamedTuple):
    """A concept, and a (row, wording) with whose adapters its output vectors are made."""

    concept: Any
    place: tuple[int, int]


class ConceptRouting:
    """The concepts of a batch's rows.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.concepts = list({id(use.concept): use.concept for row in rows for use in row.uses}.values())
        self._added = AddedRouting(rows)
        self._width = max((len(row.uses) for row in rows), default=0)
        self._gates: dict[Any, tuple[edits.Gates, Tensor]] = {}

    def projecting(
        self, text: Tensor, key_text: Tensor, layout: TextLayout, states: Sequence[State], adapters: AdapterRouting
    ) -> Callable[[str, Any], Pair]:
        """What projects a layer's keys and values, given its name and its module.

        Args:
            text: what values read, [B, T', D].
            key_text: what keys read, [B, T', D].
            layout: of the wordings in it.
            states: each row's.
            adapters: which the rows have in the same layers, switched to these states: a concept is then the concept
                of a model that has them in its weights.
        """
        self._gates = {}  # concepts may have been written to since
        entries: dict[Any, _Entry] = {}
        slots: list[dict[tuple[int, int], int]] = []  # per wording, the slot of each row's concepts
        numbers: dict[Any, int] = {}
        for wording in range(layout.wordings):
            slots.append({})
            for number, row in enumerate(self._rows):
                for place, use in _locked(row):
                    key = id(use.concept), adapters.key(number, wording)
                    entries.setdefault(key, _Entry(use.concept, (number, wording)))
                    slots[-1][number, place] = numbers.setdefault(key, len(numbers))
        held: list[list[tuple[int, ...]]] = [
            [
                tuple(
                    place
                    for place, use in _locked(row)
                    if state.concepts[place] and row.regions.has(wording, use.concept.placeholder)
                )
                for row, state in zip(self._rows, states, strict=True)
            ]
            for wording in range(layout.wordings)
        ]
        locked = {
            "to_k": self._coefficients(key_text, ("local",), layout, held, slots, list(entries.values())),
            "to_v": self._coefficients(text, ("local", "global"), layout, held, slots, list(entries.values())),
        }
        added = {side: self._added.coefficients(side, layout, states, text.device) for side in locked}
        tables = _Tables(list(entries.values()), text, adapters)

        def project(layer: str, attn: Any) -> Pair:
            def updates(projection: str) -> RowUpdates | None:
                side = projection.rpartition(".")[2]
                found = []
                if (given := locked[side]) is not None:
                    found.append(RowUpdates(tables(attn, layer, side), *given))
                if (given := added[side]) is not None:
                    width = base_layer(getattr(attn, side)).out_features
                    found.append(RowUpdates(self._added.table(layer, side, width).to(text.device), *given))
                return _joined(found) if found else None

            return keys_and_values(attn, layer, (key_text, text), updates, adapters.updates.get)

        return project

    def _coefficients(
        self,
        text: Tensor,
        locks: tuple[str, ...],
        layout: TextLayout,
        held: Sequence[Sequence[tuple[int, ...]]],
        slots: Sequence[dict[tuple[int, int], int]],
        entries: Sequence[_Entry],
    ) -> tuple[Tensor, Tensor] | None:
        """Slots [B, 2R] and coefficients [B, T', 2R] of the rows' concepts with one of `locks`; None if none counts.

        Where wordings have adapters of their own, a concept has a slot for each kind of them, R of them in all.
        """
        locked: list[Held] = [
            tuple(
                tuple(place for place in places if row.uses[place].lock in locks)
                for row, places in zip(self._rows, of_wording, strict=True)
            )
            for of_wording in held
        ]
        if not any(locked[0]):
            return None
        directions = torch.stack([entry.concept.direction for entry in entries]).to(text.device)
        kinds = list({tuple(sorted(of.items())): of for of in slots}.values())
        columns = [self._gates_of(locked[0], kind, text.device)[0].pairs(len(entries)) for kind in kinds]
        made = []
        for part, of_wording, own in zip(layout.split(text), locked, slots, strict=True):
            found = edits.coefficients(part, directions, *self._gates_of(of_wording, own, text.device))
            nothing = torch.zeros_like(found)
            made.append(torch.cat([found if kind == own else nothing for kind in kinds], -1))
        return torch.cat(columns, 1), torch.cat(made, 1)

    def _gates_of(
        self, held: Held, slot_of: dict[tuple[int, int], int], device: torch.device
    ) -> tuple[edits.Gates, Tensor]:
        """The gates [B, R] of what each row holds, and how a row's concepts combine [B, R, R]; made once for each."""
        key = held, tuple(sorted(slot_of.items())), device
        if key not in self._gates:
            size = len(self._rows), self._width
            slots = torch.full(size, -1, dtype=torch.int32)
            beta, tau, strength = (torch.full(size, number, dtype=torch.float32) for number in (0.0, 1.0, 0.0))
            mix = torch.zeros(*size, self._width, dtype=torch.float32)
            for number, (row, places) in enumerate(zip(self._rows, held, strict=True)):
                for place in places:
                    use = row.uses[place]
                    slots[number, place] = slot_of[number, place]
                    beta[number, place], tau[number, place], strength[number, place] = use.beta, use.tau, use.strength
                if places:
                    where = torch.tensor(places)
                    mix[number, where[:, None], where] = row.mix(places)
            gates = edits.Gates(*(t.to(device) for t in (slots, beta, tau, strength)))
            self._gates[key] = gates, mix.to(device)
        return self._gates[key]


def _locked(row: Row) -> list[tuple[int, ConceptUse]]:
    """A row's key-locked concepts with their places in it."""
    return [(place, use) for place, use in enumerate(row.uses) if isinstance(use.concept, KeyLockedConcept)]


def _joined(parts: Sequence[RowUpdates]) -> RowUpdates:
    """Updates of several kinds in one table."""
    first, *others = parts
    for other in others:
        moved = torch.where(other.slots >= 0, other.slots + len(first.u), other.slots)
        first = RowUpdates(
            torch.cat([first.u, other.u]),
            torch.cat([first.slots, moved.to(first.slots)], 1),
            torch.cat([first.coefficients, other.coefficients], 2),
        )
    return first


class _Tables:
    """The output vectors [2S, O] of each layer's keys and values."""

    def __init__(self, entries: Sequence[_Entry], text: Tensor, adapters: AdapterRouting) -> None:
        self._dtype, device = text.dtype, text.device
        self._adapters, self._places = adapters, [entry.place for entry in entries]
        if entries:
            concepts = [entry.concept for entry in entries]
            self._targets = _stacked(concept.target_input for concept in concepts).to(device)
            self._supers = _stacked(concept.super_class_encoding for concept in concepts).to(device)
            self._values = [concept.values_per_layer() for concept in concepts]

    def __call__(self, attn: Any, layer: str, side: str) -> Tensor:
        values = _stacked(value[layer] for value in self._values).to(self._targets.device)
        projection = getattr(attn, side)
        adapters = self._adapters.of_vectors(f"{layer}.{side}", self._places)

        def project(vectors: Tensor) -> Tensor:
            return project_vectors(projection, vectors, self._dtype, adapters)

        return edits.table(project, side, self._targets, self._supers, values)


def _stacked(vectors: Iterable[Tensor]) -> Tensor:  # [S, D] float32
    # Each by itself: autocast stacks no half precision but its own.
    return torch.stack([vector.float() for vector in vectors])
