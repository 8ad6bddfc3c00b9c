"""The CUDA kernels' own sources, run on the CPU lane by lane, compute what the reference computes.

What is emulated is the machine (csrc/cuda/host_emulation.h): tensor cores, copies in the background, barriers. Memory
that nothing was written to is NaN, and threads run in one order or the other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_kernels import localized_attention, low_rank_linear, low_rank_update, native_cuda, rank_one_coefficients
from keylock_kernels import rank_one_linear as eager_linear
from keylock_kernels import rank_one_update as eager_update
from keylock_kernels.ops.localized_attention import op
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import (
    SHAPES,
    assert_as_accurate_as_eager,
    attention_inputs,
    cast,
    low_rank_inputs,
    rank_one_inputs,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
HALVES = DTYPES[:2]


@pytest.fixture(autouse=True)
def machine(emulation, monkeypatch):
    """The kernels take CPU tensors; a machine of two processors, so that blocks take several tiles."""
    monkeypatch.setattr(native_cuda, "_module", lambda: emulation)
    monkeypatch.setattr(native_cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(native_cuda, "_stream", lambda device: 0)
    emulation.configure(processors=2, reversed=False)
    return emulation


def attend(inputs):
    """Results of the kernel as a tuple."""
    optional = ("key_bias", "query_regions", "key_regions", "image_key", "image_value")
    rest = ("image_key_bias", "image_weights", "readout_tokens", "readout_weights")
    query = inputs["query"]
    results = native_cuda.localized_attention(
        query, inputs["key"], inputs["value"], query.shape[-1] ** -0.5, *(inputs.get(name) for name in optional),
        list(inputs.get("image_lengths", ())), *(inputs.get(name) for name in rest),
    )  # fmt: skip
    return results[: 2 if "readout_tokens" in inputs else 1]


def reference(inputs):
    results = localized_attention(**inputs, backend="eager")
    return results if isinstance(results, tuple) else (results,)


def judge(inputs):
    # float32 values are added key by key where eager's library adds in blocks: the root mean square error is
    # eager's, single elements among thousands err a little more.
    roundings = 2 if inputs["query"].dtype == torch.float32 else 1
    results, eager, exact = attend(inputs), reference(inputs), reference(cast(inputs, torch.float64))
    for name, actual, beside, truth in zip(("out", "readout"), results, eager, exact, strict=False):
        assert_as_accurate_as_eager(actual, beside, truth, name, roundings=roundings)
    return results


def same(a, b):
    return all(torch.equal(x, y) and not x.isnan().any() for x, y in zip(a, b, strict=True))


EVERYTHING = dict(images=(4, 0, 3), bias=True, regions=True, weights="pixel", read=9, sums=True)


@dtypes
@pytest.mark.parametrize("head_dim", [1, 8, 16, 40, 64, 72, 80, 112, 160, 255, 256])
def test_every_head_dim(head_dim, dtype):
    judge(attention_inputs(1, 70, 77, 2, head_dim, dtype=dtype))
    judge(attention_inputs(2, 20, 77, 1, head_dim, dtype=dtype, **EVERYTHING))


@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 4, 16, 17, 48, 49, 77, 80, 81, 154, 257])
def test_every_length_of_text(tokens, dtype):
    judge(attention_inputs(1, 24, tokens, 2, 40, dtype=dtype, images=(4,), weights="row"))
    judge(attention_inputs(1, 24, tokens, 1, 8, dtype=dtype, bias=True, regions=True, images=(5,), read=12))


IMAGES = ((4,), (16,), (17,), (80,), (257,), (4,) * 5, (4, 16, 257, 3, 0, 90), (0,), (0, 20), (1,) * 40, (81, 82))


@dtypes
@pytest.mark.parametrize("weights", [None, "row", "pixel"])
@pytest.mark.parametrize("images", IMAGES, ids=str)
def test_every_set_of_image_streams(images, weights, dtype):
    options = dict(images=images, weights=weights, bias=weights == "row", dtype=dtype)
    judge(attention_inputs(1, 24, 77, 2, 40, **options))
    # The largest error of a handful of elements says little.
    judge(attention_inputs(1, 48, 90, 2, 16, read=40, sums=weights == "pixel", **options))


@dtypes
@pytest.mark.parametrize("head_dim", [80, 160, 256])
def test_keys_that_shared_memory_does_not_hold_pass_through_it(head_dim, dtype):
    for read in (0, 40):
        options = dict(images=(4, 257, 16, 90), bias=True, regions=True, weights="pixel", read=read, dtype=dtype)
        judge(attention_inputs(1, 130, 154, 1, head_dim, **options))
    judge(attention_inputs(1, 130, 154, 1, head_dim, images=(257,), dtype=dtype))  # nothing is looked over on the way


def test_as_many_streams_as_promised(machine):
    most = machine.max_image_streams
    judge(attention_inputs(1, 16, 4, 1, 16, images=(1,) * most, weights="row", dtype=torch.float16))
    with pytest.raises(ValueError, match=f"image_lengths must be at most {most} streams"):
        attend(attention_inputs(1, 16, 4, 1, 16, images=(1,) * (most + 1), dtype=torch.float16))


@dtypes
@pytest.mark.parametrize("sums", [False, True])
def test_columns_of_every_kind_of_token(sums, dtype):
    inputs = attention_inputs(2, 35, 77, 2, 40, images=(4, 16), weights="row", read=97, sums=sums, dtype=dtype)
    inputs["readout_tokens"] = torch.arange(97, dtype=torch.int32).expand(2, -1)
    _, every = judge(inputs)
    inputs["readout_tokens"] = torch.tensor([[3, -1, 77, 3, 96], [0, 97, -2, 2**31 - 1, 80]], dtype=torch.int32)
    inputs["readout_weights"] = inputs["readout_weights"][..., [3, 3, 77, 3, 96]] if sums else None
    _, found = attend(inputs)
    columns = found if sums else found.movedim(3, 2)
    known = every if sums else every.movedim(3, 2)
    assert torch.equal(columns[0, :, [0, 2, 4]], known[0, :, [3, 77, 96]])
    assert torch.equal(columns[0, :, 3], columns[0, :, 0]) and (columns[0, :, 1] == 0).all()
    assert columns[1, :, 1:4].isnan().all() and columns[1, :, [0, 4]].isfinite().all()


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("images", [(4, 3), (90, 257)], ids=str)
def test_what_is_not_seen_contributes_nothing(images, bad, dtype):
    total = sum(images)
    inputs = attention_inputs(3, 21, 77, 1, 16, images=images, bias=True, regions=True, weights="pixel", dtype=dtype)
    inputs["key_regions"][:, 2] = 0  # seen from nowhere
    inputs["key_regions"][:, 4] = 1  # seen from some pixels
    inputs["query_regions"][:, ::2] = -(2**31)
    inputs["query_regions"][:, 1::2] = 1
    inputs["key_bias"][:, 1], inputs["key_bias"][:, 4] = -torch.inf, 0
    inputs["image_key_bias"][:, total - 1] = -torch.inf
    inputs["image_weights"][1, 0] = 0
    inputs["image_weights"][:, 0, ::4] = 0
    inputs["image_weights"][[0, 2], 0, 1::4] = 1
    clean = attend(inputs)
    for name in ("key", "value", "image_key", "image_value"):
        inputs[name] = inputs[name].clone()
        if not name.startswith("image"):
            inputs[name][:, [1, 2, 4]] = bad
        else:
            inputs[name][:, total - 1] = bad
            inputs[name][1, : images[0]] = bad
    hidden = attend(inputs)
    assert same([hidden[0][:, ::2]], [clean[0][:, ::2]])
    assert not torch.equal(hidden[0][:, 1::2], clean[0][:, 1::2])  # those who see it are told
    if not torch.tensor(bad).to(dtype).isfinite():
        assert hidden[0][:, 1::2].isnan().all()


@dtypes
def test_a_pixel_that_sees_no_key_gets_zeros(dtype):
    inputs = attention_inputs(2, 20, 7, 2, 8, images=(4, 100), read=5, regions=True, dtype=dtype)
    inputs["query_regions"][:] = 1
    inputs["key_regions"][:] = 2
    inputs["image_key_bias"] = torch.full((2, 104), -torch.inf)
    inputs["query"][:, ::3] = torch.nan
    for inputs["key_bias"] in (None, torch.full((2, 7), -torch.inf)):
        assert all(torch.equal(result, torch.zeros_like(result)) for result in attend(inputs))


@dtypes
def test_odd_strides_and_addresses_give_the_same_bits(machine, dtype):
    inputs = attention_inputs(2, 40, 77, 2, 40, dtype=dtype, **EVERYTHING)
    before = machine.counts()
    wanted = attend(inputs)
    assert machine.counts()["narrow"] == before["narrow"]
    odd = dict(inputs)
    for name in ("query", "key", "value", "image_key", "image_value"):
        wide = torch.full((*inputs[name].shape[:3], 43), torch.nan, dtype=dtype)
        wide[..., 1:41] = inputs[name]
        odd[name] = wide[..., 1:41]
    for name in ("key_bias", "image_key_bias", "query_regions", "key_regions", "image_weights", "readout_weights"):
        odd[name] = inputs[name].mT.contiguous().mT
    odd["readout_tokens"] = inputs["readout_tokens"].repeat_interleave(2, 1)[:, ::2]
    assert same(attend(odd), wanted)
    assert machine.counts()["narrow"] > before["narrow"]
    grouped = torch.stack([inputs["key"], inputs["value"]], 2).flatten(2, 3)
    assert same(attend({**inputs, "key": grouped[:, :, :2], "value": grouped[:, :, 2:]}), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_aligned_tensors_move_in_128_bits(machine, shape):
    before = machine.counts()
    sizes = (1, 64, shape.tokens, 1, shape.head_dim)
    attend(attention_inputs(*sizes, images=(4, 257), weights="pixel", regions=True, dtype=torch.bfloat16))
    moved = {name: count - before[name] for name, count in machine.counts().items()}
    assert moved["wide"] >= 2 * 2 * 64 * shape.head_dim and moved["narrow"] <= 0.05 * (moved["wide"] + moved["narrow"])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.model in ("sd1.5", "sd2.1", "sdxl")], ids=lambda s: s.name)
def test_text_multiplies_little_padding(machine, shape):
    before = machine.counts()["products"]
    attend(attention_inputs(1, 64, shape.tokens, 1, shape.head_dim, dtype=torch.bfloat16))
    useful = 2 * 64 * shape.tokens * shape.head_dim
    assert 1 <= (machine.counts()["products"] - before) / useful <= 1.25


ORDERS = [(processors, is_reversed) for processors in (1, 64) for is_reversed in (False, True)]


@dtypes
@pytest.mark.parametrize(("head_dim", "images"), [(40, (4, 3)), (64, (257, 90)), (160, (4, 257))])
def test_no_order_of_threads_and_no_cut_into_blocks_changes_a_bit(machine, head_dim, images, dtype):
    options = {**EVERYTHING, "images": images}
    inputs = attention_inputs(2, 140, 90, 1, head_dim, dtype=dtype, **options)
    results = []
    for processors, is_reversed in ORDERS:
        machine.configure(processors=processors, reversed=is_reversed)
        results.append(attend(inputs))
    assert all(same(other, results[0]) for other in results[1:])


@dtypes
def test_rows_do_not_know_of_each_other(dtype):
    inputs = attention_inputs(3, 20, 77, 2, 40, dtype=dtype, **EVERYTHING)
    clean = attend(inputs)
    order = torch.tensor([2, 0, 1])
    moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    assert same(attend(moved), [result[order] for result in clean])
    for dirt in (torch.nan, 1e30):
        for name, tensor in inputs.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                inputs[name] = tensor.clone()
                inputs[name][[0, 2]] = dirt
        assert same([result[1] for result in attend(inputs)], [result[1] for result in clean])


@dtypes
def test_offsets_beyond_32_bits(dtype):
    inputs = attention_inputs(2, 16, 20, 1, 16, dtype=dtype)
    wanted = attend(inputs)
    far = 2**31 + 16
    for name in ("query", "key", "value"):
        tensor = inputs[name]
        space = torch.empty(far + tensor[0].numel(), dtype=dtype)  # touched at both ends only
        inputs[name] = space.as_strided(tensor.shape, (far, *tensor.stride()[1:]))
        inputs[name].copy_(tensor)
    assert same(attend(inputs), wanted)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 80), st.integers(0, 100), st.integers(0, 2), st.integers(1, 90)),
    images=st.lists(st.integers(0, 90), max_size=4),
    options=st.fixed_dictionaries(
        dict(bias=st.booleans(), regions=st.booleans(), weights=st.sampled_from([None, "row", "pixel"]))
    ),
    read=st.integers(0, 20),
    sums=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_options(sizes, images, options, read, sums, dtype, seed):
    inputs = attention_inputs(*sizes, images=tuple(images), read=read, sums=sums, seed=seed, dtype=dtype, **options)
    if sizes[2] + sum(images) == 0:
        inputs.pop("readout_tokens", None), inputs.pop("readout_weights", None)
    # Element by element: roundings of the probabilities and of what they meet, where they may cancel.
    parts = cast({k: v.abs() if "value" in k or "weights" in k else v for k, v in inputs.items()}, torch.float64)
    for actual, exact, size in zip(
        attend(inputs), reference(cast(inputs, torch.float64)), reference(parts), strict=True
    ):
        roundings = 64 if actual.dtype == torch.float32 else 2  # float32's scores are rounded too
        assert ((actual.double() - exact).abs() <= roundings * torch.finfo(actual.dtype).eps * size + 1e-7).all()


def test_weights_and_biases_may_be_float32_beside_half():
    inputs = attention_inputs(2, 30, 20, 2, 24, dtype=torch.float32, **EVERYTHING)
    for dtype in HALVES:
        names = ("query", "key", "value", "image_key", "image_value")
        judge({**inputs, **{name: inputs[name].to(dtype) for name in names}})


def test_the_op_finds_the_kernel():
    inputs = attention_inputs(1, 20, 7, 2, 8, images=(4,), weights="row", dtype=torch.float16)
    arguments = [inputs["query"], inputs["key"], inputs["value"], 8**-0.5, None, None, None]
    arguments += [inputs["image_key"], inputs["image_value"], [4], None, inputs["image_weights"], None, None]
    out, nothing = op.localized_attention(*arguments, "cuda")
    assert same([out], attend(inputs)) and nothing.shape == (1, 2, 0)


def test_wrong_arguments_are_named():
    inputs = attention_inputs(1, 8, 7, 2, 8, images=(4,), weights="row", dtype=torch.float16)
    for name, value, message in (
        ("query", inputs["query"].double(), "query must be float16, bfloat16 or float32 with backend 'cuda'"),
        ("key", inputs["key"].float(), r"key must be float16 \[1, 7, 2, 8\]"),
        ("value", inputs["value"].transpose(2, 3).contiguous().transpose(2, 3), "value's last dimension must be con"),
        ("image_weights", inputs["image_weights"].double(), "image_weights must be float16 or float32"),
        ("image_lengths", (3,), r"image_key must be float16 \[1, 3, 2, 8\]"),
        ("key_bias", torch.zeros(1, 8), r"key_bias must be float16 or float32 \[1, 7\]"),
        ("key", inputs["key"].to("meta"), "key must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            attend({**inputs, name: value})


def with_coefficients(u, slots, c):
    return Updates(u, None, None, slots, None, None, None, None, c, 1)


def linear(inputs):
    gate = {name: inputs.get(name) for name in ("beta", "tau", "strength")}
    c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"], **gate)
    updates = with_coefficients(inputs["u"], inputs["slots"], c)
    return native_cuda.low_rank_linear(inputs["x"], inputs["weight"], inputs.get("bias"), None, updates)


def update(base, u, slots, c):
    return native_cuda.low_rank_update(base, None, with_coefficients(u, slots, c))


def adapters(inputs):
    up, down, offsets, slots = (inputs[name] for name in ("up", "down", "offsets", "slots"))
    more = inputs.get("strength"), inputs.get("token_weights")
    return Updates(up, down, offsets, slots, None, None, *more, None, int(offsets.diff().max()))


def adapted(inputs):
    layer = (inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("output_scale"))
    return native_cuda.low_rank_linear(*layer, adapters(inputs))


def judge_linear(inputs):
    exact = eager_linear(**cast(inputs, torch.float64), backend="eager")
    assert_as_accurate_as_eager(linear(inputs), eager_linear(**inputs, backend="eager"), exact)


@dtypes
@pytest.mark.parametrize("outer", [1, 8, 100, 136])
@pytest.mark.parametrize("inner", [0, 1, 40, 100, 320])
@pytest.mark.parametrize("tokens", [1, 77, 90, 170])
def test_layers_of_every_size(tokens, inner, outer, dtype):
    judge_linear(rank_one_inputs(1, tokens, inner, outer, 4, 3, dtype=dtype))


@dtypes
@pytest.mark.parametrize("taken", [0, 1, 16, 17, 40])
def test_every_number_of_updates(taken, dtype):
    for tokens in (20, 170):
        inputs = rank_one_inputs(2, tokens, 64, 72, 5, taken, dtype=dtype)
        judge_linear(inputs)
        base = inputs["x"][..., :1].expand(-1, -1, 72)
        c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"])
        for b in (base, base.contiguous(), base.contiguous()[..., 1:]):
            arguments = (b, inputs["u"][:, : b.shape[2]], inputs["slots"], c)
            exact = eager_update(*(t.double() if t.is_floating_point() else t for t in arguments), backend="eager")
            eager = eager_update(*arguments, backend="eager")
            assert_as_accurate_as_eager(update(*arguments), eager, exact)


@dtypes
def test_updates_may_be_float32_beside_half_and_anything_may_be_strided(machine, dtype):
    inputs = rank_one_inputs(2, 20, 48, 56, 4, 3, dtype=torch.float32)
    inputs.update({name: inputs[name].to(dtype) for name in ("x", "weight")})
    judge_linear(inputs)
    wanted, before = linear(inputs), machine.counts()
    for name in ("x", "weight", "u"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (1, 2), value=torch.nan)[..., 1:-2]
    inputs["slots"] = inputs["slots"].T.contiguous().T
    assert same([linear(inputs)], [wanted])
    assert machine.counts()["narrow"] > before["narrow"]
    inputs["x"], inputs["weight"] = inputs["x"].mT.contiguous().mT, inputs["weight"].T.contiguous().T
    assert same([linear(inputs)], [wanted])


@dtypes
@pytest.mark.parametrize("tokens", [9, 170])
def test_slots_that_are_none_or_do_not_exist(tokens, dtype):
    u, x, weight = (torch.ones(*shape, dtype=dtype) for shape in ((3, 24), (4, tokens, 16), (24, 16)))
    u[1] = torch.nan
    slots = torch.tensor([[0, -1], [-1, -1], [3, 0], [-2, -1]], dtype=torch.int32)
    c = torch.ones(4, tokens, 2)
    c[slots[:, None].expand(-1, tokens, -1) == -1] = torch.nan
    for y in (
        native_cuda.low_rank_linear(x, weight, None, None, with_coefficients(u, slots, c)),
        update(torch.full_like(x[..., :1], 16).expand(-1, -1, 24), u, slots, c),
    ):
        assert (y[0] == 17).all() and (y[1] == 16).all() and y[2:].isnan().all()
    base = torch.full((1, tokens, 24), -0.0, dtype=dtype)
    y = update(base, u, torch.full((1, 2), -1, dtype=torch.int32), c[:1])
    assert torch.equal(y.signbit(), base.signbit())


@dtypes
def test_layers_rows_do_not_know_of_each_other_nor_of_the_order_of_threads(machine, dtype):
    for tokens in (33, 170):
        inputs = rank_one_inputs(3, tokens, 72, 80, 6, 2, gate="row", dtype=dtype)
        inputs["slots"] = torch.tensor([[0, 1], [2, -1], [4, 5]], dtype=torch.int32)
        clean = linear(inputs)
        for processors, is_reversed in ORDERS:
            machine.configure(processors=processors, reversed=is_reversed)
            assert same([linear(inputs)], [clean])
        for name in ("x", "beta", "strength"):
            inputs[name] = inputs[name].clone()
            inputs[name][[0, 2]] = torch.nan
        inputs["u"][[0, 1, 4, 5]] = torch.nan
        assert same([linear(inputs)[1]], [clean[1]])


@dtypes
@pytest.mark.parametrize("ranks", [(0,), (1, 16), (17, 0, 5), (40, 8)], ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_adapters_of_every_rank(scale, ranks, dtype):
    for tokens in (20, 170):
        inputs = low_rank_inputs(3, tokens, 64, 72, ranks, 2, scale=scale, bias=scale, dtype=dtype)
        exact = low_rank_linear(**cast(inputs, torch.float64), backend="eager")
        assert_as_accurate_as_eager(adapted(inputs), low_rank_linear(**inputs, backend="eager"), exact)
        base = inputs["x"][..., :1].expand(-1, -1, 72)
        given = {k: v for k, v in inputs.items() if k not in ("weight", "bias", "output_scale")} | {"base": base}
        exact = low_rank_update(**cast(given, torch.float64), backend="eager")
        eager = low_rank_update(**given, backend="eager")
        assert_as_accurate_as_eager(native_cuda.low_rank_update(base, inputs["x"], adapters(inputs)), eager, exact)


@dtypes
def test_scales_may_be_float32_and_strided(dtype):
    inputs = low_rank_inputs(2, 20, 48, 56, (4, 3), 2, dtype=torch.float32)
    inputs.update({name: inputs[name].to(dtype) for name in ("x", "weight")})
    wanted = adapted(inputs)
    exact = low_rank_linear(**cast(inputs, torch.float64), backend="eager")
    assert_as_accurate_as_eager(wanted, low_rank_linear(**inputs, backend="eager"), exact)
    for name in ("output_scale", "slots", "strength"):
        inputs[name] = inputs[name].T.contiguous().T
    inputs["token_weights"] = inputs["token_weights"].mT.contiguous().mT
    assert same([adapted(inputs)], [wanted])


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [9, 170])
def test_a_coefficient_of_zero_adds_nothing_whatever_it_meets(tokens, bad, dtype):
    inputs = low_rank_inputs(2, tokens, 64, 72, (17, 3), 2, dtype=dtype)
    inputs["slots"] = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    inputs["strength"] = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    inputs["token_weights"] = torch.ones(2, 2, tokens)
    inputs["token_weights"][1, 1, ::2] = 0
    base = inputs["weight"][0, 0].expand(2, tokens, 72)

    def both():
        return adapted(inputs), native_cuda.low_rank_update(base, inputs["x"], adapters(inputs))

    clean = both()
    for name in ("up", "down"):
        whole = inputs[name]
        inputs[name] = whole.clone()
        inputs[name][:17] = bad
        for y, wanted in zip(both(), clean, strict=True):
            assert same([y[0], y[1, ::2]], [wanted[0], wanted[1, ::2]])
            assert not y[1, 1::2].isfinite().any()
        inputs[name] = whole


@dtypes
def test_adapters_that_do_not_exist_make_their_row_nan(dtype):
    inputs = low_rank_inputs(4, 9, 16, 24, (3, 2), 2, dtype=dtype)
    inputs["slots"] = torch.tensor([[0, 1], [2, 0], [-2, -1], [-1, -1]], dtype=torch.int32)
    inputs["strength"] = torch.ones(4, 2)
    inputs["token_weights"] = torch.ones(4, 2, 9)
    y = adapted(inputs)
    assert y[[0, 3]].isfinite().all() and y[1:3].isnan().all()


def test_aligned_layers_move_in_128_bits(machine):
    before = machine.counts()
    linear(rank_one_inputs(1, 170, 320, 320, 2, 2, dtype=torch.bfloat16))
    linear(rank_one_inputs(1, 77, 768, 320, 2, 2, dtype=torch.bfloat16))
    assert machine.counts()["narrow"] == before["narrow"] and machine.counts()["wide"] > before["wide"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no mistake", None),
        ("no wait", "wrong result"),
        ("no commit", "wrong result"),
        ("no barrier", "wrong result"),
        ("outside", "access outside of shared memory"),
        ("misaligned", "misaligned"),
        ("divergence", "lanes of a warp diverge"),
        ("some lanes only", "threads wait for each other forever"),
        ("uninitialised", "wrong result"),
    ],
)
def test_the_emulation_notices(machine, mistake, message):
    """A kernel with one mistake fails, in one order of threads at least."""
    found = []
    for is_reversed in (False, True):
        machine.configure(processors=1, reversed=is_reversed)
        found.append(machine.run_with(mistake))
    assert found == ["", ""] if message is None else any(message in text for text in found), found
