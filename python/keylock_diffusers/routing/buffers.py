"""Tensors that stay where they are while their contents change, and noticing who else writes to one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for inference tensors, which do not count it."""
    return None if tensor.is_inference() else tensor._version


def versions_of(sources: Mapping[str, Sequence[Tensor]]) -> list[tuple[str, Any, int | None]]:
    return [(name, weakref.ref(tensor), version_of(tensor)) for name, tensors in sources.items() for tensor in tensors]


def filled(buffer: Tensor | None, value: Tensor) -> Tensor:
    """The buffer with this value, or the value itself where it does not fit."""
    if buffer is None or any(
        of(buffer) != of(value)
        for of in (lambda t: t.shape, lambda t: t.dtype, lambda t: t.device, Tensor.is_inference)
    ):
        return value
    return buffer.copy_(value)


def filled_pairs(
    buffers: Mapping[str, tuple[Tensor, Tensor]], values: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    result = {}
    for name, (key, value) in values.items():
        before = buffers.get(name, (None, None))
        result[name] = filled(before[0], key), filled(before[1], value)
    return result
