"""A batch row depends on itself alone: to the bit, forward and backward, wherever it stands."""

from __future__ import annotations

import functools

import pytest
import torch

from keylock_kernels import localized_attention, rank_one_coefficients, rank_one_linear, rank_one_update
from keylock_kernels.testing import attention_inputs, rank_one_inputs
from tests.kernels.helpers import (
    ATTENTION_BACKENDS,
    ATTENTION_CASES,
    INTERPRETED,
    UPDATE_BACKENDS,
    floating,
    gradients_like,
    run,
)

ROWS = 5
SHARED = ("weight", "u", "v", "bias", "beta", "tau")  # of rank_one_linear, when beta and tau are [S]
dirt = pytest.mark.parametrize("dirt", [torch.nan, 1e30])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# The second of each is a real model's width, the first is odd in every dimension.
RANK_ONE_SIZES = ((7, 9, 11), (77, 64, 48))
# In the interpreter the first, which fills no tile, stands for all.
ATTENTION_SIZES = ((13, 7, 3, 5), (64, 77, 2, 40))[: 1 if INTERPRETED else 2]
# What runs on many threads; the interpreter goes through its programs one after another, and cannot differ.
REPEATED_SIZES = ATTENTION_SIZES[-1]


@pytest.fixture(autouse=True)
def two_threads():
    """Whatever OMP_NUM_THREADS says: with one thread there is no order of theirs to depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if INTERPRETED else 2)
    yield
    torch.set_num_threads(before)


def rank_one_rows(sizes, gate, dtype):
    """Each row has two updates of its own, and one slot that is -1."""
    inputs = rank_one_inputs(ROWS, *sizes, 2 * ROWS, 3, gate=gate, dtype=dtype)
    inputs["slots"] = torch.tensor([[2 * b, -1, 2 * b + 1] for b in range(ROWS)], dtype=torch.int32)
    return inputs


def update_on_given_base(x, u, v, slots, backend, **gate):
    base = x[..., :1].expand(*x.shape[:2], u.shape[1])
    return rank_one_update(base, u, slots, rank_one_coefficients(x, v, slots, **gate), backend=backend)


def undisturbed(op, sizes, option, dtype, backend):
    """Inputs, gradients of results, results and gradients of inputs that several tests compare with."""
    inputs, upstream, results, grads = _undisturbed(op, sizes, option, dtype, backend)
    return dict(inputs), [g.clone() for g in upstream], results, grads


@functools.cache
def _undisturbed(op, sizes, option, dtype, backend):
    if op is localized_attention:
        inputs = attention_inputs(ROWS, *sizes, dtype=dtype, **ATTENTION_CASES[option])
    else:
        inputs = rank_one_rows(sizes, option, dtype)
    if op is update_on_given_base:
        inputs = {k: v for k, v in inputs.items() if k not in ("weight", "bias")}
    results, grads = run(op, inputs, wanted=of_rows(inputs), backend=backend)
    upstream = [g.to(r.dtype) for g, r in zip(gradients_like(results), results, strict=True)]
    return inputs, upstream, results, grads


def of_rows(inputs):
    """What has a gradient of its own in every row."""
    return [name for name in floating(inputs) if name not in ("weight", "bias")]


def equal(a, b):
    return torch.equal(a, b) and not a.isnan().any()


@dirt
@dtypes
@pytest.mark.parametrize("backend", UPDATE_BACKENDS)
@pytest.mark.parametrize("gate", ["table", "row"])
@pytest.mark.parametrize("sizes", RANK_ONE_SIZES, ids=str)
@pytest.mark.parametrize("op", [rank_one_linear, update_on_given_base])
def test_a_neighbours_concept_and_gradient_do_not_reach_a_row(op, sizes, gate, backend, dtype, dirt):
    inputs, upstream, clean, clean_grads = undisturbed(op, sizes, gate, dtype, backend)
    wanted = of_rows(inputs)
    others = [b for b in range(ROWS) if b != 2]
    slots = [s for b in others for s in (2 * b, 2 * b + 1)]
    for name in wanted:
        inputs[name] = inputs[name].clone()
        per_slot = name in SHARED and inputs[name].shape[0] == 2 * ROWS
        inputs[name][slots if per_slot else others] = dirt
    upstream[0][others] = dirt
    dirty, grads = run(op, inputs, wanted=wanted, upstream=upstream, backend=backend)
    assert equal(dirty[0][2], clean[0][2])
    for name in wanted:
        mine = [4, 5] if grads[name].shape[0] == 2 * ROWS else [2]
        assert equal(grads[name][mine], clean_grads[name][mine]), name


@dirt
@dtypes
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("sizes", ATTENTION_SIZES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_a_neighbours_images_masks_and_gradient_do_not_reach_a_row(case, sizes, backend, dtype, dirt):
    inputs, upstream, clean, clean_grads = undisturbed(localized_attention, sizes, case, dtype, backend)
    others = [b for b in range(ROWS) if b != 2]
    for name in floating(inputs):
        inputs[name] = inputs[name].clone()
        inputs[name][others] = dirt
    for gradient in upstream:
        gradient[others] = dirt
    dirty, grads = run(localized_attention, inputs, upstream=upstream, backend=backend)
    for result, wanted in zip(dirty, clean, strict=True):
        assert equal(result[2], wanted[2])
    for name, grad in grads.items():
        assert equal(grad[2], clean_grads[name][2]), name


@dtypes
@pytest.mark.parametrize("backend", UPDATE_BACKENDS)
@pytest.mark.parametrize("gate", ["table", "row"])
@pytest.mark.parametrize("sizes", RANK_ONE_SIZES, ids=str)
def test_permuting_rows_permutes_the_layer_bit_for_bit(sizes, gate, backend, dtype):
    inputs, upstream, results, grads = undisturbed(rank_one_linear, sizes, gate, dtype, backend)
    wanted = of_rows(inputs)
    order = torch.tensor([3, 0, 4, 1, 2])
    local = [k for k, t in inputs.items() if t.shape[0] == ROWS]
    moved = {**inputs, **{k: inputs[k][order] for k in local}}
    moved_results, moved_grads = run(
        rank_one_linear, moved, wanted=wanted, upstream=[g[order] for g in upstream], backend=backend
    )
    assert equal(moved_results[0], results[0][order])
    for name in wanted:  # every slot belongs to one row, so shared tables get the same sums
        assert equal(moved_grads[name], grads[name][order] if name in local else grads[name]), name


@dtypes
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("sizes", ((1, 1, 1, 1), (1, 16, 2, 64), *ATTENTION_SIZES), ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_permuting_rows_permutes_attention_bit_for_bit(case, sizes, backend, dtype):
    inputs, upstream, results, grads = undisturbed(localized_attention, sizes, case, dtype, backend)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    moved_results, moved_grads = run(localized_attention, moved, upstream=[g[order] for g in upstream], backend=backend)
    for result, wanted in zip(moved_results, results, strict=True):
        assert equal(result, wanted[order])
    for name, grad in moved_grads.items():
        assert equal(grad, grads[name][order]), name


@pytest.mark.parametrize("backend", UPDATE_BACKENDS)
def test_repeating_a_layer_repeats_every_bit(backend):
    inputs = rank_one_inputs(ROWS, 77, 64, 48, 4, 6, dtype=torch.float32)
    first, second = (run(rank_one_linear, inputs, backend=backend) for _ in range(2))
    assert equal(first[0][0], second[0][0])
    assert all(equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_repeating_attention_repeats_every_bit(backend):
    inputs = attention_inputs(ROWS, *REPEATED_SIZES, dtype=torch.float32, **ATTENTION_CASES["everything"])
    first, second = (run(localized_attention, inputs, backend=backend) for _ in range(2))
    assert all(equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(equal(first[1][name], second[1][name]) for name in first[1])


def test_a_broken_row_spoils_only_the_updates_it_takes():
    inputs = rank_one_rows((7, 9, 11), "table", torch.float32)
    inputs["x"][1] = torch.nan
    _, grads = run(rank_one_linear, inputs, wanted=["u", "v", "beta", "tau"])
    for name, grad in grads.items():
        spoilt = grad.view(2 * ROWS, -1).isnan().any(1).nonzero().flatten().tolist()
        assert spoilt == [2, 3], name
