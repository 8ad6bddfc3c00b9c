"""What the machine says is wrong with a kernel, or with what it was asked to run."""

from __future__ import annotations


class Fault(Exception):
    """A kernel did what a GPU does not promise to do well."""


class Unknown(Fault):
    """PTX that the machine does not know: the kernel may be right."""


class OutOfBounds(Fault):
    """An access to memory that belongs to no tensor, or behind the end of shared memory."""


class Misaligned(Fault):
    """An access of several bytes at an address that is no multiple of them."""


class Race(Fault):
    """Two warps touch the same bytes, one of them writing, and no barrier says in which order."""


class Unwaited(Fault):
    """Bytes that an asynchronous copy is still bringing are touched."""


class Unfenced(Fault):
    """An asynchronous product reads what threads stored, and no fence makes that visible to it."""


class Diverged(Fault):
    """Lanes that must come together, at a barrier or in an instruction of a whole warp, do not."""
