"""localized_attention on text, masked image streams and regions, against what a user would write instead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from keylock_kernels import localized_attention
from keylock_kernels.ops.localized_attention import reference
from keylock_kernels.testing import SHAPES, attention_inputs

IMAGE_TOKENS = 16  # of one image, as IP-Adapter Plus has them
SCALE = 0.6  # of an image prompt
LEVELS = [s for s in SHAPES if s.model in ("sd1.5", "sdxl") and s.pixels >= 256]
LEVELS = [s for s in SHAPES if s.model == "sd1.5" and s.pixels == 64] if QUICK else LEVELS
BATCHES = (2, 8) if DEVICE.type == "cuda" and not QUICK else (2,)

over_dtypes = pytest.mark.parametrize("dtype", dtypes(), ids=dtype_name)
over_rows = pytest.mark.parametrize("rows", BATCHES, ids="B{}".format)
over_levels = pytest.mark.parametrize("level", LEVELS, ids=lambda s: s.name)


def case(name: str, level: Any, rows: int, dtype: torch.dtype, peers: list[Contestant], **more: Any) -> Case:
    """One line-up, ``more`` being what attention_inputs is asked for beside text."""
    images = len(more.get("images", ()))
    keys, width = level.tokens + sum(more.get("images", ())), level.width

    def make(seed: int) -> dict[str, Any]:
        inputs = attention_inputs(
            rows, level.pixels, level.tokens, level.heads, level.head_dim, seed=seed, dtype=dtype, device=DEVICE, **more
        )
        if images:
            inputs["image_weights"] = masks(rows, images, level.pixels, seed).to(DEVICE, dtype)
        if more.get("regions"):
            # Words 1 to 8 belong to two subjects, all others to the whole picture, as padding and BOS do.
            inside = inputs["query_regions"].new_tensor([0b101, 0b110])
            inputs["query_regions"] = inside[halves(level.pixels, 2, seed)].expand(rows, -1).contiguous()
            inputs["key_regions"].fill_(0b100)
            inputs["key_regions"][:, 1:5], inputs["key_regions"][:, 5:9] = 0b001, 0b010
        return inputs

    extra = 4 * rows * (level.pixels + level.tokens) if more.get("regions") else 0
    extra += dtype.itemsize * rows * images * level.pixels
    return Case(
        f"localized_attention/{name}/{level.name}/B{rows}/{dtype_name(dtype)}",
        make_sets(make),
        [
            *library("localized_attention", localized_attention),
            *peers,
            *compiled("torch.compile of eager", eager),
            Contestant("SDPA on text alone", "floor", text_alone, heads_first),
        ],
        judge_of(localized_attention),
        moved_bytes=dtype.itemsize * 2 * rows * width * (level.pixels + keys) + extra,
        flops=4 * rows * level.pixels * keys * width,
    )


def halves(pixels: int, parts: int, seed: int) -> Tensor:  # [N], values 0 .. parts - 1
    """Vertical bands of the picture, moved a little from set to set."""
    side = math.isqrt(pixels)
    return ((torch.arange(pixels) % side + seed) % side * parts // side).to(DEVICE)


def masks(rows: int, images: int, pixels: int, seed: int) -> Tensor:  # [B, I, N]
    """Each image has its band, at the scale of its adapter, and weight 0 outside."""
    inside = halves(pixels, images, seed) == torch.arange(images, device=DEVICE)[:, None]
    return (SCALE * inside).expand(rows, -1, -1).contiguous()


def eager(inputs: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    """The eager backend's code, open to the compiler."""
    query, key, regions = inputs["query"], inputs["key"], (inputs.get("query_regions"), inputs.get("key_regions"))
    text = reference.make_stream(key, inputs["value"], None, *regions)
    images = reference.image_streams(
        inputs.get("image_key"), inputs.get("image_value"), list(inputs.get("image_lengths", ())), None, key.shape[1]
    )
    return reference.combine(query, text, images, inputs.get("image_weights"), query.shape[-1] ** -0.5)


def heads_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Views [B, H, N or T, D], streams apart, and one mask [B, N, 1] an image, made before the call."""
    views = {name: inputs[name].transpose(1, 2) for name in ("query", "key", "value")}
    if "image_key" in inputs:
        for name in ("image_key", "image_value"):
            views[name] = inputs[name].transpose(1, 2).split(list(inputs["image_lengths"]), 2)
        views["masks"] = inputs["image_weights"][..., None].unbind(1)
    return views


def text_alone(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    return F.scaled_dot_product_attention(views["query"], views["key"], views["value"]).transpose(1, 2)


def diffusers_sequence(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    """What IPAdapterAttnProcessor2_0 does after its projections, its masks resized and moved beforehand."""
    heads = views["query"].shape[1]
    out = text_alone(views).flatten(2)
    images = [views.get(name, ()) for name in ("image_key", "image_value", "masks")]
    for key, value, mask in zip(*images, strict=True):
        shown = F.scaled_dot_product_attention(views["query"], key, value).transpose(1, 2).flatten(2)
        out = out + shown * mask
    return out.unflatten(-1, (heads, -1))


def stacked(inputs: dict[str, Any]) -> dict[str, Any]:
    lengths, images = inputs["image_lengths"], len(inputs["image_lengths"])
    views = heads_first(inputs)
    for name in ("image_key", "image_value"):
        views[name] = inputs[name].unflatten(1, (images, lengths[0])).transpose(2, 3).flatten(0, 1)  # [B I, H, L, D]
    views["masks"] = inputs["image_weights"][..., None, None]  # [B, I, N, 1, 1]
    return views


def stacked_images(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    """Two SDPAs: the text, and all images of equal length as rows of one batch."""
    images = views["masks"].shape[1]
    query = views["query"][:, None].expand(-1, images, -1, -1, -1).flatten(0, 1)
    shown = F.scaled_dot_product_attention(query, views["image_key"], views["image_value"])
    shown = shown.transpose(1, 2).unflatten(0, (-1, images))
    return text_alone(views) + (shown * views["masks"]).sum(1)


def concatenated(inputs: dict[str, Any]) -> dict[str, Any]:
    weights = inputs["image_weights"].float()
    return {
        "query": inputs["query"].transpose(1, 2),
        "key": torch.cat([inputs["key"], inputs["image_key"]], 1).transpose(1, 2).contiguous(),
        "value": torch.cat([inputs["value"], inputs["image_value"]], 1).transpose(1, 2).contiguous(),
        "lengths": [inputs["key"].shape[1], *inputs["image_lengths"]],
        "repeats": torch.tensor([inputs["key"].shape[1], *inputs["image_lengths"]], device=DEVICE),
        "log_weights": F.pad(weights, (0, 0, 1, 0), value=1).log().mT[:, None],  # [B, 1, N, 1 + I]
        "total": (1 + weights.sum(1))[:, :, None, None].to(inputs["query"].dtype),  # [B, N, 1, 1]
    }


def one_softmax(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    """One SDPA over all keys, biased by log w_i less each stream's log-sum-exp: equal where no weight is negative."""
    query, key = views["query"], views["key"]
    scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5
    sums = [part.logsumexp(-1) for part in scores.split(views["lengths"], -1)]
    bias = views["log_weights"] - torch.stack(sums, -1)  # [B, H, N, 1 + I]
    mask = bias.to(query.dtype).repeat_interleave(views["repeats"], -1, output_size=key.shape[2])
    return F.scaled_dot_product_attention(query, key, views["value"], attn_mask=mask).transpose(1, 2) * views["total"]


def visible(inputs: dict[str, Any]) -> Tensor:  # [B, 1, N, T]
    return ((inputs["query_regions"][:, :, None] & inputs["key_regions"][:, None]) != 0)[:, None]


def with_mask(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    mask = views["mask"] if "mask" in views else visible(views)
    return F.scaled_dot_product_attention(
        views["query"], views["key"], views["value"], attn_mask=mask
    ).transpose(1, 2)  # fmt: skip


def flex_views(inputs: dict[str, Any]) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    here, there = inputs["query_regions"], inputs["key_regions"]

    def seen(b: Tensor, h: Tensor, n: Tensor, t: Tensor) -> Tensor:
        return (here[b, n] & there[b, t]) != 0

    block_mask = create_block_mask(seen, here.shape[0], None, here.shape[1], there.shape[1], device=DEVICE)
    return {**heads_first(inputs), "block_mask": block_mask}


def flex(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    from torch.nn.attention.flex_attention import flex_attention

    found = flex_attention(views["query"], views["key"], views["value"], block_mask=views["block_mask"])
    return found.transpose(1, 2)


def each_sdpa(run: Any, prepare: Any) -> list[Contestant]:
    """On a GPU, SDPA by each of its backends by name, beside the one it chooses by itself."""

    def forced(backend: SDPBackend) -> Contestant:
        def call(views: dict[str, Any]) -> Tensor:
            with sdpa_kernel(backend):
                return run(views)

        return Contestant(f"SDPA, {backend.name.lower().replace('_', ' ')}", "peer", call, prepare)

    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    return [forced(getattr(SDPBackend, name)) for name in names] if DEVICE.type == "cuda" else []


@over_dtypes
@over_rows
@over_levels
def test_text_only(level, rows, dtype, compare):
    peers = [
        Contestant("diffusers' sequence", "peer", diffusers_sequence, heads_first),
        *each_sdpa(text_alone, heads_first),
    ]
    compare(case("text", level, rows, dtype, peers))


@over_dtypes
@over_rows
@over_levels
@pytest.mark.parametrize("images", [2, 4], ids="{}-images".format)
def test_image_streams(images, level, rows, dtype, compare):
    peers = [
        Contestant("diffusers' sequence", "peer", diffusers_sequence, heads_first),
        Contestant("images stacked, two SDPAs", "peer", stacked_images, stacked),
        Contestant("one SDPA, log-sum-exp re-weighted", "peer", one_softmax, concatenated),
        *compiled("torch.compile of diffusers' sequence", diffusers_sequence, prepare=heads_first),
    ]
    compare(case(f"{images}-images", level, rows, dtype, peers, images=(IMAGE_TOKENS,) * images))


@over_dtypes
@over_rows
@over_levels
def test_regions(level, rows, dtype, compare):
    def masked(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**heads_first(inputs), "mask": visible(inputs)}

    def bits(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, **heads_first(inputs)}

    peers = [
        Contestant("SDPA, mask made beforehand", "peer", with_mask, masked),
        Contestant("SDPA, mask made per call", "peer", with_mask, bits),
        *each_sdpa(with_mask, masked),
        *compiled("FlexAttention", flex, prepare=flex_views),
    ]
    compare(case("regions", level, rows, dtype, peers, regions=True))
