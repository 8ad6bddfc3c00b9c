"""The memories of a GPU, and the rules that an access to them keeps.

Global memory holds copies of the tensors that a launch was given, at addresses so far apart that a wrong one is in no
other tensor. Shared memory starts as NaN. Both remember who touched what since which barrier, so that a race is found
in whatever order the warps really ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .arithmetic import Run, operation
from .faults import Misaligned, OutOfBounds, Race, Unfenced, Unknown, Unwaited
from .program import SIZES, Statement
from .values import BITS, LOCAL, NUMBERS, Array, Operands

if TYPE_CHECKING:
    from .machine import Squad

# Who touches: block, how many barriers it has passed, warp, as one number (`Squad.who`).
_NOBODY, _IN_FLIGHT, _SEVERAL_WARPS, _SEVERAL_BLOCKS = -1, -2, 255, 1 << 62

# Where tensors lie, as exponents of their distance and as bytes: beyond what 32 bits count, as on a GPU.
_APART, _FIRST, _ALIGNED = 40, 1 << 39, 256


def _unordered(before: Array, now: Array) -> Array:
    """Another block, or another warp of the same block with no barrier in between."""
    return (before >= 0) & (before != now) & ((before >> 32 != now >> 32) | (before >> 8 == now >> 8))


def _joint(before: Array, now: Array) -> Array:
    return np.where(before >> 32 == now >> 32, now | _SEVERAL_WARPS, _SEVERAL_BLOCKS)


class Memory:
    """Bytes, and for each granule of them who wrote and who read it last."""

    def __init__(self, data: Array, granule: int) -> None:
        self.data, self.granule = data, granule
        self.cells = data.view(BITS[granule])
        self.writer = np.full(len(self.cells), _NOBODY)
        self.reader = np.full(len(self.cells), _NOBODY)

    def locate(self, squad: Squad, address: Array, size: int) -> Array:
        """Where in the data the addresses of the active lanes lie, of accesses of so many bytes."""
        raise NotImplementedError

    def _cells(self, squad: Squad, address: Array, size: int) -> Array:  # [active lanes, size / granule]
        if (address % size).any():
            raise Misaligned(f"{size} bytes at an address that is no multiple of them")
        start = self.locate(squad, address, size) // self.granule
        return start[:, None] + np.arange(size // self.granule)

    def load(self, squad: Squad, address: Array, size: int) -> Array:  # uint8 [active lanes, size]
        cells = self._cells(squad, address, size)
        self.watch_read(cells, squad.who()[:, None])
        return self.cells[cells].view(np.uint8)

    def store(self, squad: Squad, address: Array, data: Array) -> None:
        cells = self._cells(squad, address, data.shape[1])
        new = data.view(BITS[self.granule])
        self._watch_write(cells, squad.who()[:, None], self.cells[cells] == new)
        self.cells[cells] = new
        if (self.cells[cells] != new).any():
            raise Race("one instruction stores different values in one place")
        self.stored(cells)

    def stored(self, cells: Array) -> None:
        """Threads wrote there."""

    def watch_read(self, cells: Array, now: Array) -> None:
        before = self.writer[cells]
        if (before == _IN_FLIGHT).any():
            raise Unwaited("reads what an asynchronous copy has not been waited for")
        if _unordered(before, now).any():
            raise Race("reads what another warp wrote, with no barrier in between")
        now = np.broadcast_to(now, cells.shape)
        before = self.reader[cells]
        self.reader[cells] = np.where(_unordered(before, now), _joint(before, now), now)
        after = self.reader[cells]
        others = _unordered(after, now)
        if others.any():  # of this very instruction
            self.reader[cells[others]] = _joint(after, now)[others]

    def _watch_write(self, cells: Array, now: Array, same: Array) -> None:
        """Writes what is there already harm nobody: kernels store what several warps hold alike."""
        before = self.writer[cells]
        if (before == _IN_FLIGHT).any():
            raise Unwaited("writes where an asynchronous copy has not been waited for")
        if (_unordered(before, now) & ~same).any():
            raise Race("writes where another warp wrote, with no barrier in between")
        if (_unordered(self.reader[cells], now) & ~same).any():
            raise Race("writes what another warp read, with no barrier in between")
        self.writer[cells] = now


class Shared(Memory):
    """One block's after another.

    Asynchronous products read it through a proxy of their own: what threads store is theirs to see behind a fence that
    comes after the store, in the same warp or past a barrier. Asynchronous copies need none.
    """

    def __init__(self, blocks: int, size: int, granule: int) -> None:
        self.size = -(-size // 16) * 16
        super().__init__(np.full(blocks * self.size, 255, np.uint8), granule)
        self._unfenced = np.zeros(len(self.cells), bool)

    def stored(self, cells: Array) -> None:
        self._unfenced[cells] = True

    def fence(self, squad: Squad) -> None:
        """Products may read what the active warps stored, and what others did before the last barrier."""
        if not self._unfenced.any():
            return
        warps = squad.machine.warps
        acting = np.zeros((len(self.data) // self.size, warps), bool)
        acting[squad.active(squad.slot), squad.active(squad.thread) // 32] = True
        writer = self.writer.reshape(len(acting), -1)
        warp = writer & 255
        own = np.take_along_axis(acting, np.minimum(warp, warps - 1), 1) & (warp < warps)
        before = (writer >> 8 & 0xFFFFFF) < squad.machine.barriers[:, None]
        self._unfenced &= ~(own | before & acting.any(1)[:, None]).reshape(-1)

    def locate(self, squad: Squad, address: Array, size: int) -> Array:
        if len(address) and (address.min() < 0 or address.max() + size > self.size):
            raise OutOfBounds(f"shared memory has {self.size} bytes, not {address.max() + size} from {address.min()}")
        return squad.active(squad.slot) * self.size + address

    def expect(self, squad: Squad, address: Array, size: int) -> None:
        """From now on a copy is on its way to here."""
        cells = self._cells(squad, address, size)
        self._watch_write(cells, squad.who()[:, None], np.zeros(cells.shape, bool))
        self.writer[cells] = _IN_FLIGHT
        self._unfenced[cells] = False

    def land(self, squad: Squad, address: Array, data: Array) -> None:
        cells = self._cells(squad, address, data.shape[1])
        self.cells[cells] = data.view(BITS[self.granule])
        self.writer[cells] = squad.who()[:, None]

    def halves(self, squad: Squad, address: Array) -> tuple[Array, Array]:
        """16-bit elements that a product of each warp reads as one [w, ...], and the cells of the active warps'."""
        if address.min() < 0 or address.max() + 2 > self.size:
            raise OutOfBounds(f"shared memory has {self.size} bytes, not {address.max() + 2} from {address.min()}")
        first = np.arange(squad.lanes) % 32 == 0
        at = (squad.slot[first] * self.size)[:, None] + address.reshape(len(address), -1)
        cells = at[squad.everyone()[first]] // self.granule
        with squad.only(squad.everyone() & first):
            self.watch_read(cells, squad.who()[:, None])
        if self._unfenced[cells].any():
            raise Unfenced("reads what was stored, with no fence in between")
        return self.data.view(np.uint16)[at // 2].reshape(address.shape), cells


class Global(Memory):
    """The elements of the tensors; what lies between the elements of a view is out of bounds."""

    def __init__(self, tensors: Iterable[torch.Tensor], granule: int) -> None:
        elements: dict[int, list[torch.Tensor]] = {}  # by storage, the views of it
        for tensor in tensors:
            elements.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._index = {storage: number for number, storage in enumerate(elements)}
        self._sizes = np.array([views[0].untyped_storage().nbytes() for views in elements.values()])
        # Pointers keep what they are aligned to, and no tensor begins where another ends.
        starts, end = [], 0
        for storage, size in zip(elements, self._sizes.tolist(), strict=True):
            starts.append(end + storage % _ALIGNED)
            end = -(-(starts[-1] + size + 1) // _ALIGNED) * _ALIGNED
        self._starts = np.array(starts)
        data, inside = np.zeros(end, np.uint8), np.zeros(end, bool)
        self._originals = []
        for start, views in zip(starts, elements.values(), strict=True):
            original = torch.empty(0, dtype=torch.uint8).set_(views[0].untyped_storage()).numpy()
            data[start : start + len(original)] = original
            self._originals.append(original)
            for view in views:
                inside[start + _offsets(view)[:, None] + np.arange(view.element_size())] = True
        # How many bytes of elements follow from each byte on.
        ends = np.flatnonzero(~inside)
        self._room = ends[np.searchsorted(ends, np.arange(end))] - np.arange(end)
        super().__init__(data, granule)

    def pointer(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return (self._index[storage] << _APART) + _FIRST + storage % _ALIGNED + tensor.data_ptr() - storage

    def locate(self, squad: Squad, address: Array, size: int) -> Array:
        tensor = address >> _APART
        known = (tensor >= 0) & (tensor < len(self._sizes))
        own = np.where(known, tensor, 0)
        offset = (address & ((1 << _APART) - 1)) - _FIRST - self._starts[own] % _ALIGNED
        known &= (offset >= 0) & (offset < self._sizes[own])
        at = self._starts[own] + np.where(known, offset, 0)
        wrong = ~known | (self._room[at] < size)
        if wrong.any():
            lane = int(np.argmax(wrong))
            raise OutOfBounds(
                f"{size} bytes at byte {offset[lane]} of the memory of tensor {tensor[lane]} of {len(self._sizes)}, "
                f"where it has no elements ({int(wrong.sum())} lanes)"
            )
        return at

    def write_back(self) -> None:
        """Gives the tensors what was stored."""
        for start, original in zip(self._starts, self._originals, strict=True):
            original[:] = self.data[start : start + len(original)]


def _offsets(view: torch.Tensor) -> Array:
    """Bytes from the storage's start to every element."""
    at = np.array([view.storage_offset()])
    for size, stride in zip(view.shape, view.stride(), strict=True):
        at = (at[:, None] + np.arange(size) * stride).reshape(-1) if size and stride else at[: size and len(at)]
    return at * view.element_size()


class Local:
    """Each thread's own bytes."""

    def __init__(self, size: int, threads: int) -> None:
        self.data = np.full((threads, size), 255, np.uint8)

    def _places(self, squad: Squad, address: Array, size: int) -> tuple[Array, Array]:
        at = address - LOCAL
        if len(at) and (at.min() < 0 or at.max() + size > self.data.shape[1]):
            raise OutOfBounds(f"a thread has {self.data.shape[1]} bytes of its own, not {at.max() + size}")
        return squad.active(squad.place)[:, None], at[:, None] + np.arange(size)

    def load(self, squad: Squad, address: Array, size: int) -> Array:
        return self.data[self._places(squad, address, size)]

    def store(self, squad: Squad, address: Array, data: Array) -> None:
        self.data[self._places(squad, address, data.shape[1])] = data


def _memory(squad: Squad, space: str, address: Array) -> Any:
    if space == "shared":
        return squad.machine.shared
    return squad.machine.memory if space == "global" or address.max() >= _FIRST else squad.machine.local


@operation("ld")
def _load(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("param", "global", "shared"), s.kinds[-1]
    if "param" in flags:
        name, target = s.operands[1].strip("[] "), o.target(s.operands[0], kind)
        return lambda squad: target(squad, squad.machine.parameter(name, kind))
    space, size = next(iter(flags), ""), SIZES[kind]
    address, targets = o.address(s.operands[1]), o.targets(s.operands[0], kind)
    number = NUMBERS.get(kind, BITS[size])

    def run(squad: Squad) -> None:
        places = squad.active(address(squad))
        data = _memory(squad, space, places).load(squad, places, size * s.count).view(number)
        if squad.mask is not None:
            spread = np.zeros((squad.lanes, s.count), number)
            spread[squad.mask] = data
            data = spread
        targets(squad, data)

    return run


@operation("st")
def _store(s: Statement, o: Operands) -> Run:
    flags, kind = s.flags("global", "shared"), s.kinds[-1]
    space, size = next(iter(flags), ""), SIZES[kind]
    address, sources = o.address(s.operands[0]), o.sources(s.operands[1], f"b{8 * size}")

    def run(squad: Squad) -> None:
        places = squad.active(address(squad))
        _memory(squad, space, places).store(squad, places, squad.active(sources(squad)).view(np.uint8))

    return run


class Groups:
    """What a squad has begun and not waited for: each lane waits for its own groups, the oldest first."""

    def __init__(self) -> None:
        self._open: list[tuple[Array, Callable[[], None]]] = []  # lanes, what happens at the end
        self._groups: list[tuple[Array, list[tuple[Array, Callable[[], None]]]]] = []  # lanes that have not waited

    def add(self, squad: Squad, land: Callable[[], None]) -> None:
        self._open.append((squad.everyone(), land))

    def commit(self, squad: Squad) -> None:
        self._groups.append((squad.everyone(), self._open))
        self._open = []

    def wait(self, squad: Squad, most: int) -> None:
        """Until at most so many groups of each lane are on their way."""
        newer, kept, landing = np.zeros(squad.lanes, int), [], []
        for lanes, begun in reversed(self._groups):
            done = lanes & squad.everyone() & (newer >= most)
            newer += lanes
            landing.append((done, begun))
            if (lanes & ~done).any():
                kept.append((lanes & ~done, begun))
        self._groups = kept[::-1]
        for done, begun in reversed(landing):
            for lanes, land in begun:
                if (lanes & done).any():
                    with squad.only(lanes & done):
                        land()


@operation("cp")
def _copy(s: Statement, o: Operands) -> Run:
    flags = s.flags("async", "ca", "cg", "shared", "global", "commit_group", "wait_group")
    if "commit_group" in flags:
        return lambda squad: squad.copies.commit(squad)
    if "wait_group" in flags:
        return lambda squad: squad.copies.wait(squad, int(s.operands[0]))
    to, came, size = o.address(s.operands[0]), o.address(s.operands[1]), int(s.operands[2], 0)
    given = o.source(s.operands[3] if len(s.operands) > 3 else s.operands[2], "u32")

    def run(squad: Squad) -> None:
        target, source = to(squad), came(squad)
        amount = np.broadcast_to(given(squad), squad.lanes)
        if not np.isin(squad.active(amount), (0, size)).all():
            raise Unknown(f"the machine copies all of {size} bytes or none")
        squad.machine.shared.expect(squad, squad.active(target), size)
        data = np.zeros((squad.lanes, size), np.uint8)  # the bytes that are not read are zeros
        reads = squad.everyone() & (amount == size)
        with squad.only(reads):
            data[reads] = squad.machine.memory.load(squad, squad.active(source), size)
        shared = squad.machine.shared
        squad.copies.add(squad, lambda: shared.land(squad, squad.active(target), squad.active(data)))

    return run
