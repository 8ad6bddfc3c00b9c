"""Weight-decomposed adapters (DoRA) as a factor on each output, at any strength.

    g(s) = magnitude / |W + s B A|,   |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2,   row by row

The three vectors are kept with the update for as long as the weight is what it was.

Paper: Liu et al., DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from keylock_diffusers.loras import LowRank
from keylock_diffusers.processors.routed import has_plain_weight
from keylock_diffusers.routing.buffers import version_of

_Squares = tuple[Tensor, Tensor, Tensor]  # |W|^2, <W, B A>, |B A|^2 by row, float64 [O] on the CPU
_KEPT: WeakKeyDictionary[LowRank, tuple[Any, int | None, _Squares]] = WeakKeyDictionary()


def output_scale(module: Any, name: str, update: LowRank, strength: float) -> Tensor:  # [O] float32
    """What a projection's outputs, without its bias, are multiplied by.

    Args:
        module: the projection.
        name: of it, for errors.
        update: what is added to its weight, with a magnitude.
        strength: the factor on up @ down.

    Raises:
        ValueError: its weight cannot be read, or a row of the sum is zero.
    """
    if not has_plain_weight(module):
        raise ValueError(
            f"a weight-decomposed LoRA (DoRA) needs the numbers of {name}, whose weight is quantised or not "
            f"loaded: {type(module).__name__}"
        )
    base, cross, own = _squares(module.weight, update)
    squared = base + 2 * strength * cross + strength**2 * own
    if not bool((squared > 0).all()):
        raise ValueError(f"a weight-decomposed LoRA (DoRA) leaves nothing of a row of {name} at strength {strength:g}")
    assert update.magnitude is not None
    return (update.magnitude.double().cpu() / squared.sqrt()).float()


def _squares(weight: Tensor, update: LowRank) -> _Squares:
    kept = _KEPT.get(update)
    if kept is not None and kept[0]() is weight and kept[1] == version_of(weight):
        return kept[2]
    rows = weight.detach().flatten(1).float()
    up, down = update.up.to(rows), update.down.flatten(1).to(rows)
    with torch.autocast(rows.device.type, enabled=False):
        base = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        cross = (rows @ down.T).mul(up).sum(1, dtype=torch.float64)
        own = (up @ (down @ down.T)).mul(up).sum(1, dtype=torch.float64)
    made = base.cpu(), cross.cpu(), own.cpu()
    _KEPT[update] = weakref.ref(weight), version_of(weight), made
    return made
