"""A batch's low-rank adapters as updates of projections: which row adds what, where, and from which step on.

Text encoders and denoisers share it. The factors lie in tables of a pool, one pair a projection, in which each adapter
has one range of rows; what a batch has of its own is small: slots, strengths and weights of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from keylock_diffusers.checks import whole
from keylock_diffusers.denoisers.base import Size
from keylock_diffusers.denoisers.projections import weight_shape, weight_shapes
from keylock_diffusers.loras import AdapterPool, LoraBank, LowRank
from keylock_diffusers.masks import area_share
from keylock_diffusers.processors.contract import AdapterUpdates
from keylock_diffusers.routing.buffers import filled
from keylock_diffusers.routing.decomposition import output_scale


@dataclass(frozen=True)
class LoraCapacity:
    """The room for low-rank adapters, where all shapes must be the same whatever the rows carry.

    Args:
        adapters: how many are resident at a time.
        rank: the largest.
        slots: how many a row may carry.
        regions: whether they may have regions.
        convolutions: whether they may change convolutions over several pixels.

    Raises:
        ValueError: a number is not a whole one of at least 1.
    """

    adapters: int
    rank: int
    slots: int = 1
    regions: bool = False
    convolutions: bool = False

    def __post_init__(self) -> None:
        for name in ("adapters", "rank", "slots"):
            whole(getattr(self, name), f"LoraCapacity: {name}", 1)


@dataclass(frozen=True)
class BoundTo:
    """The word that an adapter is bound to: it counts at the word's tokens, and at the pixels that attend to them.

    Args:
        word: the word.
        threshold: see `keylock_diffusers.Attention`.
        places: where it stands, positions in each of the row's wordings; none in those that are not there.
    """

    word: str
    threshold: float = 0.4
    places: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class AdapterUse:
    """One adapter of one row, as far as one model is concerned.

    Args:
        updates: of the model's projections, by name.
        strength: a factor.
        blocks: further factors by the projection's name; 1 where there is none.
        region: where it counts, weights in 0..1; None: everywhere.
        wordings: which of the row's wordings it counts in; None: all.
        bound: the word it is bound to; None: to none.
    """

    updates: Mapping[str, LowRank]
    strength: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    region: Tensor | None = None  # [height, width]
    wordings: frozenset[int] | None = None
    bound: BoundTo | None = None

    @property
    def limited(self) -> bool:
        """Whether it does not count everywhere."""
        return self.region is not None or self.wordings is not None or self.bound is not None

    def strength_of(self, name: str) -> float:
        """The factor on up @ down of a projection."""
        update = self.updates.get(name)
        return 0.0 if update is None else self.strength * self.blocks.get(name, 1.0) * update.scale


Store = Callable[[Mapping[str, tuple[int, ...]], torch.device, torch.dtype], AdapterPool]


def store_of(bank: LoraBank | None = None, capacity: LoraCapacity | None = None) -> Store:
    """A store of a bank's pools, or of pools that nobody else has."""
    rows = None if capacity is None else capacity.adapters * capacity.rank
    own: dict[Any, AdapterPool] = {}

    def pool(weights: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> AdapterPool:
        if bank is not None:
            return bank.pool(weights, device, dtype, rows)
        key = tuple(weights.items()), device, dtype
        if key not in own:
            own[key] = AdapterPool(weights, device, dtype, rows=rows)
        return own[key]

    return pool


class AdapterRouting:
    """The adapters of a batch's rows in one model.

    Args:
        rows: per row, its adapters.
        store: gives the pool of a model's weights, by their shapes, on a device.
        capacity: makes all shapes the same whatever the rows carry; default as much room as `rows` need.
        buffers: tensors of an earlier batch, which are filled again where shapes are the same.

    Attributes:
        updates: what each projection adds, by its name; empty before `prepare`.

    Raises:
        ValueError: the rows do not fit into the capacity.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[AdapterUse]],
        store: Store,
        capacity: LoraCapacity | None = None,
        buffers: dict[Any, Tensor] | None = None,
    ) -> None:
        self._rows = [list(row) for row in rows]
        self._store, self._capacity = store, capacity
        if capacity is not None:
            _check_room(self._rows, capacity)
        given = {id(use.updates): use.updates for row in rows for use in row}
        self._adapters = [updates for updates in given.values() if updates]
        self._slots = max(map(len, self._rows), default=0) if capacity is None else capacity.slots
        self._buffers = {} if buffers is None else buffers
        self._held: Any = None
        self._all = torch.empty(0)  # [L, B, J], strengths where every adapter is switched on
        self._scales: dict[str, Tensor] = {}  # [B, O], likewise
        self._made: set[Any] = set()  # token weights that were filled
        self._maps: dict[tuple[int, int], Tensor] = {}  # by row and number, where bound adapters count [height, width]
        self._on = [[True] * len(row) for row in self._rows]
        self.updates: dict[str, AdapterUpdates] = {}

    def __bool__(self) -> bool:
        """Whether there is room for any."""
        return self._slots > 0

    def prepare(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        *,
        size: Callable[[str], Size | None] = lambda name: None,
        wordings: Callable[[str], Tensor | None] = lambda name: None,
        bring: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Fills what the projections read; every adapter is switched on.

        Args:
            modules: the model's projections by name, all of them.
            device: where they compute.
            dtype: what they compute in.
            size: the height and width of what a projection gives; None: it has no pixels, and a region counts by its
                share of the picture.
            wordings: where a projection reads text, which wording each of its tokens belongs to, int64 [N].
            bring: brings an offloaded projection's weight to where it can be read.
        """
        self.release()
        self._scales, self._made = {}, set()
        if not self:
            return
        held = self._held = self._store(weight_shapes(modules), device, dtype).hold(self._adapters)
        names = [name for name, module in modules.items() if self._reaches(name, module)]
        # By where they lie in the tables, as the op wants their offsets.
        order = sorted(zip(held.first, self._adapters, strict=True), key=lambda one: one[0])
        flat = [name for name in names if is_flat(modules[name])]
        slots = self._fill("slots", self._slots_of(flat, [adapter for _, adapter in order]), device)
        offsets = self._fill("offsets", self._offsets_of(flat, order), device)
        self._all = torch.tensor([[self._padded(row, name) for row in self._rows] for name in names])
        strengths = self._fill("strengths", self._all.view(len(names), len(self._rows), self._slots), device)
        first = dict(zip(map(id, self._adapters), held.first, strict=True))
        at = {name: place for place, name in enumerate(flat)}
        for number, name in enumerate(names):
            up, down = held.tables(name)  # type: ignore[misc] # there is one, since it was filled
            weights = self._token_weights(size(name), wordings(name), device)
            scale = self._output_scale(name, modules[name], device, bring)
            rank = max((adapter[name].rank for adapter in self._adapters if name in adapter), default=0)
            if self._capacity is not None:
                rank = self._capacity.rank
            own: dict[str, Any] = {"strength": strengths[number], "token_weights": weights, "output_scale": scale}
            if name in at:
                own |= {"down": down, "offsets": offsets[at[name]], "slots": slots[at[name]]}
            else:
                table = down.view(len(down), *weight_shape(modules[name])[1:])  # which one pixel's are flat in
                rows, kernels = self._kernels(name, table, first, rank)
                own["slots"] = self._fill(("slots", name), rows, device)
                own["kernels"] = self._fill(("kernels", name), kernels, device)
            # On a CPU to be told would mean to look.
            self.updates[name] = AdapterUpdates(up, max_rank=len(up) if device.type == "cpu" else rank, **own)

    def release(self) -> None:
        """Gives the adapters' rows back to the pool; nothing reads them after that."""
        self.updates = {}
        if self._held is not None:
            self._held.release()
            self._held = None

    def switch(self, on: Sequence[Sequence[bool]]) -> None:
        """Puts in place which of each row's adapters count; one that does not is exactly nothing."""
        switched = [list(row) for row in on]
        if switched == self._on or not self.updates:
            return
        self._on = switched
        counts = torch.tensor([[*row, *[False] * (self._slots - len(row))] for row in switched])
        strengths = self._buffers["strengths"]
        strengths.copy_(torch.where(counts, self._all.view_as(strengths), 0))
        for name, scale in self._scales.items():  # whose rows have one adapter each
            whole = torch.tensor([all(row) for row in switched], device=scale.device)[:, None]
            self._buffers["scale", name].copy_(torch.where(whole, scale, 1))

    def confine(self, maps: Mapping[tuple[int, int], Tensor]) -> None:
        """Puts in place where adapters that are bound to words count: by row and number, weights [height, width]."""
        self._maps |= maps
        for key in self._made:
            _, size, tokens = key
            if tokens is None:
                for (row, number), seen in maps.items():
                    self._buffers[key][row, number] = area_share(seen, size or (1, 1)).to(self._buffers[key].device)

    def of_vectors(self, name: str, places: Sequence[tuple[int, int]]) -> AdapterUpdates | None:
        """What a projection adds to vectors [S, 1, K], each as if it were a token of a (row, wording)."""
        own = self.updates.get(name)
        if own is None:
            return None
        at = torch.tensor([row for row, _ in places], device=own.slots.device)
        counts = torch.zeros(len(places), self._slots, dtype=torch.bool)
        for place, (row, wording) in enumerate(places):
            for number, use in enumerate(self._rows[row]):
                counts[place, number] = use.bound is None and (use.wordings is None or wording in use.wordings)
        return own._replace(
            slots=own.slots[at],
            strength=torch.where(counts.to(own.strength.device), own.strength[at], 0),
            token_weights=None,
            output_scale=None if own.output_scale is None else own.output_scale[at],
        )

    def key(self, row: int, wording: int) -> tuple[Any, ...]:
        """Names what a row's adapters make of a token in one of its wordings; where the key is the same, so is that."""
        return tuple(
            (id(use.updates), use.strength, id(use.blocks) if use.blocks else 0, on)
            for use, on in zip(self._rows[row], self._on[row], strict=True)
            if use.bound is None and (use.wordings is None or wording in use.wordings)
        )

    def _reaches(self, name: str, module: nn.Module) -> bool:
        if self._capacity is None:
            return any(name in adapter for adapter in self._adapters)
        return self._capacity.convolutions or is_flat(module)

    def _padded(self, row: Sequence[AdapterUse], name: str) -> list[float]:
        return [use.strength_of(name) for use in row] + [0.0] * (self._slots - len(row))

    def _slots_of(self, names: Sequence[str], order: Sequence[Mapping[str, LowRank]]) -> Tensor:  # [L, B, J] int32
        """An adapter's slot is twice its place: between two of them lie rows of others, or none."""
        place = {id(adapter): 2 * number for number, adapter in enumerate(order)}
        found = torch.full((len(names), len(self._rows), self._slots), -1, dtype=torch.int32)
        for row, uses in enumerate(self._rows):
            for number, use in enumerate(uses):
                if not use.updates:
                    continue
                there = torch.tensor([name in use.updates for name in names], dtype=torch.bool)
                found[there, row, number] = place[id(use.updates)]
        return found

    def _offsets_of(self, names: Sequence[str], order: Sequence[tuple[int, Mapping[str, LowRank]]]) -> Tensor:
        """Where each adapter's rows begin and end, int32 [L, 2S]."""
        room = len(order) if self._capacity is None else len(self._rows) * self._slots
        found = []
        for name in names:
            ends = [(row, row + (adapter[name].rank if name in adapter else 0)) for row, adapter in order]
            flat = [number for pair in ends for number in pair]
            found.append(flat + flat[-1:] * (2 * (room - len(order))) if flat else [0] * 2 * room)
        return torch.tensor(found, dtype=torch.int32).view(len(names), 2 * room)

    def _kernels(
        self,
        name: str,
        table: Tensor,  # [P, C, kh, kw]
        first: Mapping[int, int],
        rank: int,
    ) -> tuple[Tensor, Tensor]:  # [B, J * R] int32, [B, J * R, C, kh, kw]
        """Each row's own kernels of a convolution, and the rows of `up` that go with them."""
        slots = torch.full((len(self._rows), self._slots * rank), -1, dtype=torch.int32)
        for row, uses in enumerate(self._rows):
            for number, use in enumerate(uses):
                if name in use.updates:
                    own = use.updates[name].rank
                    begin = first[id(use.updates)]
                    slots[row, number * rank : number * rank + own] = torch.arange(begin, begin + own)
        at = slots.to(table.device)
        there = (at >= 0).view(*at.shape, 1, 1, 1)
        return slots, torch.where(there, table[at.clamp(0).long()], 0)

    def _token_weights(self, size: Size | None, wordings: Tensor | None, device: torch.device) -> Tensor | None:
        """Where each row's adapters count, [B, J, N] float32; None where all count everywhere."""
        limited = any(use.limited for row in self._rows for use in row)
        if not (limited or (self._capacity is not None and self._capacity.regions)):
            return None
        key = ("weights", size, None if wordings is None else len(wordings))
        if key in self._made:
            return self._buffers[key]
        count = math.prod(size or (1, 1)) if wordings is None else len(wordings)
        made = torch.ones(len(self._rows), self._slots, count)
        for row, uses in enumerate(self._rows):
            for number, use in enumerate(uses):
                if wordings is not None:
                    if use.wordings is not None:
                        made[row, number] = torch.isin(wordings, torch.tensor(sorted(use.wordings))).float()
                    elif use.bound is not None:
                        made[row, number] = _at_words(use.bound, wordings)
                elif use.bound is not None:
                    seen = self._maps.get((row, number))
                    made[row, number] = 0 if seen is None else area_share(seen, size or (1, 1))
                elif use.region is not None:
                    made[row, number] = area_share(use.region, size or (1, 1))
        self._made.add(key)
        return self._fill(key, made, device)

    def _output_scale(
        self, name: str, module: nn.Module, device: torch.device, bring: Callable[[str], None]
    ) -> Tensor | None:  # [B, O] float32
        """What weight-decomposed adapters multiply a projection's outputs by; None where no row has one there."""
        found = [
            (row, use.updates[name], use.strength_of(name))
            for row, uses in enumerate(self._rows)
            for use in uses
            if name in use.updates and use.updates[name].magnitude is not None
        ]
        if not found:
            return None
        bring(name)
        made = torch.ones(len(self._rows), weight_shape(module)[0])
        for row, update, strength in found:
            if strength != 0:
                made[row] = output_scale(module, name, update, strength)
        self._scales[name] = made.to(device)
        return self._fill(("scale", name), made, device)

    def _fill(self, key: Any, value: Tensor, device: torch.device) -> Tensor:
        self._buffers[key] = filled(self._buffers.get(key), value.to(device, copy=True))
        return self._buffers[key]


def _at_words(bound: BoundTo, wordings: Tensor) -> Tensor:  # [N]
    """1 at the tokens of the word that an adapter is bound to, 0 elsewhere."""
    made = torch.zeros(len(wordings))
    for wording, places in enumerate(bound.places):
        made[(wordings == wording).nonzero()[list(places), 0]] = 1
    return made


def is_flat(module: nn.Module) -> bool:
    """Whether a projection is one product per token: a linear layer, or a convolution over one pixel."""
    if not isinstance(module, nn.Conv2d):
        return True
    return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding in ((0, 0), 0, "valid", "same")


def _check_room(rows: Sequence[Sequence[AdapterUse]], capacity: LoraCapacity) -> None:
    for uses in rows:
        if len(uses) > capacity.slots:
            raise ValueError(f"lora_capacity has {capacity.slots} slots a row, but one has {len(uses)} LoRAs")
        for use in uses:
            rank = max((update.rank for update in use.updates.values()), default=0)
            if rank > capacity.rank:
                raise ValueError(f"lora_capacity has room for rank {capacity.rank}, but a LoRA has {rank}")
            if (use.region is not None or use.bound is not None) and not capacity.regions:
                raise ValueError("lora_capacity has no room for regions of LoRAs: give it regions=True")
            if any(update.magnitude is not None for update in use.updates.values()):
                raise ValueError("lora_capacity has no room for weight-decomposed LoRAs (DoRA)")
            if not capacity.convolutions and any(
                update.down.ndim == 4 and update.down.shape[2:] != (1, 1) for update in use.updates.values()
            ):
                raise ValueError("lora_capacity has no room for LoRAs of convolutions: give it convolutions=True")
