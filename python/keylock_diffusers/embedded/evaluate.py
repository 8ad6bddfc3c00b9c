"""What the embedded model can draw: the contact sheet, and how often the classifier finds what was asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from . import classifier
from .glyphs import BACKGROUNDS, INDEX
from .prompts import CONTACT_SHEET, GUIDANCE, SEEDS, STEPS

_SCALE = 2
_COLUMNS = 8


def draw_sheet(pipe: Any, *, progress: bool = True) -> dict[int, list[np.ndarray]]:
    """Per seed, the pictures [64, 64, 3] uint8 of the contact sheet's prompts."""
    sheets = {}
    for seed in tqdm(SEEDS, desc="drawing the contact sheet", disable=not progress):
        generators = [torch.Generator().manual_seed(1000 * seed + n) for n in range(len(CONTACT_SHEET))]
        images = pipe(
            list(CONTACT_SHEET),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="np",
        ).images
        sheets[seed] = list((images * 255).round().astype(np.uint8))
    return sheets


def subjects(prompt: str) -> tuple[tuple[str, ...], str]:
    """The glyphs' captions and the background that a prompt asks for; a coat's colour is not part of a glyph's."""
    scene, background = prompt.rsplit(" on ", 1)
    names = []
    for part in scene.replace(" next to ", " and ").split(" and "):
        words = part.removeprefix("a ").removeprefix("an ")
        names.append(words if words in INDEX else words.split(" ", 1)[1])
    return tuple(names), background


def background_name(image: np.ndarray) -> str:
    """The background whose colour the picture's border has."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.float32)
    colour = np.median(border, axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(np.subtract(BACKGROUNDS[name], colour)).sum()))


def measure(sheets: dict[int, list[np.ndarray]]) -> dict[str, Any]:
    """How often the classifier names what was asked (all subjects of a pair), and the background is right."""
    judge = classifier.load()
    named, backgrounds, wrong = 0, 0, []
    for seed, images in sheets.items():
        for prompt, image in zip(CONTACT_SHEET, images, strict=True):
            asked, background = subjects(prompt)
            found = judge.names([image], len(asked))[0]
            named += set(found) == set(asked)
            backgrounds += background_name(image) == background
            if set(found) != set(asked):
                wrong.append({"prompt": prompt, "seed": seed, "named": list(found)})
    total = len(sheets) * len(CONTACT_SHEET)
    return {
        "pictures": total,
        "named": round(named / total, 4),
        "background": round(backgrounds / total, 4),
        "wrong": wrong,
    }


def contact_sheet(images: list[np.ndarray]) -> Image.Image:
    """One seed's pictures with their prompts, eight to a row."""
    side, label = 64 * _SCALE, 14
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (side + 4), rows * (side + label + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (prompt, image) in enumerate(zip(CONTACT_SHEET, images, strict=True)):
        left, top = number % _COLUMNS * (side + 4), number // _COLUMNS * (side + label + 4)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), (left, top + label))
        words = prompt.removeprefix("a ").removeprefix("an ")
        pen.text((left + 2, top + 1), words if len(words) < 23 else words[:21] + "..", fill="black", font_size=10)
    return sheet
