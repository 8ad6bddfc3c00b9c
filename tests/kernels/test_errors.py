"""Every wrong input is refused, by a message that names it, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch
from torch import full, int32, ones, zeros

from keylock_kernels import localized_attention, rank_one_coefficients, rank_one_linear, rank_one_update
from tests.kernels.helpers import ATTENTION_BACKENDS, TRITON_ALONE, UPDATE_BACKENDS, attention_case, rank_one_case

if TRITON_ALONE:
    pytest.skip("what a CPU refuses without Triton's interpreter", allow_module_level=True)

LINEAR = {
    "x list": (dict(x=[1.0]), "x must be a tensor [B, T, K], got list"),
    "x int": (dict(x=ones(3, 7, 9, dtype=torch.int64)), "x must be float16, bfloat16, float32 or float64, got int64"),
    "x 2-D": (dict(x=ones(7, 9)), "x must be [B, T, K], got [7, 9]"),
    "weight dtype": (dict(weight=ones(11, 9).half()), "weight must be float32 [O, 9], got float16 [11, 9]"),
    "weight width": (dict(weight=ones(11, 8)), "weight must be float32 [O, 9], got float32 [11, 8]"),
    "u width": (dict(u=ones(4, 10)), "u must be float32 [S, 11], got float32 [4, 10]"),
    "u dtype": (dict(u=ones(4, 11).double()), "u must be float32 [S, 11], got float64 [4, 11]"),
    "u device": (dict(u=ones(4, 11, device="meta")), "u must be on cpu, got meta"),
    "v None": (dict(v=None), "v is missing; give v, or coefficients instead of it"),
    "v count": (dict(v=ones(5, 9)), "v must be float32 [4, 9], got float32 [5, 9]"),
    "slots dtype": (dict(slots=zeros(3, 3, dtype=torch.int64)), "slots must be int32 [3, R], got int64 [3, 3]"),
    "slots rows": (dict(slots=zeros(2, 3, dtype=int32)), "slots must be int32 [3, R], got int32 [2, 3]"),
    "slots high": (dict(slots=full((3, 3), 4, dtype=int32)), "slots must lie in [-1, 4), got 4"),
    "slots low": (dict(slots=full((3, 3), -2, dtype=int32)), "slots must lie in [-1, 4), got -2"),
    "bias": (dict(bias=ones(9)), "bias must be float32 [11], got float32 [9]"),
    "no tau": (dict(tau=None), "beta and tau are given together or not at all, got only beta"),
    "no beta": (dict(beta=None), "beta and tau are given together or not at all, got only tau"),
    "beta size": (dict(beta=ones(3)), "beta must be float32 [4], got float32 [3]"),
    "beta rows": (dict(beta=ones(4, 3)), "beta must be float32 [3, 3], got float32 [4, 3]"),
    "tau 3-D": (dict(tau=ones(1, 3, 3)), "tau must be [4] or [3, 3], got float32 [1, 3, 3]"),
    "tau float": (dict(tau=0.1), "tau must be float32 [3, 3], got float"),
    "strength": (dict(strength=ones(3, 2)), "strength must be float32 [3, 3], got float32 [3, 2]"),
    "coefficients too": (
        dict(coefficients=ones(3, 7, 3)),
        "coefficients stand instead of v, beta, tau and strength, got v, beta, tau, strength too",
    ),
    "coefficients": (
        dict(v=None, beta=None, tau=None, strength=None, coefficients=ones(3, 7, 2)),
        "coefficients must be float32 [3, 7, 3], got float32 [3, 7, 2]",
    ),
    "backend": (
        dict(backend="fast"),
        "backend must be one of auto, eager, sdpa, bmm, native, triton, cuda, got 'fast'",
    ),
    "sdpa": (
        dict(backend="sdpa"),
        "backend 'sdpa' has no implementation of this op; it has native, triton, cuda, bmm, eager",
    ),
    "triton": (dict(backend="triton"), "backend 'triton' cannot run on cpu tensors: it runs on cuda tensors only"),
}
ATTENTION = {
    "query list": (dict(query=[1.0]), "query must be a tensor [B, N, H, D], got list"),
    "query 3-D": (dict(query=ones(3, 13, 10)), "query must be [B, N, H, D], got [3, 13, 10]"),
    "query bool": (
        dict(query=ones(3, 13, 2, 5).bool()),
        "query must be float16, bfloat16, float32 or float64, got bool",
    ),
    "head dim": (dict(query=ones(3, 13, 2, 257)), "query's head dimension must be 1 to 256, got 257"),
    "key heads": (dict(key=ones(3, 7, 3, 5)), "key must be float32 [3, T, 2, 5], got float32 [3, 7, 3, 5]"),
    "key dtype": (dict(key=ones(3, 7, 2, 5).half()), "key must be float32 [3, T, 2, 5], got float16 [3, 7, 2, 5]"),
    "value": (dict(value=ones(3, 6, 2, 5)), "value must be float32 [3, 7, 2, 5], got float32 [3, 6, 2, 5]"),
    "key_bias": (dict(key_bias=ones(3, 6)), "key_bias must be float32 [3, 7], got float32 [3, 6]"),
    "bool mask": (dict(key_bias=ones(3, 7).bool()), "key_bias must be float32 [3, 7], got bool [3, 7]"),
    "key_regions": (
        dict(key_regions=ones(3, 8, dtype=torch.int64)),
        "key_regions must be int32 [3, 7], got int64 [3, 8]",
    ),
    "query_regions": (
        dict(query_regions=ones(3, 12, dtype=int32)),
        "query_regions must be int32 [3, 13], got int32 [3, 12]",
    ),
    "one region": (
        dict(key_regions=None),
        "query_regions and key_regions are given together or not at all, got only query_regions",
    ),
    "image_value None": (
        dict(image_value=None),
        "image_key and image_value are given together or not at all, got only image_key",
    ),
    "lengths sum": (dict(image_lengths=(4, 2)), "image_lengths must add up to image_key's 7 keys, got 6"),
    "lengths negative": (dict(image_lengths=(8, -1)), "image_lengths must not be negative, got -1"),
    "lengths float": (dict(image_lengths=(4.0, 3.0)), "image_lengths must be ints, got float"),
    "image_key": (
        dict(image_key=ones(2, 7, 2, 5)),
        "image_key must be float32 [3, sum(L), 2, 5], got float32 [2, 7, 2, 5]",
    ),
    "image_value": (
        dict(image_value=ones(3, 6, 2, 5)),
        "image_value must be float32 [3, 7, 2, 5], got float32 [3, 6, 2, 5]",
    ),
    "image_key_bias": (dict(image_key_bias=ones(3, 2)), "image_key_bias must be float32 [3, 7], got float32 [3, 2]"),
    "weights 1-D": (dict(image_weights=ones(2)), "image_weights must be [3, 2] or [3, 2, 13], got float32 [2]"),
    "weights row": (dict(image_weights=ones(3, 3)), "image_weights must be float32 [3, 2], got float32 [3, 3]"),
    "weights pixel": (
        dict(image_weights=ones(3, 2, 12)),
        "image_weights must be float32 [3, 2, 13], got float32 [3, 2, 12]",
    ),
    "tokens dtype": (dict(readout_tokens=ones(3, 3).long()), "readout_tokens must be int32 [3, M], got int64 [3, 3]"),
    "tokens high": (dict(readout_tokens=full((3, 3), 14, dtype=int32)), "readout_tokens must lie in [-1, 14), got 14"),
    "tokens low": (dict(readout_tokens=full((3, 3), -2, dtype=int32)), "readout_tokens must lie in [-1, 14), got -2"),
    "read weights": (
        dict(readout_weights=ones(3, 13, 2)),
        "readout_weights must be float32 [3, 13, 3], got float32 [3, 13, 2]",
    ),
    "read nothing": (dict(readout_tokens=None), "readout_weights need readout_tokens, got none"),
    "last dim": (dict(key=ones(3, 7, 5, 2).mT), "key's last dimension must be contiguous, got stride 2"),
    "triton": (dict(backend="triton"), "backend 'triton' cannot run on cpu tensors: it runs on cuda tensors only"),
    "cuda": (
        dict(backend="cuda"),
        "backend 'cuda' cannot run on cpu tensors: it runs on cuda tensors only",
    ),
}
NO_IMAGES = {"image_key": None, "image_value": None}
ATTENTION |= {
    "lengths alone": (
        {**NO_IMAGES, "image_key_bias": None, "image_weights": None},
        "image_lengths needs image_key, got none",
    ),
    "weights alone": ({**NO_IMAGES, "image_key_bias": None}, "image_weights needs image_key, got none"),
    "bias alone": (NO_IMAGES, "image_key_bias needs image_key, got none"),
}


def kind_of(message):
    """Something that is no tensor, or no int, is a TypeError; anything else a ValueError."""
    return TypeError if message.endswith(("got list", "got float")) else ValueError


@pytest.mark.parametrize("wrong", LINEAR)
def test_rank_one_linear_names_what_is_wrong(wrong):
    change, message = LINEAR[wrong]
    inputs = {**rank_one_case("per row", dtype=torch.float32), **change}
    with pytest.raises(kind_of(message), match=f"^rank_one_linear: {re.escape(message)}"):
        rank_one_linear(**inputs)


@pytest.mark.parametrize("wrong", ATTENTION)
def test_localized_attention_names_what_is_wrong(wrong):
    change, message = ATTENTION[wrong]
    inputs = {**attention_case("everything", dtype=torch.float32), **change}
    with pytest.raises(kind_of(message), match=f"^localized_attention: {re.escape(message)}"):
        localized_attention(**inputs)


@pytest.mark.parametrize("backend", UPDATE_BACKENDS)
def test_a_slot_out_of_range_is_refused_by_every_backend(backend):
    x, table, c = ones(1, 1, 2), ones(3, 2), ones(1, 1, 1)
    for slot in (-2, 3):
        slots = torch.tensor([[slot]], dtype=int32)
        with pytest.raises(ValueError, match=re.escape(f"slots must lie in [-1, 3), got {slot}")):
            rank_one_update(x, table, slots, c, backend=backend)
        with pytest.raises(ValueError, match=re.escape(f"slots must lie in [-1, 3), got {slot}")):
            rank_one_coefficients(x, table, slots)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_a_token_out_of_range_is_refused_by_every_backend(backend):
    inputs = {**attention_case("maps"), "readout_tokens": full((3, 1), 12, dtype=int32)}
    with pytest.raises(ValueError, match=re.escape("readout_tokens must lie in [-1, 12), got 12")):
        localized_attention(**inputs, backend=backend)


def test_a_slot_is_checked_in_a_compiled_graph_too():
    inputs = rank_one_case("linear", dtype=torch.float32)
    compiled = torch.compile(rank_one_linear, fullgraph=True, backend="eager")
    compiled(**inputs)
    with pytest.raises(ValueError, match="slots must lie in"):
        compiled(**{**inputs, "slots": full((3, 3), 9, dtype=int32)})
    torch._dynamo.reset()


def test_coefficients_and_update_name_what_is_wrong():
    x, table, slots = ones(1, 2, 3), ones(4, 3), zeros(1, 1, dtype=int32)
    with pytest.raises(ValueError, match=r"rank_one_coefficients: v must be float32 \[S, 3\], got float32 \[4, 2\]"):
        rank_one_coefficients(x, table[:, :2], slots)
    with pytest.raises(ValueError, match=r"rank_one_coefficients: slots must be int32 \[1, R\], got int64 \[1, 1\]"):
        rank_one_coefficients(x, table, slots.long())
    with pytest.raises(ValueError, match=re.escape("rank_one_update: base must be [B, T, O], got [2, 3]")):
        rank_one_update(x[0], table, slots, ones(1, 2, 1))
    with pytest.raises(ValueError, match=r"rank_one_update: coefficients must be float32 \[1, 2, 1\], got"):
        rank_one_update(x, table, slots, ones(1, 1, 1))
