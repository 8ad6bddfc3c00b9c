"""The demo's second batch: a concept, an image prompt in a region, both, two subjects in two regions, and nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keylock_diffusers.concepts import Concept
from keylock_diffusers.demo import grid, pictures
from keylock_diffusers.demo.pictures import STRENGTH
from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.prompts import PERSONAL_GUIDANCE
from keylock_diffusers.generation.engine import Engine, Settings
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.generation.maps import AttentionMaps
from keylock_diffusers.generation.visualize import overlay
from keylock_diffusers.requests import ImagePrompt, Request, Use


@dataclass(frozen=True)
class Row:
    """One row of the batch, and the words whose attention is shown."""

    label: str
    request: Request
    words: tuple[str, ...]


def half(left: bool) -> Tensor:  # [128, 128]
    """One half of the picture as a mask."""
    mask = torch.zeros(render.SIZE, render.SIZE)
    mask[:, : render.SIZE // 2] = 1
    return mask if left else 1 - mask


def rows(seed: int = 0) -> list[Row]:
    """The batch."""
    left, right = half(True), half(False)
    picture = pictures.image_prompt()
    common: dict[str, Any] = {"seed": seed, "guidance_scale": PERSONAL_GUIDANCE}
    return [
        Row(
            "a concept",
            Request("<alice-cat> with tears of joy on pink", concepts=[Use("alice/cat", strength=STRENGTH)], **common),
            ("<alice-cat>", "tears"),
        ),
        Row(
            "an image prompt in the right half",
            Request(
                "a house next to a cat on white",
                image_prompts=[ImagePrompt(picture, scale=1.5, region=right)],
                **common,
            ),
            ("house", "cat"),
        ),
        Row(
            "both: a concept on the left, an image prompt on the right",
            Request(
                "<bob-cat> next to a cat on yellow",
                concepts=[Use("bob/cat", strength=STRENGTH, region=left)],
                image_prompts=[ImagePrompt(picture, region=right)],
                **common,
            ),
            ("<bob-cat>", "cat"),
        ),
        Row(
            "two subjects, each in its own half",
            Request(
                "<alice-cat> next to <carol-cat> on blue",
                concepts=[
                    Use("alice/cat", strength=STRENGTH, region=right),
                    Use("carol/cat", strength=STRENGTH, region=left),
                ],
                **common,
            ),
            ("<alice-cat>", "<carol-cat>"),
        ),
        Row("nothing", Request("a rocket on purple", **common), ("rocket",)),
    ]


def run(pipe: Any, bank: Mapping[str, Concept], output: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """Draws the batch and its attention; writes ``regions.png``.

    Args:
        pipe: the embedded pipeline with its adapter, after `install`.
        bank: the demo's concepts.
        output: the folder.
        steps: denoising steps.
        seed: of every picture.

    Returns:
        How many pictures there are, the lines that are left out, and the largest difference, in units of 1/255, of the
        last picture from itself beside other neighbours.
    """
    engine, asked = Engine(pipe, Settings(bank)), rows(seed)
    batch = [row for row in asked if _can_be_drawn(engine, row.request)]
    requests = [row.request for row in batch]
    words = list(dict.fromkeys(word for row in batch for word in row.words))
    options: dict[str, Any] = {"bank": bank, "num_inference_steps": steps, "output_type": "np"}
    maps = AttentionMaps(words)
    images = generate(pipe, requests, record=maps, **options)
    beside = generate(pipe, [requests[-1]] * len(requests), **options)
    lines = [
        grid.Line(
            row.label,
            str(row.request.prompt),
            [
                ("image prompt", pictures.image_prompt() if row.request.image_prompts else None),
                ("", grid.as_picture(image)),
                *((word, overlay(image, recorded.mean(word))) for word in row.words),
            ],
        )
        for row, image, recorded in zip(batch, images, maps.images, strict=True)
    ]
    grid.draw_lines(lines).save(output / "regions.png")
    return {
        "pictures_in_batch": len(batch),
        "left_out": [row.label for row in asked if row not in batch],
        "largest_difference_beside_others": float(np.abs(images[-1] - beside[-1]).max() * 255),
    }


def _can_be_drawn(engine: Engine, request: Request) -> bool:
    """Concepts that were hardly trained are still one and the same, which cannot be in a picture twice."""
    try:
        engine.plan(request)
    except ValueError:
        return False
    return True
