"""Image prompts: what a request says, what a row of the batch carries, and the streams a layer attends to."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from PIL import Image
from torch import Tensor

from keylock_diffusers.processors import IPAdapterCrossAttnProcessor
from keylock_diffusers.processors.images import resize_masks


@dataclass(frozen=True)
class ImagePrompt:
    """One image prompt of a request: a picture, or several that are attended to together, under one softmax.

    Args:
        image: a picture, or a list of them, as the pipeline's image encoder takes it.
        embeds: instead of `image`, encodings [n, D] or [n, S, D] of n pictures (FaceID: n faces).
        negative_embeds: of the unconditional half, of the same shape; default zeros.
        clip_embeds: CLIP encodings [n, S, D] of the faces, for FaceID-Plus adapters.
        negative_clip_embeds: of the unconditional half, of the same shape; default zeros.
        scale: how much the image counts: a number, or diffusers' dict of numbers per block (InstantStyle).
        region: where it counts, a picture in greys or a tensor [height, width] of weights; default everywhere.
        start: the share of the steps before it is switched on; a step counts where it starts.
        end: the share of the steps by whose end it is switched off.
        adapter: which of the loaded adapters.

    Paper: Ye et al., IP-Adapter, arXiv 2308.06721.
    """

    image: Any = None
    embeds: Tensor | None = None  # [n, D] or [n, S, D]
    negative_embeds: Tensor | None = None  # as embeds
    clip_embeds: Tensor | None = None  # [n, S, D]
    negative_clip_embeds: Tensor | None = None  # as clip_embeds
    scale: float | Mapping[str, Any] = 1.0
    region: Any = None  # [height, width]
    start: float = 0.0
    end: float = 1.0
    adapter: int = 0


@dataclass(frozen=True, eq=False)
class ImageUse:
    """One image prompt in one row of the U-Net's batch."""

    tokens: Tensor  # [L, D], projected
    scale: float | Mapping[str, float] = 1.0  # a number, or one per layer's name or its beginning; elsewhere 0
    region: Tensor | None = None  # [height, width]
    start: float = 0.0
    end: float = 1.0
    adapter: int = 0

    def scale_of(self, layer: str) -> float:
        if not isinstance(self.scale, Mapping):
            return float(self.scale)
        found = 0.0
        for name, number in self.scale.items():
            if layer.startswith(name):
                found = float(number)
        return found

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts in a step: diffusers' rule for ControlNets."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


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
        raise ValueError("give either image or embeds of an image prompt")
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
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} of an image prompt must be a floating-point tensor, got {got}")
        if tensor.ndim not in (2, 3) or not len(tensor):
            raise ValueError(f"{name} of an image prompt must be [n, D] or [n, S, D], got {list(tensor.shape)}")
    for name in ("embeds", "clip_embeds"):
        given, negative = encodings.get(name), encodings.get(f"negative_{name}")
        if negative is not None and (given is None or given.shape != negative.shape):
            shape = "absent" if given is None else str(list(given.shape))
            raise ValueError(
                f"negative_{name} of an image prompt must be {shape}, as {name}, got {list(negative.shape)}"
            )
    face_plus = isinstance(layers[prompt.adapter], IPAdapterFaceIDPlusImageProjection)
    if face_plus and len(encodings.get("clip_embeds", ())) != len(encodings.get("embeds", (0,))):
        raise ValueError("a FaceID-Plus adapter needs embeds and clip_embeds of as many faces in each image prompt")
    if not face_plus and "clip_embeds" in encodings:
        raise ValueError("clip_embeds of an image prompt belong to FaceID-Plus adapters")
    _expanded(prompt.scale, unet)
    for name in ("start", "end"):
        number = getattr(prompt, name)
        if not _is_number(number) or not 0 <= number <= 1:
            raise ValueError(f"{name} of an image prompt must lie in [0, 1], got {number!r}")
    _region(prompt.region)


def adapters(unet: Any) -> list[Any]:
    """The image projections of a U-Net's IP-Adapters."""
    projection = getattr(unet, "encoder_hid_proj", None)
    return list(projection.image_projection_layers) if isinstance(projection, MultiIPAdapterImageProjection) else []


class ImageEncoder:
    """Turns image prompts into rows' image tokens; each prompt is encoded and projected once, and by itself.

    By itself, because a row must not depend on how many images its neighbours have.
    """

    def __init__(self, pipe: Any, unet: Any) -> None:
        self._pipe, self._unet = pipe, unet
        self._done: dict[int, tuple[ImagePrompt, ImageUse, ImageUse]] = {}

    @torch.no_grad()
    def uses(self, prompt: ImagePrompt) -> tuple[ImageUse, ImageUse]:
        """What a row of the conditional and a row of the unconditional half carry for one image prompt.

        Raises:
            TypeError, ValueError: the pipeline cannot encode the image, or the encodings do not fit the adapter.
        """
        if id(prompt) not in self._done:  # the entry holds the prompt, so that its id stays its own
            projection = adapters(self._unet)[prompt.adapter]
            embeds, negative = self._encodings(prompt, projection)
            use = ImageUse(
                self._project(projection, embeds, prompt.clip_embeds),
                _expanded(prompt.scale, self._unet),
                _region(prompt.region),
                float(prompt.start),
                float(prompt.end),
                prompt.adapter,
            )
            clip = _or_zeros(prompt.negative_clip_embeds, prompt.clip_embeds)
            self._done[id(prompt)] = prompt, use, replace(use, tokens=self._project(projection, negative, clip))
        return self._done[id(prompt)][1:]

    def _encodings(self, prompt: ImagePrompt, projection: Any) -> tuple[Tensor, Tensor]:
        if prompt.embeds is not None:
            return prompt.embeds, _or_zeros(prompt.negative_embeds, prompt.embeds)
        if getattr(self._pipe, "image_encoder", None) is None:
            raise ValueError("image of an image prompt needs the pipeline's image_encoder, which is not loaded")
        hidden = not isinstance(projection, ImageProjection)
        return self._pipe.encode_image(prompt.image, self._pipe._execution_device, 1, hidden)

    def _project(self, projection: Any, embeds: Tensor, clip: Tensor | None) -> Tensor:  # [L, D]
        device, dtype = self._pipe._execution_device, self._unet.dtype
        if clip is not None:  # FaceID-Plus reads it from itself: a copy of its own, sharing every weight
            projection = copy.copy(projection)
            projection.clip_embeds = clip.to(device, dtype)[None]
        try:
            tokens = projection(embeds.to(device, dtype))
        except RuntimeError as error:
            raise ValueError(
                f"an image prompt's encodings {list(embeds.shape)} do not fit its adapter: {error}"
            ) from error
        return tokens.flatten(0, -2)


class ImageRouting:
    """A batch's image prompts as streams with one layout, so that every layer attends to all of them in one call.

    A stream is an adapter and a place: row b's k-th image prompt of adapter a. Rows with fewer or shorter image
    prompts are padded with weight 0 and bias -inf, which is exactly nothing.

    Args:
        rows: per row of the U-Net's batch, its image prompts.
        lengths: per adapter, the tokens of each of its streams; default what `rows` needs. Given, every tensor has
            the same shape whatever the rows carry.

    Raises:
        ValueError: `rows` do not fit into `lengths`.
    """

    def __init__(self, rows: Sequence[Sequence[ImageUse]], lengths: Sequence[Sequence[int]] | None = None) -> None:
        self.fixed = lengths is not None
        count = max([use.adapter + 1 for row in rows for use in row], default=0)
        count = max(count, len(lengths or ()))
        # A row's k-th longest prompt takes the k-th longest place: least padding, always the same order of sums.
        ranked = [
            [sorted((u for u in row if u.adapter == a), key=lambda u: -len(u.tokens)) for a in range(count)]
            for row in rows
        ]
        if lengths is None:
            lengths = [
                [max(len(uses[k].tokens) for uses in column if k < len(uses)) for k in range(max(map(len, column)))]
                for column in zip(*ranked, strict=True)
            ]
        places = [tuple(sorted(given, reverse=True)) for given in lengths]
        self.lengths = tuple(places + [()] * (count - len(places)))
        for uses in ranked:
            for adapter, own in enumerate(uses):
                _check_room(own, self.lengths[adapter], adapter)
        self._uses: list[list[list[ImageUse | None]]] = [
            [[*own, *[None] * (len(room) - len(own))] for own, room in zip(uses, self.lengths, strict=True)]
            for uses in ranked
        ]

    @property
    def flat_lengths(self) -> tuple[int, ...]:
        return tuple(length for places in self.lengths for length in places)

    @property
    def scheduled(self) -> bool:
        return any(use.start > 0 or use.end < 1 for row in self._flat() for use in row if use is not None)

    @property
    def per_pixel(self) -> bool:
        """Whether weights differ between pixels; always where the layout is fixed, so that shapes do not change."""
        return self.fixed or any(use.region is not None for row in self._flat() for use in row if use is not None)

    def tokens(self, adapter: int, like: Tensor, width: int) -> Tensor:  # [B, sum(L_a), D]
        """The tokens of one adapter's streams, zeros where a row has none."""
        rows = []
        for uses in self._uses:
            pieces = []
            for use, length in zip(uses[adapter], self.lengths[adapter], strict=True):
                here = like.new_zeros(length, width)
                if use is not None:
                    if use.tokens.shape[1] != width:
                        raise ValueError(
                            f"Personalization: image tokens of adapter {adapter} must be [L, {width}], "
                            f"got {list(use.tokens.shape)}"
                        )
                    here[: len(use.tokens)] = use.tokens.to(here)
                pieces.append(here)
            rows.append(torch.cat(pieces))
        return torch.stack(rows)

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:  # [B, sum(L)]
        """0 for a token, -inf for padding; None where nothing is padded and the layout is not fixed."""
        bias = torch.full((len(self._uses), sum(self.flat_lengths)), -torch.inf, dtype=dtype)
        for row, uses in enumerate(self._flat()):
            start = 0
            for use, length in zip(uses, self.flat_lengths, strict=True):
                if use is not None:
                    bias[row, start : start + len(use.tokens)] = 0
                start += length
        return bias if self.fixed or bias.isinf().any() else None

    def scale_pattern(self, layer: str) -> tuple[float, ...]:
        """The scale of every image prompt in a layer; layers with the same pattern have the same weights."""
        return tuple(0.0 if use is None else use.scale_of(layer) for row in self._flat() for use in row)

    def scales(self, layer: str, step: int, steps: int) -> tuple[tuple[float, ...], ...]:  # [B][I]
        """What each stream of each row counts in a layer and a step; 0 for a stream that a row does not have."""
        return tuple(
            tuple(use.scale_of(layer) if use is not None and use.active(step, steps) else 0.0 for use in row)
            for row in self._flat()
        )

    def masks(self, pixels: int, dtype: torch.dtype) -> Tensor:  # [B, I, N]
        """Every stream's region at one resolution; ones where it has none."""
        resized: dict[int, Tensor] = {}
        rows = []
        for row in self._flat():
            here = []
            for use in row:
                region = None if use is None else use.region
                if region is None:
                    here.append(torch.ones(pixels, dtype=dtype))
                    continue
                if id(region) not in resized:
                    resized[id(region)] = resize_masks(region.cpu()[None], pixels)[0].to(dtype)
                here.append(resized[id(region)])
            rows.append(torch.stack(here))
        return torch.stack(rows)

    def _flat(self) -> list[list[ImageUse | None]]:
        return [[use for places in row for use in places] for row in self._uses]


def projected_images(
    attn: Any,
    tokens: Sequence[Tensor | None],  # per adapter [B, sum(L_a), D]
) -> tuple[Tensor, Tensor]:  # [B, sum(L), C] each
    """One layer's keys and values of a batch's image tokens: one product per adapter for all rows and images.

    Raises:
        ValueError: the layer has no IP-Adapter's processor of ours, or another number of adapters.
    """
    processor = attn.processor
    if not isinstance(processor, IPAdapterCrossAttnProcessor) or len(processor.to_k_ip) < len(tokens):
        raise ValueError(
            f"Personalization: image prompts need a layer with {len(tokens)} IP-Adapters and keylock_diffusers' "
            f"processor, got {type(processor).__name__}; call keylock_diffusers.install(pipe) after load_ip_adapter"
        )
    sides = []
    for modules in (processor.to_k_ip, processor.to_v_ip):
        parts = [module(given) for module, given in zip(modules, tokens, strict=False) if given is not None]
        sides.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return sides[0], sides[1]


def _check_room(uses: list[ImageUse], places: tuple[int, ...], adapter: int) -> None:
    """One row's uses of an adapter fit into its places, both longest first."""
    if len(uses) > len(places):
        raise ValueError(
            f"image_lengths has {len(places)} streams for adapter {adapter}, but a row has {len(uses)} image prompts"
        )
    for use, length in zip(uses, places, strict=False):
        if len(use.tokens) > length:
            raise ValueError(
                f"image_lengths {list(places)} of adapter {adapter} have no place for an image prompt of "
                f"{len(use.tokens)} tokens"
            )


def _expanded(scale: Any, unet: Any) -> float | dict[str, float]:
    """A number, or a number per block's name, from what set_ip_adapter_scale takes."""
    if _is_number(scale):
        return float(scale)
    if not isinstance(scale, Mapping):
        raise ValueError(f"scale of an image prompt must be a finite number or a dict per block, got {scale!r}")
    (expanded,) = _maybe_expand_lora_scales(unet, [dict(scale)], default_scale=0.0)
    wrong = [number for number in expanded.values() if not _is_number(number)]
    if wrong:
        raise ValueError(f"scale of an image prompt must hold finite numbers, got {wrong[0]!r}")
    return expanded


def _or_zeros(negative: Any, positive: Any) -> Any:
    return torch.zeros_like(positive) if negative is None and positive is not None else negative


def _region(region: Any) -> Tensor | None:  # [height, width] float32
    if region is None:
        return None
    if isinstance(region, Image.Image):
        region = torch.from_numpy(np.asarray(region.convert("L"), dtype=np.float32) / 255)
    if isinstance(region, np.ndarray):
        region = torch.from_numpy(region)
    if not isinstance(region, Tensor):
        raise TypeError(f"region of an image prompt must be a picture or a tensor, got {type(region).__name__}")
    if region.ndim != 2 or not region.numel():
        raise ValueError(f"region of an image prompt must be [height, width], got {list(region.shape)}")
    if not region.is_floating_point():
        region = region.float() / (255 if region.dtype == torch.uint8 else 1)
    if not region.isfinite().all():
        raise ValueError("region of an image prompt must be finite numbers")
    return region.float()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
