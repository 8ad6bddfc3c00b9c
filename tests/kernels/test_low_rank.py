"""low_rank_linear and low_rank_update compute what their equation says, for ragged ranks and whatever is absent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_kernels import low_rank_linear, low_rank_update, rank_one_linear
from keylock_kernels.ops.low_rank import reference
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import (
    assert_as_accurate_as_eager,
    cast,
    low_rank_by_loops,
    low_rank_inputs,
    rank_one_inputs,
)
from tests.kernels.helpers import (
    DEVICE,
    INTERPRETED,
    LINEAR_BACKENDS,
    LOW_RANK_CASES,
    UPDATE_BACKENDS,
    assert_agree,
    low_rank_case,
    property_examples,
    run,
    widest,
)

cases = pytest.mark.parametrize("case", LOW_RANK_CASES)
layers = pytest.mark.parametrize("backend", LINEAR_BACKENDS)
backends = pytest.mark.parametrize("backend", UPDATE_BACKENDS)
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def plain(x, weight, up, down, offsets, slots, bias=None, strength=None, token_weights=None, output_scale=None):
    """The reference under plain autograd, with no op around it."""
    most = int(offsets.diff().max()) if len(offsets) > 1 else 0
    updates = Updates(up, down, offsets, slots, None, None, strength, token_weights, None, most)
    return reference.linear(x, weight, bias, output_scale, updates)


def plain_update(base, x, up, down, offsets, slots, strength=None, token_weights=None):
    none = torch.zeros(base.shape[2], x.shape[2], dtype=x.dtype, device=x.device)
    return base + plain(x, none, up, down, offsets, slots, None, strength, token_weights)


def as_update(inputs, seed=1):
    """The same updates, of what a layer has computed."""
    kept = {k: v for k, v in inputs.items() if k not in ("weight", "bias", "output_scale")}
    x, outer = inputs["x"], inputs["weight"].shape[0]
    generator = torch.Generator("cpu").manual_seed(seed)
    base = torch.randn(*x.shape[:2], outer, generator=generator, dtype=torch.float64, device="cpu")
    return {"base": base.to(x.dtype).to(x.device), **kept}


@cases
@layers
def test_the_result_is_each_tokens_own_weight_times_the_token(case, backend):
    inputs = low_rank_case(case)
    torch.testing.assert_close(low_rank_linear(**inputs, backend=backend), low_rank_by_loops(**inputs))


@cases
@layers
def test_every_gradient_is_the_references(case, backend):
    inputs = low_rank_case(case)
    _, exact = run(plain, inputs)
    _, grads = run(low_rank_linear, inputs, backend=backend)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], msg=lambda text, name=name: f"{name}: {text}")


@cases
def test_the_references_gradients_are_its_derivatives(case):
    inputs = low_rank_inputs(3, 3, 4, 3, (2, 0, 1), 2, **LOW_RANK_CASES[case])
    fixed = {name: inputs.pop(name) for name in ("offsets", "slots")}
    names = list(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]
    for op in (plain, low_rank_linear):
        assert torch.autograd.gradcheck(lambda *a, op=op: op(**fixed, **dict(zip(names, a, strict=True))), leaves)


@cases
@backends
def test_an_update_is_the_layer_without_its_own_product(case, backend):
    inputs = as_update(low_rank_case(case))
    results, grads = run(low_rank_update, inputs, backend=backend)
    wanted, exact = run(plain_update, inputs)
    torch.testing.assert_close(results, wanted)
    torch.testing.assert_close(grads, exact)


@cases
@layers
@halves
def test_each_dtype_errs_at_most_twice_what_eager_errs(case, backend, dtype):
    inputs = low_rank_inputs(3, 77, 64, 48, (16, 4, 33), 2, **LOW_RANK_CASES[case])
    rounded = cast(inputs, dtype)
    exact, exact_grads = run(plain, cast(rounded, torch.float64))
    eager, eager_grads = run(plain, rounded)
    actual, grads = run(low_rank_linear, rounded, backend=backend)
    assert_as_accurate_as_eager(actual[0], eager[0], exact[0], "y")
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name)


@backends
@halves
def test_each_dtype_of_an_update_errs_at_most_twice_what_eager_errs(backend, dtype):
    rounded = cast(as_update(low_rank_inputs(8, 40, 32, 48, (16, 4, 33), 2)), dtype)
    exact, exact_grads = run(low_rank_update, cast(rounded, torch.float64), backend="eager")
    eager, eager_grads = run(low_rank_update, rounded, backend="eager")
    actual, grads = run(low_rank_update, rounded, backend=backend)
    assert_as_accurate_as_eager(actual[0], eager[0], exact[0], "y")
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name)


@backends
def test_a_half_precision_result_is_the_float32_result_rounded_once(backend):
    half = torch.float16 if INTERPRETED else torch.bfloat16  # Triton's interpreter cuts bfloat16 off
    inputs = cast(low_rank_inputs(2, 70, 32, 112, (5, 8), 2), half)
    wide = low_rank_linear(**cast(inputs, torch.float32), backend=backend).to(half)
    # On a GPU other tiles of half add up in another order; on a CPU so do pairs of bfloat16, at twice the step.
    torch.testing.assert_close(low_rank_linear(**inputs, backend=backend), wide, rtol=torch.finfo(half).eps, atol=1e-6)


@backends
def test_everything_but_x_and_weight_may_be_float32_beside_half(backend):
    inputs = cast(low_rank_inputs(2, 9, 32, 16, (4, 3), 2), torch.float32)
    mixed = {**inputs, "x": inputs["x"].half(), "weight": inputs["weight"].half()}
    results, grads = run(low_rank_linear, mixed, backend=backend)
    assert results[0].dtype == torch.float16
    wide = low_rank_linear(**{**inputs, "x": mixed["x"].float(), "weight": mixed["weight"].float()}, backend=backend)
    torch.testing.assert_close(results[0], wide.half(), rtol=1e-3, atol=1e-3)
    assert {name: grad.dtype for name, grad in grads.items()} == {name: mixed[name].dtype for name in grads}


@layers
def test_rank_one_updates_are_adapters_of_rank_one(backend):
    inputs = rank_one_inputs(3, 7, 9, 11, 4, 3, gate=None)
    offsets = torch.arange(5, dtype=torch.int32)
    renamed = {**inputs, "up": inputs["u"], "down": inputs["v"], "offsets": offsets}
    del renamed["u"], renamed["v"]
    torch.testing.assert_close(low_rank_linear(**renamed, backend=backend), rank_one_linear(**inputs, backend=backend))


@layers
def test_what_is_exactly_zero_is_exactly_nothing_even_beside_nan(backend):
    """A slot of -1, a strength of 0, a token's weight of 0, and an adapter that nobody carries."""
    inputs = cast(low_rank_inputs(4, 70, 32, 40, (4, 5, 6, 3), 2), torch.float32)
    inputs["slots"] = torch.tensor([[0, 1], [2, 0], [-1, 2], [0, 0]], dtype=torch.int32)
    inputs["strength"] = torch.tensor([[0.5, 0.0], [1.0, 2.0], [3.0, -1.0], [1.0, 1.0]])
    inputs["token_weights"] = torch.ones(4, 2, 70)
    inputs["token_weights"][0, 0, 30:] = 0
    for spoiled, touched in ((1, []), (3, []), (0, [0, 1, 3])):
        broken = dict(inputs)
        lines = slice(*inputs["offsets"][spoiled : spoiled + 2].tolist())
        for name in ("up", "down"):
            broken[name] = inputs[name].clone()
            broken[name][lines] = torch.nan
        clean, clean_grads = run(low_rank_linear, inputs, backend=backend)
        results, grads = run(low_rank_linear, broken, backend=backend)
        for row in range(4):
            seen = slice(30, None) if (row, spoiled) == (0, 0) else slice(0, 0) if row in touched else slice(None)
            torch.testing.assert_close(results[0][row, seen], clean[0][row, seen], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(grads["x"][row, seen], clean_grads["x"][row, seen], rtol=1e-5, atol=1e-5)
            if row not in touched:
                assert torch.equal(results[0][row], clean[0][row])
        assert results[0][3].isnan().all() if touched else results[0].isfinite().all()
        others = torch.ones(len(inputs["up"]), dtype=torch.bool)
        others[lines] = False
        for name in ("up", "down"):
            if not touched:
                assert torch.equal(grads[name][others], clean_grads[name][others])
                assert torch.equal(grads[name][lines], torch.zeros_like(grads[name][lines]))


@layers
def test_a_factor_of_zero_has_the_gradient_of_any_other(backend):
    inputs = low_rank_case("everything")
    inputs["slots"].clamp_(min=0)
    inputs["strength"].zero_()
    _, exact = run(plain, inputs, wanted=["strength", "token_weights"])
    _, grads = run(low_rank_linear, inputs, wanted=["strength", "token_weights"], backend=backend)
    assert exact["strength"].abs().max() > 0.1
    torch.testing.assert_close(grads, exact)


def test_where_nothing_raises_what_does_not_exist_makes_its_row_nan():
    inputs = low_rank_case("plain")
    updates = Updates(*(inputs[n] for n in ("up", "down", "offsets")), None, *[None] * 5, 17)
    for wrong, slots, offsets in (
        ("slot", [[0, 5, 0], [2, -2, 0], [1, 2, -1], [4, -1, 3]], None),
        ("row", [[3, -1, -1], [-1, 4, 0], [1, 2, 0], [0, -1, 1]], [0, 3, 3, 20, 28, 60]),
        ("rank", [[3, -1, -1], [-1, 4, 0], [1, 2, 0], [0, -1, 1]], [0, 3, 3, 20, 19, 27]),
    ):
        bad = updates._replace(slots=torch.tensor(slots, dtype=torch.int32))
        if offsets is not None:
            bad = bad._replace(offsets=torch.tensor(offsets, dtype=torch.int32))
        y = reference.linear(inputs["x"], inputs["weight"], None, None, bad)  # what a kernel does that must not wait
        wanted = [True, wrong != "rank", False, False]
        assert [bool(row.isnan().all()) for row in y] == wanted, wrong
        assert [bool(row.isfinite().all()) for row in y] == [not bad for bad in wanted], wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(slots=torch.full((4, 3), 5, dtype=torch.int32)), r"slots must lie in \[-1, 5\), got 5"),
        (dict(slots=torch.full((4, 3), -2, dtype=torch.int32)), r"slots must lie in \[-1, 5\), got -2"),
        (dict(offsets=torch.tensor([0, 3, 2, 20, 21, 27], dtype=torch.int32)), "offsets must not decrease"),
        (dict(offsets=torch.tensor([0, 3, 3, 20, 21, 28], dtype=torch.int32)), r"and lie in \[0, 27\]"),
        (dict(offsets=torch.tensor([-1, 3, 3, 20, 21, 27], dtype=torch.int32)), r"offsets .*got \[-1, 3"),
        (dict(offsets=torch.zeros(0, dtype=torch.int32)), r"offsets must be int32 \[S \+ 1\]"),
        (dict(max_rank=16), "max_rank is 16, and an adapter has 17 rows"),
        (dict(max_rank=-1), "max_rank must be a number of rows"),
        (dict(max_rank=2.0), "max_rank must be a number of rows"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_what_is_out_of_range_is_said(change, message, backend):
    inputs = {**low_rank_case("plain"), "backend": backend, **change}
    with pytest.raises(ValueError, match=f"^low_rank_linear: .*{message}"):
        low_rank_linear(**inputs)
    updated = {**as_update(low_rank_case("plain")), "backend": backend, **change}
    with pytest.raises(ValueError, match=f"^low_rank_update: .*{message}"):
        low_rank_update(**updated)


@layers
def test_strides_do_not_matter(backend):
    inputs = low_rank_case("everything")
    odd = {
        **inputs,
        "x": inputs["x"].mT.contiguous().mT,
        "weight": inputs["weight"].mT.contiguous().mT,
        "up": torch.stack([inputs["up"]] * 2, -1)[..., 0],
        "down": inputs["down"].mT.contiguous().mT,
        "slots": inputs["slots"].mT.contiguous().mT,
        "strength": inputs["strength"].mT.contiguous().mT,
        "token_weights": inputs["token_weights"].mT.contiguous().mT,
        "output_scale": inputs["output_scale"].mT.contiguous().mT,
        "offsets": torch.stack([inputs["offsets"]] * 2, -1)[:, 0],
    }
    results, grads = run(low_rank_linear, odd, backend=backend)
    wanted, wanted_grads = run(low_rank_linear, inputs, backend=backend)
    torch.testing.assert_close(results, wanted)
    torch.testing.assert_close(grads, wanted_grads)


@layers
def test_more_rank_than_a_row_takes_changes_no_bit_of_it(backend):
    """At equal capacity a row is the same to the bit whatever its neighbours carry."""
    inputs = cast(low_rank_inputs(4, 77, 64, 96, (4, 16, 40, 8), 2), torch.float32)
    inputs["slots"] = torch.tensor([[0, -1], [1, 0], [2, 3], [-1, -1]], dtype=torch.int32)
    results = low_rank_linear(**inputs, backend=backend)
    order = torch.tensor([2, 3, 0, 1])
    rows = ("x", "slots", "strength", "token_weights", "output_scale")
    moved = {**inputs, **{name: inputs[name][order] for name in rows}}
    assert torch.equal(low_rank_linear(**moved, backend=backend), results[order])
    inputs["slots"] = torch.tensor([[0, -1], [2, 2], [1, -1], [3, 0]], dtype=torch.int32)
    assert torch.equal(low_rank_linear(**inputs, backend=backend)[0], results[0])


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of the compiler, not of a kernel")
def test_fullgraph_compiles_once_for_any_mix_of_adapters():
    inputs = cast(low_rank_inputs(3, 16, 32, 24, (4, 8, 2), 2), torch.float32)
    compiled = torch.compile(low_rank_linear, fullgraph=True)
    counter = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(low_rank_linear, fullgraph=True, backend=counter)
    for seed in range(4):
        inputs["slots"] = torch.randint(-1, 3, (3, 2), dtype=torch.int32, generator=torch.manual_seed(seed))
        torch.testing.assert_close(compiled(**inputs), low_rank_linear(**inputs))
        counted(**inputs)
    assert counter.frame_count == 1


@given(
    sizes=st.tuples(*(st.integers(0, top) for top in (4, 9, 20, 20, 4))),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    options=st.tuples(*[st.booleans()] * 4),
    backend=st.sampled_from(LINEAR_BACKENDS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=property_examples(), deadline=None)
def test_any_sizes_and_options_agree_with_the_reference(sizes, ranks, options, backend, seed):
    given_options = dict(zip(("bias", "strength", "weights", "scale"), options, strict=True))
    *sizes, taken = sizes
    inputs = low_rank_inputs(*sizes, ranks, taken, seed=seed, **given_options)
    assert_agree(run(low_rank_linear, cast(inputs, widest(backend)), backend=backend), run(plain, inputs))
    for dtype in (torch.float32, torch.bfloat16):
        results, grads = run(low_rank_linear, cast(inputs, dtype), backend=backend)
        assert results[0].dtype == dtype
        assert all(t.isfinite().all() for t in [*results, *grads.values()])
