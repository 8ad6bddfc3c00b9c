"""Numbers and tensors that others give, checked; errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, on the file systems that there are
_LARGEST = torch.finfo(torch.float32).max


def shown(value: Any, length: int = 80) -> str:
    """A value for an error: short and on one line, whatever its own ``__repr__`` does."""
    try:
        if isinstance(value, Tensor):
            return f"a tensor {list(value.shape)} of {value.dtype}"
        text = re.sub(r"\s+", " ", repr(value))
    except Exception:  # a number of ten thousand digits, an object that cannot say what it is
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def reason_of(error: BaseException, length: int = 400) -> str:
    """What an error says, for another error: short and on one line, and its type where it says nothing."""
    try:
        text = re.sub(r"\s+", " ", str(error)).strip()
    except Exception:
        text = ""
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        text = re.sub(r"\s+", " ", error.args[0])  # str() of a KeyError is its repr
    text = text or type(error).__name__
    return text if len(text) <= length else f"{text[: length - 3]}..."


def is_number(value: Any) -> bool:
    """Whether a value is a real number that float32 holds, of Python or numpy; booleans are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return abs(float(value)) <= _LARGEST
    except (OverflowError, ValueError):
        return False


def number(value: Any, name: str, least: float | None = None, most: float | None = None) -> float:
    """A finite number within bounds.

    Raises:
        ValueError: it is none.
    """
    found = float(value) if is_number(value) else math.nan
    if not math.isfinite(found) or (least is not None and found < least) or (most is not None and found > most):
        if least is not None and most is not None:
            wanted = f"lie in [{least:g}, {most:g}]"
        else:
            wanted = "be a finite number" + ("" if least is None else f" of at least {least:g}")
        raise ValueError(f"{name} must {wanted}, got {shown(value)}")
    return found


def whole(value: Any, name: str, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`, by default the largest of 64 bits.

    Raises:
        ValueError: it is none.
    """
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or not least <= int(value) <= (2**63 - 1 if most is None else most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {wanted}, got {shown(value)}")
    return int(value)


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """A text among those that there are.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def path_text(value: Any, name: str) -> str:
    """What a path says, if a file may be called so.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, too long, or holds what no file's name may hold.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path, got {shown(value)}")
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        parts = [b"\0"]
    whole_length = sum(len(part) + 1 for part in parts)
    if not text or b"\0" in b"".join(parts) or max(map(len, parts)) > _LONGEST_NAME or whole_length > _LONGEST_PATH:
        raise ValueError(
            f"{name} must be a path of names of at most {_LONGEST_NAME} bytes, in all {_LONGEST_PATH}, "
            f"got {shown(text)}"
        )
    return text


def check_field(config: Any, name: str, check: Callable[..., Any], *bounds: Any, optional: bool = False) -> None:
    """Checks a field of a frozen dataclass, which then holds what `check` makes of it.

    Args:
        config: the dataclass.
        name: of the field.
        check: `number` or `whole`.
        bounds: its last arguments.
        optional: whether None is left as it is.

    Raises:
        ValueError: the field is not what it should be.
    """
    value = getattr(config, name)
    if value is not None or not optional:
        object.__setattr__(config, name, check(value, f"{type(config).__name__}: {name}", *bounds))


def listed(value: Any, name: str, most: int | None = None) -> list[Any] | tuple[Any, ...]:
    """A list or tuple.

    Raises:
        TypeError: it is something else, a text among them.
        ValueError: it is longer than `most`.
    """
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    if most is not None and len(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {len(value)}")
    return value


def floats(value: Any, name: str) -> Tensor:
    """A dense tensor of floating-point numbers, with at least one of them; whether they are finite is not looked at.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        kind = "on the meta device" if value.is_meta else "nested" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} must be a dense tensor, got one that is {kind}")
    if not value.numel():
        raise ValueError(f"{name} must not be empty, got {list(value.shape)}")
    return value
