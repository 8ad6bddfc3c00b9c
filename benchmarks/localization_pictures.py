"""How well regions, localization, image prompts and maps work on the embedded model: see docs/localization.md.

Needs the emoji font, for renders that the model has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keylock_diffusers.concepts import Concept
from keylock_diffusers.demo import story
from keylock_diffusers.demo.pictures import STRENGTH, USERS, User, wearer
from keylock_diffusers.demo.regions import half
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.embedded import autoencoder, classifier, load, load_adapter, render
from keylock_diffusers.embedded.captions import default_captions
from keylock_diffusers.embedded.evaluate import background_name, phrases
from keylock_diffusers.embedded.glyphs import BACKGROUNDS, GLYPHS, INDEX
from keylock_diffusers.embedded.prompts import GUIDANCE, PERSONAL_GUIDANCE
from keylock_diffusers.encoding.text import encode, tokenize
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.generation.maps import AttentionMaps
from keylock_diffusers.processors import install
from keylock_diffusers.requests import ENDINGS, ImagePrompt, Region, Request, Use
from keylock_diffusers.training import Subject, covariance, train_concepts

COUNT, STEPS = 64, 25
_PROMPT_SEED, _FIRST_SEED, _RENDER_SEED = 64, 5000, 7000
_TIMES = (200, 400, 600)  # noise levels at which renders' maps are read
_THRESHOLDS = 100


@dataclass(frozen=True)
class Pair:
    """A picture of two subjects side by side."""

    names: tuple[str, str]  # as the prompt names them
    background: str
    first_left: bool  # whether the one named first goes left; the model was taught that it always does

    @property
    def prompt(self) -> str:
        return render.caption(list(self.names), self.background, 1)

    def mask(self, place: int) -> Tensor:  # [128, 128]
        """The half of the picture for the subject named first (0) or second (1)."""
        return half(left=(place == 0) == self.first_left)


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
    """A picture [128, 128, 3] uint8 with the colour of its border wherever the mask [128, 128] is not."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.where(mask.numpy()[..., None] >= 0.5, image, np.median(border, axis=0).astype(np.uint8))


def draw(pipe: Any, orders: Sequence[Request], **kwargs: Any) -> list[np.ndarray]:
    """Pictures [128, 128, 3] uint8 of requests."""
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


def measure_regions(pipe: Any) -> dict[str, Any]:
    """Pairs without regions, and with them in each treatment of the prompt's end."""
    scenes = pairs()
    return {
        name: judge_pairs(scenes, draw(pipe, pair_orders(scenes, None if name == "none" else name)))
        for name in ("none", *ENDINGS)
    }


def pipeline(adapter: bool = False) -> Any:
    """The embedded model, with its image prompt adapter or without."""
    return install(load_adapter(load()) if adapter else load())


def measure_two_concepts(pipe: Any) -> dict[str, Any]:
    """Two users' cats in one picture, in every order and both ways round: whose is where, and is it a cat?"""
    learned = train_concepts(pipe, story.subjects(), story.TRAINING)
    concepts = {user.name: _checked(concept) for user, concept in zip(USERS, learned, strict=True)}
    judge = classifier.load()
    cells = [
        (first, second, flip, seed)
        for first in USERS
        for second in USERS
        if first is not second
        for flip in (False, True)
        for seed in range(3)
    ]
    counted = {}
    for name in ("none", "own"):
        orders = []
        for n, (first, second, flip, _) in enumerate(cells):
            halves = [None if name == "none" else half(left=(user is first) != flip) for user in (first, second)]
            uses = [
                Use(concepts[user.name], strength=STRENGTH, region=where)
                for user, where in zip((first, second), halves, strict=True)
            ]
            words = render.caption([first.placeholder, second.placeholder], "white", 3)
            orders.append(Request(words, concepts=uses, seed=_FIRST_SEED + n, guidance_scale=PERSONAL_GUIDANCE))
        coat = other = cat = 0
        for (first, second, flip, _), image in zip(cells, draw(pipe, orders), strict=True):
            for user in (first, second):
                own = half(left=(user is first) != flip)
                coat += wearer(image / 255, own.numpy() > 0.5) == user.name
                other += wearer(image / 255, own.numpy() <= 0.5) == user.name
                cat += _is_cat(judge.names([inside(image, own)])[0][0])
        total = 2 * len(cells)
        counted[name] = {"coat": coat / total, "coat elsewhere": other / total, "cat": cat / total, "subjects": total}
    return counted


def measure_localization(pipe: Any) -> dict[str, Any]:
    """Concepts learned from pictures of two subjects, with and without the loss: what is inside and outside."""
    metric = covariance(pipe, default_captions(500))
    measured = {}
    for weight in (0.0, 1e-3, 1.0):
        taught = [_two_subject_pictures(user, number) for number, user in enumerate(USERS)]
        config = replace(story.PERFUSION_TRAINING, localize=weight)
        learned = train_concepts(pipe, taught, config, metric=metric)
        concepts = {user.name: _checked(concept) for user, concept in zip(USERS, learned, strict=True)}
        measured[f"{weight:g}"] = _beside_others(pipe, concepts)
    return measured


def _beside_others(pipe: Any, concepts: dict[str, Concept]) -> dict[str, float]:
    """Each concept beside subjects that were not in its pictures: inside its half and outside, and its word's map."""
    judge = classifier.load()
    others = ("tree", "taxi", "pizza", "robot", "sunflower", "castle", "guitar", "apple")
    others = tuple(name for name in others if name in INDEX)
    cells = [(user, name) for user in USERS for name in others]
    orders = [
        Request(
            render.caption([user.placeholder, name], "blue", 3),
            concepts=[concepts[user.name]],
            seed=_FIRST_SEED + n,
            guidance_scale=PERSONAL_GUIDANCE,
        )
        for n, (user, name) in enumerate(cells)
    ]
    left, right = half(True), half(False)
    found = {"cat inside": 0, "coat inside": 0, "cat outside": 0, "other outside": 0}
    maps = AttentionMaps([user.placeholder for user in USERS])
    images = draw(pipe, orders, record=maps)
    within = []
    for (user, name), image, recorded in zip(cells, images, maps.images, strict=True):
        found["cat inside"] += _is_cat(judge.names([inside(image, left)])[0][0])
        found["coat inside"] += wearer(image / 255, left.numpy() > 0.5) == user.name
        beyond = judge.names([inside(image, right)])[0][0]
        found["cat outside"] += _is_cat(beyond)
        found["other outside"] += beyond == name
        attention = recorded.mean(user.placeholder, tuple(left.shape))
        within.append(float((attention * left).sum() / attention.sum()))
    shares = {name: count / len(cells) for name, count in found.items()}
    return {**shares, "attention inside": float(np.mean(within)), "pictures": len(cells)}


def _two_subject_pictures(user: User, number: int) -> Subject:
    """Four pictures of a user's cat beside something else, on either side, with the cat's masks."""
    beside = ("house", "dog", "rocket", "burger")
    images, masks, captions = [], [], []
    for n, (name, background) in enumerate(zip(beside, ("white", "green", "pink", "yellow"), strict=True)):
        cat = render.named("cat", user.coat)
        other = render.named(name)
        placed = [(cat, 4, 36, 58), (other, 66, 36, 57)] if n % 2 == 0 else [(other, 4, 36, 57), (cat, 66, 36, 58)]
        image, alphas = render.compose(placed, background)
        names = [user.placeholder, name] if n % 2 == 0 else [name, user.placeholder]
        images.append(Image.fromarray(image))
        masks.append(Image.fromarray((alphas[n % 2] * 255).astype(np.uint8)))
        captions.append(render.caption(names, background, 3))
    return Subject(user.placeholder, "cat", images, captions, masks, seed=number)


def measure_adapter(pipe: Any) -> dict[str, Any]:
    """Held-out renders as image prompts: alone, with a background in words, and with scale 0."""
    judge = classifier.load()
    renders = [render.draw(_RENDER_SEED, n, pairs=0) for n in range(COUNT)]
    pictures = [Image.fromarray(picture.image) for picture in renders]
    backgrounds = list(BACKGROUNDS)
    wanted = [
        backgrounds[(backgrounds.index(picture.background) + 1 + n % (len(backgrounds) - 1)) % len(backgrounds)]
        for n, picture in enumerate(renders)
    ]

    def orders(prompts: Sequence[str], scale: float | None) -> list[Request]:
        return [
            Request(
                prompt,
                image_prompts=[] if scale is None else [ImagePrompt(picture, scale=scale)],
                seed=_FIRST_SEED + n,
                guidance_scale=GUIDANCE,
            )
            for n, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
        ]

    def named(images: Sequence[np.ndarray]) -> float:
        names = judge.names(list(images))
        return float(np.mean([n[0] == GLYPHS[p.labels[0]].caption for n, p in zip(names, renders, strict=True)]))

    alone = draw(pipe, orders([""] * COUNT, 1.0))
    worded = [f"on {background}" for background in wanted]
    with_words = draw(pipe, orders(worded, 1.0))
    absent, none = (draw(pipe, orders(worded, scale)[:8]) for scale in (0.0, None))
    ruled = [background_name(image) == background for image, background in zip(with_words, wanted, strict=True)]
    return {
        "class from the image alone": named(alone),
        "class with words of the background": named(with_words),
        "background of the words": float(np.mean(ruled)),
        "scale 0 equals none bit for bit": all(np.array_equal(a, b) for a, b in zip(absent, none, strict=True)),
    }


@torch.no_grad()
def measure_maps(pipe: Any) -> dict[str, float]:
    """Maps of the words for renders' subjects against their exact masks, read while the model denoises the renders."""
    scores: dict[str, list[float]] = {"one subject": [], "two subjects": []}
    chance: dict[str, list[float]] = {"one subject": [], "two subjects": []}
    for kind, share in (("one subject", 0.0), ("two subjects", 1.0)):
        for start in range(0, COUNT, 16):
            scenes = [render.draw(_RENDER_SEED, n, pairs=share) for n in range(start, start + 16)]
            names = [phrases(scene.caption)[0] for scene in scenes]
            words = tuple(dict.fromkeys(name for row in names for name in row))
            maps = AttentionMaps(words, tuple(cross_attention_layers(pipe.unet)), every_step=False)
            prompts = [tokenize(pipe.tokenizer, scene.caption) for scene in scenes]
            pixels = autoencoder.pixels([scene.image for scene in scenes])
            latents = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
            readout = maps.readout(pipe.unet, [[p] for p in prompts], pipe.tokenizer, tuple(latents.shape[-2:]))
            text = encode(pipe.text_encoder, prompts)
            for time in _TIMES:
                noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(_FIRST_SEED + start + time))
                times = torch.full((len(scenes),), time)
                noisy = pipe.scheduler.add_noise(latents, noise, times)
                pipe.unet(noisy, times, text, cross_attention_kwargs={"readout": readout})
            for row, scene in enumerate(scenes):
                recorded = readout.picture(row, scene.caption)
                for name, mask in zip(names[row], scene.masks, strict=True):
                    score, base = best_overlap(recorded.mean(name, mask.shape), torch.from_numpy(mask) > 0.5)
                    scores[kind].append(score)
                    chance[kind].append(base)
    return {
        **{kind: float(np.mean(values)) for kind, values in scores.items()},
        **{f"{kind}, by chance": float(np.mean(values)) for kind, values in chance.items()},
    }


def best_overlap(attention: Tensor, mask: Tensor) -> tuple[float, float]:
    """Intersection over union of a map [h, w] with a mask at the best threshold, and what no map at all would get."""
    levels = torch.linspace(float(attention.min()), float(attention.max()), _THRESHOLDS)[:, None, None]
    found = attention >= levels
    overlap = (found & mask).sum((1, 2)) / (found | mask).sum((1, 2))
    return float(overlap.max()), float(mask.float().mean())


def _is_cat(name: str) -> bool:
    return GLYPHS[INDEX[name]].group == "cat"


def _checked(concept: Any) -> Concept:
    if not isinstance(concept, Concept):
        raise concept
    return concept
