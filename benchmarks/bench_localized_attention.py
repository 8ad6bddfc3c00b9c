"""localized_attention on text, masked image streams and regions, against what a user would write instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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
from keylock_kernels.testing import SHAPES, assert_as_accurate_as_eager, attention_inputs, cast

SCALE = 0.6  # of an image prompt
GPU = DEVICE.type == "cuda"
LEVELS = [s for s in SHAPES if GPU or s.model in ("sd1.5", "sdxl") and s.pixels >= 256]
LEVELS = [s for s in SHAPES if s.model == "sd1.5" and s.pixels == 64] if QUICK else LEVELS
BATCHES = (2,) if QUICK else (1, 8, 32) if GPU else (2, 8)

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


def picture_masks(inputs: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' documentation has them: one mask the size of the picture an image, on the CPU."""
    views = heads_first(inputs)
    side = math.isqrt(inputs["query"].shape[1])
    small = inputs["image_weights"][:1].cpu().float().unflatten(2, (side, side)).transpose(0, 1)  # [I, 1, h, w]
    views["pictures"] = F.interpolate(small, scale_factor=8).unbind(0)
    return views


def diffusers_resizing(views: dict[str, Any]) -> Tensor:  # [B, N, H, D]
    """The same with each mask resized, repeated over channels and moved in the call, as happens in a step."""
    query = views["query"]
    rows, heads, pixels, width = query.shape
    side = math.isqrt(pixels)
    masks = []
    for picture in views["pictures"]:
        small = F.interpolate(picture[None], size=(side, side), mode="bicubic")[0].flatten(1)  # [1, N]
        masks.append(small.repeat(rows, 1)[..., None].repeat(1, 1, heads * width).to(query))
    return diffusers_sequence({**views, "masks": masks})


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
    return [forced(getattr(SDPBackend, name)) for name in names] if GPU else []


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
@pytest.mark.parametrize(
    ("images", "tokens"), [(1, 4), (2, 16), (4, 4), (4, 16), (8, 4)] if GPU else [(2, 4), (4, 4), (4, 16)], ids=str
)
def test_image_streams(images, tokens, level, rows, dtype, compare):
    peers = [
        Contestant("diffusers' sequence", "peer", diffusers_sequence, heads_first),
        # Resizing interpolates at the masks' edges: the table says so instead of a time where that is too much.
        Contestant("diffusers' sequence, masks resized in the call", "peer", diffusers_resizing, picture_masks),
        Contestant("images stacked, two SDPAs", "peer", stacked_images, stacked),
        Contestant("one SDPA, log-sum-exp re-weighted", "peer", one_softmax, concatenated),
        *compiled("torch.compile of diffusers' sequence", diffusers_sequence, prepare=heads_first),
    ]
    compare(case(f"{images}-images-of-{tokens}", level, rows, dtype, peers, images=(tokens,) * images))


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


@over_dtypes
@over_rows
@over_levels
def test_columns_read_out(level, rows, dtype, compare):
    """Four columns beside the attention itself."""

    def attention_alone(inputs: dict[str, Any]) -> Tensor:
        return localized_attention(**{k: v for k, v in inputs.items() if not k.startswith("readout")})

    def make(seed: int) -> dict[str, Any]:
        sizes = (rows, level.pixels, level.tokens, level.heads, level.head_dim)
        return attention_inputs(*sizes, seed=seed, dtype=dtype, device=DEVICE, read=4)

    compare(
        Case(
            f"localized_attention/4-columns/{level.name}/B{rows}/{dtype_name(dtype)}",
            make_sets(make),
            [
                *library("localized_attention", localized_attention),
                Contestant("without columns", "floor", attention_alone),
            ],
            judge_of(localized_attention),
            moved_bytes=dtype.itemsize * 2 * rows * level.width * (level.pixels + level.tokens)
            + 4 * rows * level.heads * level.pixels * 4,
            flops=4 * rows * level.pixels * level.tokens * level.width,
        )
    )


@over_dtypes
@over_rows
@over_levels
@pytest.mark.parametrize("images", [0, 4], ids="{}-images".format)
def test_backward(images, level, rows, dtype, compare):
    """Gradients of queries, keys and values, through a forward pass that was made beforehand."""
    names = ("query", "key", "value", "image_key", "image_value")[: 5 if images else 3]

    def make(seed: int) -> dict[str, Any]:
        sizes = (rows, level.pixels, level.tokens, level.heads, level.head_dim)
        inputs = attention_inputs(*sizes, images=(4,) * images, seed=seed, dtype=dtype, device=DEVICE)
        if images:
            inputs["image_weights"] = masks(rows, images, level.pixels, seed).to(DEVICE, dtype)
        return inputs

    def recorded(attend: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], Any]:
        def prepare(inputs: dict[str, Any]) -> Any:
            with torch.enable_grad():
                leaves = {name: inputs[name].detach().requires_grad_() for name in names}
                out = attend({**inputs, **leaves})
            return out, tuple(leaves.values()), torch.ones_like(out)

        return prepare

    def gradients(made: Any) -> tuple[Tensor, ...]:
        out, leaves, upstream = made
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    def through(backend: str) -> Callable[[dict[str, Any]], Any]:
        return recorded(lambda inputs: localized_attention(**inputs, backend=backend))

    def judge(inputs: dict[str, Any]) -> Callable[[tuple[Tensor, ...]], None]:
        exact = gradients(through("eager")(cast(inputs, torch.float64)))
        eager = gradients(through("eager")(inputs))

        def accept(actual: tuple[Tensor, ...]) -> None:
            for name, found, near, true in zip(names, actual, eager, exact, strict=True):
                assert_as_accurate_as_eager(found, near, true, name)

        return accept

    own = [c.name for c in library("localized_attention", localized_attention) if c.kind == "library"]
    contestants = [Contestant(name, "library", gradients, through(name)) for name in own]
    peers = [Contestant("SDPA", "peer", gradients, recorded(lambda inputs: diffusers_sequence(heads_first(inputs))))]
    width = dtype.itemsize * rows * level.width
    compare(
        Case(
            f"localized_attention/backward-{images}-images/{level.name}/B{rows}/{dtype_name(dtype)}",
            make_sets(make),
            [*contestants, replace(contestants[0], name=f"{own[0]}, again", kind="again"), *peers],
            judge,
            moved_bytes=width * (3 * level.pixels + 4 * (level.tokens + 4 * images)),
            flops=10 * rows * level.pixels * (level.tokens + 4 * images) * level.width,
            graph=False,
        )
    )
