"""localized_attention computes what its equation says, in every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from keylock_kernels import localized_attention
from keylock_kernels.ops.localized_attention import op, reference, sdpa
from keylock_kernels.testing import (
    SHAPES,
    assert_as_accurate_as_eager,
    attention_by_loops,
    attention_inputs,
    cast,
    localization_weights,
)
from tests.kernels.helpers import (
    ATTENTION_BACKENDS,
    ATTENTION_CASES,
    DEVICE,
    GPU_BACKENDS,
    TRITON_ALONE,
    assert_agree,
    attention_case,
    attention_roundings,
    floating,
    property_examples,
    run,
    widest,
)

cases = pytest.mark.parametrize("case", ATTENTION_CASES)
backends = pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def plain(
    query, key, value, key_bias=None, query_regions=None, key_regions=None, image_key=None, image_value=None,
    image_lengths=(), image_key_bias=None, image_weights=None, readout_tokens=None, readout_weights=None,
):  # fmt: skip
    """The reference under plain autograd, with no op around it."""
    scale = query.shape[-1] ** -0.5
    text = reference.make_stream(key, value, key_bias, query_regions, key_regions)
    images = reference.image_streams(image_key, image_value, image_lengths, image_key_bias, key.shape[1])
    out = reference.combine(query, text, images, image_weights, scale)
    if readout_tokens is None:
        return out
    return out, reference.read_out(query, [text, *images], readout_tokens, readout_weights, scale)


def judge(inputs, backend):
    """Results and every gradient against float64, allowed what eager in the same dtype errs."""
    exact, exact_grads = run(plain, cast(inputs, torch.float64))
    eager, eager_grads = run(plain, inputs)
    actual, grads = run(localized_attention, inputs, backend=backend)
    loose = attention_roundings(backend, inputs["query"].dtype)
    for index, result in enumerate(actual):
        assert_as_accurate_as_eager(result, eager[index], exact[index], ("out", "readout")[index], roundings=loose)
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name, roundings=loose)


@cases
@backends
def test_the_result_is_the_loop_over_visible_keys(case, backend):
    inputs = attention_case(case)
    result = localized_attention(**inputs, backend=backend)
    tokens, weights = inputs.pop("readout_tokens", None), inputs.pop("readout_weights", None)
    out, maps = attention_by_loops(**inputs)
    if tokens is None:
        torch.testing.assert_close(result, out)
        return
    index = tokens.long()[:, None, None].expand(*maps.shape[:3], -1)
    columns = maps.gather(3, index.clamp(min=0)) * (index >= 0)
    torch.testing.assert_close(result[0], out)
    torch.testing.assert_close(
        result[1], columns if weights is None else torch.einsum("bhnm,bnm->bhm", columns, weights)
    )


@cases
@backends
def test_every_gradient_is_the_references(case, backend):
    inputs = attention_case(case)
    _, exact = run(plain, inputs)
    _, grads = run(localized_attention, inputs, backend=backend)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], msg=lambda text, name=name: f"{name}: {text}")


@cases
def test_the_references_gradients_are_its_derivatives(case):
    inputs = attention_inputs(2, 3, 3, 1, 2, **ATTENTION_CASES[case])
    # A hidden key's bias is -inf, which has no finite difference; biases have a test of their own.
    names = [name for name in floating(inputs) if not name.endswith("bias")]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *a: plain(**{**inputs, **dict(zip(names, a, strict=True))}), leaves)


@backends
def test_a_bias_has_its_derivative(backend):
    inputs = attention_inputs(2, 3, 4, 1, 2, images=(3,), weights="pixel", read=2)
    biases = [torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda a, b: localized_attention(**inputs, key_bias=a, image_key_bias=b, backend=backend),
        [bias.requires_grad_() for bias in biases],
    )


@cases
@halves
@backends
def test_each_dtype_errs_at_most_twice_what_eager_errs(case, dtype, backend):
    options = dict(ATTENTION_CASES[case])
    if "read" in options:
        options["read"] = 40  # the largest error of a handful of elements says little
    judge(attention_inputs(2, 48, 77, 2, 40, dtype=dtype, **options), backend)


# Triton's are in test_triton_attention.py.
@pytest.mark.parametrize("backend", ["sdpa", "native"] if DEVICE == "cpu" else ["sdpa", *GPU_BACKENDS[1:]])
@pytest.mark.parametrize("head_dim", sorted({shape.head_dim for shape in SHAPES}) + [1, 3, 255, 256])
def test_the_head_dims_of_real_models_and_the_extremes_work(head_dim, backend):
    judge(attention_inputs(1, 64, 77, 2, head_dim, dtype=torch.float32, images=(4,), regions=True), backend)


@backends
def test_weights_and_biases_may_be_float32_beside_half(backend):
    inputs = attention_case("everything", dtype=torch.float32)
    half = {**inputs, **{k: inputs[k].bfloat16() for k in ("query", "key", "value", "image_key", "image_value")}}
    judge(half, backend)
    out, grads = run(localized_attention, half, backend=backend)
    assert out[0].dtype == torch.bfloat16 and out[1].dtype == torch.float32
    assert {name: grad.dtype for name, grad in grads.items()} == {name: half[name].dtype for name in grads}


@backends
def test_maps_are_float64_for_float64_and_float32_for_the_rest(backend):
    for dtype, maps in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.half, torch.float32)):
        assert localized_attention(**attention_case("maps", dtype=dtype), backend=backend)[1].dtype == maps


@backends
def test_the_sign_bit_is_a_region(backend):
    inputs = attention_inputs(1, 2, 2, 1, 4)
    regions = torch.tensor([[-(2**31), 1]], dtype=torch.int32)
    out = localized_attention(**inputs, query_regions=regions, key_regions=regions, backend=backend)
    torch.testing.assert_close(out, inputs["value"])


@backends
@pytest.mark.parametrize("hide", ["bias", "regions", "no key", "image bias"])
def test_a_pixel_that_sees_no_key_gets_zeros_and_gives_none(backend, hide):
    inputs = attention_case("weights per pixel" if hide == "image bias" else "maps", dtype=torch.float32)
    if hide == "bias":
        inputs["key_bias"] = torch.full((3, 7), -torch.inf)
    elif hide == "regions":
        inputs["query_regions"], inputs["key_regions"] = (
            torch.full((3, n), b, dtype=torch.int32) for n, b in ((13, 1), (7, 2))
        )
    elif hide == "no key":
        inputs["key"], inputs["value"] = inputs["key"][:, :0], inputs["value"][:, :0]
        inputs["readout_tokens"] = inputs["readout_tokens"].clamp(max=4)
    else:
        inputs["image_key_bias"] = torch.full((3, 7), -torch.inf)
    hidden, shown = ("image_key", "image_value"), ("key", "value")
    if hide != "image bias":
        hidden, shown = shown, hidden
        inputs["image_weights"] = torch.zeros(3, 1)
    results, grads = run(localized_attention, inputs, backend=backend)
    if hide == "image bias":
        alone = {k: v for k, v in inputs.items() if not k.startswith("image")}
        assert torch.equal(results[0], localized_attention(**alone, backend=backend))
    else:
        assert torch.equal(results[0], torch.zeros_like(results[0]))
        assert results[1].isfinite().all()
    for name in hidden:
        assert torch.equal(grads[name], torch.zeros_like(grads[name])), name
    assert all(grad.isfinite().all() for grad in grads.values())


@backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_hidden_key_contributes_nothing_whatever_it_holds(backend, bad):
    inputs = attention_case("everything", dtype=torch.float32)
    inputs["key_regions"][:, 2] = 0  # seen from nowhere
    inputs["key_regions"][:, 4] = 1  # seen from some pixels
    inputs["query_regions"][:, ::2] = -(2**31)
    inputs["query_regions"][:, 1::2] = 1
    inputs["key_bias"] = torch.randn(3, 7)
    inputs["key_bias"][:, 1] = inputs["image_key_bias"][:, 3] = -torch.inf
    inputs["readout_tokens"] = torch.tensor([[0, 8, -1]] * 3, dtype=torch.int32)
    inputs["readout_weights"][:, 1::2] = 0
    only_blind = [torch.zeros(3, 13, 2, 5), torch.zeros(3, 2, 3)]  # gradients from pixels that do not see key 4
    only_blind[0][:, ::2] = 1
    clean, clean_grads = run(localized_attention, inputs, upstream=only_blind, backend=backend)
    for name, hidden in (("key", [1, 2, 4]), ("value", [1, 2, 4]), ("image_key", [3]), ("image_value", [3])):
        inputs[name] = inputs[name].clone()
        inputs[name][:, hidden] = bad
    results, grads = run(localized_attention, inputs, upstream=only_blind, backend=backend)
    assert torch.equal(results[0][:, ::2], clean[0][:, ::2])
    assert not torch.equal(results[0][:, 1::2], clean[0][:, 1::2])  # those who see it are told
    for name in ("key", "value", "image_key", "image_value"):
        assert torch.equal(grads[name][:, [1, 2]], torch.zeros_like(grads[name][:, [1, 2]])) or "image" in name
    assert torch.equal(grads["image_key"], clean_grads["image_key"])
    assert torch.equal(grads["query"][:, ::2], clean_grads["query"][:, ::2])


@backends
@pytest.mark.parametrize("kind", ["row", "pixel"])
@pytest.mark.parametrize("bad", [torch.nan, 1e30])
def test_a_weight_of_zero_contributes_nothing_whatever_the_stream_holds(backend, kind, bad):
    inputs = attention_inputs(3, 13, 7, 2, 5, images=(4, 3), weights=kind, dtype=torch.float32)
    inputs["image_weights"][1, 1] = 0
    results, _ = run(localized_attention, inputs, backend=backend)
    _, text_grads = run(
        localized_attention,
        {**{k: v[1:2] for k, v in inputs.items() if k not in ("image_lengths",)}, "image_lengths": (4, 3)},
        upstream=[torch.ones(1, 13, 2, 5)],
        backend=backend,
    )
    for name in ("image_key", "image_value"):
        inputs[name] = inputs[name].clone()
        inputs[name][1, 4:] = bad
    dirty, grads = run(localized_attention, inputs, upstream=[torch.ones(3, 13, 2, 5)], backend=backend)
    assert torch.equal(dirty[0], results[0])
    torch.testing.assert_close(grads["query"][1], text_grads["query"][0])
    for name in ("image_key", "image_value"):
        assert torch.equal(grads[name][1, 4:], torch.zeros_like(grads[name][1, 4:])), name
    assert all(grad.isfinite().all() for grad in grads.values())


@backends
def test_pixels_of_weight_zero_do_not_feel_a_broken_stream(backend):
    inputs = attention_inputs(1, 6, 5, 2, 4, images=(3,), weights="pixel", dtype=torch.float32)
    inputs["image_weights"][0, 0] = torch.tensor([0.0, 1, 0, 0, 1, 0])
    clean, clean_grads = run(localized_attention, inputs, backend=backend)
    inputs["image_value"] = torch.full_like(inputs["image_value"], torch.nan)
    dirty, grads = run(localized_attention, inputs, backend=backend)
    off = inputs["image_weights"][0, 0] == 0
    assert torch.equal(dirty[0][:, off], clean[0][:, off]) and dirty[0][:, ~off].isnan().all()
    assert torch.equal(grads["query"][:, off], clean_grads["query"][:, off])


@backends
@pytest.mark.parametrize("kind", ["row", "pixel"])
def test_a_zero_weights_own_gradient_is_the_inner_product(backend, kind):
    inputs = attention_inputs(2, 6, 5, 2, 4, images=(3, 2), weights=kind)
    inputs["image_weights"].zero_()
    upstream = torch.randn(2, 6, 2, 4, dtype=torch.float64)
    _, grads = run(localized_attention, inputs, wanted=["image_weights"], upstream=[upstream], backend=backend)
    for i, part in enumerate((slice(0, 3), slice(3, 5))):
        stream = {
            "query": inputs["query"],
            "key": inputs["image_key"][:, part],
            "value": inputs["image_value"][:, part],
        }
        inner = (localized_attention(**stream) * upstream).sum((2, 3))
        torch.testing.assert_close(grads["image_weights"][:, i], inner.sum(1) if kind == "row" else inner)


@backends
def test_reading_another_stream_does_not_touch_a_broken_one(backend):
    inputs = attention_inputs(2, 6, 5, 2, 4, images=(3,), weights="row", read=2, dtype=torch.float32)
    inputs["image_weights"][:] = torch.tensor([[1.0], [0.0]])
    inputs["readout_tokens"] = torch.tensor([[0, 6], [1, -1]], dtype=torch.int32)
    clean, clean_grads = run(localized_attention, inputs, backend=backend)
    for name in ("image_key", "image_value"):
        inputs[name] = inputs[name].clone()
        inputs[name][1] = torch.nan
    dirty, grads = run(localized_attention, inputs, backend=backend)
    assert torch.equal(dirty[1], clean[1])
    assert torch.equal(grads["query"], clean_grads["query"])


@backends
def test_read_out_columns_do_not_depend_on_the_streams_weight(backend):
    inputs = attention_inputs(2, 6, 5, 2, 4, images=(3,), weights="row", read=4)
    maps = localized_attention(**inputs, backend=backend)[1]
    inputs["image_weights"] = torch.zeros(2, 1, dtype=torch.float64)
    assert torch.equal(localized_attention(**inputs, backend=backend)[1], maps)


@backends
def test_the_localization_loss_is_a_readout(backend):
    inputs = attention_inputs(2, 16, 7, 3, 4)
    tokens = torch.tensor([[2, 5], [3, -1]], dtype=torch.int32)
    masks = (torch.arange(16)[None, :, None] < torch.tensor([[[4, 9]], [[7, 2]]])).double()
    _, maps = localized_attention(**inputs, readout_tokens=tokens, backend=backend)
    inside, outside = masks[:, None], 1 - masks[:, None]
    loss = (maps * outside).sum(2) / outside.sum(2) - (maps * inside).sum(2) / inside.sum(2)
    _, readout = localized_attention(
        **inputs, readout_tokens=tokens, readout_weights=localization_weights(masks), backend=backend
    )
    torch.testing.assert_close(readout, loss)


@backends
def test_keys_may_be_slices_of_one_grouped_projection(backend):
    inputs = attention_case("everything", dtype=torch.float32)
    grouped = dict(inputs)
    both = torch.stack([inputs["key"], inputs["value"]], 2).flatten(2, 3)
    grouped["key"], grouped["value"] = both[:, :, :2], both[:, :, 2:]
    grouped["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(grouped[k].is_contiguous() for k in ("query", "key", "value"))
    results, grads = run(localized_attention, grouped, backend=backend)
    wanted, wanted_grads = run(localized_attention, inputs, backend=backend)
    torch.testing.assert_close(results, wanted)
    torch.testing.assert_close(grads, wanted_grads)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


torch_alone = pytest.mark.skipif(TRITON_ALONE, reason="about torch's own attention; nothing here is Triton's")


@torch_alone
@pytest.mark.parametrize("read", [0, 2])
def test_sdpa_never_holds_a_whole_attention_map(read, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK_SCORES", 1 << 10)
    monkeypatch.setattr(op, "_forward_op", op._forward)  # a dispatch mode does not see into an op
    monkeypatch.setattr(op, "_backward_op", op._backward)
    inputs = attention_inputs(
        1, 512, 77, 4, 8, images=(4,), weights="pixel", read=read, sums=read > 0, dtype=torch.float32
    )
    with LargestTensor() as eager:
        run(localized_attention, inputs, backend="eager")
    with LargestTensor() as largest:
        run(localized_attention, inputs, backend="sdpa")
    assert eager.elements >= 512 * 77 * 4
    assert largest.elements <= 512 * 4 * 16  # the padded queries


@torch_alone
def test_columns_read_in_blocks_are_the_whole_columns(monkeypatch):
    inputs = attention_inputs(2, 70, 7, 2, 5, images=(4,), bias=True, regions=True, weights="row", read=3, sums=True)
    whole, whole_grads = run(localized_attention, inputs, backend="sdpa")
    monkeypatch.setattr(sdpa, "CHUNK_SCORES", 1)
    blocks, grads = run(localized_attention, inputs, backend="sdpa")
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(grads, whole_grads)


@given(
    sizes=st.tuples(*(st.integers(0, top) for top in (3, 20, 9, 3)), st.integers(1, 9)),
    images=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(),
    regions=st.booleans(),
    weights=st.sampled_from([None, "row", "pixel"]),
    read=st.integers(0, 3),
    sums=st.booleans(),
    backend=st.sampled_from(ATTENTION_BACKENDS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=property_examples(interpreted=25), deadline=None)
def test_any_sizes_and_options_agree_with_the_reference(
    sizes, images, bias, regions, weights, read, sums, backend, seed
):
    inputs = attention_inputs(
        *sizes, images=tuple(images), bias=bias, regions=regions, weights=weights, read=read, sums=sums,
        seed=seed,
    )  # fmt: skip
    assert_agree(run(localized_attention, cast(inputs, widest(backend)), backend=backend), run(plain, inputs))
    for dtype in (torch.float32, torch.bfloat16):
        results, grads = run(localized_attention, cast(inputs, dtype), backend=backend)
        assert [r.dtype for r in results] == [dtype, torch.float32][: len(results)]
        assert all(t.isfinite().all() for t in [*results, *grads.values()])
