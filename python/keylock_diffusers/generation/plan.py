"""What is made of a request before a batch is drawn, and the checks that find a bad one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.concepts import BaseModel, Concept
from keylock_diffusers.denoisers.unet import text_encoders
from keylock_diffusers.encoding import images as image_prompts
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.fusion import SubjectFusion, encode_subject
from keylock_diffusers.encoding.images import ImageEncoder
from keylock_diffusers.encoding.regions import PromptRegions
from keylock_diffusers.encoding.regions import resolve as resolve_regions
from keylock_diffusers.requests import Region, Request, Use
from keylock_diffusers.routing.concepts import ConceptUse
from keylock_diffusers.routing.images import ImageRouting, ImageUse
from keylock_diffusers.routing.personalization import Personalization

_LOCKS = ("local", "global")


@dataclass(frozen=True)
class Plan:
    """A request whose words, concepts and images were found to be in order."""

    uses: tuple[ConceptUse, ...]
    prompts: tuple[text.TokenizedPrompt, ...] | None  # one per text encoder
    negatives: tuple[text.TokenizedPrompt, ...] | None
    images: tuple[ImageUse, ...]
    negative_images: tuple[ImageUse, ...]  # of the unconditional half; none without guidance
    subjects: tuple[tuple[str, Tensor], ...]  # words of the prompt, and the encoding [D] of what they name
    regions: PromptRegions
    negative_regions: PromptRegions


def plan(
    pipe: Any,
    request: Request,
    *,
    bank: Mapping[str, Concept] | None,
    base: BaseModel | None,
    images: ImageEncoder,
    image_lengths: Sequence[Sequence[int]] | None,
    max_regions: int | None,
    fusion: SubjectFusion | None,
    strict: bool,
) -> Plan:
    """Looks up, tokenizes and checks everything a request names, and encodes its images.

    Raises:
        TypeError, ValueError, KeyError, OSError: what is wrong with the request.
    """
    if not isinstance(request, Request):
        raise TypeError(f"must be a Request, got {type(request).__name__}")
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds")
    if request.negative_prompt is not None and request.negative_prompt_embeds is not None:
        raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
    if not isinstance(request.num_images, int) or request.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {request.num_images!r}")
    if request.concepts and request.prompt is None:
        raise ValueError("concepts need a prompt, not prompt_embeds")
    guidance, seed = request.guidance_scale, request.seed
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance!r}")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63 - request.num_images):
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    _check_encodings(pipe, request)
    uses = tuple(_resolve(use, bank) for use in request.concepts)
    for use in uses:
        use.concept.check(base, strict=strict)
    super_classes = {use.concept.placeholder: use.concept.super_class for use in uses}
    if len(super_classes) < len(uses):
        raise ValueError("two of its concepts have the same placeholder")
    prompts = negatives = None
    if request.prompt is not None:
        prompts = tuple(
            text.tokenize(tokenizer, text.converted(pipe, tokenizer, request.prompt), super_classes)
            for tokenizer, _ in text_encoders(pipe)
        )
        Personalization([uses], torch.zeros(1, dtype=torch.int64))  # raises here what would fail the whole batch
    if request.negative_prompt_embeds is None:
        negatives = tuple(
            text.tokenize(tokenizer, text.converted(pipe, tokenizer, request.negative_prompt or ""))
            for tokenizer, _ in text_encoders(pipe)
        )
    if not isinstance(request.image_prompts, (list, tuple)):
        raise TypeError(f"image_prompts must be a list, got {type(request.image_prompts).__name__}")
    for image in request.image_prompts:
        image_prompts.check(image, pipe.unet)
    drawn = tuple(images.use(image) for image in request.image_prompts)
    ImageRouting([drawn], image_lengths)  # raises here what would fail the whole batch
    absent = tuple(images.use(image, negative=True) for image in request.image_prompts if guidance > 1)
    start = request.subject_start
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 <= start <= 1:
        raise ValueError(f"subject_start must lie in [0, 1], got {start!r}")
    subjects = _subjects(pipe, request, prompts, fusion)
    halves = _regions(pipe, request, uses, prompts, negatives)
    if guidance <= 1:  # checked, but no row reads it
        halves = halves[0], PromptRegions()
    most = max(len(half.own) for half in halves)
    if max_regions is not None and most > max_regions:
        raise ValueError(f"regions with a wording of their own must be at most max_regions, {max_regions}, got {most}")
    return Plan(uses, prompts, negatives, drawn, absent, subjects, *halves)


def _subjects(
    pipe: Any, request: Request, prompts: tuple[text.TokenizedPrompt, ...] | None, fusion: SubjectFusion | None
) -> tuple[tuple[str, Tensor], ...]:
    """The words that the request's subjects are fused into, and the subjects' encodings."""
    if not isinstance(request.subjects, (list, tuple)):
        raise TypeError(f"subjects must be a list, got {type(request.subjects).__name__}")
    made = []
    taken: set[int] = set()
    for subject in request.subjects:
        embeds = encode_subject(subject, pipe, fusion)
        if prompts is None or len(prompts) > 1:
            raise ValueError("subjects need a prompt, not prompt_embeds, and a pipeline with one text encoder")
        places = text.find(pipe.tokenizer, prompts[0], subject.prompt)
        if not places:
            raise ValueError(f"the words {subject.prompt!r} of a FusedSubject are not in the prompt")
        tokens = {place[-1] for place in places}
        if tokens & taken:
            raise ValueError(f"two of its subjects are fused into the same word {subject.prompt!r}")
        taken |= tokens
        made.append((subject.prompt, embeds))
    return tuple(made)


def _regions(
    pipe: Any,
    request: Request,
    uses: Sequence[ConceptUse],
    prompts: tuple[text.TokenizedPrompt, ...] | None,
    negatives: tuple[text.TokenizedPrompt, ...] | None,
) -> tuple[PromptRegions, PromptRegions]:
    """Regions of the prompt, those of its concepts and subjects among them, and of the negative prompt."""
    for name in ("regions", "negative_regions"):
        if not isinstance(getattr(request, name), (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(getattr(request, name)).__name__}")
    of_concepts = [
        Region(order.region, use.concept.placeholder)
        for order, use in zip(request.concepts, uses, strict=True)
        if isinstance(order, Use) and order.region is not None
    ]
    of_subjects = [Region(subject.region, subject.prompt) for subject in request.subjects if subject.region is not None]
    given = [*request.regions, *of_concepts, *of_subjects]
    halves = []
    for name, half, tokenized, embeds in (
        ("regions", given, prompts, request.prompt_embeds),
        ("negative_regions", list(request.negative_regions), negatives, request.negative_prompt_embeds),
    ):
        length = pipe.tokenizer.model_max_length if embeds is None else embeds.shape[0]
        tokenizers = [tokenizer for tokenizer, _ in text_encoders(pipe)]
        halves.append(resolve_regions(half, tokenized, length, tokenizers, request.endings, name))
    return halves[0], halves[1]


def _check_encodings(pipe: Any, request: Request) -> None:
    """Given encodings have the U-Net's width, both halves of guidance the same length, and SDXL's pooled ones too."""
    width, lengths = pipe.unet.config.cross_attention_dim, []
    for name, words in (("prompt_embeds", request.prompt), ("negative_prompt_embeds", request.negative_prompt)):
        embeds = getattr(request, name)
        _check_pooled(pipe, request, name)
        if embeds is None:
            if words is not None and not isinstance(words, str):
                raise TypeError(f"{name.removesuffix('_embeds')} must be text, got {type(words).__name__}")
            lengths.append(pipe.tokenizer.model_max_length)
            continue
        if not isinstance(embeds, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(embeds).__name__}")
        if embeds.ndim != 2 or embeds.shape[1] != width:
            raise ValueError(f"{name} must be [T, {width}], got {list(embeds.shape)}")
        lengths.append(embeds.shape[0])
    if request.guidance_scale > 1 and lengths[0] != lengths[1]:
        raise ValueError(f"prompt and negative prompt must have equally many tokens, got {lengths[0]} and {lengths[1]}")


def _check_pooled(pipe: Any, request: Request, name: str) -> None:
    """SDXL's pooled encodings come with the encodings they belong to, and with no other."""
    pooled_name = name.replace("prompt", "pooled_prompt")
    embeds, pooled = getattr(request, name), getattr(request, pooled_name)
    encoders = text_encoders(pipe)
    if embeds is None or len(encoders) == 1:
        if pooled is not None:
            reason = f"without {name}" if embeds is None else "with one text encoder"
            raise ValueError(f"{pooled_name} must be None {reason}, got {type(pooled).__name__}")
        return
    width = encoders[-1][1].config.projection_dim
    if not isinstance(pooled, Tensor) or pooled.shape != (width,):
        got = list(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(f"{name} need {pooled_name} [{width}] with this pipeline, got {got}")


def _resolve(use: Use | str | Concept, bank: Mapping[str, Concept] | None) -> ConceptUse:
    if not isinstance(use, Use):
        use = Use(use)
    concept = use.concept
    if isinstance(concept, str):
        if bank is None:
            raise ValueError(f"concept {concept!r} is an id, but generate was given no bank")
        concept = bank[concept]
    if not isinstance(concept, Concept):
        raise TypeError(f"a concept must be an id or a Concept, got {type(concept).__name__}")
    if use.lock not in _LOCKS:
        raise ValueError(f'lock must be "local" or "global", got {use.lock!r}')
    numbers = {
        "beta": concept.beta if use.beta is None else use.beta,
        "tau": concept.tau if use.tau is None else use.tau,
        "strength": use.strength,
    }
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name} of {concept.placeholder} must be a finite number, got {number!r}")
    return ConceptUse(concept, lock=use.lock, **numbers)
