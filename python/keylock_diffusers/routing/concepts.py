"""A batch's concepts as updates of projections: which row's keys and values are edited by what, from when on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.processors.contract import RowUpdates
from keylock_diffusers.processors.projection import keys_and_values
from keylock_diffusers.routing import edits
from keylock_diffusers.routing.rows import ConceptUse, Row, TextLayout

Pair = tuple[Tensor, Tensor]  # a layer's keys and values
Pairs = dict[str, Pair]
Held = tuple[tuple[int, ...], ...]  # per row, which of its concepts count, by their place in it


class ConceptRouting:
    """The concepts of a batch's rows.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.concepts = list({id(use.concept): use.concept for row in rows for use in row.uses}.values())
        self._slot_of = {id(concept): slot for slot, concept in enumerate(self.concepts)}
        self._width = max((len(row.uses) for row in rows), default=0)
        self._gates: dict[tuple[Held, torch.device], tuple[edits.Gates, Tensor]] = {}
        self.scheduled = any(row.start for row in rows)

    def waiting(self, steps: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
        """Which rows' concepts do not count yet, each in its own (step, of how many)."""
        return tuple(step / total < row.start for row, (step, total) in zip(self._rows, steps, strict=True))

    def projecting(
        self, text: Tensor, key_text: Tensor, layout: TextLayout, *, early: bool
    ) -> Callable[[str, Any], Pair]:
        """What projects a layer's keys and values, given its name and its module.

        Args:
            text: what values read, [B, T', D].
            key_text: what keys read, [B, T', D].
            layout: of the wordings in it.
            early: before the rows' starts rather than after them.
        """
        self._gates = {}  # concepts may have been written to since
        sides = {
            "to_k": self._coefficients(key_text, ("local",), early, layout),
            "to_v": self._coefficients(text, ("local", "global"), early, layout),
        }
        tables = _Tables(self.concepts, text)

        def project(layer: str, attn: Any) -> Pair:
            def updates(projection: str) -> RowUpdates | None:
                side = projection.rpartition(".")[2]
                if sides[side] is None:
                    return None
                slots, coefficients = sides[side]  # type: ignore[misc]
                return RowUpdates(tables(attn, layer, side), slots, coefficients)

            return keys_and_values(attn, layer, (key_text, text), updates)

        return project

    def _coefficients(
        self, text: Tensor, locks: tuple[str, ...], early: bool, layout: TextLayout
    ) -> tuple[Tensor, Tensor] | None:
        """Slots [B, 2R] and coefficients [B, T', 2R] of the rows' concepts with one of `locks`; None if none counts."""

        def counts(row: Row, use: ConceptUse, wording: int) -> bool:
            delayed = early and row.start > 0
            return use.lock in locks and not delayed and row.regions.has(wording, use.concept.placeholder)

        held: list[Held] = [
            tuple(tuple(place for place, use in enumerate(row.uses) if counts(row, use, wording)) for row in self._rows)
            for wording in range(layout.wordings)
        ]
        if not any(held[0]):
            return None
        directions = torch.stack([concept.direction for concept in self.concepts]).to(text.device)
        parts = [
            edits.coefficients(part, directions, *self._gates_of(of_wording, text.device))
            for part, of_wording in zip(layout.split(text), held, strict=True)
        ]
        slots = self._gates_of(held[0], text.device)[0].pairs(len(self.concepts))
        return slots, torch.cat(parts, 1)

    def _gates_of(self, held: Held, device: torch.device) -> tuple[edits.Gates, Tensor]:
        """The gates [B, R] of what each row holds, and how a row's concepts combine [B, R, R]; made once for each."""
        if (held, device) not in self._gates:
            size = len(self._rows), self._width
            slots = torch.full(size, -1, dtype=torch.int32)
            beta, tau, strength = (torch.full(size, number, dtype=torch.float32) for number in (0.0, 1.0, 0.0))
            mix = torch.zeros(*size, self._width, dtype=torch.float32)
            for number, (row, places) in enumerate(zip(self._rows, held, strict=True)):
                for place in places:
                    use = row.uses[place]
                    slots[number, place] = self._slot_of[id(use.concept)]
                    beta[number, place], tau[number, place], strength[number, place] = use.beta, use.tau, use.strength
                if places:
                    where = torch.tensor(places)
                    mix[number, where[:, None], where] = row.mix(places)
            gates = edits.Gates(*(t.to(device) for t in (slots, beta, tau, strength)))
            self._gates[held, device] = gates, mix.to(device)
        return self._gates[held, device]


class _Tables:
    """The output vectors [2S, O] of each layer's keys and values."""

    def __init__(self, concepts: Sequence[Any], text: Tensor) -> None:
        self._dtype, device = text.dtype, text.device
        if concepts:
            self._targets = _stacked(concept.target_input for concept in concepts).to(device)
            self._supers = _stacked(concept.super_class_encoding for concept in concepts).to(device)
            self._values = [concept.values_per_layer() for concept in concepts]

    def __call__(self, attn: Any, layer: str, side: str) -> Tensor:
        values = _stacked(value[layer] for value in self._values).to(self._targets.device)
        return edits.table(attn, side, self._targets, self._supers, values, self._dtype)


def _stacked(vectors: Iterable[Tensor]) -> Tensor:  # [S, D] float32
    # Each by itself: autocast stacks no half precision but its own.
    return torch.stack([vector.float() for vector in vectors])
