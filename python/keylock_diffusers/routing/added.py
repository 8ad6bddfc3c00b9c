"""A batch's concepts that add to keys and values at their own words, as updates with given coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keylock_diffusers.concepts import AddedConcept
from keylock_diffusers.routing.rows import Row, State, TextLayout

_SIDES = {"to_k": "keys", "to_v": "values"}


class AddedRouting:
    """The `AddedConcept`s of a batch's rows: a slot for each word of theirs that a side of a layer learned.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        held = (use.concept for row in rows for use in row.uses)
        self.concepts = list({id(one): one for one in held if isinstance(one, AddedConcept)}.values())
        self._layers: dict[tuple[int, str], dict[str, Tensor]] = {}

    def coefficients(
        self, side: str, layout: TextLayout, states: Sequence[State], device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Slots [B, R] and coefficients [B, T', R] of a side's updates; None if no row has any.

        Args:
            side: to_k or to_v.
            layout: of the rows' wordings.
            states: each row's.
            device: of both.
        """
        first, total = {}, 0
        for concept in self.concepts:
            first[id(concept)] = total
            total += len(getattr(concept, _SIDES[side]))
        columns = [
            [
                (first[id(use.concept)] + word, use, state.concepts[place], word)
                for place, use in enumerate(row.uses)
                if isinstance(use.concept, AddedConcept)
                for word in range(len(getattr(use.concept, _SIDES[side])))
            ]
            for row, state in zip(self._rows, states, strict=True)
        ]
        if not any(columns):
            return None
        size = len(self._rows), max(map(len, columns))
        slots = torch.full(size, -1, dtype=torch.int32)
        made = torch.zeros(size[0], layout.length, size[1], dtype=torch.float32)
        for row, own in enumerate(columns):
            for column, (slot, use, counts, word) in enumerate(own):
                slots[row, column] = slot
                for wording, places in enumerate(use.places if counts else ()):
                    for position, number in places:
                        if number == word:
                            made[row, layout.tokens * wording + position, column] = use.strength
        return slots.to(device), made.to(device)

    def table(self, layer: str, side: str, width: int) -> Tensor:  # [S, O] float32
        """A layer's output vectors, in the order of the slots; a concept that does not change it adds nothing."""
        parts = []
        for concept in self.concepts:
            key = id(concept), side
            if key not in self._layers:
                self._layers[key] = concept.per_layer(_SIDES[side])
            found = self._layers[key].get(layer)
            parts.append(torch.zeros(len(getattr(concept, _SIDES[side])), width) if found is None else found.float())
        return torch.cat(parts)
