"""Image prompts of requests: what they say, the checks, and their encoding into image tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
)
from torch import Tensor

from keylock_diffusers.checks import floats, number, reason_of, whole
from keylock_diffusers.denoisers.neighbours import loading
from keylock_diffusers.denoisers.unet import adapters
from keylock_diffusers.encoding.blocks import factors
from keylock_diffusers.encoding.pictures import for_image_encoder
from keylock_diffusers.masks import region_mask
from keylock_diffusers.pictures import PictureLimits
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
    whole(prompt.adapter, "adapter of an image prompt", 0, len(layers) - 1)
    if (prompt.image is None) == (prompt.embeds is None):
        got = "none of them" if prompt.image is None else "both"
        raise ValueError(f"give either image or embeds of an image prompt, got {got}")
    encodings: dict[str, Any] = {
        name: getattr(prompt, name) for name in ("embeds", "negative_embeds", "clip_embeds", "negative_clip_embeds")
    }
    encodings = {name: tensor for name, tensor in encodings.items() if tensor is not None}
    if prompt.image is not None and encodings:
        raise ValueError(f"{next(iter(encodings))} of an image prompt cannot be given beside image")
    flat = isinstance(layers[prompt.adapter], _FLAT)
    for name, tensor in encodings.items():
        shape = list(floats(tensor, f"{name} of an image prompt").shape)
        wanted = 2 if flat and "clip" not in name else 3
        if len(shape) != wanted:
            hint = ""
            if len(shape) == wanted + 1 and shape[0] == 2 and "negative" not in name:
                hint = "; diffusers' own have the negative first: give held[1], and held[0] as the negative ones"
            form = "[n, D]" if wanted == 2 else "[n, S, D]"
            raise ValueError(f"{name} of an image prompt must be {form} for this adapter, got {shape}{hint}")
    for name in ("embeds", "clip_embeds"):
        given, negative = encodings.get(name), encodings.get(f"negative_{name}")
        if negative is not None and (given is None or given.shape != negative.shape):
            wanted_shape = "absent" if given is None else str(list(given.shape))
            raise ValueError(
                f"negative_{name} of an image prompt must be {wanted_shape}, as {name}, got {list(negative.shape)}"
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
    _scale(prompt.scale, unet)
    for name in ("start", "end"):
        number(getattr(prompt, name), f"{name} of an image prompt", 0, 1)


# Adapters that read one vector a picture; the others read hidden states.
_FLAT = (ImageProjection, IPAdapterFaceIDImageProjection, IPAdapterFaceIDPlusImageProjection)


class ImageEncoder:
    """Turns image prompts into rows' image tokens; each prompt is encoded and projected once, and by itself.

    By itself, because a row must not depend on how many images its neighbours have.
    """

    def __init__(self, pipe: Any, unet: Any, limits: PictureLimits = PictureLimits()) -> None:
        self._pipe, self._unet, self._limits = pipe, unet, limits
        # The entries hold their prompts and masks, so that an id stays its own.
        self._encoded: dict[int, tuple[ImagePrompt, tuple[Tensor, Tensor]]] = {}
        self._regions: dict[int, tuple[Any, Tensor]] = {}
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
        # Whatever a picture, an image encoder or a projection raises, the request fails alone.
        except Exception as error:
            what = "image" if prompt.embeds is None else f"embeds {list(prompt.embeds.shape)}"
            raise ValueError(
                f"{what} of an image prompt cannot be encoded by adapter {prompt.adapter}: {reason_of(error)}"
            ) from error
        other = self._uses.get((id(prompt), not negative))
        if other is not None:  # one region for both halves, so that it is resized once
            self._uses[key] = replace(other, tokens=tokens)
        else:
            self._uses[key] = ImageUse(
                tokens,
                _scale(prompt.scale, self._unet),
                self._region(prompt.region),
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
        image = for_image_encoder(prompt.image, "image of an image prompt", self._limits)
        return self._pipe.encode_image(image, self._pipe._execution_device, 1, hidden)

    def _region(self, region: Any) -> Tensor | None:  # [height, width] float32
        if region is None:
            return None
        if id(region) not in self._regions:  # where several prompts have one mask, it is resized once for all
            self._regions[id(region)] = region, region_mask(region, "region of an image prompt", self._limits)
        return self._regions[id(region)][1]

    def _project(self, projection: Any, embeds: Tensor, clip: Tensor | None) -> Tensor:  # [L, D]
        with loading(self._unet, emptied=True) as bring:
            bring("encoder_hid_proj")
            device, dtype = next(projection.parameters()).device, self._unet.dtype
            if device.type == "meta":  # sequential offloading: hooks move inputs to where the weights will be
                device = self._pipe._execution_device
            if clip is not None:  # FaceID-Plus reads it from itself: a copy of its own, sharing every weight
                projection = copy.copy(projection)
                projection.clip_embeds = clip.to(device, dtype)[None]
            return projection(embeds.to(device, dtype)).flatten(0, -2)


def _scale(scale: Any, unet: Any) -> float | dict[str, float]:
    return factors(scale, unet, "scale of an image prompt", default=0.0)


def _or_zeros(negative: Any, positive: Any) -> Any:
    return torch.zeros_like(positive) if negative is None and positive is not None else negative
