"""The demo's third batch: LoRA files that users bring, a style and two people's cats, which are taught here first."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from keylock_diffusers.concepts import Concept
from keylock_diffusers.demo import grid, pictures
from keylock_diffusers.demo.pictures import STRENGTH, USERS, wearer
from keylock_diffusers.demo.regions import half
from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.captions import default_captions
from keylock_diffusers.embedded.prompts import PERSONAL_GUIDANCE
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.loras import Adapter, LoraBank, write_adapter
from keylock_diffusers.requests import Lora, Request, Use
from keylock_diffusers.routing.adapters import LoraCapacity
from keylock_diffusers.training import LoraTrainingConfig, Subject, train_loras

TRAINING = LoraTrainingConfig(rank=4, targets="linear", steps=90, batch_size=4, learning_rate=5e-3)
STYLE, ON_THE_LEFT, ON_THE_RIGHT = "studio/sepia", "alice/cat", "carol/cat"
_DRAWN, _DRAWING_STEPS = 24, 12  # pictures that the style is learned from
_JUDGED, _SEEDS = (1, 2, 3), 4  # rows that are measured, with how many seeds
_GREYS = np.array([0.299, 0.587, 0.114], np.float32)
_DARK, _LIGHT = (np.array(c, np.float32) / 255 for c in ((58, 38, 24), (252, 240, 214)))


@dataclass(frozen=True)
class Row:
    """One row of the batch."""

    label: str
    request: Request


def sepia(image: np.ndarray) -> np.ndarray:
    """The style, exactly: a picture [..., 3] in 0..1 in browns."""
    grey = (image @ _GREYS)[..., None]
    return _DARK * (1 - grey) + _LIGHT * grey


def rows(seed: int = 0) -> list[Row]:
    """The batch."""
    common: dict[str, Any] = {"seed": seed, "guidance_scale": PERSONAL_GUIDANCE}
    left, right = half(True), half(False)
    two = [Lora(ON_THE_LEFT, region=left), Lora(ON_THE_RIGHT, region=right)]
    return [
        Row("no LoRA", Request("a house on yellow", **common)),
        Row("a style", Request("a cat on blue", loras=[STYLE], **common)),
        Row("the style in the left half", Request("a strawberry on teal", loras=[Lora(STYLE, region=left)], **common)),
        Row("two users' LoRAs, a half each", Request("a cat next to a cat on white", loras=two, **common)),
        Row(
            "the style beside a concept",
            Request("<bob-cat> on pink", concepts=[Use("bob/cat", strength=STRENGTH)], loras=[STYLE], **common),
        ),
        Row("the style from half of the steps on", Request("a fox on blue", loras=[Lora(STYLE, start=0.5)], **common)),
        Row("the style at strength -0.5", Request("a dog on green", loras=[Lora(STYLE, -0.5)], **common)),
    ]


def subjects(pipe: Any, steps: int = _DRAWING_STEPS) -> dict[str, Subject]:
    """What is learned from, by the ids of the LoRAs: pictures that the model drew, in the style, and two users' own.

    Args:
        pipe: the embedded pipeline after `install`.
        steps: denoising steps of the pictures that it draws.
    """
    captions = default_captions(_DRAWN, seed=5)
    orders = [Request(caption, seed=500 + n, guidance_scale=PERSONAL_GUIDANCE) for n, caption in enumerate(captions)]
    drawn = generate(pipe, orders, num_inference_steps=steps, output_type="np")
    made = {STYLE: Subject("sepia", "", [grid.as_picture(sepia(image)) for image in drawn], captions)}
    for seed, (name, user) in enumerate(((ON_THE_LEFT, USERS[0]), (ON_THE_RIGHT, USERS[2])), 1):
        given, masks = pictures.load(user)
        words = [caption.format("cat") for caption in pictures.CAPTIONS]
        made[name] = Subject("cat", "", given, words, masks, seed)
    return made


def run(
    pipe: Any,
    bank: Mapping[str, Concept],
    output: Path,
    *,
    steps: int,
    seed: int,
    training: LoraTrainingConfig = TRAINING,
    progress: bool = True,
) -> dict[str, Any]:
    """Teaches the LoRAs, draws the batch and measures it; writes the files below ``loras``, and ``loras.png``.

    Args:
        pipe: the embedded pipeline after `install`.
        bank: the demo's concepts.
        output: the folder.
        steps: denoising steps.
        seed: of every picture.
        training: how the LoRAs are trained.
        progress: whether to show a progress bar.

    Returns:
        Sizes in bytes, seconds, the largest difference of pictures beside other neighbours and distances from the exact
        style in units of 1/255, and how many halves show the cat of the user whose LoRA they had, and without LoRAs.
    """
    taught = subjects(pipe, min(steps, _DRAWING_STEPS))
    start = time.perf_counter()
    adapters = train_loras(pipe, list(taught.values()), training, progress=progress)
    seconds = time.perf_counter() - start
    files = {name: output / "loras" / f"{name}.safetensors" for name in taught}
    for path, adapter in zip(files.values(), adapters, strict=True):
        if not isinstance(adapter, Adapter):
            raise adapter
        write_adapter(path, adapter)
    loras = LoraBank(output / "loras", cache=output / "cache")
    room = LoraCapacity(
        adapters=len(taught), rank=training.rank, slots=2, regions=True, convolutions=training.targets == "all"
    )

    def draw(orders: Sequence[Request]) -> list[np.ndarray]:  # each [128, 128, 3] in 0..1
        return generate(
            pipe, orders, bank=bank, loras=loras, lora_capacity=room, max_regions=2, max_batch=len(orders),
            num_inference_steps=steps, output_type="np",
        )  # fmt: skip

    asked = rows(seed)
    requests = [row.request for row in asked]
    bare = [replace(request, loras=()) for request in requests]
    images, plain = draw(requests), draw(bare)
    beside = draw([request if n % 2 else bare[n] for n, request in enumerate(requests)])
    lines = [
        grid.Line(
            row.label,
            str(row.request.prompt),
            [
                ("learned from", _learned_from(row.request, taught)),
                ("without", grid.as_picture(without) if row.request.loras else None),
                ("with" if row.request.loras else "", grid.as_picture(image)),
            ],
        )
        for row, image, without in zip(asked, images, plain, strict=True)
    ]
    grid.draw_lines(lines).save(output / "loras.png")
    return {
        "files": {name: path.stat().st_size for name, path in files.items()},
        "training_seconds": round(seconds, 1),
        "torch_threads": torch.get_num_threads(),
        "pictures_in_batch": len(requests),
        "largest_difference_beside_others": float(
            max(np.abs(a - b).max() for a, b in zip(images[1::2], beside[1::2], strict=True)) * 255
        ),
        **_measured(draw, asked),
    }


def _learned_from(request: Request, taught: Mapping[str, Subject]) -> Image.Image | None:
    """Pictures that a request's LoRAs were taught from, from each as many."""
    names = [order.lora if isinstance(order, Lora) else order for order in request.loras]
    shown = [picture for name in names for picture in taught[name].images[: 4 // len(names)]]
    return grid.mosaic(shown) if shown else None


def _measured(draw: Any, asked: Sequence[Row]) -> dict[str, Any]:
    """How near the style's pictures are to the exact ones, and whose cats the two halves show, over some seeds."""
    left = np.broadcast_to(np.arange(render.SIZE) < render.SIZE // 2, (render.SIZE, render.SIZE))
    orders = [replace(asked[n].request, seed=100 + seed) for n in _JUDGED for seed in range(_SEEDS)]
    images, plain = draw(orders), draw([replace(order, loras=()) for order in orders])
    styled, halved, shared = (slice(n * _SEEDS, (n + 1) * _SEEDS) for n in range(len(_JUDGED)))

    def distance(given: Sequence[np.ndarray], exact: Sequence[np.ndarray], where: Any = ...) -> float:
        """On average over pixels and channels."""
        found = [np.abs(one - other)[where].mean() for one, other in zip(given, exact, strict=True)]
        return round(float(np.mean(found)) * 255, 1)

    def coats(given: Sequence[np.ndarray]) -> str:
        halves = ((left, USERS[0]), (~left, USERS[2]))
        own = [wearer(image, where) == user.name for image in given for where, user in halves]
        return f"{sum(own)} of {len(own)}"

    exact = [sepia(image) for image in plain]
    return {
        "style": {
            "without": distance(plain[styled], exact[styled]),
            "everywhere": distance(images[styled], exact[styled]),
            "inside its half": distance(images[halved], exact[halved], left),
            "outside, from the picture without": distance(images[halved], plain[halved], ~left),
        },
        "coats": coats(images[shared]),
        "coats_without": coats(plain[shared]),
    }
