"""Requests in, images out: different users' prompts, concepts, gates, guidance and seeds in one batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from keylock_diffusers import text
from keylock_diffusers.concepts import BaseModel, Concept
from keylock_diffusers.personalization import ConceptUse, Personalization
from keylock_diffusers.processors import verify

_LOCKS = ("local", "global")


@dataclass(frozen=True)
class Use:
    """One concept in a request.

    Args:
        concept: an id of the bank that `generate` is given, or a Concept.
        beta: where the gate opens, in units of the similarity; default the concept's own.
        tau: the gate's temperature; default the concept's own.
        strength: 1 is the concept as trained, 0 exactly its absence.
        lock: "local": keys are locked to the super-class token by token; "global": all keys are those of the prompt
            with the super-class in the concept's place, which follows the prompt more and the subject less.
    """

    concept: str | Concept
    beta: float | None = None
    tau: float | None = None
    strength: float = 1.0
    lock: str = "local"


@dataclass(frozen=True)
class Request:
    """One picture order: everything that may differ between the rows of a batch.

    Args:
        prompt: text in which each concept's placeholder stands once or more.
        prompt_embeds: encodings [T, D] instead of a prompt, without concepts.
        negative_prompt: text for the unconditional half; placeholders are not allowed in it.
        negative_prompt_embeds: encodings [T, D] instead of a negative prompt.
        guidance_scale: weight of the prompt; 1 or less is without guidance.
        concepts: what the prompt's placeholders stand for.
        seed: of the first image; image k takes seed + k. None: a different picture every time.
        num_images: how many.
    """

    prompt: str | None = None
    prompt_embeds: Tensor | None = None  # [T, D]
    negative_prompt: str | None = None
    negative_prompt_embeds: Tensor | None = None  # [T, D]
    guidance_scale: float = 7.5
    concepts: Sequence[Use | str | Concept] = ()
    seed: int | None = None
    num_images: int = 1

    def __str__(self) -> str:
        return repr(self.prompt) if self.prompt is not None else "prompt_embeds"


class RequestError(ValueError):
    """A request that cannot be drawn; ``index`` says which."""

    def __init__(self, index: int, request: Any, reason: str) -> None:
        super().__init__(f"request {index} ({request}): {reason}")
        self.index = index


@dataclass(frozen=True)
class _Row:
    """One image to draw."""

    request: int
    image: int
    order: Request = field(repr=False)
    plan: _Plan = field(repr=False)


@dataclass(frozen=True)
class _Plan:
    """A request whose words and concepts were found to be in order."""

    uses: tuple[ConceptUse, ...]
    prompt: text.TokenizedPrompt | None
    negative: text.TokenizedPrompt | None


def generate(
    pipe: Any,
    requests: Sequence[Request],
    *,
    bank: Mapping[str, Concept] | None = None,
    num_inference_steps: int = 50,
    scheduler: Any = None,
    max_batch: int = 16,
    on_error: str = "raise",
    callback: Callable[..., Any] | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Draws different users' requests together; the U-Net is called ``num_inference_steps`` times per batch.

    A request's picture does not depend on what else is in the batch: at its place in a batch of equal size it is the
    same bit for bit, and at another place or in another size up to rounding, since the U-Net's own layers are
    torch's. Two calls may run at the same time on one pipeline.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x text-to-image pipeline after `install`.
        requests: what to draw.
        bank: where the ids of concepts are looked up.
        num_inference_steps: denoising steps.
        scheduler: one to use instead of the pipeline's; it is copied.
        max_batch: images per call of the U-Net, before guidance doubles them.
        on_error: "raise": a request that cannot be drawn raises before any step; "return": the others are drawn and
            its place in the result holds the RequestError.
        callback: the pipeline's ``callback_on_step_end``.
        strict: refuse concepts trained on other weights of the same base model instead of warning.
        kwargs: passed on to the pipeline: height, width, output_type, clip_skip, cross_attention_kwargs ...

    Returns:
        Per request its image, or the list of its images where ``num_images`` is above 1.

    Raises:
        RequestError: see ``on_error``.
        RuntimeError: a cross-attention layer does not have our processor.
        TypeError, ValueError: an argument is not what this says.

    Example:
        >>> images = kd.generate(pipe, [kd.Request("<alice-cat> on blue", concepts=["alice/cat"], seed=7),
        ...                             kd.Request("a house", seed=9)], bank=bank)  # doctest: +SKIP
    """
    if on_error not in ("raise", "return"):
        raise ValueError(f'generate: on_error must be "raise" or "return", got {on_error!r}')
    if max_batch < 1 or num_inference_steps < 1:
        raise ValueError(
            f"generate: max_batch and num_inference_steps must be at least 1, got {max_batch} and {num_inference_steps}"
        )
    if getattr(pipe, "text_encoder_2", None) is not None or getattr(pipe, "text_encoder", None) is None:
        raise TypeError(
            "generate: pipe must be a pipeline with one text encoder (Stable Diffusion 1.x, 2.x), "
            f"got {type(pipe).__name__}"
        )
    clash = sorted(
        {"prompt", "negative_prompt", "generator", "guidance_scale", "num_images_per_prompt", "latents"} & set(kwargs)
    )
    if clash:
        raise TypeError(f"generate: {clash[0]} belongs to each Request, not to the call")
    verify(pipe)

    base = BaseModel.of(pipe) if any(isinstance(r, Request) and r.concepts for r in requests) else None
    results: list[Any] = [None] * len(requests)
    rows: list[_Row] = []
    for index, request in enumerate(requests):
        try:
            plan = _plan(pipe, request, bank, base, strict)
        except (ValueError, TypeError, KeyError, OSError) as error:
            failure = RequestError(index, request, str(error))
            if on_error == "raise":
                raise failure from error
            results[index] = failure
        else:
            rows += [_Row(index, image, request, plan) for image in range(request.num_images)]
            results[index] = [None] * request.num_images

    view = copy.copy(pipe)  # its own scheduler and per-call state; modules are shared
    for batch in _batches(view, rows, max_batch):
        view.scheduler = copy.deepcopy(pipe.scheduler if scheduler is None else scheduler)
        images = _draw(view, batch, num_inference_steps, callback, dict(kwargs))
        for row, image in zip(batch, images, strict=True):
            results[row.request][row.image] = image
    return [r[0] if isinstance(r, list) and len(r) == 1 else r for r in results]


def _plan(
    pipe: Any, request: Request, bank: Mapping[str, Concept] | None, base: BaseModel | None, strict: bool
) -> _Plan:
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
    prompt = negative = None
    if request.prompt is not None:
        prompt = text.tokenize(pipe.tokenizer, _converted(pipe, request.prompt), super_classes)
        Personalization([uses], torch.zeros(1, dtype=torch.int64))  # raises here what would fail the whole batch
    if request.negative_prompt_embeds is None:
        negative = text.tokenize(pipe.tokenizer, _converted(pipe, request.negative_prompt or ""))
    return _Plan(uses, prompt, negative)


def _check_encodings(pipe: Any, request: Request) -> None:
    """Given encodings have the U-Net's width, and both halves of guidance the same length."""
    width, lengths = pipe.unet.config.cross_attention_dim, []
    for name, words in (("prompt_embeds", request.prompt), ("negative_prompt_embeds", request.negative_prompt)):
        embeds = getattr(request, name)
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


def _batches(pipe: Any, rows: list[_Row], max_batch: int) -> list[list[_Row]]:
    """Rows that can share the U-Net's calls: all with guidance or all without, in input order."""

    def kind(row: _Row) -> tuple[Any, ...]:
        guided = row.order.guidance_scale > 1
        distilled = pipe.unet.config.time_cond_proj_dim is not None
        embeds = row.order.prompt_embeds
        length = pipe.tokenizer.model_max_length if embeds is None else embeds.shape[0]
        return (guided, row.order.guidance_scale if distilled else 0.0, length)

    batches = []
    for _, group in groupby(sorted(rows, key=kind), key=kind):
        members = list(group)
        batches += [members[i : i + max_batch] for i in range(0, len(members), max_batch)]
    return batches


@torch.no_grad()
def _draw(pipe: Any, rows: list[_Row], steps: int, callback: Any, kwargs: dict[str, Any]) -> list[Any]:
    device, dtype = pipe._execution_device, pipe.unet.dtype
    distilled = pipe.unet.config.time_cond_proj_dim is not None
    guided = rows[0].order.guidance_scale > 1 and not distilled
    attention = dict(kwargs.pop("cross_attention_kwargs", None) or {})
    encoder = _Encoder(pipe, rows, kwargs.get("clip_skip"))
    index = torch.arange(len(rows))
    if guided:  # the row layout of diffusers' guidance
        index = torch.cat([torch.full_like(index, -1), index])
    with _lora_scale(pipe, attention.get("scale")):
        positive = encoder.positive(learned=lambda use: True)
        keys = None
        if any(use.lock == "global" for row in rows for use in row.plan.uses):
            keys = encoder.positive(learned=lambda use: use.lock == "local")
        negative = encoder.negative() if guided else None

        def stacked(half: Tensor) -> Tensor:
            return (half if negative is None else torch.cat([negative, half])).to(device, dtype)

        personalization = Personalization([row.plan.uses for row in rows], index).prepare(
            pipe, stacked(positive), None if keys is None else stacked(keys)
        )
    scales = [row.order.guidance_scale for row in rows]
    result = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        guidance_scale=scales[0] if distilled else _RowGuidance(scales),
        generator=[_generator(row) for row in rows],
        num_inference_steps=steps,
        callback_on_step_end=callback,
        cross_attention_kwargs={**attention, "personalization": personalization},
        return_dict=True,
        **kwargs,
    )
    return list(result.images)


@contextmanager
def _lora_scale(pipe: Any, scale: float | None) -> Iterator[None]:
    """LoRA weights at the scale that the pipeline's own call will give them."""
    modules = [] if scale is None else [pipe.text_encoder, pipe.unet]
    for module in modules:
        scale_lora_layers(module, scale)
    try:
        yield
    finally:
        for module in modules:
            unscale_lora_layers(module, scale)


class _Encoder:
    """Encodes the prompts of a batch's rows, each with its own learned words."""

    def __init__(self, pipe: Any, rows: list[_Row], clip_skip: int | None) -> None:
        self._pipe, self._rows, self._clip_skip = pipe, rows, clip_skip

    def positive(self, learned: Callable[[ConceptUse], bool]) -> Tensor:  # [B, T, D]
        """The rows' prompts; a concept that `learned` refuses is encoded as its super-class."""
        words = [
            {use.concept.placeholder: use.concept.word_embeddings[0] for use in row.plan.uses if learned(use)}
            for row in self._rows
        ]
        return self._encode(
            [row.plan.prompt for row in self._rows], [row.order.prompt_embeds for row in self._rows], words
        )

    def negative(self) -> Tensor:  # [B, T, D]
        """The rows' negative prompts."""
        return self._encode(
            [row.plan.negative for row in self._rows], [row.order.negative_prompt_embeds for row in self._rows], None
        )

    def _encode(
        self,
        prompts: list[text.TokenizedPrompt | None],
        embeds: list[Tensor | None],
        words: list[dict[str, Tensor]] | None,
    ) -> Tensor:
        encoder = self._pipe.text_encoder
        places = [row for row, prompt in enumerate(prompts) if prompt is not None]
        out: list[Any] = list(embeds)
        if places:
            encoded = text.encode(
                encoder,
                [prompts[row] for row in places],  # type: ignore[misc]
                None if words is None else [words[row] for row in places],
                clip_skip=self._clip_skip if words is not None else None,
            )
            for row, encoding in zip(places, encoded, strict=True):
                out[row] = encoding
        return torch.stack([e.to(self._pipe._execution_device, encoder.dtype) for e in out])


class _RowGuidance:
    """A guidance scale per row, where pipelines expect one number: they compare it with 1 and multiply by it."""

    def __init__(self, scales: list[float]) -> None:
        self._scales = torch.tensor(scales, dtype=torch.float32)

    def __gt__(self, other: float) -> bool:
        return bool((self._scales > other).any())

    def __mul__(self, difference: Tensor) -> Tensor:  # [B, ...]
        scales = self._scales.to(difference.device).view(-1, *[1] * (difference.ndim - 1))
        return (difference.float() * scales).to(difference.dtype)

    __rmul__ = __mul__


def _generator(row: _Row) -> torch.Generator:
    generator = torch.Generator()
    if row.order.seed is None:
        generator.seed()
    else:
        generator.manual_seed(row.order.seed + row.image)
    return generator


def _converted(pipe: Any, prompt: str) -> str:
    """The prompt with diffusers' multi-vector textual inversion words spelled out."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return prompt if convert is None else convert(prompt, pipe.tokenizer)
