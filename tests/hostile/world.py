"""What the cases are tried on: a tiny pipeline with everything that requests can ask for, made once a process."""

from __future__ import annotations

import functools
from typing import Any

import torch

import keylock_diffusers as kd
from keylock_diffusers.denoisers.projections import projections, weight_shapes
from keylock_diffusers.loras import Adapter, LowRank
from keylock_diffusers.testing import random_ip_adapter
from tests.diffusers.compatibility import WIDTH, image_encoder
from tests.diffusers.conftest import build_tiny, make_concept
from tests.diffusers.test_oracles import controlnet

OTHERS = "zoe/secret-dog"  # the id of somebody else, which no message may tell


@functools.cache
def pipeline() -> Any:
    """After `install`, with an IP-Adapter and its image encoder."""
    pipe = build_tiny()
    for name, module in image_encoder().items():
        pipe.register_modules(**{name: module})
    encoder = pipe.image_encoder.eval()
    pipe.load_ip_adapter([random_ip_adapter(pipe.unet, width=WIDTH)], subfolder="", weight_name=[""])
    pipe.image_encoder = encoder
    return kd.install(pipe)


@functools.cache
def concepts() -> dict[str, kd.Concept]:
    """By id."""
    pipe = pipeline()
    return {
        "alice/cat": make_concept(pipe),
        "bob/dog": make_concept(pipe, "<bob-dog>", "dog", seed=2),
        OTHERS: make_concept(pipe, "<zoe-dog>", "dog", seed=3),
    }


@functools.cache
def adapter() -> Adapter:
    """Of every linear layer and convolution."""
    random = torch.Generator().manual_seed(4)
    halves = [
        {
            name: LowRank(
                torch.randn(2, *shape[1:], generator=random) * 0.05, torch.randn(shape[0], 2, generator=random)
            )
            for name, shape in weight_shapes(projections(module)).items()
        }
        for module in (pipeline().unet, pipeline().text_encoder)
    ]
    return Adapter(halves[0], (halves[1],))


@functools.cache
def options() -> dict[str, Any]:
    """Of `generate`."""
    torch.manual_seed(0)
    fusion = kd.SubjectFusion(WIDTH).eval()
    shared = {
        "bank": concepts(),
        "loras": {"alice/style": adapter(), OTHERS: adapter()},
        "controlnets": {"depth": controlnet()},
        "fusion": fusion,
    }
    return {**shared, "num_inference_steps": 2, "output_type": "np"}
