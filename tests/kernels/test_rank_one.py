"""rank_one_linear, rank_one_coefficients and rank_one_update compute what their equation says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_kernels import rank_one_coefficients, rank_one_linear, rank_one_update
from keylock_kernels.ops.low_rank import reference
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import assert_as_accurate_as_eager, cast, rank_one_by_loops, rank_one_inputs
from tests.kernels.helpers import (
    DEVICE,
    INTERPRETED,
    LINEAR_BACKENDS,
    RANK_ONE_CASES,
    UPDATE_BACKENDS,
    assert_agree,
    linear_through_coefficients,
    property_examples,
    rank_one_case,
    run,
    widest,
)

cases = pytest.mark.parametrize("case", RANK_ONE_CASES)
backends = pytest.mark.parametrize("backend", UPDATE_BACKENDS)
layers = pytest.mark.parametrize("backend", LINEAR_BACKENDS)
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def plain(x, weight, u, v, slots, bias=None, beta=None, tau=None, strength=None):
    """The reference under plain autograd, with no op around it."""
    updates = Updates(u, v, None, slots, beta, tau, strength, None, None, 1)
    return reference.linear(x, weight, bias, None, updates)


@cases
@layers
def test_the_result_is_the_loop_over_tokens_and_updates(case, backend):
    inputs = rank_one_case(case)
    torch.testing.assert_close(rank_one_linear(**inputs, backend=backend), rank_one_by_loops(**inputs))


@cases
@layers
def test_every_gradient_is_the_references(case, backend):
    inputs = rank_one_case(case)
    _, exact = run(plain, inputs)
    _, grads = run(rank_one_linear, inputs, backend=backend)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], msg=lambda text, name=name: f"{name}: {text}")


@cases
def test_the_references_gradients_are_its_derivatives(case):
    inputs = rank_one_inputs(2, 3, 4, 3, 3, 2, **RANK_ONE_CASES[case])
    slots = inputs.pop("slots")
    names = list(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *a: plain(slots=slots, **dict(zip(names, a, strict=True))), leaves)
    assert torch.autograd.gradcheck(lambda *a: rank_one_linear(slots=slots, **dict(zip(names, a, strict=True))), leaves)


@cases
@layers
@halves
def test_each_dtype_errs_at_most_twice_what_eager_errs(case, backend, dtype):
    inputs = rank_one_inputs(2, 77, 64, 48, 5, 3, **RANK_ONE_CASES[case])
    rounded = cast(inputs, dtype)
    exact, exact_grads = run(plain, cast(rounded, torch.float64))
    eager, eager_grads = run(plain, rounded)
    actual, grads = run(rank_one_linear, rounded, backend=backend)
    assert_as_accurate_as_eager(actual[0], eager[0], exact[0], "y")
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name)


def assert_rounded_once(actual, wide):
    """Equal; on a GPU but for one unit in the last place, since other tiles of half add up in another order."""
    torch.testing.assert_close(actual, wide, rtol=0 if DEVICE == "cpu" else torch.finfo(actual.dtype).eps, atol=0)


@backends
def test_a_half_precision_result_is_the_float32_result_rounded_once(backend):
    half = torch.float16 if INTERPRETED else torch.bfloat16  # Triton's interpreter cuts bfloat16 off
    inputs = cast(rank_one_inputs(2, 9, 32, 16, 5, 3), half)
    wide = rank_one_linear(**cast(inputs, torch.float32), backend=backend)
    assert_rounded_once(rank_one_linear(**inputs, backend=backend), wide.to(half))


@backends
def test_everything_but_x_and_weight_may_be_float32_beside_half(backend):
    inputs = cast(rank_one_inputs(2, 9, 32, 16, 5, 3), torch.float32)
    mixed = {**inputs, "x": inputs["x"].half(), "weight": inputs["weight"].half()}
    results, grads = run(rank_one_linear, mixed, backend=backend)
    wide = {**inputs, "x": mixed["x"].float(), "weight": mixed["weight"].float()}
    assert_rounded_once(results[0], rank_one_linear(**wide, backend=backend).half())
    assert {name: grad.dtype for name, grad in grads.items()} == {name: mixed[name].dtype for name in grads}


@cases
@backends
def test_coefficients_made_first_give_the_same_layer(case, backend):
    inputs = rank_one_case(case)
    whole, whole_grads = run(rank_one_linear, inputs, backend=backend)
    parts, parts_grads = run(linear_through_coefficients, inputs, backend=backend)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_grads, whole_grads)


@halves
@backends
def test_coefficients_may_have_the_dtype_of_x(backend, dtype):
    inputs = rank_one_inputs(2, 5, 8, 6, 3, 2, gate=None, bias=True, strength=False, dtype=dtype)
    c = rank_one_coefficients(inputs["x"], inputs.pop("v"), inputs["slots"]).to(dtype)
    layer, grads = run(rank_one_linear, {**inputs, "v": None, "coefficients": c}, backend=backend)
    wide, _ = run(rank_one_linear, {**inputs, "v": None, "coefficients": c.float()}, backend=backend)
    assert torch.equal(layer[0], wide[0]) and grads["coefficients"].dtype == dtype
    base, u, slots = layer[0], inputs["u"], inputs["slots"]
    updated = rank_one_update(base, u, slots, c, backend=backend)
    assert torch.equal(updated, rank_one_update(base, u, slots, c.float(), backend=backend))


@backends
def test_an_update_on_the_layers_output_gives_the_same_layer(backend):
    inputs = rank_one_case("linear")
    c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])

    def update(base, u, coefficients):
        return rank_one_update(base, u, inputs["slots"], coefficients, backend=backend)

    base = inputs["x"] @ inputs["weight"].T
    leaves = {"base": base, "u": inputs["u"], "coefficients": c}
    results, grads = run(update, leaves)
    torch.testing.assert_close(results[0], rank_one_linear(**inputs, backend=backend))

    def plain_update(base, u, coefficients):
        return reference.update(base, None, Updates(u, None, None, inputs["slots"], *[None] * 4, coefficients, 1))

    _, exact = run(plain_update, leaves)
    torch.testing.assert_close(grads, exact)


@backends
def test_an_update_writes_into_new_memory(backend):
    base = torch.ones(1, 2, 3)
    none = torch.zeros(1, 0, dtype=torch.int32)
    result = rank_one_update(base, torch.ones(1, 3), none, torch.ones(1, 2, 0), backend=backend)
    result.zero_()
    assert torch.equal(base, torch.ones(1, 2, 3))


@backends
def test_coefficients_are_float32_for_half_inputs(backend):
    inputs = cast(rank_one_case("linear"), torch.bfloat16)
    c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])
    assert c.dtype == torch.float32
    assert rank_one_update(inputs["x"], inputs["v"], inputs["slots"], c, backend=backend).dtype == torch.bfloat16


@backends
def test_slot_minus_one_is_exactly_nothing_even_beside_nan(backend):
    inputs = rank_one_case("everything", dtype=torch.float32)
    inputs["slots"][:] = -1
    plain_layer = rank_one_linear(**{**inputs, "slots": inputs["slots"][:, :0], "strength": inputs["strength"][:, :0]},
                                  backend=backend)  # fmt: skip
    for name in ("u", "v", "beta", "tau", "strength"):
        inputs[name] = torch.full_like(inputs[name], torch.nan)
    results, grads = run(rank_one_linear, inputs, backend=backend)
    assert torch.equal(results[0], plain_layer)
    for name in ("u", "v", "beta", "tau", "strength"):
        assert torch.equal(grads[name], torch.zeros_like(grads[name])), name
    assert grads["x"].isfinite().all()


@backends
def test_an_update_nobody_takes_may_be_nan(backend):
    inputs = rank_one_case("everything", dtype=torch.float32)
    inputs["slots"] = inputs["slots"].clamp(max=2)
    clean, clean_grads = run(rank_one_linear, inputs, backend=backend)
    for name in ("u", "v", "beta", "tau"):
        inputs[name] = inputs[name].clone()
        inputs[name][3] = torch.nan
    results, grads = run(rank_one_linear, inputs, backend=backend)
    assert torch.equal(results[0], clean[0])
    for name, grad in grads.items():
        assert torch.equal(grad, clean_grads[name]), name


def test_where_nothing_raises_a_slot_that_does_not_exist_makes_its_row_nan():
    inputs = rank_one_case("linear")
    inputs["slots"] = torch.tensor([[0, 1, 2], [0, 4, -1], [-1, -2, 1]], dtype=torch.int32)
    y = plain(**inputs)  # what a kernel does that must not wait for the device to look
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isnan().all()


@backends
def test_a_slot_taken_twice_counts_twice(backend):
    inputs = rank_one_case("linear")
    inputs["slots"] = torch.full((3, 1), 2, dtype=torch.int32)
    base = inputs["x"] @ inputs["weight"].T
    once = rank_one_linear(**inputs, backend=backend)
    inputs["slots"] = torch.full((3, 2), 2, dtype=torch.int32)
    torch.testing.assert_close(rank_one_linear(**inputs, backend=backend) - base, 2 * (once - base))


@backends
def test_tau_zero_is_linear_and_has_no_gradient_of_its_own(backend):
    inputs = rank_one_case("everything")
    linear = {k: v for k, v in inputs.items() if k not in ("beta", "tau")}
    inputs["tau"] = torch.zeros_like(inputs["tau"])
    inputs["beta"] = torch.full_like(inputs["beta"], torch.inf)
    results, grads = run(rank_one_linear, inputs, backend=backend)
    wanted, wanted_grads = run(rank_one_linear, linear, backend=backend)
    torch.testing.assert_close(results, wanted)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad)
    assert torch.equal(grads["tau"], torch.zeros_like(grads["tau"]))
    assert torch.equal(grads["beta"], torch.zeros_like(grads["beta"]))


def test_linear_and_gated_updates_may_share_a_call():
    inputs = rank_one_case("everything")
    inputs["tau"][1] = 0
    torch.testing.assert_close(rank_one_linear(**inputs, backend="eager"), rank_one_by_loops(**inputs))
    _, exact = run(plain, inputs)
    _, grads = run(rank_one_linear, inputs)
    torch.testing.assert_close(grads, exact)
    assert grads["tau"][1] == 0 and grads["beta"][1] == 0


def test_a_negative_tau_follows_the_formula():
    inputs = rank_one_case("per row")
    inputs["tau"] = -inputs["tau"]
    torch.testing.assert_close(rank_one_linear(**inputs), rank_one_by_loops(**inputs))
    names = [name for name in inputs if name != "slots"]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *a: rank_one_linear(slots=inputs["slots"], **dict(zip(names, a, strict=True))), leaves
    )


def test_the_weights_gradient_is_computed_only_when_asked(monkeypatch):
    from keylock_kernels.ops.low_rank import op

    asked = []
    inner = op._linear_backward_op
    monkeypatch.setattr(op, "_linear_backward_op", lambda *a: asked.append(list(a[-1])) or inner(*a))
    inputs = rank_one_case("everything")
    _, grads = run(rank_one_linear, inputs, wanted=["u", "beta"])
    assert asked == [[name in ("up", "beta") for name in op._OF_LAYER]]
    _, everything = run(rank_one_linear, inputs)
    assert torch.equal(grads["u"], everything["u"]) and torch.equal(grads["beta"], everything["beta"])


@backends
def test_strides_do_not_matter(backend):
    inputs = rank_one_case("everything")
    odd = {
        **inputs,
        "x": inputs["x"].mT.contiguous().mT,
        "weight": inputs["weight"].mT.contiguous().mT,
        "u": torch.stack([inputs["u"]] * 2, -1)[..., 0],
        "slots": inputs["slots"].mT.contiguous().mT,
        "strength": inputs["strength"].mT.contiguous().mT,
    }
    assert not any(odd[k].is_contiguous() for k in ("x", "weight", "u", "slots", "strength"))
    results, grads = run(rank_one_linear, odd, backend=backend)
    wanted, wanted_grads = run(rank_one_linear, inputs, backend=backend)
    torch.testing.assert_close(results, wanted)
    torch.testing.assert_close(grads, wanted_grads)


@backends
def test_gates_have_gradients_where_x_has_no_columns(backend):
    inputs = rank_one_inputs(1, 2, 0, 3, 1, 1, gate="table", bias=False, strength=True)
    inputs["slots"].zero_()
    _, exact = run(plain, inputs)
    _, grads = run(rank_one_linear, inputs, backend=backend)
    assert exact["beta"].abs().min() > 0
    torch.testing.assert_close(grads, exact)


@given(
    sizes=st.tuples(*(st.integers(0, top) for top in (4, 9, 20, 20, 4, 18))),
    gate=st.sampled_from([None, "table", "row"]),
    bias=st.booleans(),
    strength=st.booleans(),
    backend=st.sampled_from(UPDATE_BACKENDS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=property_examples(), deadline=None)
def test_any_sizes_and_options_agree_with_the_reference(sizes, gate, bias, strength, backend, seed):
    rows, tokens, inner, outer, updates, taken = sizes
    inputs = rank_one_inputs(
        rows, tokens, inner, outer, max(updates, 1), taken, gate=gate, bias=bias, strength=strength, seed=seed
    )
    if updates == 0:  # nothing to take: every slot is -1
        inputs["slots"].fill_(-1)
        for name in ("u", "v"):
            inputs[name] = inputs[name][:0]
        if gate == "table":
            inputs["beta"], inputs["tau"] = inputs["beta"][:0], inputs["tau"][:0]
    assert_agree(run(rank_one_linear, cast(inputs, widest(backend)), backend=backend), run(plain, inputs))
    for dtype in (torch.float32, torch.bfloat16):
        results, grads = run(rank_one_linear, cast(inputs, dtype), backend=backend)
        assert results[0].dtype == dtype
        assert all(t.isfinite().all() for t in [*results, *grads.values()])
