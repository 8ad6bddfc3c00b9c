"""rank_one_linear and rank_one_update on text keys and values, against what a user would write instead.

Half of the rows are unconditional and take nothing, as under guidance; each of the others is a user of their own
with R = 2 updates.
"""

from __future__ import annotations

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
from keylock_kernels import rank_one_coefficients, rank_one_linear, rank_one_update
from keylock_kernels.ops.low_rank import reference
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import SHAPES, rank_one_inputs

TAKEN = 2  # R
TOKENS = 77
WIDTHS = list(dict.fromkeys((s.model, s.text_width, s.width) for s in SHAPES if s.model in ("sd1.5", "sdxl")))
WIDTHS, BATCHES = (WIDTHS[:1], (2,)) if QUICK else (WIDTHS, (2, 8, 32) if DEVICE.type == "cuda" else (2, 8))

over_dtypes = pytest.mark.parametrize("dtype", dtypes(), ids=dtype_name)
over_rows = pytest.mark.parametrize("rows", BATCHES, ids="B{}".format)
over_widths = pytest.mark.parametrize(("model", "inner", "outer"), WIDTHS)


def make(rows: int, inner: int, outer: int, dtype: torch.dtype, given: bool, seed: int) -> dict[str, Any]:
    """Arguments of rank_one_linear, coefficients given or linear in v."""
    users = rows // 2
    inputs = rank_one_inputs(
        rows, TOKENS, inner, outer, users * TAKEN, TAKEN, gate=None, bias=False, strength=False,
        seed=seed, dtype=dtype, device=DEVICE,
    )  # fmt: skip
    own = torch.arange(users * TAKEN, dtype=torch.int32).view(users, TAKEN)
    inputs["slots"] = torch.cat([torch.full((rows - users, TAKEN), -1, dtype=torch.int32), own]).to(DEVICE)
    if given:
        # As concepts have them: in float32 whatever the layer computes in, and 0 for a row that takes nothing.
        x, v = inputs["x"].double(), inputs.pop("v").double()
        inputs["coefficients"] = rank_one_coefficients(x, v, inputs["slots"]).float()
        inputs["v"] = None
    return inputs


def tables(inputs: dict[str, Any]) -> dict[str, Any]:
    """Made once for all steps: tables with a row of zeros, for rows that take nothing to point at."""
    slots = torch.where(inputs["slots"] < 0, inputs["u"].shape[0], inputs["slots"]).long()
    padded = {name: F.pad(inputs[name], (0, 0, 0, 1)) for name in ("u", "v") if inputs.get(name) is not None}
    return {**inputs, **padded, "slots": slots}


def coefficients(inputs: dict[str, Any]) -> Tensor:  # [B, T, R]
    if inputs.get("v") is None:
        return inputs["coefficients"].to(inputs["u"].dtype)
    return inputs["x"] @ inputs["v"][inputs["slots"]].mT


def composed(inputs: dict[str, Any]) -> Tensor:
    return torch.baddbmm(base(inputs), coefficients(inputs), inputs["u"][inputs["slots"]])


def base(inputs: dict[str, Any]) -> Tensor:
    return inputs["base"] if "base" in inputs else F.linear(inputs["x"], inputs["weight"])


def eager(inputs: dict[str, Any]) -> Tensor:
    """The eager backend's code, open to the compiler."""
    u, v, slots, c = (inputs.get(name) for name in ("u", "v", "slots", "coefficients"))
    updates = Updates(u, v, None, slots, None, None, None, None, c, 1)
    if "base" in inputs:
        return reference.update(inputs["base"], None, updates)
    return reference.linear(inputs["x"], inputs["weight"], None, None, updates)


def adapters(inputs: dict[str, Any]) -> dict[str, Any]:
    """PEFT's layout: each adapter's two factors, and the rows that use it, known before the call."""
    users = inputs["slots"].tolist()
    groups = []
    for slots in dict.fromkeys(tuple(row) for row in users if row[0] >= 0):
        rows = torch.tensor([b for b, row in enumerate(users) if tuple(row) == slots], device=DEVICE)
        pair = list(slots)
        groups.append((rows, inputs["u"][pair], None if inputs.get("v") is None else inputs["v"][pair].mT))
    return {**inputs, "groups": groups}


def loop(inputs: dict[str, Any]) -> Tensor:
    """PEFT's mixed batch: per adapter gather its rows, two products, scatter."""
    out = inputs["base"].clone() if "base" in inputs else base(inputs)
    for rows, u, v in inputs["groups"]:
        c = inputs["coefficients"][rows].to(out.dtype) if v is None else inputs["x"][rows] @ v
        out.index_add_(0, rows, c @ u)
    return out


def materialised(inputs: dict[str, Any]) -> Tensor:  # [B, O, K]
    slots, weight = inputs["slots"], inputs["weight"]
    whole = weight.expand(slots.shape[0], *weight.shape)
    return torch.baddbmm(whole, inputs["u"][slots].mT, inputs["v"][slots])


PEERS = [
    Contestant("product and baddbmm", "peer", composed, tables),
    Contestant("loop over adapters, as PEFT", "peer", loop, adapters),
]
# A weight holds a linear update only; a gated one, whose coefficients are given, it cannot.
LINEAR_PEERS = [
    Contestant(
        "W + u v^T per call, bmm", "peer", lambda inputs: torch.bmm(inputs["x"], materialised(inputs).mT), tables
    ),
    Contestant(
        "W + u v^T beforehand, bmm",
        "peer",
        lambda arguments: torch.bmm(*arguments),
        lambda inputs: (inputs["x"], materialised(tables(inputs)).mT),
    ),
]


def compiled_peers() -> list[Contestant]:
    return compiled("torch.compile of eager", eager) + compiled(
        "torch.compile of product and baddbmm", composed, prepare=tables
    )


@over_dtypes
@over_rows
@over_widths
@pytest.mark.parametrize("form", ["linear", "coefficients"])
def test_rank_one_linear(form, model, inner, outer, rows, dtype, compare):
    given = form == "coefficients"
    size, users = dtype.itemsize, rows // 2
    read = (rows * TOKENS * TAKEN * 4) if given else users * TAKEN * inner * size
    compare(
        Case(
            f"rank_one_linear/{form}/{model}-{inner}x{outer}/B{rows}/{dtype_name(dtype)}",
            make_sets(lambda seed: make(rows, inner, outer, dtype, given, seed)),
            [
                *library("rank_one_linear", rank_one_linear),
                *PEERS,
                *([] if given else LINEAR_PEERS),
                *compiled_peers(),
                Contestant("F.linear", "floor", base),
            ],
            judge_of(rank_one_linear),
            moved_bytes=size * (rows * TOKENS * (inner + outer) + inner * outer + users * TAKEN * outer) + read,
            flops=2 * rows * TOKENS * inner * outer + 2 * users * TOKENS * TAKEN * (outer + (0 if given else inner)),
        )
    )


def make_update(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    inputs = make(rows, inner, outer, dtype, True, seed)
    projected = F.linear(inputs["x"], inputs["weight"])
    return {"base": projected, **{name: inputs[name] for name in ("u", "slots", "coefficients")}}


@over_dtypes
@over_rows
@over_widths
def test_rank_one_update(model, inner, outer, rows, dtype, compare):
    size, users = dtype.itemsize, rows // 2
    compare(
        Case(
            f"rank_one_update/{model}-{outer}/B{rows}/{dtype_name(dtype)}",
            make_sets(lambda seed: make_update(rows, inner, outer, dtype, seed)),
            [
                *library("rank_one_update", rank_one_update),
                *PEERS,
                *compiled_peers(),
                Contestant("copy of base", "floor", lambda inputs: inputs["base"].clone()),
            ],
            judge_of(rank_one_update),
            moved_bytes=size * (2 * rows * TOKENS * outer + users * TAKEN * outer) + 4 * rows * TOKENS * TAKEN,
            flops=2 * users * TOKENS * TAKEN * outer,
        )
    )
