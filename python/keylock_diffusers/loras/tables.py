"""Tables of adapters' factors on one device, a pair a module, and the order in which streams write and read them."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.loras.adapter import LowRank

Updates = Mapping[str, LowRank]
Weights = Mapping[str, tuple[int, ...]]


class Layout:
    """What a model's tables look like, and whether an adapter fits them.

    Args:
        weights: every module's weight shape.
        device: of the tables.
        dtype: of the tables.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        # A convolution over single pixels is a matrix.
        self.shapes = {
            name: (shape[0], shape[1:] if prod(shape[2:]) > 1 else (shape[1],)) for name, shape in weights.items()
        }

    def row_bytes(self, modules: Iterable[str]) -> int:
        """Of one row in the tables of some modules."""
        return self.dtype.itemsize * sum(self.shapes[name][0] + prod(self.shapes[name][1]) for name in modules)

    def rows(self, adapter: Updates) -> int:
        """How many rows an adapter takes: its largest rank.

        Raises:
            ValueError: it changes another module, or one of another shape.
        """
        for name, update in adapter.items():
            if name not in self.shapes:
                raise ValueError(f"AdapterPool.hold: an adapter changes {name:.200}, which is no module of this model")
            outer, inner = self.shapes[name]
            down = update.down.shape[1:]
            if update.up.shape[0] != outer or (down != inner and prod(down) != prod(inner)):
                raise ValueError(
                    f"AdapterPool.hold: {name:.200} must have up [{outer}, r] and down {['r', *inner]}, "
                    f"got {list(update.up.shape)} and {list(update.down.shape)}"
                )
        return max((update.rank for update in adapter.values()), default=0)

    def check_numbers(self, adapter: Updates) -> None:
        """A factor that becomes infinite in the tables' dtype would make its user's pictures black without a word.

        Raises:
            ValueError: there is one.
        """
        most = torch.finfo(self.dtype).max
        for name, update in adapter.items():
            if update.up.dtype == self.dtype or torch.finfo(update.up.dtype).max <= most:
                continue
            for factor in (update.up, update.down):
                largest = float(factor.abs().max())
                if largest > most:
                    raise ValueError(
                        f"AdapterPool.hold: {name:.200} holds {largest:.3g}, which {self.dtype} cannot hold"
                    )


@dataclass(eq=False)
class Table:
    """One module's pair."""

    up: Tensor  # [P, O]
    down: Tensor  # [P, K] or [P, C, kh, kw]
    written: bytearray  # [P], 1 where a row may hold something else than zeros

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down


class Tables:
    """All modules' pairs, of one number of rows, full of zeros at first.

    Args:
        layout: of the model.
        height: how many rows they have.
        modules: which have tables so far.
    """

    def __init__(self, layout: Layout, height: int, modules: Iterable[str] = ()) -> None:
        self.height, self.holders = height, 0
        self.of: dict[str, Table] = {}
        self._layout = layout
        self.add(modules)

    @property
    def nbytes(self) -> int:
        return self.height * self._layout.row_bytes(self.of)

    def add(self, modules: Iterable[str]) -> None:
        """Make the tables of modules that have none."""
        options: dict[str, Any] = {"device": self._layout.device, "dtype": self._layout.dtype}
        for name in modules:
            if name not in self.of:
                outer, inner = self._layout.shapes[name]
                up, down = torch.zeros(self.height, outer, **options), torch.zeros(self.height, *inner, **options)
                self.of[name] = Table(up, down, bytearray(self.height))

    def write(self, first: int, rows: int, adapter: Updates) -> None:
        """Put an adapter into a range of rows, zeros where it has nothing."""
        end = first + rows
        for name, table in list(self.of.items()):  # another thread may add some, full of zeros
            update = adapter.get(name)
            middle = first + (0 if update is None else update.rank)
            if 1 in table.written[middle:end]:
                for tensor in table.pair:
                    tensor[middle:end].zero_()
            table.written[first:end] = b"\1" * (middle - first) + b"\0" * (end - middle)
            if update is not None:
                _copy(table.up, first, update.up, middle - first, turned=True)
                _copy(table.down, first, update.down, middle - first)

    def carry(self, old: Tables, end: int, modules: Collection[str]) -> None:
        """Add tables of modules, with the rows up to `end` of older ones; those that nobody holds go one by one."""
        for name in modules:
            self.add([name])
            was = old.of.get(name) if old.holders else old.of.pop(name, None)
            if was is not None:
                table = self.of[name]
                for tensor, source in zip(table.pair, was.pair, strict=True):
                    tensor[:end].copy_(source[:end])
                table.written[:end] = was.written[:end]
                _record(was.pair)

    def leave(self) -> None:
        """Before they are dropped: a GPU's memory is given to nobody before the current stream has read it."""
        for table in self.of.values():
            _record(table.pair)


def _copy(table: Tensor, first: int, factor: Tensor, rank: int, turned: bool = False) -> None:
    """Put A, or B turned, into a table. A packed adapter's B lies turned already."""
    as_rows = factor.stride() == (1, factor.shape[0]) if turned else factor.is_contiguous()
    if as_rows and table.is_cpu and factor.is_cpu and factor.dtype == table.dtype:
        # torch would wake its threads for every one of an adapter's tensors, which takes longer than copying them.
        size = factor.nbytes
        ctypes.memmove(table.data_ptr() + first * (size // rank), factor.data_ptr(), size)
    else:
        place = table[first : first + rank]
        place.copy_((factor.t() if turned else factor).reshape(place.shape), non_blocking=True)


def _record(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Order:
    """Marks in a GPU's streams, so that no stream writes rows that another still reads; on a CPU there are none.

    Args:
        device: of the tables.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> Any:
        """Where the current stream is now."""
        if self._device.type != "cuda":
            return None
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        self._marks = [one for one in self._marks if not one.query()] + [mark]
        return mark

    def after_all(self) -> None:
        """What the current stream does next comes after every mark so far."""
        for mark in self._marks:
            self.after(mark)

    def after(self, mark: Any) -> None:
        """What the current stream does next comes after a mark; None is none."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
