"""A batch's image prompts as the streams that every layer attends to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.masks import resize_masks
from keylock_diffusers.processors.attention import IPAdapterCrossAttnProcessor
from keylock_diffusers.processors.contract import ImageStreams
from keylock_diffusers.routing.buffers import filled, filled_pairs
from keylock_diffusers.routing.rows import ImageUse
from keylock_kernels.ops.precision import accumulate_dtype


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

    def place(self, row: int, use: ImageUse) -> range:
        """Where the tokens of one of a row's image prompts stand."""
        first = 0
        for held, length in zip(self._rows[row], self.flat_lengths, strict=True):
            if held is use:
                return range(first, first + len(use.tokens))
            first += length
        raise ValueError("Personalization: the row has no such image prompt")

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:  # [B, sum(L)]
        """0 for a token, -inf for padding; None where nothing is padded and the layout is not fixed."""
        padding = self.places() == sum(len(use.tokens) for use in self.uses)
        if not self.fixed and not padding.any():
            return None
        return torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -torch.inf)

    def scale_pattern(self, layer: str) -> tuple[float, ...]:
        """The scale of every image prompt in a layer; layers with the same pattern have the same weights."""
        return tuple(0.0 if use is None else use.scale_of(layer) for row in self._rows for use in row)

    def scales(
        self, layer: str, steps: Sequence[tuple[int, int]], factors: Mapping[int, float] = MappingProxyType({})
    ) -> tuple[tuple[float, ...], ...]:  # [B][I]
        """What each stream of each row counts in a layer, the rows each in a (step, of how many); 0 for none."""

        def scale(use: ImageUse | None, at: tuple[int, int]) -> float:
            if use is None or not use.active(*at):
                return 0.0
            return use.scale_of(layer) * factors.get(use.adapter, 1.0)

        return tuple(tuple(scale(use, at) for use in row) for row, at in zip(self._rows, steps, strict=True))

    def active(self, steps: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
        """Which image prompts count, the rows each in a (step, of how many)."""
        return tuple(
            use.active(*at) for row, at in zip(self._rows, steps, strict=True) for use in row if use is not None
        )

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


class ImageBuffers:
    """The image streams of a batch's layers, in tensors that stay where they are from batch to batch."""

    def __init__(self) -> None:
        self._routing = ImageRouting([])
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}  # keys and values of each layer
        self._bias: Tensor | None = None
        self._groups: dict[str, int] = {}  # of each layer
        self._layer_of: dict[int, str] = {}  # one of each group
        self._weights: dict[tuple[int, int], Tensor] = {}  # by group and pixels, 0 for weights without them
        self._masks: dict[int, Tensor] = {}
        self._factors: Mapping[int, float] = {}  # per adapter

    def assign(self, routing: ImageRouting) -> None:
        """Other image prompts, which count what they say; `prepare` must follow."""
        self._routing, self._factors = routing, {}

    def prepare(
        self,
        projected: Mapping[str, tuple[Tensor, Tensor]],
        like: Tensor,
        sizes: Mapping[str, tuple[int, int]],
        steps: Sequence[tuple[int, int]],
    ) -> None:
        """Fills what layers read.

        Args:
            projected: each layer's keys and values.
            like: a tensor of the device and dtype that they are in.
            sizes: height and width of each layer, where they are known.
            steps: the rows' own, as `ImageRouting.scales` takes them.
        """
        routing = self._routing
        if not routing.flat_lengths:
            self._pairs, self._weights, self._groups, self._masks, self._bias = {}, {}, {}, {}, None
            return
        self._pairs = filled_pairs(self._pairs, projected)
        dtype = accumulate_dtype(like.dtype)
        bias = routing.key_bias(dtype)
        self._bias = None if bias is None else filled(self._bias, bias.to(like.device))
        # Layers whose streams count equally share their weights, but never where that could change between users.
        patterns = {name: name if routing.fixed else routing.scale_pattern(name) for name in projected}
        numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns.values()))}
        self._groups = {name: numbers[pattern] for name, pattern in patterns.items()}
        self._layer_of = {group: name for name, group in self._groups.items()}
        by_pixels = {math.prod(size): size for size in sizes.values()}
        resolutions = {name: math.prod(size) for name, size in sizes.items()}
        if not routing.per_pixel:
            resolutions = dict.fromkeys(projected, 0)
        wanted = {(self._groups[name], pixels) for name, pixels in resolutions.items()}
        self._weights = {key: tensor for key, tensor in self._weights.items() if key in wanted}
        self._masks = {
            pixels: filled(self._masks.get(pixels), routing.masks(pixels, by_pixels[pixels], dtype).to(like.device))
            for pixels in sorted({pixels for _, pixels in wanted} - {0})
        }
        for group, pixels in sorted(wanted):
            self._weigh(group, pixels, steps)

    def streams(self, layer: str, pixels: int, steps: Sequence[tuple[int, int]]) -> ImageStreams | None:
        """A layer's image tokens at a resolution of [N] pixels; None where no row has an image prompt.

        Raises:
            ValueError: regions were not prepared at this resolution, and the step is being compiled.
        """
        if layer not in self._pairs:
            return None
        group = self._groups[layer]
        at = pixels if self._routing.per_pixel else 0
        if (group, at) not in self._weights:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"Personalization: no regions were prepared for {pixels} pixels; give prepare the latent_size"
                )
            self._weigh(group, at, steps)
        key, value = self._pairs[layer]
        return ImageStreams(key, value, self._routing.flat_lengths, self._weights[group, at], self._bias)

    def weigh(self, steps: Sequence[tuple[int, int]]) -> None:
        """What counts in these steps."""
        for group, pixels in list(self._weights):
            self._weigh(group, pixels, steps)

    def scale(self, factors: Mapping[int, float], steps: Sequence[tuple[int, int]]) -> None:
        """From now on the image prompts of an adapter count so many times what their rows say."""
        if factors != self._factors:
            self._factors = factors
            self.weigh(steps)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        bias = [] if self._bias is None else [self._bias]
        return [
            *(t for pair in self._pairs.values() for t in pair),
            *self._weights.values(),
            *self._masks.values(),
            *bias,
        ]

    def _weigh(self, group: int, pixels: int, steps: Sequence[tuple[int, int]]) -> None:
        """Fills the weights [B, I] (no pixels: [B, I, N] with them) of a group of layers."""
        like = next(iter(self._pairs.values()))[0]
        dtype = accumulate_dtype(like.dtype)
        scales = self._routing.scales(self._layer_of[group], steps, self._factors)
        weights = torch.tensor(scales, dtype=dtype).to(like.device)
        if pixels:
            if pixels not in self._masks:
                self._masks[pixels] = self._routing.masks(pixels, None, dtype).to(like.device)
            weights = weights[..., None] * self._masks[pixels]
        self._weights[group, pixels] = filled(self._weights.get((group, pixels)), weights)


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
