"""What the embedded model can draw: the contact sheet, and how often the classifier finds what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from . import classifier
from .coats import WORDS
from .glyphs import BACKGROUNDS, DYES, INDEX
from .prompts import CONTACT_SHEET, GUIDANCE, SEEDS, STEPS, coats, pairs
from .render import SIZE

_COLUMNS = 8
_BATCH = 32
_OF_COATS = {*DYES, *WORDS.values()}


def draw(
    pipe: Any, prompts: Sequence[str], seed: int = 0, *, desc: str = "", progress: bool = True
) -> list[np.ndarray]:
    """A picture [128, 128, 3] uint8 of each prompt, from a seed of its own."""
    made: list[np.ndarray] = []
    for first in tqdm(range(0, len(prompts), _BATCH), desc=desc, disable=not progress):
        group = list(prompts[first : first + _BATCH])
        images = pipe(
            group,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(1000 * seed + first + n) for n in range(len(group))],
            output_type="np",
        ).images
        made += list((images * 255).round().astype(np.uint8))
    return made


def phrases(prompt: str) -> tuple[tuple[str, ...], str]:
    """What a prompt calls its subjects, without articles, and the background it asks for."""
    scene, background = prompt.rsplit(" on ", 1)
    parts = scene.replace(" next to ", " and ").split(" and ")
    return tuple(part.removeprefix("a ").removeprefix("an ") for part in parts), background


def subjects(prompt: str) -> tuple[tuple[str, ...], str]:
    """The glyphs' captions and the background that a prompt asks for; a coat's words are not part of a glyph's."""
    named, background = phrases(prompt)
    bare = (" ".join(word for word in name.split() if word not in _OF_COATS) for name in named)
    return tuple(name if name in INDEX else noun for name, noun in zip(named, bare, strict=True)), background


def background_name(image: np.ndarray) -> str:
    """The background whose colour the picture's border has."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.float32)
    colour = np.median(border, axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.square(np.subtract(BACKGROUNDS[name], colour)).sum()))


def measure(pipe: Any, *, progress: bool = True) -> tuple[dict[str, Any], list[np.ndarray]]:
    """How often the classifier names what was asked (all subjects of a pair), and the background is right.

    Returns:
        The figures of the contact sheet, of pairs of subjects and of coats; the pictures of the contact sheet.
    """
    sheets = [draw(pipe, CONTACT_SHEET, seed, desc=f"contact sheet {seed}", progress=progress) for seed in SEEDS]
    asked = [
        (prompt, seed, image)
        for seed, sheet in enumerate(sheets)
        for prompt, image in zip(CONTACT_SHEET, sheet, strict=True)
    ]
    found = {"contact sheet": _judged(asked)}
    for name, prompts in (("pairs", pairs()), ("coats", coats())):
        images = draw(pipe, prompts, desc=name, progress=progress)
        found[name] = _judged([(prompt, 0, image) for prompt, image in zip(prompts, images, strict=True)])
    return found, sheets[0]


def _judged(drawn: Sequence[tuple[str, int, np.ndarray]]) -> dict[str, Any]:  # prompt, seed and picture
    judge = classifier.load()
    named, backgrounds, wrong = 0, 0, []
    for prompt, seed, image in drawn:
        asked, background = subjects(prompt)
        found = judge.names([image], len(asked))[0]
        named += set(found) == set(asked)
        backgrounds += background_name(image) == background
        if set(found) != set(asked):
            wrong.append({"prompt": prompt, "seed": seed, "named": list(found)})
    total = len(drawn)
    return {
        "pictures": total,
        "named": round(named / total, 4),
        "background": round(backgrounds / total, 4),
        "wrong": wrong,
    }


def contact_sheet(images: list[np.ndarray]) -> Image.Image:
    """One seed's pictures with their prompts, eight to a row."""
    side, label = SIZE, 14
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (side + 4), rows * (side + label + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (prompt, image) in enumerate(zip(CONTACT_SHEET, images, strict=True)):
        left, top = number % _COLUMNS * (side + 4), number // _COLUMNS * (side + label + 4)
        sheet.paste(Image.fromarray(image), (left, top + label))
        words = prompt.removeprefix("a ").removeprefix("an ")
        pen.text((left + 2, top + 1), words if len(words) < 23 else words[:21] + "..", fill="black", font_size=10)
    return sheet
