"""Four users' concepts on the embedded model in one batch, against one by one and against no personalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import keylock_diffusers as kd
from benchmarks.harness import DEVICE, QUICK, Case, Contestant
from keylock_diffusers import embedded

if TYPE_CHECKING:
    from keylock_diffusers.concepts import BaseModel

USERS = ("alice", "bob", "carol", "dave")
SCENES = ("{} on blue", "{} on green", "a pouting {} on yellow", "{} next to a house on green")
STEPS = 2 if QUICK else 4
GUIDANCE = 4.0
ROUNDING = 2 / 255  # of a channel, between batches of different sizes in float32


def concept(base: BaseModel, user: str, seed: int) -> kd.Concept:
    """Random and untrained: what a picture costs does not depend on what it shows."""
    random = torch.Generator().manual_seed(seed)
    width = base.cross_attention_dim
    target = torch.randn(width, generator=random)
    energy = float(target @ target)
    return kd.Concept(
        f"<{user}-cat>",
        "cat",
        target_input=target,
        energy=energy,
        direction=target / energy,
        super_class_encoding=torch.randn(width, generator=random),
        word_embeddings=tuple(0.1 * torch.randn(e.hidden_size, generator=random) for e in base.text_encoders),
        values=0.1 * torch.randn(base.values_width, generator=random),
        base=base,
    )


def requests(concepts: list[kd.Concept], seed: int) -> list[kd.Request]:
    return [
        kd.Request(scene.format(c.placeholder), concepts=[c], seed=seed + n, guidance_scale=GUIDANCE)
        for n, (scene, c) in enumerate(zip(SCENES, concepts, strict=True))
    ]


def judge(one_by_one: Callable[[list[kd.Request]], list[Any]]) -> Any:
    def oracle(orders: list[kd.Request]) -> Callable[[list[Any]], None]:
        expected = np.stack(one_by_one(orders))

        def accept(images: list[Any]) -> None:
            difference = float(np.abs(np.stack(images) - expected).max())
            if not difference <= ROUNDING:  # also true for NaN
                raise AssertionError(f"a channel differs by {255 * difference:.1f}/255 from the picture drawn alone")

        return accept

    return oracle


def test_mixed_batch(compare):
    from keylock_diffusers.concepts import BaseModel

    if not (embedded.BASE_MODEL / "model_index.json").exists():
        pytest.skip("this checkout has no embedded base model")
    stock, pipe = embedded.load(dtype=torch.float32).to(DEVICE), embedded.load(dtype=torch.float32)
    kd.install(pipe.to(DEVICE))
    base = BaseModel.of(pipe)
    concepts = [concept(base, user, seed) for seed, user in enumerate(USERS)]

    def one_batch(orders: list[kd.Request]) -> list[Any]:
        return kd.generate(pipe, orders, num_inference_steps=STEPS, output_type="np")

    def one_by_one(orders: list[kd.Request]) -> list[Any]:
        return [one_batch([order])[0] for order in orders]

    def unpersonalised(orders: list[kd.Request]) -> Any:
        return stock(
            [scene.format("cat") for scene in SCENES],
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(order.seed or 0) for order in orders],
            num_inference_steps=STEPS,
            output_type="np",
        ).images

    compare(
        Case(
            f"generation/{len(USERS)}-users/embedded-{STEPS}-steps/float32",
            [requests(concepts, seed) for seed in (0, 100)],
            [
                Contestant("one batch", "library", one_batch),
                Contestant("one batch, again", "again", one_batch),
                Contestant("one request at a time", "peer", one_by_one),
                Contestant("same batch unpersonalised, plain diffusers", "floor", unpersonalised),
            ],
            judge(one_by_one),
            graph=False,
        )
    )
