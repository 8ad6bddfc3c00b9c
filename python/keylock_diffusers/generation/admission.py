"""What is wrong with a request, as far as that can be told without encoding anything: kinds, bounds and shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from keylock_diffusers.checks import floats, is_number, listed, number, shown, whole
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.loras import LearnedWord
from keylock_diffusers.requests import Control, Embedding, Request

_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def checked(request: Any, denoiser: Any, limits: RequestLimits) -> Request:
    """A request whose numbers are Python's own, and whose lists, texts and encodings are what they should be.

    Args:
        request: what the user gave.
        denoiser: the pipeline's description.
        limits: what a request may ask for.

    Raises:
        TypeError, ValueError: what is wrong, by the argument's name.
    """
    if not isinstance(request, Request):
        raise TypeError(f"must be a Request, got {type(request).__name__}")
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds")
    if request.negative_prompt is not None and request.negative_prompt_embeds is not None:
        raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
    _check_lists(request, limits)
    _check_texts(request, limits)
    numbers: dict[str, Any] = {
        "num_images": whole(request.num_images, "num_images", 1, limits.num_images),
        "guidance_scale": number(request.guidance_scale, "guidance_scale"),
        "strength": number(request.strength, "strength", 0, 1),
        "subject_start": number(request.subject_start, "subject_start", 0, 1),
        "aesthetic_score": number(request.aesthetic_score, "aesthetic_score"),
        "negative_aesthetic_score": number(request.negative_aesthetic_score, "negative_aesthetic_score"),
    }
    if request.seed is not None:
        numbers["seed"] = whole(request.seed, "seed", 0, 2**63 - 1 - numbers["num_images"])
    for name in ("original_size", "target_size", "crops_coords_top_left"):
        for pair in (name, f"negative_{name}"):
            numbers[pair] = _pair(getattr(request, pair), pair)
    request = replace(request, **numbers)
    _check_encodings(denoiser, request, limits)
    return request


def is_guided(denoiser: Any, request: Request) -> bool:
    """Whether a row of the unconditional half is drawn; without one, its prompt is checked and not read."""
    return request.guidance_scale > 1 and not denoiser.distilled


def control_numbers(control: Any, names: Any) -> tuple[float, float, float]:
    """A control's scale, start and end.

    Args:
        control: what the user gave.
        names: of the ControlNets that there are.

    Raises:
        TypeError, ValueError: what is wrong with it.
    """
    if not isinstance(control, Control):
        raise TypeError(f"controls must be Control objects, got {type(control).__name__}")
    if not isinstance(control.name, str) or control.name not in names:
        known = ", ".join(sorted(names)) or "none"
        raise ValueError(
            f"name of a Control must be a ControlNet given to generate ({known}), got {shown(control.name)}"
        )
    scale = number(control.scale, "scale of a Control")
    start, end = (number(getattr(control, name), f"{name} of a Control", 0, 1) for name in ("start", "end"))
    return scale, start, end


def _check_lists(request: Request, limits: RequestLimits) -> None:
    """Lists are lists, and no longer than the limits, what they hold together included."""
    for name in ("image_prompts", "subjects", "regions", "negative_regions", "controls"):
        listed(getattr(request, name), name, limits.pictures)
    listed(request.concepts, "concepts", limits.concepts)
    listed(request.loras, "loras", limits.loras)
    if request.concepts and request.prompt is None:
        raise ValueError("concepts need a prompt, not prompt_embeds")
    for embedding in listed(request.embeddings, "embeddings", limits.embeddings):
        _check_embedding(embedding)
    held: list[tuple[str, Any, int]] = [
        ("image", request.image, 4),
        ("mask", request.mask, 4),
    ]  # and a batch's dimensions
    for item in (*request.image_prompts, *request.subjects, *request.controls):
        image = getattr(item, "image", None)
        held += [(_of("image", item), one, 4) for one in (image if isinstance(image, (list, tuple)) else [image])]
        held += [(_of(name, item), getattr(item, name, None), 2) for name in ("embeds", "clip_embeds")]
    for item in (*request.image_prompts, *request.subjects, *request.concepts, *request.loras):
        held.append((_of("region", item), getattr(item, "region", None), 4))
    held += [
        (_of("mask", item), getattr(item, "mask", None), 4) for item in (*request.regions, *request.negative_regions)
    ]
    names = [name for name, _, _ in held]
    counts, sizes = zip(*(_extent(one, several) for _, one, several in held), strict=True)
    _check_total(f"a request must hold at most {limits.pictures} pictures and masks", names, counts, limits.pictures)
    _check_total(
        f"pictures of a request must have at most {limits.pixels} pixels together", names, sizes, limits.pixels
    )


def _check_embedding(embedding: Any) -> None:
    if not isinstance(embedding, Embedding):
        raise TypeError(f"embeddings must be Embedding objects, got {type(embedding).__name__}")
    if not isinstance(embedding.source, Path | LearnedWord):
        raise TypeError(f"source: an embedding must be a Path or a LearnedWord, got {shown(embedding.source)}")
    if embedding.name is not None and not isinstance(embedding.name, str):
        raise TypeError(f"name of an Embedding must be text, got {type(embedding.name).__name__}")


def _of(name: str, item: Any) -> str:
    return f"{name} of {type(item).__name__}"


def _check_total(rule: str, names: list[str], parts: tuple[int, ...], most: int) -> None:
    if sum(parts) > most:
        largest = max(range(len(parts)), key=parts.__getitem__)
        raise ValueError(f"{rule}, got {sum(parts)}, {parts[largest]} of them in {names[largest]}")


def _extent(held: Any, several: int) -> tuple[int, int]:
    """How many pictures something holds, as a tensor of at least `several` dimensions, and how many pixels."""
    if isinstance(held, Image.Image):
        return 1, held.width * held.height
    if isinstance(held, np.ndarray):
        return 1, held.size
    if isinstance(held, Tensor) and not held.is_nested:
        return (len(held) if held.ndim >= several else 1), held.numel()
    return int(held is not None), 0


def _check_texts(request: Request, limits: RequestLimits) -> None:
    texts = [(name, getattr(request, name)) for name in _TEXTS]
    for name in ("subjects", "regions", "negative_regions"):
        texts += [(f"prompt of {name}", getattr(item, "prompt", None)) for item in getattr(request, name)]
    for name, words in texts:
        if words is None:
            continue
        if not isinstance(words, str):
            raise TypeError(f"{name} must be text, got {type(words).__name__}")
        if len(words) > limits.text:
            raise ValueError(f"{name} must have at most {limits.text} letters, got {len(words)}")
        if any("\ud800" <= letter <= "\udfff" for letter in words):  # which JSON can write and no tokenizer takes
            raise ValueError(f"{name} must be text, got half of a surrogate pair: {shown(words)}")


def _pair(given: Any, name: str) -> tuple[float, float] | None:
    if given is None and "size" in name:
        return None
    if not isinstance(given, (list, tuple)) or len(given) != 2 or not all(is_number(each) for each in given):
        raise ValueError(f"{name} must be two numbers, got {shown(given)}")
    return number(given[0], name), number(given[1], name)


def _check_encodings(denoiser: Any, request: Request, limits: RequestLimits) -> None:
    """Given encodings have the U-Net's width and no end, and SDXL's pooled ones too."""
    width = denoiser.text_width
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = getattr(request, name)
        _check_pooled(denoiser, request, name)
        if embeds is None:
            continue
        floats(embeds, name)
        if embeds.ndim != 2 or embeds.shape[1] != width:
            raise ValueError(f"{name} must be [T, {width}], got {list(embeds.shape)}")
        if len(embeds) > limits.tokens:
            raise ValueError(f"{name} must have at most {limits.tokens} tokens, got {len(embeds)}")


def _check_pooled(denoiser: Any, request: Request, name: str) -> None:
    """SDXL's pooled encodings come with the encodings they belong to, and with no other."""
    pooled_name = name.replace("prompt", "pooled_prompt")
    embeds, pooled, width = getattr(request, name), getattr(request, pooled_name), denoiser.pooled_width
    if embeds is None or width is None:
        if pooled is not None:
            reason = f"without {name}" if embeds is None else "with one text encoder"
            raise ValueError(f"{pooled_name} must be None {reason}, got {type(pooled).__name__}")
        return
    if pooled is None:
        raise ValueError(f"{name} need {pooled_name} [{width}] with this pipeline, got None")
    if floats(pooled, pooled_name).shape != (width,):
        raise ValueError(f"{name} need {pooled_name} [{width}] with this pipeline, got {list(pooled.shape)}")
