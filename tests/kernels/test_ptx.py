"""The PTX of the Triton kernels computes what the reference does, run instruction by instruction without a GPU.

What a launcher launches is compiled for a GPU and run by tests/ptx on the CPU. A case is a line of CASES; a kernel that
no case launches fails a test.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from keylock_kernels import (  # noqa: E402
    localized_attention,
    low_rank_linear,
    low_rank_update,
    ops,
    rank_one_linear,
    rank_one_update,
)
from keylock_kernels.ops.low_rank.updates import Updates  # noqa: E402
from keylock_kernels.testing import (  # noqa: E402
    assert_as_accurate_as_eager,
    attention_inputs,
    cast,
    low_rank_inputs,
    rank_one_inputs,
)
from tests.kernels.helpers import (  # noqa: E402
    INTERPRETED,
    floating,
    gradients_like,
    linear_through_coefficients,
    run,
)
from tests.ptx import plants  # noqa: E402
from tests.ptx.faults import Diverged, Misaligned, OutOfBounds, Race, Unfenced, Unwaited  # noqa: E402
from tests.ptx.launches import Edit, gpu, simulated  # noqa: E402
from tests.ptx.machine import ORDERS  # noqa: E402

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter and the compiler exclude each other"),
    pytest.mark.usefixtures("own_cache"),
]
TARGETS = ("sm_80", "sm_90")
# How many roundings tensor cores may add in a dtype: what they cut off is of one sign, and does not average out as
# eager's roundings do. Numbers of 16 bits hide it.
CUT_OFF = {torch.float32: 4}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call of an op, forward and backward; sizes are small, and odd or aligned as the name says."""

    op: Callable[..., Any]
    inputs: Callable[[], dict[str, Any]]
    quick: tuple[str, ...]  # what `make test` runs of it, as "dtype target"
    tables: tuple[str, ...] = ()  # inputs of which a row sees what its slots take
    shared: tuple[str, ...] = ()  # and those that it shares with all rows
    processors: int = 132  # with few of them a program takes several tiles in turn


def _update_inputs(rows: int, tokens: int, outer: int, updates: int, taken: int) -> dict[str, Any]:
    made = rank_one_inputs(rows, tokens, outer, outer, updates, taken, gate=None, bias=False, strength=False)
    (c,) = gradients_like([torch.empty(rows, tokens, taken)])
    return {"base": made["x"], "u": made["u"], "slots": made["slots"], "coefficients": c}


def _heads_of_a_slice(inputs: dict[str, Any]) -> dict[str, Any]:
    """Keys and values as halves of one projection, and queries whose heads are outermost."""
    key, value = torch.cat([inputs["key"], inputs["value"]], -1).chunk(2, -1)
    return {**inputs, "query": inputs["query"].transpose(1, 2).contiguous().transpose(1, 2), "key": key, "value": value}


def _on_an_output(inputs: dict[str, Any]) -> dict[str, Any]:
    weight, _, _ = (inputs.pop(name) for name in ("weight", "bias", "output_scale"))
    return {"base": inputs["x"] @ weight.mT, **inputs}


_rank_one = functools.partial(Case, tables=("u", "v", "beta", "tau"), shared=("weight", "bias"))
_low_rank = functools.partial(Case, tables=("up", "down"), shared=("weight", "bias"))
CASES: dict[str, Case] = {
    "linear, odd": _rank_one(
        rank_one_linear, lambda: rank_one_inputs(2, 83, 70, 72, 5, 2, gate=None), ("float16 sm_80", "bfloat16 sm_90")
    ),
    "gated, two chunks, aligned": _rank_one(
        rank_one_linear, lambda: rank_one_inputs(2, 77, 64, 48, 40, 18),
        ("bfloat16 sm_80", "float32 sm_90", "float16 sm_90"),
    ),
    "gated, pixels, aligned": _rank_one(
        rank_one_linear, lambda: rank_one_inputs(2, 170, 128, 144, 5, 3), ("bfloat16 sm_90",)
    ),
    "gated per row, pixels": _rank_one(
        rank_one_linear, lambda: rank_one_inputs(2, 170, 72, 136, 5, 3, gate="row"),
        ("float16 sm_90", "bfloat16 sm_80"),
    ),
    "gated, two splits, narrow": _rank_one(
        rank_one_linear, lambda: rank_one_inputs(2, 530, 9, 11, 5, 2), ("float32 sm_80",)
    ),
    "given coefficients": _rank_one(
        linear_through_coefficients, lambda: rank_one_inputs(2, 83, 40, 72, 5, 2), ("float32 sm_80", "float16 sm_90")
    ),
    "a few updates": _rank_one(rank_one_update, lambda: _update_inputs(2, 45, 136, 5, 3), ("float16 sm_90",)),
    "adapters, odd": _low_rank(
        low_rank_linear, lambda: low_rank_inputs(2, 83, 70, 72, (3, 0, 21, 5), 3, seed=1),
        ("float16 sm_80", "bfloat16 sm_90"),
    ),
    "adapters, pixels, aligned": _low_rank(
        low_rank_linear, lambda: low_rank_inputs(2, 170, 128, 144, (16, 8, 16), 1, weights=False),
        ("float16 sm_90",),
    ),
    "adapters of many": _low_rank(
        low_rank_linear, lambda: low_rank_inputs(2, 40, 64, 64, (64, 33, 70), 2, scale=False), ("bfloat16 sm_90",)
    ),
    "adapters on an output": _low_rank(
        low_rank_update, lambda: _on_an_output(low_rank_inputs(2, 43, 70, 136, (3, 0, 21, 5), 3, seed=1)),
        ("float16 sm_80", "bfloat16 sm_90"),
    ),
    "update, two chunks": _rank_one(
        rank_one_update, lambda: _update_inputs(2, 83, 136, 40, 18),
        ("bfloat16 sm_90", "float16 sm_80", "float32 sm_80"),
    ),
    "text": Case(
        localized_attention, lambda: attention_inputs(2, 150, 77, 2, 40),
        ("bfloat16 sm_90", "float32 sm_80", "float16 sm_80"), processors=1,
    ),
    "text, strided": Case(
        localized_attention, lambda: _heads_of_a_slice(attention_inputs(2, 70, 37, 2, 24)), ("float16 sm_90",)
    ),
    "regions": Case(
        localized_attention, lambda: attention_inputs(2, 70, 77, 1, 64, regions=True),
        ("bfloat16 sm_80", "float16 sm_90"),
    ),
    "images": Case(
        localized_attention, lambda: attention_inputs(2, 150, 77, 1, 40, images=(4,) * 4, weights="pixel"),
        ("bfloat16 sm_90", "float32 sm_80"), processors=1,
    ),
    "long streams": Case(
        localized_attention, lambda: attention_inputs(2, 70, 100, 1, 72, images=(100, 3), weights="row"),
        ("float16 sm_80", "bfloat16 sm_90"),
    ),
    "maps": Case(
        localized_attention, lambda: attention_inputs(2, 70, 77, 1, 40, images=(5,), read=4), ("float16 sm_90",)
    ),
    "everything, odd": Case(
        localized_attention,
        lambda: attention_inputs(
            2, 37, 23, 2, 5, images=(4, 0, 3), bias=True, regions=True, weights="pixel", read=3, sums=True
        ),
        ("bfloat16 sm_80", "float32 sm_90"),
    ),
}  # fmt: skip


def points(names: Iterable[str], dtypes: Iterable[str] = DTYPES, mark_long: bool = True) -> pytest.MarkDecorator:
    """Cases in every dtype and for every target; those that only `make test-long` runs are marked."""
    found = []
    for name, dtype, target in itertools.product(names, dtypes, TARGETS):
        marks = [pytest.mark.long] if mark_long and f"{dtype} {target}" not in CASES[name].quick else []
        found.append(pytest.param(name, dtype, target, marks=marks, id=f"{name}-{dtype}-{target}"))
    return pytest.mark.parametrize(("name", "dtype", "target"), found)


def in_half(*names: str) -> pytest.MarkDecorator:
    return points(names, ["float16"], mark_long=False)


def on_the_machine(
    case: Case, target: str, order: str = "together", edit: Edit | None = None, exact: bool = True
) -> contextlib.AbstractContextManager[None]:
    return simulated(target, order, edit, case.processors, exact)


def first(results: Any) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def equal(a: tuple[list[Tensor], dict[str, Tensor]], b: tuple[list[Tensor], dict[str, Tensor]]) -> bool:
    pairs = [*zip(a[0], b[0], strict=True), *((a[1][name], b[1][name]) for name in a[1])]
    return all(torch.equal(x, y) for x, y in pairs)


@points(CASES)
def test_results_and_gradients_err_at_most_twice_as_much_as_eager(name, dtype, target):
    case, inputs = CASES[name], cast(CASES[name].inputs(), DTYPES[dtype])
    exact, exact_grads = run(case.op, cast(inputs, torch.float64), backend="eager")
    eager, eager_grads = run(case.op, inputs, backend="eager")
    with on_the_machine(case, target, exact=False):
        actual, grads = run(case.op, inputs, backend="triton")
    judged = [(f"result {i}", result, eager[i], exact[i]) for i, result in enumerate(actual)]
    judged += [(what, grad, eager_grads[what], exact_grads[what]) for what, grad in grads.items()]
    for what, found, beside, right in judged:
        more = CUT_OFF.get(found.dtype, 1)
        assert_as_accurate_as_eager(found, beside, right, what, roundings=more, mean_roundings=more)


@in_half("linear, odd", "gated, two chunks, aligned", "text", "everything, odd")
def test_runs_and_orders_of_warps_agree_to_the_bit(name, dtype, target):
    case, inputs = CASES[name], cast(CASES[name].inputs(), DTYPES[dtype])
    found = []
    for order in ("together", *ORDERS):
        with on_the_machine(case, target, order):
            found.append(run(case.op, inputs, backend="triton"))
    assert all(equal(again, found[0]) for again in found[1:])
    assert not any(t.isnan().any() for t in (*found[0][0], *found[0][1].values()))


def tables(case: Case, inputs: dict[str, Any]) -> list[str]:
    """Which inputs have lines for every slot: what belongs to a row's places has one for every row instead."""
    return [name for name in case.tables if name in inputs and len(inputs[name]) != len(inputs["slots"])]


def lines(inputs: dict[str, Any], slots: Tensor) -> set[int]:
    """What slots take of the tables."""
    taken = {slot for slot in slots.flatten().tolist() if slot >= 0}
    if "offsets" not in inputs:
        return taken
    bounds = inputs["offsets"].tolist()
    return {line for slot in taken if slot + 1 < len(bounds) for line in range(*bounds[slot : slot + 2])}


def poisoned(case: Case, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """NaN wherever row 0 alone, or no row, looks; and for each table what the other rows take of it."""
    inputs, taken = dict(inputs), {}
    of_slots = tables(case, inputs)
    for name, tensor in floating(inputs).items():
        if name in case.shared:
            continue
        inputs[name] = tensor.clone()
        if name in of_slots:
            mine = lines(inputs, inputs["slots"][1:])
            taken[name] = sorted(mine)
            inputs[name][sorted(set(range(len(tensor))) - mine)] = torch.nan
        else:
            inputs[name][0] = torch.nan
    return inputs, taken


@in_half("linear, odd", "adapters, odd", "update, two chunks", "text", "everything, odd")
def test_a_neighbours_nan_does_not_reach_a_row(name, dtype, target):
    case, inputs = CASES[name], cast(CASES[name].inputs(), DTYPES[dtype])
    wanted = [what for what in floating(inputs) if what not in case.shared]
    dirt, taken = poisoned(case, inputs)
    with on_the_machine(case, target):
        clean, clean_grads = run(case.op, inputs, wanted, backend="triton")
        upstream = gradients_like(clean)
        for gradient in upstream:
            gradient[0] = torch.nan
        dirty, grads = run(case.op, dirt, wanted, upstream, backend="triton")
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a[1:], b[1:]) and a[0].isnan().any()
    # What both rows take has a gradient from both.
    also = lines(inputs, inputs["slots"][0]) if "slots" in inputs else set()
    for what, gradient in grads.items():
        rows = [slot for slot in taken[what] if slot not in also] if what in taken else list(range(1, len(gradient)))
        assert rows and torch.equal(gradient[rows], clean_grads[what][rows]), what


@in_half("linear, odd", "gated per row, pixels", "adapters, odd", "adapters on an output", "update, two chunks")
def test_slot_minus_one_is_exactly_nothing_and_a_missing_slot_is_nan(name, dtype, target):
    case, inputs = CASES[name], cast(CASES[name].inputs(), DTYPES[dtype])
    inputs["slots"][1] = -1
    bare = {**inputs, "slots": torch.full_like(inputs["slots"], -1)}
    # Row 0 takes its slots but the last, in whose place it asks for one that does not exist.
    slots, of_slots = inputs["slots"].clone(), tables(case, inputs)
    slots[0, -1] = len(inputs["offsets"]) - 1 if "offsets" in inputs else len(inputs[of_slots[0]])
    given = {**inputs, "slots": slots}
    untaken = sorted(set(range(len(inputs[of_slots[0]]))) - lines(inputs, slots))
    for what in of_slots:
        given[what] = given[what].index_fill(0, torch.tensor(untaken), torch.nan)
    with mock.patch.object(Updates, "checked", lambda updates, _: updates), on_the_machine(case, target):
        found, plain = (case.op(**i, backend="triton") for i in (given, bare))  # a GPU does not look at slots first
    assert found[0].isnan().all() and torch.equal(found[1], plain[1]) and found[1].isfinite().all()


def kernels_of_the_library() -> set[str]:
    found = set()
    for module in pkgutil.walk_packages(ops.__path__, "keylock_kernels.ops."):
        if "triton" in module.name.rpartition(".")[2]:
            found |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_launched_by_a_case_that_make_test_runs(target):
    launched: set[str] = set()

    def record(kernel: Any, *launch: Any) -> bool:
        launched.add(kernel.fn.__name__)
        return True

    for case in CASES.values():
        if any(target in point for point in case.quick):
            with gpu(target, record):
                run(case.op, cast(case.inputs(), torch.float32), backend="triton")
    assert launched == kernels_of_the_library()


# What is wrong, where it is planted (case, dtype, target, kernel), and what is said of it.
PLANTED = {
    "a dropped mask of a load": (
        plants.DROPPED_LOAD_MASK, "linear, odd", "float16", "sm_80", "linear_kernel", OutOfBounds, "has no elements",
    ),
    "a dropped mask of a store": (
        plants.DROPPED_STORE_MASK, "linear, odd", "float16", "sm_80", "linear_kernel", Race,
        "different values in one place",
    ),
    "a dropped mask of an asynchronous copy": (
        plants.DROPPED_COPY_MASK, "text", "float16", "sm_80", "localized_attention_fwd_kernel", OutOfBounds,
        "has no elements",
    ),
    "a wrong stride": (
        plants.swapped_parameters(2, 3), "text", "float16", "sm_80", "localized_attention_fwd_kernel", AssertionError,
        "error .* allowed",
    ),
    "a wrong stride, out of bounds": (
        plants.swapped_parameters(1, 2), "linear, odd", "float16", "sm_80", "linear_kernel", OutOfBounds,
        "has no elements",
    ),
    "no wait for asynchronous copies": (
        plants.MISSING_COPY_WAIT, "text", "float16", "sm_80", "localized_attention_fwd_kernel", Unwaited,
        "has not been waited for",
    ),
    "a wait for too few asynchronous copies": (
        plants.LATE_COPY_WAIT, "text", "float16", "sm_90", "localized_attention_fwd_kernel", Unwaited,
        "has not been waited for",
    ),
    "no wait for a product": (
        plants.MISSING_PRODUCT_WAIT, "text", "float16", "sm_90", "localized_attention_fwd_kernel", AssertionError,
        "error nan",
    ),
    "no fence before a product": (
        plants.MISSING_PROXY_FENCE, "text", "float16", "sm_90", "localized_attention_fwd_kernel", Unfenced,
        "with no fence in between",
    ),
    "no barriers": (
        plants.MISSING_BARRIERS, "text", "float16", "sm_80", "localized_attention_fwd_kernel", Race, "no barrier",
    ),
    "a barrier that some lanes pass by": (
        plants.barrier_of_some, "linear, odd", "float16", "sm_80", "linear_kernel", Diverged, "barrier",
    ),
    "an access off by two bytes": (
        plants.SHIFTED_ACCESS, "text", "float16", "sm_80", "localized_attention_fwd_kernel", Misaligned, "no multiple",
    ),
    "a swapped fragment": (
        plants.SWAPPED_FRAGMENT, "text", "float16", "sm_80", "localized_attention_fwd_kernel", AssertionError,
        "error .* allowed",
    ),
    "a dropped sum": (
        plants.DROPPED_SUM, "text", "float16", "sm_80", "localized_attention_fwd_kernel", AssertionError,
        "error .* allowed",
    ),
    "operands rounded to 16 bits": (
        plants.ROUNDED_OPERANDS, "update, two chunks", "float32", "sm_80", "given_update_kernel", AssertionError,
        "error .* allowed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted):
    plant, name, dtype, target, kernel, fault, said = PLANTED[planted]
    case, inputs, planted_in = CASES[name], cast(CASES[name].inputs(), DTYPES[dtype]), set()

    def edit(of: str, text: str) -> str:
        planted_in.add(of)
        return plant(text) if of == kernel else text

    exact, eager = (first(case.op(**i, backend="eager")) for i in (cast(inputs, torch.float64), inputs))
    with pytest.raises(fault, match=said), on_the_machine(case, target, edit=edit):
        assert_as_accurate_as_eager(first(case.op(**inputs, backend="triton")), eager, exact)
    assert kernel in planted_in
