"""Many adapters on one device, in tables that growing and evicting keep in order while others generate."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keylock_diffusers.checks import shown, whole
from keylock_diffusers.loras.ranges import FIXED, Range, place
from keylock_diffusers.loras.tables import Layout, Order, Table, Tables, Updates, Weights


class PoolStats(NamedTuple):
    """What an `AdapterPool` holds and did: adapters that are resident, those of them that somebody holds, rows of the
    tables, bytes of all tables (older ones that somebody still holds included), and how often an adapter that was asked
    for was resident, was copied, or had to go."""

    resident: int
    held: int
    rows: int
    bytes: int
    hits: int
    misses: int
    evictions: int


@dataclass(eq=False)
class _Resident:
    """An adapter's range of rows."""

    adapter: Updates  # kept alive, so that no other object can have its id
    rows: int
    first: int = 0
    holders: int = 0
    used: int = 0  # when, last; 0 where it was forgotten
    ready: threading.Event = field(default_factory=threading.Event)  # set when its rows are written, or failed
    failed: bool = False
    mark: Any = None  # after which its rows are written, on a GPU's streams


class AdapterPool:
    """Adapters resident on one device, as the tables that `keylock_kernels.low_rank_linear` reads.

    Every module has two tables, ``up`` [P, O], whose row p is a column of B, and ``down`` [P, K]. An adapter whose
    largest rank is R takes the same R rows in all of them. Where its own rank is lower, and in modules it does not
    change, the rest of its rows are zeros: one list of offsets serves every module.

    Adapters are told apart by identity and kept alive while they are resident. What nobody holds goes when its place is
    needed, least recently used first: a place is any stretch of rows that nobody holds, whatever lies in it is evicted,
    and a batch's own adapters move where they stand in its way. Only what others hold can break the free rows into
    pieces that are too short, and then tables that may grow do.

    Without `rows` the tables double when they are full. Growing copies them, for which others wait. A batch that is
    held keeps the tables it was given: until it lets go both exist, and count for `max_bytes`. With `rows` every
    module's tables are made at once, full of zeros, and never move.

    Threads may share a pool. A range is written only when nobody holds it; an adapter that several ask for is copied
    once, and who holds or asks for others does not wait for that. On a GPU copies are ordered on the current stream of
    who asks for them, after the reads of those who held the rows before, on the streams they released them on.

    Args:
        weights: every module's weight shape, [O, K] or [O, C, kh, kw], in the model's order.
        device: of the tables.
        dtype: of the tables, floating point; factors are cast to it.
        rows: of the tables, P; None lets them grow.
        max_bytes: of all tables; None sets no bound.

    Raises:
        TypeError, ValueError: an argument is not what this says, or `rows` take more than `max_bytes`.

    Paper: S-LoRA, Sheng et al. 2023, arXiv 2311.03285 (adapters of any rank in one paged pool).

    Example:
        >>> from keylock_diffusers.loras import AdapterPool, LowRank
        >>> pool = AdapterPool({"to_q": (4, 3)}, torch.device("cpu"), torch.float32)
        >>> held = pool.hold([{"to_q": LowRank(torch.ones(2, 3), torch.ones(4, 2))}])
        >>> held.first, [list(table.shape) for table in held.tables("to_q")]
        ((0,), [[2, 4], [2, 3]])
        >>> held.release()
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rows: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        for name, shape in weights.items():
            if len(shape) < 2 or not all(shape):
                raise ValueError(f"AdapterPool: weights of {name:.200} must be [O, K] or [O, C, kh, kw], got {shape}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"AdapterPool: dtype must be a floating-point dtype, got {shown(dtype)}")
        self.device, self.dtype = torch.device(device), dtype
        self._grows = rows is None
        self._max_bytes = None if max_bytes is None else whole(max_bytes, "AdapterPool: max_bytes", 1)
        self._layout, self._order = Layout(weights, self.device, dtype), Order(self.device)
        height = 0 if rows is None else whole(rows, "AdapterPool: rows", 1)
        size = height * self._layout.row_bytes(weights)
        if size > (self._max_bytes or size):
            raise ValueError(f"AdapterPool: rows = {rows} take {size} bytes, more than max_bytes = {max_bytes} allows")
        self._tables = Tables(self._layout, height, () if self._grows else weights)
        self._retired: list[Tables] = []  # that somebody still holds
        self._changed = threading.Condition()
        self._resident: dict[int, _Resident] = {}  # by the adapter's id
        self._filling = self._waiting = 0
        self._clock = count(1)
        self._hits = self._misses = self._evictions = 0

    def hold(self, adapters: Sequence[Updates]) -> Held:
        """Make adapters resident and keep them so until the result is released.

        Args:
            adapters: each by module names; the same one may come twice.

        Raises:
            ValueError: an adapter does not fit the modules, or holds a number that the dtype cannot; or there is no
                room for them beside what others hold, which the message counts. Nobody else notices.
        """
        wanted = {id(adapter): adapter for adapter in adapters}
        while True:
            tables, residents, mine = self._take(wanted)
            try:
                self._fill(tables, mine)
                for resident in residents.values():
                    resident.ready.wait()
            except BaseException:
                self._let_go(tables, residents.values())
                raise
            if not any(resident.failed for resident in residents.values()):
                break
            self._let_go(tables, residents.values())  # whoever was copying failed, and says so there: try it here
        for resident in residents.values():
            self._order.after(resident.mark)
        first = tuple(residents[id(adapter)].first for adapter in adapters)
        return Held(first, tables.of, lambda: self._let_go(tables, residents.values()))

    def forget(self, adapter: Updates) -> None:
        """Let an adapter go that will not be asked for again: at once, or when its last holder does."""
        with self._changed:
            found = self._resident.get(id(adapter))
            if found is not None:
                found.used = 0
                if not found.holders:
                    self._drop(found)

    def stats(self) -> PoolStats:
        with self._changed:
            return PoolStats(
                len(self._resident),
                sum(1 for resident in self._resident.values() if resident.holders),
                self._tables.height,
                self._tables.nbytes + sum(tables.nbytes for tables in self._retired),
                self._hits,
                self._misses,
                self._evictions,
            )

    def _take(self, wanted: Mapping[int, Updates]) -> tuple[Tables, dict[int, _Resident], list[_Resident]]:
        """Find or make a range for each adapter, all held from now on; the last are those that the caller must fill."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            while (new := self._make_room(wanted)) is None:
                # What is being written cannot be copied to larger tables; nobody else begins to write meanwhile.
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._filling)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
            self._resident |= new
            self._misses += len(new)
            self._hits += len(wanted) - len(new)
            self._filling += len(new)
            self._tables.holders += 1
            residents = {key: self._resident[key] for key in wanted}
            for resident in residents.values():
                resident.holders += 1
                resident.used = next(self._clock)
            return self._tables, residents, list(new.values())

    def _make_room(self, wanted: Mapping[int, Updates]) -> dict[int, _Resident] | None:
        """The adapters to be filled, each with a range of its own; None where first all filling must end.

        Free rows come first, then growing, then evicting, then placing all of the batch afresh.
        """
        new = {key: self._newcomer(adapter) for key, adapter in wanted.items() if key not in self._resident}
        modules = self._tables.of.keys() | _modules(new.values())
        inside = self._tables.height <= self._most_rows(modules, self._retired)
        others = [one for key, one in self._resident.items() if key not in wanted and not one.holders]
        if inside and self._place(new):
            self._tables.add(modules)
            return new
        if self._grows:
            every = [*self._resident.values(), *new.values()]
            least = self._end() + sum(one.rows for one in new.values())
            most = self._most_rows(_modules(every), self._older())
            if least <= most or most > self._tables.height:
                if self._filling:
                    return None
                self._remake(min(most, max(least, 2 * self._tables.height)), _modules(every))
                inside, modules = True, _modules(every)
                if self._place(new):
                    return new
        if inside and self._place(new, others):
            self._tables.add(modules)
            return new
        # Those of the batch that nobody else holds may stand in the way of the rest.
        unheld = [one for one in self._resident.values() if not one.holders]
        kept = self._resident.keys() - {id(one.adapter) for one in unheld}
        afresh = {key: self._newcomer(adapter) for key, adapter in wanted.items() if key not in kept}
        if inside and self._place(afresh, unheld, anywhere=True):
            self._tables.add(modules)
            return afresh
        if self._grows:  # tables for this batch alone: the old ones are left to their holders
            alone = {key: self._newcomer(adapter) for key, adapter in wanted.items()}
            least = sum(one.rows for one in alone.values())
            if least <= self._most_rows(_modules(alone.values()), self._older()):
                if self._filling:
                    return None
                self._evictions += len(self._resident)
                self._resident.clear()
                self._remake(least, _modules(alone.values()))
                self._place(alone)
                return alone
        raise ValueError(self._no_room(wanted))

    def _place(self, new: Mapping[int, _Resident], evictable: Sequence[_Resident] = (), anywhere: bool = False) -> bool:
        """Give every new adapter its first row, and evict what lies there; False, and no change, if one has no place.

        The most recently used ones are spared, unless `anywhere` in their rows will do.
        """
        able = {id(one) for one in evictable}
        taken = [
            Range(one.first, one.first + one.rows, one.used if id(one) in able else FIXED)
            for one in self._resident.values()
            if one.rows and not (anywhere and id(one) in able)
        ]
        found = place([one.rows for one in new.values()], taken, self._tables.height)
        if found is None:
            return False
        for one, first in zip(new.values(), found, strict=True):
            one.first = first
        gone = [
            key
            for key, one in self._resident.items()
            if id(one) in able and (key in new or any(_overlap(one, other) for other in new.values()))
        ]
        for key in gone:
            del self._resident[key]
        self._evictions += len(gone)
        return True

    def _remake(self, height: int, modules: set[str]) -> None:
        """Make other tables, with the rows of all residents; nobody may be filling."""
        old, self._tables = self._tables, Tables(self._layout, height)
        if old.holders:
            self._retired.append(old)
        self._order.after_all()
        try:
            self._tables.carry(old, self._end(), modules)
        except BaseException:  # a device without so much memory: who holds the old tables keeps them
            self._resident.clear()
            self._tables = Tables(self._layout, 0)
            raise
        mark = self._order.mark()
        for one in self._resident.values():
            one.mark = mark

    def _fill(self, tables: Tables, mine: Sequence[_Resident]) -> None:
        if not mine:
            return
        done = 0
        try:
            with self._changed:
                self._order.after_all()
            for one in mine:
                self._layout.check_numbers(one.adapter)
                tables.write(one.first, one.rows, one.adapter)
                done += 1
        finally:
            with self._changed:
                mark = self._order.mark()
                for one in mine[:done]:
                    one.mark = mark
                for one in mine[done:]:
                    one.failed = True
                    self._drop(one)
                for one in mine:
                    one.ready.set()
                self._filling -= len(mine)
                self._changed.notify_all()

    def _newcomer(self, adapter: Updates) -> _Resident:
        return _Resident(adapter, self._layout.rows(adapter))

    def _let_go(self, tables: Tables, residents: Iterable[_Resident]) -> None:
        with self._changed:
            self._order.mark()
            tables.holders -= 1
            if not tables.holders and tables in self._retired:
                self._retired.remove(tables)
                self._order.after_all()
                tables.leave()
            for one in residents:
                one.holders -= 1
                if not one.used and not one.holders:
                    self._drop(one)

    def _drop(self, one: _Resident) -> None:
        if self._resident.get(id(one.adapter)) is one:
            del self._resident[id(one.adapter)]

    def _end(self) -> int:
        return max((one.first + one.rows for one in self._resident.values()), default=0)

    def _older(self) -> list[Tables]:
        """What is there beside new tables: what somebody holds."""
        return [*self._retired, *([self._tables] if self._tables.holders else ())]

    def _most_rows(self, modules: Iterable[str], beside: Sequence[Tables]) -> int:
        """How many rows the bound allows tables of some modules, beside other tables."""
        if not self._grows or self._max_bytes is None:
            return sys.maxsize
        left = self._max_bytes - sum(tables.nbytes for tables in beside)
        return max(0, left) // max(1, self._layout.row_bytes(modules))

    def _no_room(self, wanted: Mapping[int, Updates]) -> str:
        held = [one for one in self._resident.values() if one.holders]
        asked = sum(self._layout.rows(adapter) for adapter in wanted.values())
        room = f"{self._max_bytes} bytes" if self._grows else f"{self._tables.height} rows"
        older = sum(tables.nbytes for tables in self._retired)
        return (
            f"AdapterPool.hold: no room for {len(wanted)} adapters of {asked} rows in {room}: {len(held)} adapters of "
            f"{sum(one.rows for one in held)} rows are held" + f", and {older} bytes of older tables" * bool(older)
        )


class Held:
    """Adapters that stay where they are until this is released.

    Args:
        first: where each adapter's rows begin, in all modules.
        tables: the tables by module.
        release: lets go.
    """

    def __init__(self, first: tuple[int, ...], tables: Mapping[str, Table], release: Callable[[], None]) -> None:
        self.first = first
        self._tables: Mapping[str, Table] | None = tables
        self._release = [release]

    def tables(self, module: str) -> tuple[Tensor, Tensor] | None:  # up [P, O]; down [P, K] or [P, C, kh, kw]
        """A module's tables; None if no adapter ever changed a module of that name.

        Raises:
            RuntimeError: released already, when the rows may be anybody's.
        """
        if self._tables is None:
            raise RuntimeError("Held.tables: released already")
        table = self._tables.get(module)
        return None if table is None else (table.up, table.down)

    def release(self) -> None:
        """Let go; a second time is nothing."""
        self._tables = None
        try:
            release = self._release.pop()
        except IndexError:
            return
        release()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _modules(residents: Iterable[_Resident]) -> set[str]:
    return {name for one in residents for name in one.adapter}


def _overlap(one: _Resident, other: _Resident) -> bool:
    return one.first < other.first + other.rows and other.first < one.first + one.rows
