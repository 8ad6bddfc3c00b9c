"""What one batch carries: each row's concepts, image prompts and regions, and the keys and values they give."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.denoisers.neighbours import loading
from keylock_diffusers.denoisers.unet import ProjectionState, cross_attention_layers, resolutions_of, unet_of
from keylock_diffusers.processors.contract import BOUND, Bound, ImageStreams, Kept
from keylock_diffusers.routing.buffers import filled, filled_pairs, version_of, versions_of
from keylock_diffusers.routing.concepts import ConceptRouting, Pairs
from keylock_diffusers.routing.images import ImageRouting, projected_images
from keylock_diffusers.routing.regions import RegionRouting
from keylock_diffusers.routing.rows import Row, TextLayout
from keylock_kernels.ops.precision import accumulate_dtype


class Personalization:
    """Different users' rows in one batch, passed as ``cross_attention_kwargs={"personalization": p}``.

    What `prepare` makes lies in buffers that later calls fill again where shapes are the same. With `image_lengths`,
    and a latent_size and a read_text of one length, longer than the text, given to `prepare`, they always are: a step
    that was compiled, or captured as a CUDA graph, then stays valid for other users (see `assign`).

    Args:
        rows: the denoiser's batch, row by row: unconditional rows, and repeated ones, are rows of their own.
        image_lengths: per adapter, the tokens of each image stream that a batch has room for; default as many as
            `rows` need. Given, all shapes are the same whatever the rows carry.

    Raises:
        ValueError: the rows' images do not fit into `image_lengths`.
    """

    def __init__(self, rows: Sequence[Row], *, image_lengths: Sequence[Sequence[int]] | None = None) -> None:
        self.kv: Pairs = {}
        self._spare: Pairs = {}  # buffers of the users before
        self._image_lengths = image_lengths
        self.image_kv: Pairs = {}
        self._image_bias: Tensor | None = None
        self._layer_of: dict[int, str] = {}  # one of each group
        self._image_groups: dict[str, int] = {}
        self._image_weights: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int, Tensor] = {}
        self._image_factors: dict[int, float] = {}  # per adapter
        self._sizes: dict[int, tuple[int, int]] = {}  # height and width, by number of pixels
        self._pixels_of: dict[str, int] = {}  # of each layer
        self._tokens = 0  # of one wording
        self._key_regions: Tensor | None = None
        self._query_regions: dict[int, Tensor] = {}
        self._phases: tuple[Pairs, Pairs] | None = None  # keys and values before and after the rows' starts
        self._sources: list[tuple[str, Any, int | None]] = []
        self._seen: tuple[Any, int | None] | None = None  # the text a layer was given last, and its version
        self._steps: list[tuple[int, int]] = []  # per row, its step and of how many
        self._text: Tensor | None = None
        self._made_with: ProjectionState | None = None  # what keys and values were made with
        self._again: tuple[Tensor, dict[str, Any]] | None = None  # what `prepare` was given
        self.assign(rows)

    def assign(self, rows: Sequence[Row]) -> Personalization:
        """Gives the batch to other users; `prepare` must follow and keeps the buffers whose shapes have not changed.

        Args, raises: as for the class.

        Returns:
            This object.
        """
        wrong = [row for row in rows if not isinstance(row, Row)]
        if wrong:
            raise TypeError(f"Personalization: rows must be Row objects, got {type(wrong[0]).__name__}")
        routing = ImageRouting([row.images for row in rows], self._image_lengths)
        self.rows = tuple(rows)
        self._concepts, self._routing = ConceptRouting(self.rows), routing
        self._regions = RegionRouting([row.regions for row in rows])
        self._image_factors = {}
        self._spare, self.kv = self.kv or self._spare, {}  # nothing can be read before `prepare`
        return self

    @torch.no_grad()
    def prepare(
        self,
        pipe: Any,
        text: Tensor,
        key_text: Tensor | None = None,
        *,
        read_text: Tensor | None = None,
        early_text: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        steps: int | Sequence[int] = 1,
        step: int | Sequence[int] = 0,
    ) -> Personalization:
        """Projects every layer's keys and values, which no timestep changes, once for the whole generation.

        Args:
            pipe: the pipeline or U-Net whose layers are projected.
            text: the encodings the U-Net is given, [B, T, D], a row each.
            key_text: what keys read where that differs (global key-locking), as `read_text`.
            read_text: what keys and values read where that is more than the U-Net is given, [B, T', D]: the text, and
                after it the wordings of regions that have their own. Default `text`.
            early_text: what rows read before their start, as `read_text`, their subjects' super-classes in the
                subjects' place; needed where one starts later than at 0.
            latent_size: (height, width) of the latents, which says at which resolutions regions are needed; without it
                they are resized when a layer first asks, which a compiled step cannot do.
            steps: of the generation, for what is switched on or off between steps; see `at_step`.
            step: the one that comes next.

        Returns:
            This object; a second call fills what the first one made.

        Raises:
            ValueError: the number of rows does not match, or the layers cannot hold what the rows carry.
        """
        given = {"text": text, "key_text": key_text, "read_text": read_text, "early_text": early_text}
        for name, tensor in given.items():
            if tensor is not None and (tensor.ndim != 3 or len(tensor) != len(self.rows)):
                raise ValueError(
                    f"Personalization.prepare: {name} must be [{len(self.rows)}, T, D], got {list(tensor.shape)}"
                )
        self._spare, self.kv = self.kv or self._spare, {}  # nor if this fails
        self._sources = versions_of(self._read(key_text))
        read_text = text if read_text is None else read_text
        key_text = read_text if key_text is None else key_text
        for name, other in (("key_text", key_text), ("early_text", early_text)):
            if other is not None and other.shape != read_text.shape:
                raise ValueError(
                    f"Personalization.prepare: {name} must be {list(read_text.shape)}, got {list(other.shape)}"
                )
        self._steps = self._each(step, steps)
        if self._concepts.scheduled and early_text is None:
            raise ValueError("Personalization.prepare: early_text is needed for rows that start later, got None")
        unet = unet_of(pipe)
        layers = cross_attention_layers(unet)
        self._made_with = ProjectionState(layers)
        options = {"read_text": read_text, "key_text": key_text, "early_text": early_text, "latent_size": latent_size}
        self._again = text, options
        self._tokens = text.shape[1]
        layout = TextLayout(self._tokens, read_text.shape[1] // self._tokens)
        projecting = [self._concepts.projecting(read_text, key_text, layout, early=False)]
        if early_text is not None and self._concepts.scheduled:
            projecting.append(self._concepts.projecting(early_text, early_text, layout, early=True))
        if self._routing.flat_lengths:
            places = self._routing.places().to(text.device)
            projecting.append(lambda _, attn: projected_images(attn, self._routing.uses, places, text))
        made: list[Pairs] = [{} for _ in projecting]
        with loading(unet) as bring:
            for name, attn in layers.items():
                bring(name)
                for pairs, project in zip(made, projecting, strict=True):
                    pairs[name] = project(name, attn)
        images = made.pop() if self._routing.flat_lengths else {}
        projected, self._phases = made[0], None
        if len(made) > 1:
            self._phases = made[1], made[0]
            projected = self._current()
        sizes = resolutions_of(unet, layers, latent_size)
        self._sizes = {math.prod(size): size for size in sizes.values()}
        self._pixels_of = {name: math.prod(size) for name, size in sizes.items()}
        self._prepare_images(images, text, sizes)
        self._prepare_regions(read_text)
        self._text = filled(self._text, text.clone())
        self._seen = weakref.ref(text), version_of(text)
        self.kv, self._spare = filled_pairs(self._spare, projected), {}
        return self

    def _current(self) -> Pairs:
        """Keys and values of the current step, each row's own of its two phases."""
        if self._phases is None:
            return self.kv
        early, late = self._phases
        device = next(iter(late.values()))[0].device
        waiting = torch.tensor(self._concepts.waiting(self._steps), device=device)[:, None, None]
        return {
            name: (torch.where(waiting, early[name][0], key), torch.where(waiting, early[name][1], value))
            for name, (key, value) in late.items()
        }

    @property
    def scheduled(self) -> bool:
        """Whether `at_step` must be called between steps."""
        return self._routing.scheduled or self._concepts.scheduled

    @torch.no_grad()
    def at_step(self, step: int | Sequence[int], steps: int | Sequence[int]) -> None:
        """Puts in place what counts in one step: image prompts by their start and end, rows' subjects by their start.

        A row's subjects count from the step s (from 0) on for which s / steps is at least its start, which is step
        (1 - alpha) * steps of FastComposer's paper; its code compares with <=, and starts one step later.

        Args:
            step: the step that comes next, from 0; one for all rows, or each row's own.
            steps: of the whole generation, likewise.
        """
        before, self._steps = self._steps, self._each(step, steps)
        if self._routing.active(before) != self._routing.active(self._steps):
            for group, pixels in list(self._image_weights):
                self._weigh(group, pixels)
        if self._concepts.waiting(before) != self._concepts.waiting(self._steps):
            self.kv = filled_pairs(self.kv, self._current())

    def _each(self, step: int | Sequence[int], steps: int | Sequence[int]) -> list[tuple[int, int]]:
        """Every row's (step, of how many)."""
        count = len(self.rows)
        each = [[given] * count if isinstance(given, int) else list(given) for given in (step, steps)]
        return list(zip(*each, strict=True))

    def outdated(self) -> bool:
        """Whether somebody changed the projections' weights or scales since keys and values were made."""
        return self._made_with is not None and self._made_with.changed()

    def remake(self, pipe: Any) -> None:
        """Makes keys and values again, of the same text, with the projections as they are now."""
        assert self._again is not None
        text, options = self._again
        at = list(zip(*self._steps, strict=True))
        self.prepare(pipe, text, **options, step=at[0], steps=at[1])

    def keys_and_values(self, layer: str, rows: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """A layer's prepared keys and values [B, T, C].

        Args:
            layer: the attention module's name.
            rows: the batch size the layer runs at.
            text: the encodings the layer was given. Their values are compared with what was prepared whenever they are
                another tensor than before, or were written to since; inside a compiled step they are not.

        Raises:
            ValueError: the batch differs from what was prepared, nothing was, or a concept, an image or a region was
                written to since.
        """
        if layer not in self.kv:
            raise ValueError(
                f"Personalization: nothing was prepared for layer {layer!r}; call prepare(pipe, text) first"
            )
        key, value = self.kv[layer]
        tokens = key.shape[1] if self._text is None else self._text.shape[1]
        if key.shape[0] != rows or (text is not None and text.shape[:2] != (rows, tokens)):
            raise ValueError(
                f"Personalization: prepared for {[len(key), tokens]} rows and tokens, but {layer} runs on {rows} rows"
                + ("" if text is None else f" with text {list(text.shape)}")
            )
        if self._text is not None and not torch.compiler.is_compiling():
            if layer == next(iter(self.kv)):
                self._check_sources()
            if text is not None:
                self._check_text(layer, text, self._text)
        return key, value

    def updates(self, projection: str) -> None:
        """Nothing: what rows add to keys and values is in those that are kept."""

    def image_streams(self, layer: str, pixels: int) -> ImageStreams | None:
        """A layer's prepared image tokens at a resolution of [N] pixels; None where no row has an image prompt.

        Raises:
            ValueError: regions were not prepared at this resolution, and the step is being compiled.
        """
        if layer not in self.image_kv:
            return None
        group = self._image_groups[layer]
        at = pixels if self._routing.per_pixel else 0
        if (group, at) not in self._image_weights:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"Personalization: no regions were prepared for {pixels} pixels; give prepare the latent_size"
                )
            self._weigh(group, at)
        key, value = self.image_kv[layer]
        return ImageStreams(key, value, self._routing.flat_lengths, self._image_weights[group, at], self._image_bias)

    def visibility(self, layer: str, pixels: int) -> tuple[Tensor, Tensor] | None:
        """Which regions a layer's [N] pixels lie in and its tokens are seen from; None where no row has a region.

        Returns:
            Bitfields int32 [B, N] and [B, T]: see `keylock_kernels.localized_attention`.

        Raises:
            ValueError: regions were not prepared at this resolution, and the step is being compiled, or the
                resolution cannot be told from the number of pixels.
        """
        if self._key_regions is None:
            return None
        if pixels not in self._query_regions:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"Personalization: no regions were prepared for {pixels} pixels; give prepare the latent_size"
                )
            self._query_regions[pixels] = self._bits(pixels, self._key_regions.device)
        return self._query_regions[pixels], self._key_regions

    def image_positions(self, row: int) -> list[range]:
        """Where the tokens of a row's image prompts stand among all its keys, which begin with the text's."""
        text = next(iter(self.kv.values()))[0].shape[1]
        return [
            range(text + places.start, text + places.stop)
            for use in self.rows[row].images
            for places in [self._routing.place(row, use)]
        ]

    @contextmanager
    def handed_out(self, layers: Mapping[str, Any]) -> Iterator[Bound]:
        """While it lasts, each layer's processor holds its own tensors; yields what layers are given as the batch.

        Needs the latent_size that `prepare` was given. It is for one step, since what counts may change between two.
        """
        try:
            for name, attn in layers.items():
                pixels = self._pixels_of[name]
                streams, visibility = self.image_streams(name, pixels), self.visibility(name, pixels)
                attn.processor.kept = Kept(*self.kv[name], streams, visibility)
            yield BOUND
        finally:
            for attn in layers.values():
                attn.processor.kept = None

    def scale_images(self, factors: Mapping[int, float]) -> None:
        """From now on the image prompts of an adapter count so many times what their rows say."""
        factors = {adapter: factor for adapter, factor in factors.items() if factor != 1}
        if factors == self._image_factors:
            return
        self._image_factors = factors
        for group, pixels in list(self._image_weights):
            self._weigh(group, pixels)

    def tensors(self) -> list[Tensor]:
        """Everything that stays in memory for a generation."""
        pairs = [*self.kv.values(), *self.image_kv.values()]
        single = [t for t in (self._text, self._image_bias, self._key_regions) if t is not None]
        pairs += [pair for phase in self._phases or () for pair in phase.values()]
        by_size = [t for held in (self._image_weights, self._masks, self._query_regions) for t in held.values()]
        return [*(t for pair in pairs for t in pair), *by_size, *single]

    def _read(self, key_text: Tensor | None) -> dict[str, list[Tensor]]:
        """The tensors beside the text that what was prepared depends on, by what they belong to."""
        sources = {
            f"concept {concept.placeholder}": [
                concept.target_input, concept.direction, concept.super_class_encoding, concept.values
            ]
            for concept in self._concepts.concepts
        }  # fmt: skip
        for number, use in enumerate(self._routing.uses):
            sources[f"image prompt {number}"] = [use.tokens, *([] if use.region is None else [use.region])]
        for row, regions in enumerate(self._regions.rows):
            if regions.uses:
                sources[f"a region of row {row}"] = [use.mask for use in regions.uses]
        return sources if key_text is None else {**sources, "key_text": [key_text]}

    def _check_sources(self) -> None:
        for name, tensor, seen in self._sources:
            found = tensor()
            if found is not None and version_of(found) != seen:
                raise ValueError(f"Personalization: {name} was written to after it was prepared; prepare it again")

    def _check_text(self, layer: str, text: Tensor, prepared: Tensor) -> None:
        version = version_of(text)
        if self._seen is not None and self._seen[0]() is text:
            # Inference tensors do not count how often they were written to: those are compared once a step.
            if version == self._seen[1] and (version is not None or layer != next(iter(self.kv))):
                return
        if not torch.allclose(text, prepared.to(text), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"Personalization: {layer} was given another text than was prepared; prepare it again")
        self._seen = weakref.ref(text), version

    def _prepare_regions(self, text: Tensor) -> None:
        if not self._regions.any and text.shape[1] == self._tokens:
            self._key_regions, self._query_regions = None, {}
            return
        self._key_regions = filled(self._key_regions, self._regions.key_regions(text.shape[1]).to(text.device))
        self._query_regions = {
            pixels: filled(self._query_regions.get(pixels), self._bits(pixels, text.device)) for pixels in self._sizes
        }

    def _bits(self, pixels: int, device: torch.device) -> Tensor:
        size = self._sizes.get(pixels)
        if size is None:  # the aspect ratio of the picture is that of the first mask, as diffusers guesses it
            shapes = [row.uses[0].mask.shape for row in self._regions.rows if row.uses]
            height, width = shapes[0] if shapes else (1, 1)
            rows = max(1, round(math.sqrt(pixels * height / width)))
            size = rows, pixels // rows
            if math.prod(size) != pixels:
                raise ValueError(f"Personalization: {pixels} pixels are no picture of {size}; give prepare latent_size")
        return self._regions.query_regions(size).to(device)

    def _prepare_images(self, projected: Pairs, text: Tensor, sizes: Mapping[str, tuple[int, int]]) -> None:
        routing = self._routing
        if not routing.flat_lengths:
            self.image_kv, self._image_weights, self._image_groups, self._image_bias = {}, {}, {}, None
            self._masks = {}
            return
        self.image_kv = filled_pairs(self.image_kv, projected)
        dtype = accumulate_dtype(text.dtype)
        bias = routing.key_bias(dtype)
        self._image_bias = None if bias is None else filled(self._image_bias, bias.to(text.device))
        # Layers whose streams count equally share their weights, but never where that could change between users.
        patterns = {name: name if routing.fixed else routing.scale_pattern(name) for name in projected}
        numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns.values()))}
        self._image_groups = {name: numbers[pattern] for name, pattern in patterns.items()}
        self._layer_of = {group: name for name, group in self._image_groups.items()}
        resolutions = {name: math.prod(size) for name, size in sizes.items()}
        if not routing.per_pixel:
            resolutions = dict.fromkeys(projected, 0)
        wanted = {(self._image_groups[name], pixels) for name, pixels in resolutions.items()}
        self._image_weights = {key: tensor for key, tensor in self._image_weights.items() if key in wanted}
        self._masks = {
            pixels: filled(self._masks.get(pixels), routing.masks(pixels, self._sizes[pixels], dtype).to(text.device))
            for pixels in sorted({pixels for _, pixels in wanted} - {0})
        }
        for group, pixels in sorted(wanted):
            self._weigh(group, pixels)

    def _weigh(self, group: int, pixels: int) -> None:
        """Fills the weights [B, I] (no pixels: [B, I, N] with them) of a group of layers in the current step."""
        like = next(iter(self.image_kv.values()))[0]
        dtype = accumulate_dtype(like.dtype)
        weights = torch.tensor(
            self._routing.scales(self._layer_of[group], self._steps, self._image_factors), dtype=dtype
        ).to(like.device)
        if pixels:
            if pixels not in self._masks:
                self._masks[pixels] = self._routing.masks(pixels, None, dtype).to(like.device)
            weights = weights[..., None] * self._masks[pixels]
        self._image_weights[group, pixels] = filled(self._image_weights.get((group, pixels)), weights)
