"""A whole cross-attention layer with two masked image prompts, against the one of diffusers.

Ours reads keys and values of text and images as they are prepared once per generation, and weights resized once;
diffusers projects and resizes in every step, as its pipelines call it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, QUICK, Case, Contestant, dtype_name, dtypes, library
from keylock_kernels import localized_attention
from keylock_kernels.testing import SHAPES, assert_as_accurate_as_eager

IMAGES, TOKENS, SCALE = 2, 4, 0.6
LEVELS = [s for s in SHAPES if s.model in ("sd1.5", "sdxl") and s.pixels >= 1024]
LEVELS = [s for s in SHAPES if s.model == "sd1.5" and s.pixels == 64] if QUICK else LEVELS


@pytest.mark.parametrize("dtype", dtypes(), ids=dtype_name)
@pytest.mark.parametrize("rows", (2,) if QUICK else (2, 8), ids="B{}".format)
@pytest.mark.parametrize("level", LEVELS, ids=lambda s: s.name)
def test_two_masked_images(level, rows, dtype, compare):
    processor = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    layer = processor.Attention(
        level.width, cross_attention_dim=level.text_width, heads=level.heads, dim_head=level.head_dim
    )
    layer.set_processor(
        processor.IPAdapterAttnProcessor2_0(level.width, level.text_width, num_tokens=(TOKENS,), scale=SCALE)
    )
    layer.requires_grad_(False).to(DEVICE, dtype)
    exact_layer = copy.deepcopy(layer).double()
    side = math.isqrt(level.pixels)

    def make(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        masks = torch.zeros(1, IMAGES, 8 * side, 8 * side)
        masks[:, 0, :, : 4 * side] = masks[:, 1, :, 4 * side :] = 1
        return {
            "pixels": normal(rows, level.pixels, level.width),
            "text": normal(rows, level.tokens, level.text_width),
            "images": normal(rows, IMAGES, TOKENS, level.text_width),
            "masks": masks,
        }

    def stock(layer: nn.Module, inputs: dict[str, Any]) -> Tensor:  # [B, N, C]
        states = (inputs["text"], [inputs["images"]])
        return layer(inputs["pixels"], encoder_hidden_states=states, ip_adapter_masks=[inputs["masks"]])

    def prepare(inputs: dict[str, Any]) -> dict[str, Any]:
        adapter = layer.processor

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (level.heads, level.head_dim))

        images = inputs["images"].flatten(1, 2)
        weights = [
            processor.IPAdapterMaskProcessor.downsample(inputs["masks"][:, i], rows, level.pixels, 1)[..., 0]
            for i in range(IMAGES)
        ]
        return {
            "pixels": inputs["pixels"],
            "key": heads(layer.to_k(inputs["text"])),
            "value": heads(layer.to_v(inputs["text"])),
            "image_key": heads(adapter.to_k_ip[0](images)),
            "image_value": heads(adapter.to_v_ip[0](images)),
            "image_lengths": (TOKENS,) * IMAGES,
            "image_weights": (SCALE * torch.stack(weights, 1)).to(DEVICE, dtype),
        }

    def through(backend: str) -> Callable[[dict[str, Any]], Tensor]:
        def run(prepared: dict[str, Any]) -> Tensor:  # [B, N, C]
            streams = {name: value for name, value in prepared.items() if name != "pixels"}
            query = layer.to_q(prepared["pixels"]).unflatten(-1, (level.heads, level.head_dim))
            return layer.to_out[0](localized_attention(query, **streams, backend=backend).flatten(2))

        return run

    def projections(inputs: dict[str, Any]) -> Tensor:
        return layer.to_out[0](layer.to_q(inputs["pixels"]))

    def judge(inputs: dict[str, Any]) -> Callable[[Tensor], None]:
        wide = {name: value.double() for name, value in inputs.items()}
        exact, near = stock(exact_layer, wide), stock(layer, inputs)
        return lambda actual: assert_as_accurate_as_eager(actual, near, exact)

    own = library("localized_attention", localized_attention)
    contestants = [Contestant(c.name, c.kind, through(c.name.removesuffix(", again")), prepare) for c in own]
    compare(
        Case(
            f"layer/{IMAGES}-masked-images/{level.name}/B{rows}/{dtype_name(dtype)}",
            [make(seed) for seed in range(2)],
            [
                *contestants,
                Contestant("diffusers' processor", "peer", lambda inputs: stock(layer, inputs)),
                Contestant("to_q and to_out alone", "floor", projections),
            ],
            judge,
            flops=4 * rows * level.pixels * level.width * (level.width + level.tokens + IMAGES * TOKENS),
        )
    )
