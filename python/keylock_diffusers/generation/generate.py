"""Requests in, images out: different users' prompts, concepts, images, gates, guidance and seeds in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from keylock_diffusers.concepts import BaseModel, Concept
from keylock_diffusers.denoisers.unet import adapters as image_adapters
from keylock_diffusers.denoisers.unet import text_encoders, unet_of
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.batch import BatchEncoder, lora_scale
from keylock_diffusers.encoding.fusion import SubjectFusion
from keylock_diffusers.encoding.images import ImageEncoder
from keylock_diffusers.generation.maps import AttentionMaps, WordMaps, check_words, recording
from keylock_diffusers.generation.plan import Plan, plan
from keylock_diffusers.processors import verify
from keylock_diffusers.requests import Request, RequestError
from keylock_diffusers.routing.concepts import ConceptUse
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.regions import LIMIT

# What a pipeline takes for the whole call and a Request has for itself.
_PER_REQUEST = frozenset(
    "prompt prompt_2 negative_prompt negative_prompt_2 generator guidance_scale num_images_per_prompt latents "
    "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds ip_adapter_image "
    "ip_adapter_image_embeds ip_adapter_masks personalization readout".split()
)


@dataclass(frozen=True)
class _Row:
    """One image to draw."""

    request: int
    image: int
    order: Request = field(repr=False)
    plan: Plan = field(repr=False)


def generate(
    pipe: Any,
    requests: Sequence[Request],
    *,
    bank: Mapping[str, Concept] | None = None,
    num_inference_steps: int = 50,
    scheduler: Any = None,
    max_batch: int = 16,
    image_lengths: Sequence[Sequence[int]] | None = None,
    max_regions: int | None = None,
    fusion: SubjectFusion | None = None,
    on_error: str = "raise",
    callback: Callable[..., Any] | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Draws different users' requests together; the U-Net is called ``num_inference_steps`` times per batch.

    A request's picture does not depend on what else is in the batch: at its place in a batch of equal size it is the
    same bit for bit, and at another place or in another size up to rounding, since the U-Net's own layers are
    torch's. (On a GPU in half precision, where others have regions with wordings of their own, the bits are the same
    only with `max_regions`: kernels sum more keys in another order.) Two calls may run at the same time on one
    pipeline.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL text-to-image pipeline after `install`.
        requests: what to draw.
        bank: where the ids of concepts are looked up.
        num_inference_steps: denoising steps.
        scheduler: one to use instead of the pipeline's; it is copied.
        max_batch: images per call of the U-Net, before guidance doubles them.
        image_lengths: per IP-Adapter, the tokens of each image prompt that a row has room for, such as [[4, 4]];
            default as many as a batch needs. Given, a compiled U-Net runs any mix of them without recompiling, as long
            as regions do too.
        max_regions: how many regions with a wording of their own (see `Request`) a row has room for; default as many as
            a batch needs. Given, a compiled U-Net runs any mix of them without recompiling.
        fusion: mixes pictures of the requests' subjects into the words that name them.
        on_error: "raise": a request that cannot be drawn raises before any step; "return": the others are drawn and
            its place in the result holds the RequestError.
        callback: the pipeline's ``callback_on_step_end``. It must leave the rows and the adapters' scales alone;
            diffusers' own cutoff callbacks do not.
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
    encoders = text_encoders(pipe)
    clip = all("clip" in getattr(encoder.config, "model_type", "") for _, encoder in encoders)
    if not encoders or not clip or pipe.text_encoder is None:
        raise TypeError(
            "generate: pipe must be a pipeline with CLIP text encoders (Stable Diffusion 1.x, 2.x, XL), "
            f"got {type(pipe).__name__}"
        )
    if max_regions is not None and not (isinstance(max_regions, int) and 1 <= max_regions <= LIMIT):
        raise ValueError(f"generate: max_regions must be None or 1 to {LIMIT}, got {max_regions!r}")
    clash = sorted(_PER_REQUEST & {*kwargs, *(kwargs.get("cross_attention_kwargs") or {})})
    if clash:
        raise TypeError(
            f"generate: {clash[0]} belongs to each Request, or is made of it; it cannot be given to the call"
        )
    if "callback_on_step_end" in kwargs:
        raise TypeError("generate: callback_on_step_end is given as callback")
    if fusion is not None and (fusion.width != pipe.unet.config.cross_attention_dim):
        raise ValueError(
            f"generate: fusion must be as wide as the text, {pipe.unet.config.cross_attention_dim}, got {fusion.width}"
        )
    verify(pipe)
    _check_image_lengths(pipe, image_lengths)

    base = BaseModel.of(pipe) if any(isinstance(r, Request) and r.concepts for r in requests) else None
    images = ImageEncoder(pipe, unet_of(pipe))
    results: list[Any] = [None] * len(requests)
    rows: list[_Row] = []
    for index, request in enumerate(requests):
        try:
            planned = plan(
                pipe,
                request,
                bank=bank,
                base=base,
                images=images,
                image_lengths=image_lengths,
                max_regions=max_regions,
                fusion=fusion,
                strict=strict,
            )
        except (ValueError, TypeError, KeyError, OSError) as error:
            failure = RequestError(index, request, str(error))
            if on_error == "raise":
                raise failure from error
            results[index] = failure
        else:
            rows += [_Row(index, image, request, planned) for image in range(request.num_images)]
            results[index] = [None] * request.num_images

    maps = recording()
    if maps is not None and len(rows) and not any(isinstance(result, RequestError) for result in results):
        check_words(maps, (row.plan.prompts for row in rows), encoders[0][0])
    recorded: dict[tuple[int, int], WordMaps] = {}
    view = copy.copy(pipe)  # its own scheduler and per-call state; modules are shared
    for batch in _batches(view, rows, max_batch):
        view.scheduler = copy.deepcopy(pipe.scheduler if scheduler is None else scheduler)
        drawn = _draw(
            view, batch, num_inference_steps, callback, image_lengths, max_regions, fusion, maps, recorded, dict(kwargs)
        )
        for row, image in zip(batch, drawn, strict=True):
            results[row.request][row.image] = image
    if maps is not None:
        maps.images += [recorded[key] for key in sorted(recorded)]
    return [r[0] if isinstance(r, list) and len(r) == 1 else r for r in results]


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
def _draw(
    pipe: Any,
    rows: list[_Row],
    steps: int,
    callback: Any,
    image_lengths: Sequence[Sequence[int]] | None,
    max_regions: int | None,
    fusion: SubjectFusion | None,
    maps: AttentionMaps | None,
    recorded: dict[tuple[int, int], WordMaps],
    kwargs: dict[str, Any],
) -> list[Any]:
    device, dtype = pipe._execution_device, pipe.unet.dtype
    distilled = pipe.unet.config.time_cond_proj_dim is not None
    guided = rows[0].order.guidance_scale > 1 and not distilled
    attention = dict(kwargs.pop("cross_attention_kwargs", None) or {})
    plans = [row.plan for row in rows]
    encoder = BatchEncoder(pipe, [row.order for row in rows], plans, kwargs.get("clip_skip"), fusion, max_regions)
    index = torch.arange(len(rows))
    images = [plan.images for plan in plans]
    regions = [plan.regions.row for plan in plans]
    if guided:  # the row layout of diffusers' guidance
        index = torch.cat([torch.full_like(index, -1), index])
        images = [plan.negative_images for plan in plans] + images
        regions = [plan.negative_regions.row for plan in plans] + regions
    starts = [row.order.subject_start if row.plan.uses or row.plan.subjects else 0.0 for row in rows]
    with lora_scale(pipe, attention.get("scale")):
        positive = encoder.positive(learned=lambda use: True)
        negative = encoder.negative() if guided else None

        def stacked(half: Tensor) -> Tensor:
            return (half if negative is None else torch.cat([negative.text, half])).to(device, dtype)

        others = [] if negative is None else encoder.own_negative_wordings(negative.text)

        def read(learned: Callable[[ConceptUse], bool], fused: bool = True, prompts: Tensor | None = None) -> Tensor:
            """What keys or values read: the prompts, and after them the wordings that regions have of their own."""
            own = encoder.own_wordings(learned, fused=fused)
            if others:
                own = [torch.cat(halves) for halves in zip(others, own, strict=True)]
            if prompts is None:
                prompts = stacked(encoder.positive(learned, fused=fused).text)
            return torch.cat([prompts, *(wording.to(device, dtype) for wording in own)], 1)

        whole = stacked(positive.text)
        locked = any(use.lock == "global" for plan in plans for use in plan.uses)
        personalization = Personalization(
            [plan.uses for plan in plans], index, images, image_lengths, regions, starts
        ).prepare(
            pipe,
            whole,
            read(lambda use: use.lock == "local") if locked else None,
            read_text=read(lambda use: True, prompts=whole) if encoder.wordings else None,
            early_text=read(lambda use: False, fused=False) if any(starts) else None,
            latent_size=_latent_size(pipe, kwargs),
            steps=_count_steps(pipe, steps, kwargs) if any(starts) or any(plan.images for plan in plans) else steps,
        )
    if positive.pooled is not None:
        kwargs["pooled_prompt_embeds"] = positive.pooled
        kwargs["negative_pooled_prompt_embeds"] = None if negative is None else negative.pooled
    adapters = len(image_adapters(pipe.unet))
    if adapters:
        halves = 2 if guided else 1
        kwargs["ip_adapter_image_embeds"] = [torch.empty(halves * len(rows), 0, 1)] * adapters
    if personalization.scheduled:
        callback, kwargs = _stepping(personalization, callback, kwargs)
    readout = None
    if maps is not None:
        wordings = [_wordings(plan) for plan in plans]
        layout = [*([None] * len(rows) if guided else []), *wordings]
        readout = maps.batch(unet_of(pipe), layout, pipe.tokenizer, _latent_size(pipe, kwargs)).to(device)
        attention["readout"] = readout
    scales = [row.order.guidance_scale for row in rows]
    result = pipe(
        prompt_embeds=positive.text,
        negative_prompt_embeds=None if negative is None else negative.text,
        guidance_scale=scales[0] if distilled else _RowGuidance(scales),
        generator=[_generator(row) for row in rows],
        num_inference_steps=steps,
        callback_on_step_end=callback,
        cross_attention_kwargs={**attention, "personalization": personalization},
        return_dict=True,
        **kwargs,
    )
    if readout is not None:
        first = len(rows) if guided else 0
        for place, row in enumerate(rows):
            recorded[row.request, row.image] = readout.picture(first + place, str(row.order.prompt))
    return list(result.images)


def _wordings(plan: Plan) -> list[text.TokenizedPrompt] | None:
    """What a row reads one after another: its prompt, and the wordings that its regions have of their own."""
    return None if plan.prompts is None else [plan.prompts[0], *(own[0] for own in plan.regions.own)]


def _latent_size(pipe: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of what the U-Net is given."""
    sample = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    default = tuple(sample) if isinstance(sample, (list, tuple)) else (sample, sample)
    given = [kwargs.get(name) and int(kwargs[name]) // pipe.vae_scale_factor for name in ("height", "width")]
    if not all(given) and len(text_encoders(pipe)) == 1:  # Stable Diffusion's take both or neither, SDXL's each
        return default[0], default[1]
    return given[0] or default[0], given[1] or default[1]


def _count_steps(pipe: Any, steps: int, kwargs: Mapping[str, Any]) -> int:
    """How many timesteps the scheduler makes of `steps`; some make more."""
    given = {name: kwargs[name] for name in ("timesteps", "sigmas") if kwargs.get(name) is not None}
    return len(retrieve_timesteps(copy.deepcopy(pipe.scheduler), steps, "cpu", **given)[0])


def _check_image_lengths(pipe: Any, lengths: Any) -> None:
    if lengths is None:
        return
    adapters = len(image_adapters(pipe.unet))
    right = isinstance(lengths, (list, tuple)) and all(
        isinstance(places, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in places) for places in lengths
    )
    if not right or len(lengths) > adapters:
        raise ValueError(
            f"generate: image_lengths must be a list of token counts per IP-Adapter, at most {adapters} of them, "
            f"got {lengths!r}"
        )


def _stepping(
    personalization: Personalization, callback: Any, kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A callback that puts in place what counts in the next step, and then calls the caller's own."""
    wanted = getattr(callback, "tensor_inputs", None)  # diffusers asks its own callback objects for this
    if wanted is not None:
        kwargs = {**kwargs, "callback_on_step_end_tensor_inputs": wanted}

    def after(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < pipe.num_timesteps:
            personalization.at_step(step + 1, pipe.num_timesteps)
        return given if callback is None else callback(pipe, step, timestep, given)

    return after, kwargs


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
