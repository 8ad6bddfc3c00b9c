"""Runs a kernel's blocks on the CPU, one instruction at a time for all warps that have come to it.

Lanes that part wait where they are; those at the lowest statement go on, so that all meet again behind a branch or
loop. Between barriers warps go together, or one after another in either order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from . import memory, tensor_core, warp_wide  # noqa: F401 - they bring their instructions
from .arithmetic import OPERATIONS
from .faults import Diverged, Fault, Unknown
from .memory import Global, Groups, Local, Shared
from .program import SIZES, Program, Statement
from .values import BITS, NUMBERS, Array, Operands

WARP = 32
LANES = 1 << 14  # that run at once; the rest of the blocks follow
ORDERS: dict[str, Callable[[int], list[list[int]]]] = {
    "together": lambda warps: [list(range(warps))],
    "forward": lambda warps: [[w] for w in range(warps)],
    "backward": lambda warps: [[w] for w in reversed(range(warps))],
}


class _Registers(dict[str, Array]):
    """What was never written is NaN."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __missing__(self, name: str) -> Array:
        width = self._program.width(name)
        return np.full(1, (1 << 8 * width) - 1, BITS[width]) if width else np.zeros(1, bool)


class Squad:
    """Warps that go together, each of all the blocks that run at once. Lanes are numbered block by block."""

    def __init__(self, machine: Machine, blocks: Array, chosen: Sequence[int], threads: int) -> None:
        self.machine, self.copies, self.products, self.flying = machine, Groups(), Groups(), tensor_core.Flying()
        shape = (len(blocks), len(chosen), WARP)
        self.lanes, self.blocks = int(np.prod(shape)), len(blocks)
        self.registers = _Registers(machine.program)
        self.mask: Array | None = None  # who takes part in the instruction; None: all
        self._all = np.ones(self.lanes, bool)

        def spread(values: Array) -> Array:
            return np.broadcast_to(values, shape).reshape(-1)

        warp = np.array(chosen)[None, :, None]
        self.thread = spread(warp * WARP + np.arange(WARP)).astype(np.uint32)
        self.slot = spread(np.arange(len(blocks))[:, None, None])
        self.place = self.slot * threads + self.thread
        self._who = spread((blocks[:, None, None] << 32) + warp)
        grid = machine.grid
        axes = (blocks % grid[0], blocks // grid[0] % grid[1], blocks // (grid[0] * grid[1]))
        self.block_x, self.block_y, self.block_z = (spread(a[:, None, None]).astype(np.uint32) for a in axes)
        self.nblock_x, self.nblock_y, self.nblock_z = (np.array([n], np.uint32) for n in grid)

    def everyone(self) -> Array:
        return self._all if self.mask is None else self.mask

    def active(self, values: Array) -> Array:
        return values if self.mask is None else values[self.mask]

    def who(self) -> Array:
        return self.active(self._who + (self.machine.barriers[self.slot] << 8))

    @contextlib.contextmanager
    def only(self, lanes: Array) -> Iterator[None]:
        outer, self.mask = self.mask, lanes
        try:
            yield
        finally:
            self.mask = outer

    def whole_warps(self) -> None:
        """Raises unless every warp takes part entirely or not at all."""
        if self.mask is not None:
            sums = self.mask.reshape(-1, WARP).sum(1)
            if ((sums != 0) & (sums != WARP)).any():
                raise Diverged("a part of a warp is at an instruction of whole warps")


class Kernel:
    """A program made ready to run."""

    def __init__(self, text: str) -> None:
        self.program = Program(text)
        operands = Operands(self.program)
        self.code = [self._step(s, operands) for s in self.program.statements]

    def _step(self, s: Statement, operands: Operands) -> tuple[str, str, bool, Any]:
        if s.name == "bra":
            return s.name, s.guard, s.negated, self.program.labels[s.operands[0]]
        if s.name == "ret" or s.name == "bar" and s.modifiers == ("sync",) and s.operands == ("0",):
            return s.name, s.guard, s.negated, None
        maker = OPERATIONS.get(s.name)
        if maker is None:
            raise Unknown(f"{self.program.name}: the machine does not know the instruction `{s.text}`")
        return "", s.guard, s.negated, maker(s, operands)


class Machine:
    """One launch of a kernel.

    Args:
        kernel: what runs.
        grid: its blocks.
        warps: of a block.
        shared: bytes of shared memory of a block.
        arguments: of its parameters.
        order: in which warps run, of ORDERS.
        terms: how many a tensor core adds up at a time, cutting off; None: products are summed exactly, and rounded
            once an instruction, and no other instruction is less accurate than its result.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        warps: int,
        shared: int,
        arguments: Sequence[torch.Tensor | int | float],
        order: str = "together",
        terms: int | None = None,
    ) -> None:
        self.terms = terms
        self.kernel, self.program = kernel, kernel.program
        self.grid = (*grid, 1, 1)[:3]
        self.warps, self._shared = warps, shared
        self._order = ORDERS[order](warps)
        # Behind the arguments come pointers to scratch memory, which these kernels have no use for.
        names = self.program.parameters
        if not len(arguments) <= len(names) <= len(arguments) + 2:
            raise Unknown(f"{self.program.name}: {len(names)} parameters for {len(arguments)} arguments")
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        self.memory = Global(tensors, self.program.granules["global"])
        self._values = dict.fromkeys(names, 0) | {
            name: self.memory.pointer(a) if isinstance(a, torch.Tensor) else a
            for name, a in zip(names, arguments, strict=False)
        }

    def parameter(self, name: str, kind: str) -> Array:
        value, number = self._values[name], NUMBERS.get(kind, BITS[SIZES[kind]])
        if isinstance(value, float):
            return np.array([value], f"f{SIZES[kind]}").view(number)
        return np.array([value & ((1 << 8 * SIZES[kind]) - 1)], BITS[SIZES[kind]]).view(number)

    def run(self) -> None:
        """Runs every block, and stores what they wrote into the tensors."""
        threads = self.warps * WARP
        blocks = np.arange(int(np.prod(self.grid)))
        most = max(1, LANES // threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), most):
                self._run_blocks(blocks[first : first + most], threads)
        self.memory.write_back()

    def _run_blocks(self, blocks: Array, threads: int) -> None:
        self.shared = Shared(len(blocks), self._shared, self.program.granules["shared"])
        self.local = Local(self.program.local, len(blocks) * threads)
        self.barriers = np.zeros(len(blocks), int)
        marches = [self._march(Squad(self, blocks, chosen, threads)) for chosen in self._order]
        while True:
            arrived = [next(march, None) for march in marches]
            if arrived[0] is None and all(a is None for a in arrived):
                return
            if any(a is None or a[0] != arrived[0][0] or not np.array_equal(a[1], arrived[0][1]) for a in arrived):
                raise Diverged(f"{self.program.name}: some warps of a block are at a barrier, others are not")
            self.barriers[arrived[0][1]] += 1

    def _march(self, squad: Squad) -> Iterator[tuple[int, Array]]:
        """Runs to the end; at every barrier yields where it stands and which blocks have come to it.

        Lanes that went apart meet again where the last of them comes by: those behind run first. An instruction of
        whole warps or blocks that a part of them has come to waits for the others, which may be further on, in what
        the compiler moved out of the way.
        """
        code, waiting = self.kernel.code, {0: np.ones(squad.lanes, bool)}
        parked: set[int] = set()  # of `waiting`, those that wait for others

        def part(place: int, lanes: Array) -> None:
            waiting[place] = waiting[place] | lanes if place in waiting else lanes
            parked.discard(place)

        while waiting:
            place = min(waiting.keys() - parked or waiting)
            here = waiting.pop(place)
            parked.discard(place)
            full = bool(here.all())
            limit = min(waiting.keys() - parked, default=len(code))
            while place < limit and place not in parked:
                name, guard, negated, run = code[place]
                taken = None if full else here
                if guard:
                    said = squad.registers[guard] != negated
                    taken = np.broadcast_to(said, squad.lanes) if full else said & here
                    if not taken.any():
                        place += 1
                        continue
                    if taken.all():
                        taken = None
                squad.mask = taken
                if name == "bra":
                    if taken is not None and not np.array_equal(taken, here):
                        part(place + 1, here & ~taken)
                        part(run, taken)
                        break
                    place = run
                    continue
                if name == "ret":
                    if taken is not None and not np.array_equal(taken, here):
                        part(place + 1, here & ~taken)
                    break
                try:
                    if name == "bar":
                        yield place, self._whole_blocks(squad)
                    else:
                        run(squad)
                except Fault as fault:
                    if isinstance(fault, Diverged) and waiting.keys() - parked:
                        part(place, here)
                        parked.add(place)
                        break
                    text = self.program.statements[place].text
                    raise type(fault)(f"{self.program.name}: {fault}: `{text}`") from fault
                except Exception as error:
                    error.add_note(f"{self.program.name}: `{self.program.statements[place].text}`")
                    raise
                place += 1
            else:
                part(place, here)
                if place >= len(code):
                    raise Diverged(f"{self.program.name}: lanes run behind the end")

    def _whole_blocks(self, squad: Squad) -> Array:
        sums = squad.everyone().reshape(squad.blocks, -1).sum(1)
        if ((sums != 0) & (sums != squad.lanes // squad.blocks)).any():
            raise Diverged("a part of a block is at a barrier")
        return np.flatnonzero(sums)
