"""low_rank_linear and low_rank_update on the projections of a U-Net, against what a user would write instead.

Eight rows in one batch, each a user of their own with J adapters of one rank; no two rows share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    DEVICE,
    QUICK,
    Case,
    Contestant,
    compiled,
    dtype_name,
    dtypes,
    judge_of,
    library,
    make_sets,
)
from keylock_kernels import low_rank_linear, low_rank_update
from keylock_kernels.ops.low_rank import reference
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import PROJECTIONS, Projection, low_rank_inputs

ROWS = 2 if QUICK else 8
LAYERS = PROJECTIONS[1:2] if QUICK else PROJECTIONS
# Rank and J: what targets are about, and how it grows with either.
SIZES, MORE = ((8, 1), (16, 1), (32, 1)), ((4, 1), (128, 1), (16, 4), (16, 8))
SIZES, MORE = (SIZES[:1], ()) if QUICK else (SIZES, MORE)
CASES = [(projection, *size) for projection in LAYERS for size in SIZES]
CASES += [(projection, *size) for projection in LAYERS if projection.layer == "to_q" for size in MORE]

over_dtypes = pytest.mark.parametrize("dtype", dtypes(), ids=dtype_name)


def over(cases: Iterable[tuple[Projection, int, int]]) -> pytest.MarkDecorator:
    named = [pytest.param(*case, id=f"{case[0].name}-r{case[1]}x{case[2]}") for case in cases]
    return pytest.mark.parametrize(("projection", "rank", "taken"), named)


def make(projection: Projection, rank: int, taken: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Arguments of low_rank_linear."""
    inputs = low_rank_inputs(
        ROWS, projection.tokens, projection.inner, projection.outer, (rank,) * (ROWS * taken), taken,
        bias=False, strength=False, weights=False, scale=False, seed=seed, dtype=dtype, device=DEVICE,
    )  # fmt: skip
    own = torch.arange(ROWS * taken, dtype=torch.int32, device=DEVICE).view(ROWS, taken)
    return {**inputs, "slots": own, "max_rank": rank}


def base(inputs: dict[str, Any]) -> Tensor:  # [B, N, O]
    return inputs["base"] if "base" in inputs else F.linear(inputs["x"], inputs["weight"])


def tables(inputs: dict[str, Any]) -> dict[str, Any]:
    """Adapters of one rank as [S, r, K] and [S, r, O], which is how their rows are gathered."""
    rank = inputs["max_rank"]
    shaped = {name: inputs[name].unflatten(0, (-1, rank)) for name in ("up", "down")}
    return {**inputs, **shaped, "slots": inputs["slots"].long()}


def gathered(inputs: dict[str, Any]) -> Tensor:
    down, up = (inputs[name][inputs["slots"]].flatten(1, 2) for name in ("down", "up"))
    return torch.baddbmm(base(inputs), inputs["x"] @ down.mT, up)


def adapters(inputs: dict[str, Any]) -> dict[str, Any]:
    """PEFT's layout: each adapter's two factors, and the rows that use it, known before the call."""
    shaped = tables(inputs)
    users = inputs["slots"].tolist()
    groups = [
        (torch.tensor([b for b, row in enumerate(users) if slot in row], device=DEVICE), up, down.mT)
        for slot, (up, down) in enumerate(zip(shaped["up"], shaped["down"], strict=True))
    ]
    return {**inputs, "groups": groups}


def loop(inputs: dict[str, Any]) -> Tensor:
    """PEFT's mixed batch: per adapter gather its rows, two products, scatter."""
    out = inputs["base"].clone() if "base" in inputs else base(inputs)
    for rows, up, down in inputs["groups"]:
        out.index_add_(0, rows, inputs["x"][rows] @ down @ up)
    return out


def factors(inputs: dict[str, Any]) -> dict[str, Any]:
    """A weight that may be written, and each row's factors side by side."""
    shaped = tables(inputs)
    pairs = [tuple(shaped[name][slots].flatten(0, 1) for name in ("up", "down")) for slots in shaped["slots"]]
    return {**inputs, "weight": inputs["weight"].clone(), "pairs": pairs}


def one_at_a_time(inputs: dict[str, Any]) -> Tensor:
    """As adapters that are fused must be used: into the weight, the user's row, out of the weight again."""
    weight, rows = inputs["weight"], []
    for x, (up, down) in zip(inputs["x"], inputs["pairs"], strict=True):
        weight.addmm_(up.mT, down)
        rows.append(F.linear(x, weight))
        weight.addmm_(up.mT, down, alpha=-1)
    return torch.stack(rows)


def eager(inputs: dict[str, Any]) -> Tensor:
    """The eager backend's code, open to the compiler."""
    up, down, offsets, slots = (inputs[name] for name in ("up", "down", "offsets", "slots"))
    updates = Updates(up, down, offsets, slots, None, None, None, None, None, inputs["max_rank"])
    if "base" in inputs:
        return reference.update(inputs["base"], inputs["x"], updates)
    return reference.linear(inputs["x"], inputs["weight"], None, None, updates)


def peers() -> list[Contestant]:
    return [
        Contestant("F.linear, gather and bmm", "peer", gathered, tables),
        Contestant("loop over adapters, as PEFT", "peer", loop, adapters),
        *compiled("torch.compile of eager", eager),
        *compiled("torch.compile of gather and bmm", gathered, prepare=tables),
    ]


@over_dtypes
@over(CASES)
def test_low_rank_linear(projection, rank, taken, dtype, compare):
    inner, outer, every = projection.inner, projection.outer, taken * rank
    numbers = ROWS * projection.tokens * (inner + outer) + inner * outer + ROWS * every * (inner + outer)
    compare(
        Case(
            f"low_rank_linear/{projection.name}/r{rank}x{taken}/{dtype_name(dtype)}",
            make_sets(lambda seed: make(projection, rank, taken, dtype, seed)),
            [
                *library("low_rank_linear", low_rank_linear),
                *peers(),
                Contestant("one user at a time, fused into W", "peer", one_at_a_time, factors),
                Contestant("F.linear", "floor", base),
            ],
            judge_of(low_rank_linear),
            moved_bytes=dtype.itemsize * numbers,
            flops=2 * ROWS * projection.tokens * (inner * outer + every * (inner + outer)),
            facts={"target, x floor": 1.03 + 1.25 * every * (inner + outer) / (inner * outer)},
        )
    )


def make_update(projection: Projection, rank: int, taken: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    inputs = make(projection, rank, taken, dtype, seed)
    projected = base(inputs)
    del inputs["weight"]
    return {"base": projected, **inputs}


@over_dtypes
@over(case for case in CASES if case[1:] == ((8, 1) if QUICK else (16, 1)))
def test_low_rank_update(projection, rank, taken, dtype, compare):
    inner, outer, every = projection.inner, projection.outer, taken * rank
    numbers = ROWS * projection.tokens * (inner + 2 * outer) + ROWS * every * (inner + outer)
    compare(
        Case(
            f"low_rank_update/{projection.name}/r{rank}x{taken}/{dtype_name(dtype)}",
            make_sets(lambda seed: make_update(projection, rank, taken, dtype, seed)),
            [
                *library("low_rank_update", low_rank_update),
                *peers(),
                Contestant("copy of base", "floor", lambda inputs: inputs["base"].clone()),
            ],
            judge_of(low_rank_update),
            moved_bytes=dtype.itemsize * numbers,
            flops=2 * ROWS * projection.tokens * every * (inner + outer),
        )
    )
