"""Requests in, images out: different users' prompts, concepts, images, gates, guidance and seeds in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from keylock_diffusers.checks import listed, number, reason_of, shown, whole
from keylock_diffusers.concepts import Concept
from keylock_diffusers.denoisers.unet import adapters, text_encoders
from keylock_diffusers.encoding.fusion import SubjectFusion
from keylock_diffusers.generation.batch import Batch, Picture
from keylock_diffusers.generation.callbacks import Callbacks
from keylock_diffusers.generation.engine import Engine, Settings
from keylock_diffusers.generation.loras import LoraSource
from keylock_diffusers.generation.maps import AttentionMaps, WordMaps, check_words
from keylock_diffusers.generation.plan import Plan
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.loras import LoraBank
from keylock_diffusers.requests import Request, RequestError
from keylock_diffusers.routing.adapters import LoraCapacity
from keylock_diffusers.routing.regions import LIMIT

# What a pipeline takes for the whole call and a Request has for itself.
_PER_REQUEST = frozenset(
    "prompt prompt_2 negative_prompt negative_prompt_2 generator guidance_scale num_images_per_prompt latents "
    "num_videos_per_prompt control_image masked_image_latents "
    "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds ip_adapter_image "
    "ip_adapter_image_embeds ip_adapter_masks personalization readout image mask_image strength original_size "
    "target_size crops_coords_top_left negative_original_size negative_target_size negative_crops_coords_top_left "
    "aesthetic_score negative_aesthetic_score controlnet_conditioning_scale control_guidance_start "
    "control_guidance_end".split()
)
_OUTPUTS = ("pil", "np", "pt", "latent")
_SHARES = ("eta", "guidance_rescale")  # keywords of the pipelines' calls that lie in 0..1


def generate(
    pipe: Any,
    requests: Sequence[Request],
    *,
    bank: Mapping[str, Concept] | None = None,
    loras: LoraSource | None = None,
    controlnets: Mapping[str, Any] | None = None,
    num_inference_steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    scheduler: Any = None,
    max_batch: int = 8,
    record: AttentionMaps | None = None,
    callback_on_step_end: Callable[..., Any] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    callback_on_image: Callable[[int, int, Any], None] | None = None,
    on_error: str = "raise",
    output_type: str = "pil",
    image_lengths: Sequence[Sequence[int]] | None = None,
    max_regions: int | None = None,
    lora_capacity: LoraCapacity | None = None,
    fusion: SubjectFusion | None = None,
    strict: bool = False,
    limits: RequestLimits = RequestLimits(),
    **kwargs: Any,
) -> list[Any]:
    """Draws different users' requests together; the U-Net is called ``num_inference_steps`` times per batch.

    A request's picture does not depend on what else is in the batch: at its place in a batch of equal size it is the
    same bit for bit, and at another place or in another size up to rounding, since the U-Net's own layers are
    torch's. (On a GPU in half precision, where others have regions with wordings of their own, the bits are the same
    only with `max_regions`: kernels sum more keys in another order.) Two calls may run at the same time on one
    pipeline. Setting the pipeline's ``_interrupt`` stops the call at the next step: pictures that were begun are
    decoded as they are, and in the place of the others is None.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline of any task (or AnimateDiff's) after `install`.
        requests: what to draw.
        bank: where the ids of concepts are looked up.
        loras: where the ids of LoRAs are looked up: a `LoraBank`, or a mapping of ids to files and Adapters.
        controlnets: ControlNets by the names that requests' controls have.
        num_inference_steps: denoising steps.
        height, width: of the pictures; default the model's own, or that of a request's own picture. Stable Diffusion
            1.x and 2.x take both or neither, as their pipelines do.
        scheduler: one to use instead of the pipeline's; it is copied.
        max_batch: images per call of the U-Net, before guidance doubles them.
        record: where words' attention is recorded.
        callback_on_step_end: the pipelines' own: see `Callbacks` for what it may change.
        callback_on_step_end_tensor_inputs: what it is given.
        callback_on_image: called with a request's index, the number of its picture and the picture, batch by batch as
            they are decoded, so that what was drawn is kept whatever becomes of the rest.
        on_error: "raise": a request that cannot be drawn raises before any step, and one whose numbers turn out not to
            be finite (a strength of 1e30) raises after the last one, with everybody else's pictures in the error's
            ``images``; "return": the others are drawn and its place in the result holds the RequestError.
        output_type: the pipelines' own: "pil", "np", "pt" or "latent".
        image_lengths: per IP-Adapter, the tokens of each image prompt that a row has room for, such as [[4, 4]];
            default as many as a batch needs. Given, a compiled U-Net runs any mix of them without recompiling, as long
            as regions do too.
        max_regions: how many regions with a wording of their own (see `Request`) a row has room for; default as many as
            a batch needs. Given, a compiled U-Net runs any mix of them without recompiling.
        lora_capacity: the room for LoRAs; default as much as a batch needs. Given, a compiled U-Net runs any mix of
            them without recompiling, and a row's bits do not depend on whether its neighbours have any.
        fusion: mixes pictures of the requests' subjects into the words that name them.
        strict: refuse concepts trained on other weights of the same base model instead of warning.
        limits: how much each request may ask for; one that asks for more is a request that cannot be drawn.
        kwargs: what the pipeline takes besides for the whole call: clip_skip, eta, guidance_rescale,
            cross_attention_kwargs, timesteps, sigmas, denoising_end, pag_scale, num_frames ...

    Returns:
        Per request its image, or the list of its images where ``num_images`` is above 1; see ``on_error`` for what
        stands in the place of one that could not be drawn.

    Raises:
        RequestError: see ``on_error``.
        RuntimeError: a cross-attention layer does not have our processor.
        TypeError, ValueError: an argument is not what this says.

    Example:
        >>> images = kd.generate(pipe, [kd.Request("<alice-cat> on blue", concepts=["alice/cat"], seed=7),
        ...                             kd.Request("a house", seed=9)], bank=bank)  # doctest: +SKIP
    """
    settings = Settings(
        bank, {} if controlnets is None else controlnets, num_inference_steps, height, width, scheduler,
        image_lengths, max_regions, fusion, loras, lora_capacity, record, output_type, strict, limits, kwargs,
    )  # fmt: skip
    _check_kinds(pipe, settings, callback_on_step_end=callback_on_step_end, callback_on_image=callback_on_image)
    requests = _check(pipe, requests, settings, max_batch, on_error)
    callbacks = None
    if callback_on_step_end is not None:
        callbacks = Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs)
    engine = Engine(pipe, settings)
    pipe._interrupt = False
    plans = [_planned(engine, index, request, on_error) for index, request in enumerate(requests)]
    results: list[Any] = [
        plan if isinstance(plan, RequestError) else [None] * plan.request.num_images for plan in plans
    ]
    pictures = [
        Picture(plan, index, image)
        for index, plan in enumerate(plans)
        if isinstance(plan, Plan)
        for image in range(plan.request.num_images)
    ]
    if record is not None and pictures and not any(isinstance(plan, RequestError) for plan in plans):
        prompts = [picture.plan.wordings[0] for picture in pictures]
        most = max(len(picture.plan.row.images) for picture in pictures)
        check_words(record, engine.denoiser.tokenizer, prompts, most)
    late: list[RequestError] = []
    recorded: dict[tuple[int, int], WordMaps] = {}
    batches = list(_batches(pictures, max_batch, engine.denoiser.followed))
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    for nth, members in enumerate(batches, 1):
        if engine.stopped:
            break
        if len(batches) > 1:
            engine.pipe.set_progress_bar_config(**{"desc": f"batch {nth} of {len(batches)}", **bar})
        batch, drawn = _drawn(engine, members, callbacks)
        for picture, image in drawn:
            results[picture.request][picture.image] = image
            if isinstance(image, RequestError):
                late.append(image)
            elif callback_on_image is not None and image is not None:
                callback_on_image(picture.request, picture.image, image)
        if batch is not None and batch.readout is not None and batch.position > 0:
            for row, picture in enumerate(batch.pictures):
                recorded[picture.request, picture.image] = batch.readout.picture(row, str(picture.plan.request.prompt))
    if record is not None:
        record.images += [recorded[key] for key in sorted(recorded)]
    images = [r[0] if isinstance(r, list) and len(r) == 1 else r for r in results]
    if late and on_error == "raise":
        late[0].images = images
        raise late[0]
    return images


def _drawn(
    engine: Engine, members: list[Picture], callbacks: Callbacks | None
) -> tuple[Batch | None, list[tuple[Picture, Any]]]:
    """A batch after it was drawn, and what became of each picture; who cannot be loaded or begun fails alone."""
    failed: list[tuple[Picture, Any]] = []
    while members:
        batch = None
        try:
            batch = engine.load(members)
            images = engine.draw(batch, callbacks)
        except Exception:
            if batch is not None and batch.position > 0:  # everybody was begun
                raise
            members, found = _apart(engine, members)
            if not found:  # none of them alone: it is the batch as a whole
                raise
            failed += found
        else:
            return batch, failed + list(zip(batch.pictures, images, strict=True))
    return None, failed


def _apart(engine: Engine, members: list[Picture]) -> tuple[list[Picture], list[tuple[Picture, Any]]]:
    """Pictures that make their first step, each by itself, and the errors of the others."""
    good: list[Picture] = []
    failed: list[tuple[Picture, Any]] = []
    for picture in members:
        batch = None
        try:
            batch = engine.load([picture])
            engine.step(batch)
            good.append(picture)
        except Exception as error:
            found = RequestError(picture.request, picture.plan.request, reason_of(error))
            found.__cause__ = error
            failed.append((picture, found))
        finally:
            if batch is not None:
                engine.release(batch)
    return good, failed


def _planned(engine: Engine, index: int, request: Any, on_error: str) -> Plan | RequestError:
    try:
        return engine.plan(request)
    except Exception as error:  # whatever is wrong with a request, it fails alone
        failure = RequestError(index, request, reason_of(error))
        if on_error == "raise":
            raise failure from error
        return failure


def _batches(pictures: list[Picture], max_batch: int, in_step: bool) -> Iterator[list[Picture]]:
    """Pictures that can share the denoiser's calls, in input order; those that are changed most lie together.

    Args:
        pictures: all of them.
        max_batch: how many there may be in a batch.
        in_step: whether all of a batch must make the same steps.
    """

    def kind(picture: Picture) -> tuple[Any, ...]:
        return (*picture.plan.group, share(picture) if in_step else 0.0)

    def share(picture: Picture) -> float:
        return 0.0 if picture.plan.image is None else -float(picture.plan.request.strength)

    ordered = sorted(pictures, key=lambda picture: (kind(picture), share(picture)))
    for _, group in groupby(ordered, key=kind):
        members = list(group)
        for first in range(0, len(members), max_batch):
            yield members[first : first + max_batch]


def _check_kinds(pipe: Any, settings: Settings, **callbacks: Any) -> None:
    """What kinds of things the arguments of the call are; what is wrong with one is named."""
    if not callable(pipe):
        raise TypeError(f"generate: pipe must be a pipeline, got {type(pipe).__name__}")
    given = settings.options
    kinds: dict[str, tuple[Any, Any, str]] = {
        "controlnets": (settings.controlnets, Mapping, "a mapping of names to ControlNets"),
        "loras": (settings.loras, (LoraBank, Mapping), "a LoraBank or a mapping of ids to files"),
        "lora_capacity": (settings.lora_capacity, LoraCapacity, "a LoraCapacity"),
        "fusion": (settings.fusion, SubjectFusion, "a SubjectFusion"),
        "record": (settings.record, AttentionMaps, "AttentionMaps"),
        "cross_attention_kwargs": (given.get("cross_attention_kwargs"), Mapping, "a mapping"),
    }
    for name, (value, kind, what) in kinds.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"generate: {name} must be {what}, got {type(value).__name__}")
    for name, value in callbacks.items():
        if value is not None and not callable(value):
            raise TypeError(f"generate: {name} must be a function, got {type(value).__name__}")
    if settings.scheduler is not None and not callable(getattr(settings.scheduler, "set_timesteps", None)):
        raise TypeError(f"generate: scheduler must be one of diffusers', got {type(settings.scheduler).__name__}")
    if not isinstance(settings.output_type, str) or settings.output_type not in _OUTPUTS:
        raise ValueError(f"generate: output_type must be one of {_OUTPUTS}, got {shown(settings.output_type)}")
    for name, value in (("height", settings.height), ("width", settings.width)):
        if value is not None:
            whole(value, f"generate: {name}", 1, 2**16)
    for name in {*_SHARES} & {*given}:
        number(given[name], f"generate: {name}", 0, 1)
    for name in {"pag_scale", "pag_adaptive_scale"} & {*given}:
        number(given[name], f"generate: {name}", 0)
    for name in {"num_frames", "decode_chunk_size"} & {*given}:
        whole(given[name], f"generate: {name}", 1)
    for name in {"timesteps", "sigmas"} & {*given}:
        if given[name] is not None:
            listed(given[name], f"generate: {name}")
    layers = [
        getattr(encoder.model.config, "num_hidden_layers", 1) - encoder.penultimate for encoder in text_encoders(pipe)
    ]
    if given.get("clip_skip") is not None and layers:
        whole(given["clip_skip"], "generate: clip_skip", 0, min(layers))


def _check(pipe: Any, requests: Any, settings: Settings, max_batch: int, on_error: str) -> list[Any]:
    """The requests as a list, once the arguments of the call are found to be in order; what is wrong is named."""
    if isinstance(requests, (Request, str, Mapping)) or not isinstance(requests, Iterable):
        got = "one; put it in a list" if isinstance(requests, Request) else type(requests).__name__
        raise TypeError(f"generate: requests must be a list of Requests, got {got}")
    if on_error not in ("raise", "return"):
        raise ValueError(f'generate: on_error must be "raise" or "return", got {shown(on_error)}')
    if settings.bank is not None and not isinstance(settings.bank, Mapping):
        raise TypeError(f"generate: bank must be a ConceptBank or a mapping, got {type(settings.bank).__name__}")
    if not isinstance(settings.limits, RequestLimits):
        raise TypeError(f"generate: limits must be a RequestLimits, got {type(settings.limits).__name__}")
    whole(max_batch, "generate: max_batch", 1, 2**31)
    whole(settings.num_inference_steps, "generate: num_inference_steps", 1, 2**31)
    fusion = settings.fusion
    if settings.max_regions is not None:
        whole(settings.max_regions, "generate: max_regions", 1, LIMIT)
    given = settings.options
    clash = sorted(_PER_REQUEST & {*given, *(given.get("cross_attention_kwargs") or {})})
    if clash:
        raise TypeError(
            f"generate: {clash[0]} belongs to each Request, or is made of it; it cannot be given to the call"
        )
    requests = list(requests)
    if not hasattr(pipe, "unet"):
        return requests
    if fusion is not None and fusion.width != pipe.unet.config.cross_attention_dim:
        raise ValueError(
            f"generate: fusion must be as wide as the text, {pipe.unet.config.cross_attention_dim}, got {fusion.width}"
        )
    lengths, count = settings.image_lengths, len(adapters(pipe.unet))
    for each in () if lengths is None else listed(lengths, "generate: image_lengths", count):
        for tokens in listed(each, "generate: image_lengths of an IP-Adapter"):
            whole(tokens, "generate: image_lengths", 1)
    return requests
