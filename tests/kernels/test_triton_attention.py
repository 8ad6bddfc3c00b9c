"""What the Triton kernels of localized attention promise beyond their numbers: launches, tiles, memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from keylock_kernels import localized_attention
from keylock_kernels.testing import assert_as_accurate_as_eager, attention_inputs, cast
from tests.kernels.helpers import ATTENTION_CASES, TRITON_ALONE, attention_case, run

pytest.importorskip("triton")

from keylock_kernels.ops import launching  # noqa: E402
from keylock_kernels.ops.localized_attention import triton as kernels  # noqa: E402
from keylock_kernels.ops.localized_attention import triton_plan  # noqa: E402

runs = pytest.mark.skipif(not TRITON_ALONE, reason="needs Triton's interpreter or a GPU")
LENGTHS = (0, 1, 4, 16, 77, 154, 231, 257, 512)
HEAD_DIMS = (1, 8, 16, 40, 64, 72, 80, 96, 112, 160, 255, 256)


def judged(inputs):
    """Results and gradients of the kernels, judged against float64."""
    exact, exact_grads = run(localized_attention, cast(inputs, torch.float64), backend="eager")
    eager, eager_grads = run(localized_attention, inputs, backend="eager")
    actual, grads = run(localized_attention, inputs, backend="triton")
    for index, result in enumerate(actual):
        assert_as_accurate_as_eager(result, eager[index], exact[index])
    for name, grad in grads.items():
        assert_as_accurate_as_eager(grad, eager_grads[name], exact_grads[name], name)


def exactly(inputs):
    """Results and gradients of the kernels in float64."""
    exact, exact_grads = run(localized_attention, inputs, backend="eager")
    actual, grads = run(localized_attention, inputs, backend="triton")
    torch.testing.assert_close(actual, exact)
    torch.testing.assert_close(grads, exact_grads)


@runs
@pytest.mark.parametrize("tokens", LENGTHS)
def test_any_number_of_text_keys(tokens):
    exactly(attention_inputs(1, 19, tokens, 1, 24, bias=True))


@runs
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_of_an_image_stream_beside_short_ones(length):
    images = (3, length, 4, 4)
    exactly(attention_inputs(1, 19, 7, 1, 24, images=images, weights="pixel"))


@runs
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_head_dimension_in_any_dtype(head_dim, dtype):
    heads = 8 if head_dim < 16 else 1  # the largest error of a handful of elements says little
    judged(attention_inputs(1, 70, 33, heads, head_dim, images=(4, 4), dtype=dtype))


@runs
@pytest.mark.parametrize("count", [1, 16, 17, 40])
@pytest.mark.parametrize("sums", [False, True])
def test_any_number_of_read_out_tokens(count, sums):
    exactly(attention_inputs(2, 19, 30, 2, 8, images=(4, 20), weights="row", read=count, sums=sums))


@runs
@pytest.mark.parametrize("images", [(4,) * 8, (16,) * 5, (2, 3, 5, 6, 7), (16, 100, 4, 4, 90), (80, 48, 20)], ids=str)
def test_many_image_streams(images):
    inputs = attention_inputs(1, 19, 77, 1, 160, images=images, weights="pixel")
    exactly(inputs)
    judged(cast(inputs, torch.bfloat16))


OPTIONS = {
    "bias": (False, True),
    "regions": (False, True),
    "images": ((), (3, 2)),
    "weights": (None, "row", "pixel"),
    "read": (0, 2),
    "sums": (False, True),
}


def combinations():
    """All of them but those that are the same call: without images there are no weights, without maps no sums."""
    for choice in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, choice, strict=True))
        if (options["images"] or options["weights"] is None) and (options["read"] or not options["sums"]):
            yield choice


@runs
@pytest.mark.parametrize("choice", list(combinations()), ids=str)
def test_every_combination_of_arguments(choice):
    options = dict(zip(OPTIONS, choice, strict=True))
    exactly(attention_inputs(2, 5, 4, 2, 3, **options))


def launches(call):
    """The kernels that a call launches, in their order; nothing runs."""
    names = []

    def note(kernel, grid, arguments, options):
        names.append(kernel.fn.__name__)
        return True

    with launching.observed(note):
        call()
    return names


def forward_arguments(inputs):
    names = (
        "query", "key", "value", "scale", "key_bias", "query_regions", "key_regions", "image_key", "image_value",
        "image_lengths", "image_key_bias", "image_weights", "readout_tokens", "readout_weights",
    )  # fmt: skip
    return [{"scale": 0.3, "image_lengths": [], **inputs}.get(name) for name in names]


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_forward_is_one_launch_and_backward_at_most_three(case):
    inputs = attention_case(case, dtype=torch.float32)
    arguments = forward_arguments(inputs)
    assert launches(lambda: kernels.forward(*arguments)) == ["localized_attention_fwd_kernel"]
    read = inputs.get("readout_tokens")
    grads = [torch.zeros(3, 13, 2, 5), None]
    if read is not None:
        grads[1] = torch.zeros(3, 2, read.shape[1]) if "readout_weights" in inputs else torch.zeros(3, 2, 13, 3)
    names = launches(lambda: kernels.backward(*grads, *arguments, [True] * 9))
    assert names[:2] == ["localized_attention_bwd_pixel_kernel", "localized_attention_bwd_key_kernel"]
    assert names[2:] in ([], ["localized_attention_bwd_sum_kernel"])


def test_nothing_is_launched_for_gradients_nobody_wants():
    arguments = forward_arguments(attention_case("text", dtype=torch.float32))
    needs = [True] + [False] * 8
    names = launches(lambda: kernels.backward(torch.zeros(3, 13, 2, 5), None, *arguments, needs))
    assert names == ["localized_attention_bwd_pixel_kernel"]


def test_inputs_go_to_the_kernels_as_they_are():
    """No copy, pad or contiguous() on the way: every tensor that a kernel reads is one that was given."""
    inputs = attention_case("everything", dtype=torch.float32)
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    given = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    seen = []

    def note(kernel, grid, arguments, options):
        seen.extend(a.data.untyped_storage().data_ptr() for a in arguments if hasattr(a, "data") and hasattr(a, "b"))
        return True

    with launching.observed(note):
        kernels.forward(*forward_arguments(inputs))
    assert len(seen) == 12 and set(seen) <= given


@pytest.mark.parametrize("length", range(1, 81))
def test_a_short_streams_tiles_hold_it_with_at_most_15_to_spare(length):
    first, second = triton_plan.cut(length)
    assert 0 <= first + second - length <= 15 or first == 64 and second == 0
    assert all(size & (size - 1) == 0 for size in (first, second))


@pytest.mark.parametrize("head_dim", range(1, 257))
def test_the_parts_of_a_head_hold_it(head_dim):
    wide = triton_plan.parts(head_dim)
    assert sum(wide) >= head_dim and len(wide) <= 2 and all(size & (size - 1) == 0 and size >= 16 for size in wide)
    known = {40: (32, 16), 64: (64,), 72: (64, 16), 80: (64, 16), 112: (128,), 160: (128, 32)}
    assert wide == known.get(head_dim, wide)


def test_image_streams_of_few_keys_share_a_tile():
    groups = triton_plan.pack((4, 4, 4, 4, 4, 20, 90, 0), 80)
    assert [(g.long, g.start, g.stream, g.first, g.lengths) for g in groups] == [
        (True, 40, 6, 0, (90,)),
        (False, 0, 0, 16, (4, 4, 4, 4)),
        (False, 16, 4, 16, (4,)),
        (False, 20, 5, 32, (20,)),
        (False, 130, 7, 16, (0,)),
    ]


@pytest.mark.parametrize("pixels", [1, 64, 4096, 9216])
@pytest.mark.parametrize("others", [1, 80, 4000])
def test_programs_take_all_tiles_and_leave_no_multiprocessor_idle_for_it(pixels, others):
    tiles = -(-pixels // 64)
    each = triton_plan.per_program(tiles, others, torch.device("cpu"))
    assert 1 <= each <= triton_plan.MOST_TILES
    assert each == 1 or tiles * others // each >= launching.processors(torch.device("cpu"))


def test_strides_are_told_in_units_of_16_bytes_where_they_can_be():
    aligned = torch.empty(2, 64, 8, 40, dtype=torch.bfloat16)
    assert kernels._unit(aligned, aligned) == 8
    assert kernels._unit(aligned, torch.empty(2, 64, 8, 40, dtype=torch.bfloat16)[..., 1:33]) == 8
    assert kernels._unit(aligned, torch.empty(2, 64, 8, 36, dtype=torch.bfloat16)) == 1
    assert kernels._unit(torch.empty(1, 3, 1, 8, dtype=torch.float32)) == 4
