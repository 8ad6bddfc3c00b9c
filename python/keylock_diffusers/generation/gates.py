"""Where LoRAs that are bound to words count: maps of these words, read out in one step for the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keylock_diffusers.denoisers.base import Size
from keylock_diffusers.generation.maps import conditional
from keylock_diffusers.processors.contract import Readout
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import Row, TextLayout

_WIDTH = 0.08  # of the edge, as the logistic's scale, in units of a map's largest value


class _Gate(NamedTuple):
    """One LoRA that is bound to a word."""

    row: int  # its picture
    number: int  # which of the row's LoRAs
    positions: tuple[int, ...]  # of the word's tokens among all that the row reads
    threshold: float


class Gates:
    """Collects a batch's maps of the words that its LoRAs are bound to; a `keylock_diffusers.processors.Readout`.

    What is read lies in tensors that stay where they are, one a layer, so that a captured step fills them again.

    Args:
        rows: the conditional rows, a picture each.
        layout: of what they read.
        sizes: per cross-attention layer, its height and width.
        device: of the layers.
    """

    def __init__(
        self, rows: Sequence[Row], layout: TextLayout, sizes: Mapping[str, Size], device: torch.device
    ) -> None:
        self._sizes = sizes
        self._gates = []
        for row, held in enumerate(rows):
            for number, use in enumerate(held.loras):
                if use.bound is not None:
                    places = enumerate(use.bound.places)
                    spots = tuple(layout.positions(n)[place] for n, own in places for place in own)
                    self._gates.append(_Gate(row, number, spots, use.bound.threshold))
        width = max((sum(len(g.positions) for g in self._gates if g.row == row) for row in range(len(rows))), default=0)
        self._own = torch.full((len(rows), width), -1, dtype=torch.int32)
        self._columns = []  # of each gate, among its row's tokens that are read
        taken = [0] * len(rows)
        for gate in self._gates:
            first = taken[gate.row]
            taken[gate.row] += len(gate.positions)
            self._columns.append(slice(first, taken[gate.row]))
            self._own[gate.row, self._columns[-1]] = torch.tensor(gate.positions, dtype=torch.int32)
        self._own = self._own.to(device)
        self._tokens, self._rows = self._own, slice(0, len(rows))
        self._read: dict[str, Tensor] = {}  # [gates, N] per layer
        self._maps: dict[int, Tensor] = {}  # [height, width] by gate

    def lay_out(self, parts: Sequence[str]) -> Gates:
        """Takes the conditional rows of a row layout."""
        self._tokens, self._rows = conditional(self._own, parts)
        return self

    def wanted(self, layer: str, rows: int, pixels: int) -> tuple[Tensor, None] | None:
        """See `keylock_diffusers.processors.Readout`."""
        return (self._tokens, None) if layer in self._sizes else None

    def receive(self, layer: str, read: Tensor) -> None:  # [B, H, N, M]
        """See `keylock_diffusers.processors.Readout`."""
        own = read[self._rows].detach()
        # Each row by itself: no sum may go over others' tokens, not even times 0.
        seen = torch.stack(
            [
                own[gate.row, ..., columns].float().sum(-1).mean(0)
                for gate, columns in zip(self._gates, self._columns, strict=True)
            ]
        )
        if layer not in self._read:
            self._read[layer] = torch.zeros_like(seen)
        self._read[layer].copy_(seen)

    def commit(self, live: Sequence[bool], parts: int, held: Personalization) -> None:
        """What a step has read becomes where the LoRAs count in the next.

        Args:
            live: which pictures were drawn in it.
            parts: how many rows each has.
            held: the batch's.
        """
        if not self._read:
            return
        finest = max(self._sizes.values(), key=math.prod)
        for number, gate in enumerate(self._gates):
            if live[gate.row]:
                maps = [self._read[layer][number].view(1, 1, *self._sizes[layer]) for layer in self._read]
                self._maps[number] = torch.sigmoid((_joined(maps, finest) - gate.threshold) / _WIDTH)
        self.confine(parts, held)

    def confine(self, parts: int, held: Personalization) -> None:
        """Puts in place, of all halves of guidance, what the last step has read."""
        count = len(self._own)
        held.confine(
            {
                (part * count + self._gates[number].row, self._gates[number].number): seen
                for number, seen in self._maps.items()
                for part in range(parts)
            }
        )


class Several:
    """Several readouts of one pass; a `keylock_diffusers.processors.Readout`."""

    def __init__(self, *readouts: Readout) -> None:
        self._readouts = readouts
        self._wanted: dict[str, list[tuple[Readout, int]]] = {}

    def wanted(self, layer: str, rows: int, pixels: int) -> tuple[Tensor, None] | None:
        """See `keylock_diffusers.processors.Readout`."""
        asked = [(one, found[0]) for one in self._readouts if (found := one.wanted(layer, rows, pixels)) is not None]
        self._wanted[layer] = [(one, tokens.shape[1]) for one, tokens in asked]
        return (torch.cat([tokens for _, tokens in asked], 1), None) if asked else None

    def receive(self, layer: str, read: Tensor) -> None:
        """See `keylock_diffusers.processors.Readout`."""
        first = 0
        for one, count in self._wanted[layer]:
            one.receive(layer, read[..., first : first + count])
            first += count


def _joined(maps: Sequence[Tensor], size: Size) -> Tensor:  # [height, width] in 0..1
    """The mean of layers' maps [1, 1, h, w], each over its largest value, a little blurred, over its own."""
    resized = [F.interpolate(_over_its_largest(one), size, mode="bilinear") for one in maps]
    mean = torch.stack(resized).mean(0)
    blurred = F.avg_pool2d(F.pad(mean, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return _over_its_largest(blurred)[0, 0]


def _over_its_largest(seen: Tensor) -> Tensor:
    return seen / seen.amax().clamp(min=1e-6)
