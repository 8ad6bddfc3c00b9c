"""Faults to plant in the PTX of a right kernel, so that finding them can be tested."""

from __future__ import annotations

import re
from collections.abc import Callable


def replaced(pattern: str, by: str | Callable[[re.Match[str]], str], count: int = 0) -> Callable[[str], str]:
    """Rewrites what a pattern finds; raises where it finds nothing to rewrite."""

    def plant(text: str) -> str:
        found, changes = re.subn(pattern, by, text, count=count, flags=re.M)
        if not changes:
            raise ValueError(f"there is nothing like {pattern} to plant a fault in")
        return found

    return plant


def swapped_parameters(first: int, second: int) -> Callable[[str], str]:
    """A kernel that takes one stride for another."""
    other = {str(first): str(second), str(second): str(first)}
    return replaced(rf"(ld\.param.*_param_)({first}|{second})\]", lambda m: f"{m[1]}{other[m[2]]}]")


def barrier_of_some(text: str) -> str:
    """Two of the warps do not come to the first barrier."""
    thread = re.findall(r"mov\.u32\s+(%r\d+), %tid\.x;", text)[0]
    return replaced(r"bar\.sync\s+0;", f"setp.lt.u32 %p0, {thread}, 64; @%p0 bar.sync 0;", 1)(text)


DROPPED_LOAD_MASK = replaced(r"@%p\d+ (ld\.global)", r"\1")
DROPPED_STORE_MASK = replaced(r"@%p\d+ (st\.global)", r"\1")
DROPPED_COPY_MASK = replaced(r"(cp\.async.*, 0x10), %r\d+", r"\1, 16")
SHIFTED_ACCESS = replaced(r"(st\.global\.v4.*\[ %rd\d+ \+ )0 \]", r"\g<1>2 ]")
MISSING_COPY_WAIT = replaced(r"cp\.async\.wait_group.*", "")
LATE_COPY_WAIT = replaced(r"(cp\.async\.wait_group)\s+\d+", r"\1 99")
MISSING_PRODUCT_WAIT = replaced(r"wgmma\.wait_group.*", "")
MISSING_PROXY_FENCE = replaced(r"fence\.proxy\.async.*", "")
MISSING_BARRIERS = replaced(r"bar\.sync.*", "")
SWAPPED_FRAGMENT = replaced(r"(mma\.sync.*?\}, \{ %r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2")
DROPPED_SUM = replaced(r"(mma\.sync.*\}, )\{[^}]*\};", r"\1{0f00000000, 0f00000000, 0f00000000, 0f00000000};")
# The lower parts of float32 operands, which are split into three of 16 bits, are lost.
ROUNDED_OPERANDS = replaced(r"sub\.f32 (\s*%r\d+), (%r\d+), %r\d+", r"sub.f32 \1, \2, \2")
