"""Swapping processors in and out, leaving no trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn

from keylock_diffusers.denoisers.projections import projections
from keylock_diffusers.denoisers.unet import (
    attention_modules,
    cross_attention_layers,
    is_plain,
    text_encoders,
    uncompiled,
    unet_of,
)
from keylock_diffusers.processors.attention import (
    CrossAttnProcessor,
    IPAdapterCrossAttnProcessor,
    SelfAttnProcessor,
)
from keylock_diffusers.processors.images import PreparedImageProjection
from keylock_diffusers.processors.routed import is_routed, route, unroute

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Plain attention whichever way it is computed: these can be replaced without changing a picture.
_REPLACEABLE = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor)
_IP_ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
_CROSS = (CrossAttnProcessor, IPAdapterCrossAttnProcessor)
_OURS = (*_CROSS, SelfAttnProcessor)


def install(pipe: T) -> T:
    """Replaces a pipeline's attention processors by ours; a drop-in that changes no picture by itself.

    The linear layers and convolutions of the U-Net and of the text encoders keep their classes and weights, and are
    given forwards of ours, through which rows' LoRAs reach them.

    A loaded IP-Adapter stays loaded: ours use its weights and scales. Layers whose processor or module does more (added
    key and value projections, one shared set of key heads, somebody's own processor) keep what they have, and one
    warning names them. Calling it again changes nothing, unless diffusers replaced processors in between, as
    `load_ip_adapter` and `unload_ip_adapter` do: then those are replaced again.

    Args:
        pipe: a diffusers pipeline with a ``unet``, or the U-Net itself.

    Returns:
        `pipe`, for chaining.

    Raises:
        TypeError: there is no U-Net in `pipe`.

    Example:
        >>> import keylock_diffusers as kd  # doctest: +SKIP
        >>> pipe = kd.install(StableDiffusionPipeline.from_pretrained(path))  # doctest: +SKIP
    """
    unet = unet_of(pipe)
    cross = {id(attn) for attn in cross_attention_layers(unet).values()}
    kept = []
    for name, attn in attention_modules(unet).items():
        processor = attn.processor
        if isinstance(processor, _OURS):
            if isinstance(processor, _CROSS):
                processor.layer = name  # a processor that was moved by hand
            continue
        made = replacement(name, attn) if id(attn) in cross else None
        if made is not None:
            attn.set_processor(made)
        elif type(processor) not in _REPLACEABLE or not is_plain(attn):
            kept.append(f"{name} ({type(processor).__name__})")
        elif not attn.is_cross_attention and attn.scale_qk:
            attn.set_processor(SelfAttnProcessor(processor))
    projection = getattr(unet, "encoder_hid_proj", None)
    if type(projection) is MultiIPAdapterImageProjection:
        unet.encoder_hid_proj = PreparedImageProjection(projection)
    for model in _routed_models(pipe):
        route(projections(model))
    if kept:
        logger.warning("install: %d attention layers keep their processor: %s", len(kept), _shorten(kept))
    return pipe


def uninstall(pipe: T) -> T:
    """Puts back exactly the processors and forwards that `install` replaced; anything else stays as it is.

    Args:
        pipe: what `install` was given.

    Returns:
        `pipe`.

    Raises:
        TypeError: there is no U-Net in `pipe`.
    """
    unet = unet_of(pipe)
    for attn in attention_modules(unet).values():
        processor = attn.processor
        if isinstance(processor, _OURS):
            original = processor.original
            if isinstance(processor, IPAdapterCrossAttnProcessor):
                original.scale = processor.scale
            # diffusers makes self-attention processors anew in load_ip_adapter; such a one replaced nothing.
            attn.set_processor(AttnProcessor2_0() if original is None else original)
    projection = getattr(unet, "encoder_hid_proj", None)
    if isinstance(projection, PreparedImageProjection):
        unet.encoder_hid_proj = projection.original
    for model in _routed_models(pipe):
        unroute(projections(model).values())
    return pipe


def _routed_models(pipe: Any) -> list[Any]:
    return [unet_of(pipe), *(uncompiled(encoder.model) for encoder in text_encoders(pipe))]


def replacement(layer: str, attn: Attention) -> CrossAttnProcessor | IPAdapterCrossAttnProcessor | None:
    """The processor of ours that can stand in for the one a cross-attention layer has; None if none can."""
    processor = attn.processor
    if not is_plain(attn):
        return None
    if type(processor) in _IP_ADAPTERS:
        return IPAdapterCrossAttnProcessor(layer, processor)
    return CrossAttnProcessor(layer, processor) if type(processor) in _REPLACEABLE else None


def verify(pipe: Any) -> None:
    """Checks that every text cross-attention layer has our processor.

    Raises:
        RuntimeError: one has not; the message names the layer and what it has.
    """
    for name, attn in cross_attention_layers(unet_of(pipe)).items():
        if not isinstance(attn.processor, _CROSS):
            held = f"{name} has the processor {type(attn.processor).__name__}, which cannot personalise"
            raise RuntimeError(f"{held}; {_remedy(name, attn)}")
        attn.processor.layer = name


def verify_routes(modules: Mapping[str, nn.Module], wanted: Iterable[str]) -> None:
    """Checks that projections which LoRAs change have a forward of ours.

    Args:
        modules: a model's projections by name.
        wanted: the names of those that are changed.

    Raises:
        RuntimeError: one has not.
    """
    missing = [name for name in wanted if not is_routed(modules[name])]
    if missing:
        raise RuntimeError(
            f"LoRAs cannot reach {_shorten(missing)}: call keylock_diffusers.install(pipe) after anything that "
            "replaces modules or their forwards"
        )


def _remedy(layer: str, attn: Attention) -> str:
    """What to do about a layer that does not have our processor."""
    if replacement(layer, attn) is not None:
        return "call keylock_diffusers.install(pipe) after anything that sets processors"
    if getattr(attn, "fused_projections", False):
        return "call pipe.unfuse_qkv_projections(), then keylock_diffusers.install(pipe)"
    if not is_plain(attn):
        return "its heads share keys and values, which generate does not know"
    return (
        "install keeps it, since it does more than plain attention: take off what set it, or give this layer an "
        "AttnProcessor2_0 with set_processor, then call keylock_diffusers.install(pipe)"
    )


def _shorten(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
