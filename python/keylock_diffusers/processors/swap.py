"""Swapping processors in and out, leaving no trace."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from keylock_diffusers.concepts import cross_attention_layers
from keylock_diffusers.processors.attention import CrossAttnProcessor, SelfAttnProcessor

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Plain attention whichever way it is computed: these can be replaced without changing a picture.
_REPLACEABLE = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor)
_OURS = (CrossAttnProcessor, SelfAttnProcessor)


def install(pipe: T) -> T:
    """Replaces a pipeline's attention processors by ours; a drop-in that changes no picture by itself.

    Layers whose processor or module does more than plain attention (an IP-Adapter's, added key and value
    projections, one shared set of key heads) keep what they have, and one warning names them. Calling it again
    changes nothing, unless diffusers replaced processors in between: then those are replaced again.

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
    for name, attn in _attention_modules(unet).items():
        processor = attn.processor
        if isinstance(processor, _OURS):
            if isinstance(processor, CrossAttnProcessor):
                processor.layer = name  # a processor that was moved by hand
            continue
        if type(processor) not in _REPLACEABLE or not _is_plain(attn):
            kept.append(f"{name} ({type(processor).__name__})")
        elif id(attn) in cross:
            attn.set_processor(CrossAttnProcessor(name, processor))
        elif not attn.is_cross_attention and attn.scale_qk:
            attn.set_processor(SelfAttnProcessor(processor))
    if kept:
        logger.warning("install: %d attention layers keep their processor: %s", len(kept), _shorten(kept))
    return pipe


def uninstall(pipe: T) -> T:
    """Puts back exactly the processors that `install` replaced; anything else stays as it is.

    Args:
        pipe: what `install` was given.

    Returns:
        `pipe`.

    Raises:
        TypeError: there is no U-Net in `pipe`.
    """
    for attn in _attention_modules(unet_of(pipe)).values():
        if isinstance(attn.processor, _OURS):
            # diffusers makes self-attention processors anew in load_ip_adapter; such a one replaced nothing.
            attn.set_processor(attn.processor.original or AttnProcessor2_0())
    return pipe


def verify(pipe: Any) -> None:
    """Checks that every text cross-attention layer has our processor.

    Raises:
        RuntimeError: one has not; the message names the layer and what it has.
    """
    for name, attn in cross_attention_layers(unet_of(pipe)).items():
        if not isinstance(attn.processor, CrossAttnProcessor):
            raise RuntimeError(
                f"{name} has the processor {type(attn.processor).__name__}, which cannot personalise; "
                "call keylock_diffusers.install(pipe) after anything that sets processors"
            )
        attn.processor.layer = name


def unet_of(pipe: Any) -> nn.Module:
    """The U-Net of a pipeline, or the U-Net itself."""
    unet = getattr(pipe, "unet", pipe)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module) or not hasattr(unet, "attn_processors"):
        raise TypeError(f"pipe must be a pipeline with a U-Net or a U-Net, got {type(pipe).__name__}")
    return unet


def _attention_modules(unet: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def _is_plain(attn: Attention) -> bool:
    return attn.added_kv_proj_dim is None and attn.inner_kv_dim == attn.inner_dim


def _shorten(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
