"""Numbers that users give: checked by name, and as Python's own afterwards."""

from __future__ import annotations

import math
import numbers


def whole_number(name: str, value: object, *, least: int) -> int:
    """An integer of at least so much; numpy's count too, booleans do not.

    Raises:
        TypeError: it is none.
        ValueError: it is less, or beyond 64 bits.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r:.80}")
    found = int(value)
    if not least <= found < 2**63:
        raise ValueError(f"{name} must be at least {least}{' and below 2**63' * (found > least)}, got {_cut(found)}")
    return found


def real_number(name: str, value: object, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """A finite number of at least `least` and more than `above`; numpy's count too, booleans do not.

    Raises:
        TypeError: it is none.
        ValueError: it is not finite, or less.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r:.80}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {_cut(value)}")
    if found < least or found <= above:
        bound = f"at least {least:g}" if found < least else f"above {above:g}"
        raise ValueError(f"{name} must be {bound}, got {_cut(value)}")
    return found


def _cut(value: object) -> str:
    """A number's digits; Python refuses to print an integer of thousands of them."""
    try:
        return f"{value!s:.80}"
    except ValueError:
        return "an integer of thousands of digits"
