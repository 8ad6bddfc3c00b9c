"""Image prompts of requests: what they say, the checks, and their encoding into image tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.embeddings import ImageProjection, IPAdapterFaceIDPlusImageProjection
from torch import Tensor

from keylock_diffusers.denoisers.unet import adapters
from keylock_diffusers.masks import read_mask
from keylock_diffusers.requests import ImagePrompt
from keylock_diffusers.routing.rows import ImageUse


def check(prompt: Any, unet: Any) -> None:
    """Looks for mistakes that can be found without encoding anything.

    Raises:
        TypeError, ValueError: what is wrong, by the argument's name.
    """
    if not isinstance(prompt, ImagePrompt):
        raise TypeError(f"image_prompts must be ImagePrompt objects, got {type(prompt).__name__}")
    layers = adapters(unet)
    if not layers:
        raise ValueError("image_prompts need an IP-Adapter: call pipe.load_ip_adapter and keylock_diffusers.install")
    if isinstance(prompt.adapter, bool) or not isinstance(prompt.adapter, int) or not 0 <= prompt.adapter < len(layers):
        raise ValueError(f"adapter of an image prompt must be 0 to {len(layers) - 1}, got {prompt.adapter!r}")
    if (prompt.image is None) == (prompt.embeds is None):
        got = "none of them" if prompt.image is None else "both"
        raise ValueError(f"give either image or embeds of an image prompt, got {got}")
    encodings: dict[str, Any] = {
        name: getattr(prompt, name) for name in ("embeds", "negative_embeds", "clip_embeds", "negative_clip_embeds")
    }
    encodings = {name: tensor for name, tensor in encodings.items() if tensor is not None}
    if prompt.image is not None and encodings:
        raise ValueError(f"{next(iter(encodings))} of an image prompt cannot be given beside image")
    if isinstance(prompt.image, (list, tuple)) and not prompt.image:
        raise ValueError("image of an image prompt must hold at least one picture, got none")
    for name, tensor in encodings.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} of an image prompt must be a floating-point tensor, got {got}")
        forms = {3: "[n, S, D]"} if "clip" in name else {2: "[n, D]", 3: "[n, S, D]"}
        if tensor.ndim not in forms or not len(tensor):
            raise ValueError(
                f"{name} of an image prompt must be {' or '.join(forms.values())}, got {list(tensor.shape)}"
            )
    for name in ("embeds", "clip_embeds"):
        given, negative = encodings.get(name), encodings.get(f"negative_{name}")
        if negative is not None and (given is None or given.shape != negative.shape):
            shape = "absent" if given is None else str(list(given.shape))
            raise ValueError(
                f"negative_{name} of an image prompt must be {shape}, as {name}, got {list(negative.shape)}"
            )
    face_plus = isinstance(layers[prompt.adapter], IPAdapterFaceIDPlusImageProjection)
    faces = [len(encodings[name]) if name in encodings else 0 for name in ("embeds", "clip_embeds")]
    if face_plus and (faces[0] != faces[1] or not faces[0]):
        raise ValueError(
            f"a FaceID-Plus adapter needs embeds and clip_embeds of as many faces, got {faces[0]} and {faces[1]}"
        )
    if not face_plus and faces[1]:
        kind = type(layers[prompt.adapter]).__name__
        raise ValueError(f"clip_embeds of an image prompt belong to FaceID-Plus adapters, got one with {kind}")
    _expanded(prompt.scale, unet)
    for name in ("start", "end"):
        number = getattr(prompt, name)
        if not _is_number(number) or not 0 <= number <= 1:
            raise ValueError(f"{name} of an image prompt must lie in [0, 1], got {number!r}")
    _region(prompt.region)


class ImageEncoder:
    """Turns image prompts into rows' image tokens; each prompt is encoded and projected once, and by itself.

    By itself, because a row must not depend on how many images its neighbours have.
    """

    def __init__(self, pipe: Any, unet: Any) -> None:
        self._pipe, self._unet = pipe, unet
        # The entries hold their prompts, so that an id stays its own.
        self._encoded: dict[int, tuple[ImagePrompt, tuple[Tensor, Tensor]]] = {}
        self._uses: dict[tuple[int, bool], ImageUse] = {}

    @torch.no_grad()
    def use(self, prompt: ImagePrompt, *, negative: bool = False) -> ImageUse:
        """What a row of the conditional (or the unconditional) half carries for one image prompt.

        Raises:
            ValueError: the image cannot be encoded, or the encodings do not fit the adapter.
        """
        key = (id(prompt), negative)
        if key in self._uses:
            return self._uses[key]
        try:
            if id(prompt) not in self._encoded:
                self._encoded[id(prompt)] = prompt, self._encodings(prompt)
            embeds = self._encoded[id(prompt)][1][1 if negative else 0]
            clip = prompt.clip_embeds
            if negative and clip is not None:
                clip = _or_zeros(prompt.negative_clip_embeds, clip)
            tokens = self._project(adapters(self._unet)[prompt.adapter], embeds, clip)
        except torch.OutOfMemoryError:
            raise
        # Whatever a picture, an image encoder or a projection raises, the request fails alone.
        except Exception as error:
            what = "image" if prompt.embeds is None else f"embeds {list(prompt.embeds.shape)}"
            raise ValueError(
                f"{what} of an image prompt cannot be encoded by adapter {prompt.adapter}: {error}"
            ) from error
        other = self._uses.get((id(prompt), not negative))
        if other is not None:  # one region for both halves, so that it is resized once
            self._uses[key] = replace(other, tokens=tokens)
        else:
            self._uses[key] = ImageUse(
                tokens,
                _expanded(prompt.scale, self._unet),
                _region(prompt.region),
                float(prompt.start),
                float(prompt.end),
                prompt.adapter,
            )
        return self._uses[key]

    def _encodings(self, prompt: ImagePrompt) -> tuple[Tensor, Tensor]:
        if prompt.embeds is not None:
            return prompt.embeds, _or_zeros(prompt.negative_embeds, prompt.embeds)
        if getattr(self._pipe, "image_encoder", None) is None:
            raise ValueError("it needs the pipeline's image_encoder, which is not loaded")
        hidden = not isinstance(adapters(self._unet)[prompt.adapter], ImageProjection)
        return self._pipe.encode_image(prompt.image, self._pipe._execution_device, 1, hidden)

    def _project(self, projection: Any, embeds: Tensor, clip: Tensor | None) -> Tensor:  # [L, D]
        device, dtype = next(projection.parameters()).device, self._unet.dtype
        if device.type == "meta":  # sequential offloading: hooks move inputs to where the weights will be
            device = self._pipe._execution_device
        if clip is not None:  # FaceID-Plus reads it from itself: a copy of its own, sharing every weight
            projection = copy.copy(projection)
            projection.clip_embeds = clip.to(device, dtype)[None]
        return projection(embeds.to(device, dtype)).flatten(0, -2)


def _expanded(scale: Any, unet: Any) -> float | dict[str, float]:
    """A number, or a number per block's name, from what set_ip_adapter_scale takes."""
    if _is_number(scale):
        return float(scale)
    if not isinstance(scale, Mapping):
        raise ValueError(f"scale of an image prompt must be a finite number or a dict per block, got {scale!r}")
    try:
        (expanded,) = _maybe_expand_lora_scales(unet, [dict(scale)], default_scale=0.0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"scale of an image prompt must name this U-Net's blocks, got {scale!r}: {error}") from error
    wrong = [number for number in expanded.values() if not _is_number(number)]
    if wrong:
        raise ValueError(f"scale of an image prompt must hold finite numbers, got {wrong[0]!r}")
    return expanded


def _or_zeros(negative: Any, positive: Any) -> Any:
    return torch.zeros_like(positive) if negative is None and positive is not None else negative


def _region(region: Any) -> Tensor | None:  # [height, width] float32
    if region is None:
        return None
    what = "region of an image prompt"
    read = read_mask(region, what)
    if not read.any():
        raise ValueError(f"{what} must not be empty, got zeros alone")
    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
