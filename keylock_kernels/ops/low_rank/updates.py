"""What the rows of a batch add to a projection, as every backend is handed it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Updates(NamedTuple):
    """Each batch row's updates of a projection: a coefficient per token times a row of `up`.

    With offsets a slot is an adapter, a range of rows of the tables. Without, it is one row, whose coefficient may
    have a gate, or be given.
    """

    up: Tensor  # [P, O]
    down: Tensor | None  # [P, K]
    offsets: Tensor | None  # [S + 1]: adapter k owns the rows offsets[k] : offsets[k + 1]
    slots: Tensor  # [B, J]
    beta: Tensor | None  # [P] or [B, J]
    tau: Tensor | None  # [P] or [B, J]
    strength: Tensor | None  # [B, J]
    token_weights: Tensor | None  # [B, J, N]
    coefficients: Tensor | None  # [B, N, J], instead of down and what follows it
    max_rank: int  # the most rows that a slot takes

    @property
    def family(self) -> str:
        """How the public functions are called that make such updates."""
        return "rank_one" if self.offsets is None else "low_rank"

    @property
    def choices(self) -> int:
        """S, of what slots may name."""
        return self.up.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def width(self) -> int:
        """R, how many rows of the tables a batch row takes at most; at least one for each slot."""
        return self.slots.shape[1] * max(self.max_rank, 1)

    def checked(self, op: str) -> Updates:
        """These, with max_rank as small as what rows take lets it be.

        Looks at slots and offsets on the CPU alone, since elsewhere looking would stall the device.

        Raises:
            ValueError: a slot or a row does not exist, or an adapter that is taken has more than max_rank rows.
        """
        if self.slots.device.type != "cpu":
            return self
        if self.slots.numel() > 0:
            low, high = (int(bound) for bound in torch.aminmax(self.slots))
            if low < -1 or high >= self.choices:
                wrong = low if low < -1 else high
                raise ValueError(f"{self.family}_{op}: slots must lie in [-1, {self.choices}), got {wrong}")
        if self.offsets is None:
            return self
        steps, end = self.offsets.tolist(), self.up.shape[0]
        if sorted((0, *steps, end)) != [0, *steps, end]:
            raise ValueError(f"{self.family}_{op}: offsets must not decrease and lie in [0, {end}], got {steps}")
        # Of those taken: between a pool's adapters lie rows that nobody has, as an adapter of any number of rows.
        taken = set(self.slots.flatten().tolist()) - {-1}
        most = max((steps[slot + 1] - steps[slot] for slot in taken), default=0)
        if most > self.max_rank:
            raise ValueError(f"{self.family}_{op}: max_rank is {self.max_rank}, and an adapter has {most} rows")
        return self._replace(max_rank=most)
