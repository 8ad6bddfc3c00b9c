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


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One image prompt of a request: a picture, or several that are attended to together, under one softmax.

    Args:
        image: a picture, or a list of them, as the pipeline's image encoder takes it.
        embeds: instead of `image`, encodings [n, D] or [n, S, D] of n pictures (FaceID: n faces).
        negative_embeds: of the unconditional half, of the same shape; default zeros. Adapters that read hidden states
            were trained with those of a black picture instead, which `image` takes by itself.
        clip_embeds: CLIP encodings [n, S, D] of the faces, for FaceID-Plus adapters.
        negative_clip_embeds: of the unconditional half, of the same shape; default zeros.
        scale: how much the image counts: a number, or diffusers' dict of numbers per block (InstantStyle).
        region: where it counts, a picture in greys or a tensor [height, width] of weights, which is stretched over the
            whole of what is drawn; default everywhere.
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
        except (
            Exception
        ) as error:  # whatever a picture, an image encoder or a projection raises: the request fails alone
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
        self._rows: list[list[ImageUse | None]] = [
            [
                use
                for own, room in zip(uses, self.lengths, strict=True)
                for use in [*own, *[None] * (len(room) - len(own))]
            ]
            for uses in ranked
        ]
        given = [use for row in self._rows for use in row if use is not None]
        self.uses = list({id(use): use for use in given}.values())  # each once
        self.flat_lengths = tuple(length for places in self.lengths for length in places)
        self.scheduled = any(use.start > 0 or use.end < 1 for use in self.uses)
        # Where the layout is fixed, always, so that shapes do not change.
        self.per_pixel = self.fixed or any(use.region is not None for use in self.uses)

    def places(self) -> Tensor:  # [B, sum(L)] int64
        """Where each row's keys stand in the tokens of all `uses` one after another; the place after is padding."""
        starts, total = {}, 0
        for given in self.uses:
            starts[id(given)] = total
            total += len(given.tokens)
        found = torch.full((len(self._rows), sum(self.flat_lengths)), total)
        for row, uses in enumerate(self._rows):
            first = 0
            for use, length in zip(uses, self.flat_lengths, strict=True):
                if use is not None:
                    found[row, first : first + len(use.tokens)] = torch.arange(len(use.tokens)) + starts[id(use)]
                first += length
        return found

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:  # [B, sum(L)]
        """0 for a token, -inf for padding; None where nothing is padded and the layout is not fixed."""
        padding = self.places() == sum(len(use.tokens) for use in self.uses)
        if not self.fixed and not padding.any():
            return None
        return torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -torch.inf)

    def scale_pattern(self, layer: str) -> tuple[float, ...]:
        """The scale of every image prompt in a layer; layers with the same pattern have the same weights."""
        return tuple(0.0 if use is None else use.scale_of(layer) for row in self._rows for use in row)

    def scales(self, layer: str, step: int, steps: int) -> tuple[tuple[float, ...], ...]:  # [B][I]
        """What each stream of each row counts in a layer and a step; 0 for a stream that a row does not have."""
        return tuple(
            tuple(use.scale_of(layer) if use is not None and use.active(step, steps) else 0.0 for use in row)
            for row in self._rows
        )

    def active(self, step: int, steps: int) -> tuple[bool, ...]:
        """Which image prompts count in a step."""
        return tuple(use.active(step, steps) for use in self.uses)

    def masks(self, pixels: int, size: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:  # [B, I, N]
        """Every stream's region at one resolution (see `resize_masks`); ones where it has none."""
        resized: dict[int, Tensor] = {}
        rows = []
        for row in self._rows:
            here = []
            for use in row:
                region = None if use is None else use.region
                if region is None:
                    here.append(torch.ones(pixels, dtype=dtype))
                    continue
                if id(region) not in resized:
                    resized[id(region)] = resize_masks(region.cpu()[None], pixels, size)[0].to(dtype)
                here.append(resized[id(region)])
            rows.append(torch.stack(here))
        return torch.stack(rows)


def projected_images(attn: Any, uses: Sequence[ImageUse], places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's keys and values of a batch's image tokens, [B, sum(L), C] each.

    Each image prompt is projected once, whatever the number of its rows, and by itself: how a product of several rounds
    may depend on their number.

    Args:
        attn: the layer.
        uses: the image prompts.
        places: int64 [B, sum(L)], which of their tokens stand where (see `ImageRouting.places`).
        like: a tensor of the device and dtype in which to project.

    Raises:
        ValueError: the layer has no processor of ours with all the adapters, or tokens of another width.
    """
    processor = attn.processor
    wanted = max((use.adapter + 1 for use in uses), default=0)
    if not isinstance(processor, IPAdapterCrossAttnProcessor) or len(processor.to_k_ip) < wanted:
        loaded = len(processor.to_k_ip) if isinstance(processor, IPAdapterCrossAttnProcessor) else 0
        raise ValueError(
            f"Personalization: image prompts need {wanted} IP-Adapters in each layer, got {loaded} and the processor "
            f"{type(processor).__name__}; call keylock_diffusers.install(pipe) after load_ip_adapter"
        )
    for use in uses:
        if use.tokens.ndim != 2 or use.tokens.shape[1] != processor.cross_attention_dim:
            raise ValueError(
                f"Personalization: image tokens must be [L, {processor.cross_attention_dim}], "
                f"got {list(use.tokens.shape)}"
            )

    def side(modules: Any) -> Tensor:
        parts = [modules[use.adapter](use.tokens.to(like)) for use in uses]
        return torch.cat([*parts, like.new_zeros(1, processor.hidden_size)])[places]

    return side(processor.to_k_ip), side(processor.to_v_ip)


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
        raise ValueError("region of an image prompt must hold finite numbers, got NaN or infinity")
    return region.float()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
