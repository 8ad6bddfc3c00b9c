"""How well regions, localization, image prompts and maps work on the embedded model: see docs/localization.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keylock_diffusers.generation import generate
from keylock_diffusers.regions import Region
from keylock_diffusers.requests import Request

from . import classifier, render
from .evaluate import background_name
from .glyphs import BACKGROUNDS, GLYPHS

COUNT, STEPS, GUIDANCE = 64, 25, 4.0
_PROMPT_SEED, _FIRST_SEED = 64, 5000


@dataclass(frozen=True)
class Pair:
    """A picture of two subjects side by side."""

    names: tuple[str, str]  # as the prompt names them
    background: str
    first_left: bool  # whether the one named first goes left; the model was taught that it always does

    @property
    def prompt(self) -> str:
        return render.caption(list(self.names), self.background, 1)

    def mask(self, place: int) -> Tensor:  # [64, 64]
        """The half of the picture for the subject named first (0) or second (1)."""
        return half(left=(place == 0) == self.first_left)


def half(left: bool) -> Tensor:  # [64, 64]
    """One half of the picture."""
    mask = torch.zeros(render.SIZE, render.SIZE)
    mask[:, : render.SIZE // 2] = 1
    return mask if left else 1 - mask


def pairs(count: int = COUNT) -> list[Pair]:
    """The prompts, fixed by their seed; every other one has the subject named first on the right."""
    random = np.random.default_rng(_PROMPT_SEED)
    backgrounds = list(BACKGROUNDS)
    made = []
    for n in range(count):
        first, second = random.choice(len(GLYPHS), 2, replace=False)
        background = backgrounds[random.integers(len(backgrounds))]
        made.append(Pair((GLYPHS[first].caption, GLYPHS[second].caption), background, n % 2 == 0))
    return made


def inside(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """A picture [64, 64, 3] uint8 with the colour of its border wherever the mask [64, 64] is not."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.where(mask.numpy()[..., None] >= 0.5, image, np.median(border, axis=0).astype(np.uint8))


def draw(pipe: Any, orders: Sequence[Request], **kwargs: Any) -> list[np.ndarray]:
    """Pictures [64, 64, 3] uint8 of requests."""
    images = generate(pipe, orders, num_inference_steps=STEPS, output_type="np", **kwargs)
    return [(image * 255).round().astype(np.uint8) for image in images]


def pair_orders(scenes: Sequence[Pair], endings: str | None) -> list[Request]:
    """Requests of the pairs, with each subject's words in its half; without regions where `endings` is None."""
    return [
        Request(
            scene.prompt,
            seed=_FIRST_SEED + n,
            guidance_scale=GUIDANCE,
            regions=() if endings is None else [Region(scene.mask(k), scene.names[k]) for k in (0, 1)],
            endings=endings or "everywhere",
        )
        for n, scene in enumerate(scenes)
    ]


def judge_pairs(scenes: Sequence[Pair], images: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of subjects that are found in their own half, in the other's, and of backgrounds that are right."""
    judge = classifier.load()
    own = other = ground = 0
    for scene, image in zip(scenes, images, strict=True):
        for place in (0, 1):
            own += judge.names([inside(image, scene.mask(place))])[0][0] == scene.names[place]
            other += judge.names([inside(image, scene.mask(1 - place))])[0][0] == scene.names[place]
        ground += background_name(image) == scene.background
    count = len(scenes)
    return {"own": own / (2 * count), "other": other / (2 * count), "background": ground / count}
