"""What a row of the batch carries of concepts, and the keys and values that every layer makes of its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.concepts import Concept
from keylock_diffusers.routing import edits
from keylock_diffusers.routing.regions import RegionRouting

Pairs = dict[str, tuple[Tensor, Tensor]]  # a layer's keys and values


@dataclass(frozen=True)
class ConceptUse:
    """One concept in one row: its gate, its strength, and which streams it edits."""

    concept: Concept
    beta: float
    tau: float
    strength: float = 1.0
    lock: str = "local"  # "local": keys and values are edited; "global": values only


class ConceptRouting:
    """A batch's concepts: which row's keys and values are edited by what, and from when on.

    Args:
        uses: per prompt, the concepts it uses.
        rows: per row of the U-Net's batch, its prompt; -1 for none.
        starts: per prompt, the share of the steps before its concepts count.

    Raises:
        ValueError: one prompt uses the same concept twice, or starts outside [0, 1].
    """

    def __init__(self, uses: Sequence[Sequence[ConceptUse]], rows: Sequence[int], starts: Sequence[float]) -> None:
        if not all(0 <= start <= 1 for start in starts):
            raise ValueError(f"Personalization: starts must lie in [0, 1], got {list(starts)}")
        self._uses, self._rows, self._starts = [list(row) for row in uses], list(rows), list(starts)
        self.concepts = list({id(use.concept): use.concept for row in self._uses for use in row}.values())
        for row in self._uses:
            _gates_of([row], self.concepts)
        self.scheduled = any(self._starts)

    def waiting(self, step: int, steps: int) -> tuple[bool, ...]:
        """Which rows' subjects do not count yet in a step."""
        return tuple(row >= 0 and step / steps < self._starts[row] for row in self._rows)

    def project(
        self,
        layers: Mapping[str, Any],
        text: Tensor,
        key_text: Tensor,
        regions: RegionRouting,
        tokens: int,
        *,
        early: bool,
    ) -> Pairs:
        """Every layer's keys and values [B, T', C].

        Args:
            layers: the layers.
            text: what values read, [B, T', D].
            key_text: what keys read, [B, T', D].
            regions: which concepts each wording of a row's prompt names.
            tokens: of one wording.
            early: before the rows' starts rather than after them.
        """
        key_edits = self._edits(key_text, ("local",), early, regions, tokens)
        value_edits = self._edits(text, ("local", "global"), early, regions, tokens)
        edited = key_edits is not None or value_edits is not None
        tables = self._tables(layers, text) if edited else {}
        return edits.project_layers(layers, (key_text, text), tables, (key_edits, value_edits))

    def _edits(
        self, text: Tensor, locks: tuple[str, ...], early: bool, regions: RegionRouting, tokens: int
    ) -> edits.Edit | None:
        """The edit of the rows' concepts with one of `locks`; None if there are none."""
        rows: list[list[ConceptUse]] = [
            [use for use in self._uses[row] if use.lock in locks]
            if row >= 0 and not (early and self._starts[row])
            else []
            for row in self._rows
        ]
        if not any(rows):
            return None
        directions = torch.stack([concept.direction for concept in self.concepts]).to(text.device)
        gates, _ = _gates_of(rows, self.concepts)
        slots = gates.pairs(len(self.concepts)).to(text.device)
        parts = []
        for wording, part in enumerate(text.split(tokens, 1)):
            held = [
                [use if own.has(wording, use.concept.placeholder) else None for use in row]
                for row, own in zip(rows, regions.rows, strict=True)
            ]
            gates, mix = _gates_of(held, self.concepts)
            gates = edits.Gates(*(t.to(text.device) for t in (gates.slots, gates.beta, gates.tau, gates.strength)))
            parts.append(edits.coefficients(part, directions, gates, mix.to(text.device)))
        return slots, torch.cat(parts, 1)

    def _tables(self, layers: Mapping[str, Any], text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer, the output vectors [2S, O] of keys and of values."""
        device, dtype = text.device, text.dtype
        targets = torch.stack([concept.target_input for concept in self.concepts]).to(device)
        supers = torch.stack([concept.super_class_encoding for concept in self.concepts]).to(device).float()
        values = [concept.values_per_layer() for concept in self.concepts]
        return {
            name: edits.tables(attn, targets, supers, torch.stack([value[name] for value in values]).to(device), dtype)
            for name, attn in layers.items()
        }


def _gates_of(rows: Sequence[Sequence[ConceptUse | None]], concepts: Sequence[Concept]) -> tuple[edits.Gates, Tensor]:
    """The gates of a batch's rows and how each row's concepts combine [B, R, R].

    Raises:
        ValueError: a row uses a concept twice.
    """
    slot_of = {id(concept): slot for slot, concept in enumerate(concepts)}
    width = max((len(row) for row in rows), default=0)

    def table(value: Callable[[ConceptUse], float], empty: float, dtype: torch.dtype) -> Tensor:  # [B, R]
        values = [[empty if use is None else value(use) for use in row] + [empty] * (width - len(row)) for row in rows]
        return torch.tensor(values, dtype=dtype).reshape(len(rows), width)

    gates = edits.Gates(
        slots=table(lambda use: slot_of[id(use.concept)], -1, torch.int32),
        beta=table(lambda use: use.beta, 0.0, torch.float32),
        tau=table(lambda use: use.tau, 1.0, torch.float32),
        strength=table(lambda use: use.strength, 0.0, torch.float32),
    )
    return gates, edits.mixing(concepts, gates.slots, gates.strength)
