"""What one batch carries: each row's concepts, LoRAs, image prompts and regions, and the keys and values they give."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.denoisers.base import Size
from keylock_diffusers.denoisers.neighbours import loading
from keylock_diffusers.denoisers.projections import output_size, projections, reads_text
from keylock_diffusers.denoisers.unet import ProjectionState, cross_attention_layers, resolutions_of, unet_of
from keylock_diffusers.processors import verify_routes
from keylock_diffusers.processors.contract import BOUND, AdapterUpdates, Bound, ImageStreams, Kept
from keylock_diffusers.processors.perturbed import in_one_call
from keylock_diffusers.processors.routed import adapting
from keylock_diffusers.routing.adapters import AdapterRouting, LoraCapacity, Store, store_of
from keylock_diffusers.routing.buffers import filled, filled_pairs, version_of, versions_of
from keylock_diffusers.routing.concepts import ConceptRouting, Pairs
from keylock_diffusers.routing.images import ImageBuffers, ImageRouting, projected_images
from keylock_diffusers.routing.regions import RegionRouting
from keylock_diffusers.routing.rows import Phases, Row, TextLayout


class Personalization:
    """Different users' rows in one batch, passed as ``cross_attention_kwargs={"personalization": p}``.

    What `prepare` makes lies in buffers that later calls fill again where shapes are the same. With `image_lengths`,
    and a latent_size and a read_text of one length, longer than the text, given to `prepare`, they always are: a step
    that was compiled, or captured as a CUDA graph, then stays valid for other users (see `assign`).

    Args:
        rows: the denoiser's batch, row by row: unconditional rows, and repeated ones, are rows of their own.
        image_lengths: per adapter, the tokens of each image stream that a batch has room for; default as many as
            `rows` need. Given, all shapes are the same whatever the rows carry.
        lora_capacity: the room for LoRAs that a batch has; default as much as `rows` need. Given, all shapes are the
            same whatever the rows carry.
        store: gives the pool that a model's adapters lie in (see `LoraBank.pool`); default one of the batch's own.

    Raises:
        ValueError: the rows' images do not fit into `image_lengths`, or their LoRAs into `lora_capacity`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        image_lengths: Sequence[Sequence[int]] | None = None,
        lora_capacity: LoraCapacity | None = None,
        store: Store | None = None,
    ) -> None:
        self.kv: Pairs = {}
        self._spare: Pairs = {}  # buffers of the users before
        self._image_lengths, self._lora_capacity = image_lengths, lora_capacity
        self._store = store_of(None, lora_capacity) if store is None else store
        self._adapter_buffers: dict[Any, Tensor] = {}
        self._adapters = AdapterRouting([], self._store)
        self._images = ImageBuffers()
        self._sizes: dict[int, tuple[int, int]] = {}  # height and width, by number of pixels
        self._pixels_of: dict[str, int] = {}  # of each layer
        self._tokens = 0  # of one wording
        self._key_regions: Tensor | None = None
        self._query_regions: dict[int, Tensor] = {}
        self._phases = Phases((), ())
        self._of_phases: list[Pairs] = []  # keys and values in each, where there are several
        self._phase: list[int] = []  # that each row is in
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
        self.release()
        self._adapters = AdapterRouting(
            [[use.in_denoiser for use in row.loras] for row in rows],
            self._store,
            self._lora_capacity,
            self._adapter_buffers,
        )
        self.rows = tuple(rows)
        self._concepts, self._routing = ConceptRouting(self.rows), routing
        self._regions = RegionRouting([row.regions for row in rows])
        self._images.assign(routing)
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
        earlier: Sequence[tuple[Tensor, Tensor]] = (),
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
            earlier: what values and keys read in each phase of the rows before the last (see `Phases`), as `read_text`,
                where that differs: the super-classes in the place of subjects that start later, and encodings with
                the LoRAs of the phase.
            latent_size: (height, width) of the latents, which says at which resolutions regions are needed; without it
                they are resized when a layer first asks, which a compiled step cannot do. LoRAs' regions need it.
            steps: of the generation, for what is switched on or off between steps; see `at_step`.
            step: the one that comes next.

        Returns:
            This object; a second call fills what the first one made.

        Raises:
            ValueError: the number of rows does not match, or the layers cannot hold what the rows carry.
        """
        for name, tensor in {"text": text, "key_text": key_text, "read_text": read_text}.items():
            if tensor is not None and (tensor.ndim != 3 or len(tensor) != len(self.rows)):
                raise ValueError(
                    f"Personalization.prepare: {name} must be [{len(self.rows)}, T, D], got {list(tensor.shape)}"
                )
        self._spare, self.kv = self.kv or self._spare, {}  # nor if this fails
        self._sources = versions_of(self._read(key_text))
        read_text = text if read_text is None else read_text
        key_text = read_text if key_text is None else key_text
        texts = [*earlier, (read_text, key_text)]
        for name, other in [("key_text", key_text), *[("earlier", one) for pair in earlier for one in pair]]:
            if other.shape != read_text.shape:
                raise ValueError(
                    f"Personalization.prepare: {name} must be {list(read_text.shape)}, got {list(other.shape)}"
                )
        self._steps = self._each(step, steps)
        phases = self._phases = Phases(self.rows, [total for _, total in self._steps])
        if len(earlier) < phases.count - 1 and (earlier or phases.waiting):
            wanted = f"the texts of {phases.count - 1} phases before the rows' last"
            raise ValueError(f"Personalization.prepare: earlier must hold {wanted}, got {len(earlier)}")
        texts = ([texts[0]] * phases.count + texts)[-phases.count :]
        unet = unet_of(pipe)
        layers = cross_attention_layers(unet)
        self._made_with = ProjectionState(layers)
        self._again = text, dict(read_text=read_text, key_text=key_text, earlier=earlier, latent_size=latent_size)
        self._tokens = text.shape[1]
        layout = TextLayout(self._tokens, read_text.shape[1] // self._tokens)
        self._prepare_adapters(unet, text, layout, latent_size)
        projecting = []
        for phase, (values_read, keys_read) in enumerate(texts):
            self._switch(phase)
            projecting.append(
                self._concepts.projecting(values_read, keys_read, layout, phases.states(phase), self._adapters)
            )
        if self._routing.flat_lengths:
            places = self._routing.places().to(text.device)
            projecting.append(lambda _, attn: projected_images(attn, self._routing.uses, places, text))
        made: list[Pairs] = [{} for _ in projecting]
        with loading(unet) as bring:
            for name, attn in layers.items():
                bring(name)
                for phase, (pairs, project) in enumerate(zip(made, projecting, strict=True)):
                    self._switch(phase)
                    pairs[name] = project(name, attn)
        images = made.pop() if self._routing.flat_lengths else {}
        self._of_phases, projected = (made, {}) if len(made) > 1 else ([], made[0])
        self._phase = phases.at(self._steps)
        self._adapters.switch([row.state(*at).loras for row, at in zip(self.rows, self._steps, strict=True)])
        if self._of_phases:
            projected = self._current()
        sizes = resolutions_of(unet, layers, latent_size)
        self._sizes = {math.prod(size): size for size in sizes.values()}
        self._pixels_of = {name: math.prod(size) for name, size in sizes.items()}
        self._images.prepare(images, text, sizes, self._steps)
        self._prepare_regions(read_text)
        self._text = filled(self._text, text.clone())
        self._seen = weakref.ref(text), version_of(text)
        self.kv, self._spare = filled_pairs(self._spare, projected), {}
        return self

    def _prepare_adapters(self, unet: Any, text: Tensor, layout: TextLayout, latent: Size | None) -> None:
        """Fills what the U-Net's projections read of the rows' LoRAs."""
        if not self._adapters:
            return
        if latent is None and any(use.region is not None for row in self.rows for use in row.loras):
            raise ValueError("Personalization.prepare: LoRAs with regions need latent_size, got None")
        wordings = torch.arange(layout.wordings).repeat_interleave(layout.tokens)
        modules = projections(unet)
        with loading(unet) as bring:
            self._adapters.prepare(
                modules,
                text.device,
                text.dtype,
                size=lambda name: None if latent is None else output_size(unet, name, latent),
                wordings=lambda name: wordings if reads_text(name) else None,
                bring=bring,
            )
        verify_routes(modules, [name for name in self.adapters if not reads_text(name)])

    def _switch(self, phase: int) -> None:
        """Puts the LoRAs in place that count in one of the rows' phases."""
        if self._phases.count > 1:
            self._adapters.switch([state.loras for state in self._phases.states(min(phase, self._phases.count - 1))])

    def _current(self) -> Pairs:
        """Keys and values of the current step, each row's own of its phases."""
        device = next(iter(self._of_phases[-1].values()))[0].device
        now = torch.tensor(self._phase, device=device)[:, None, None]
        current = dict(self._of_phases[-1])
        for phase, earlier in enumerate(self._of_phases[:-1]):
            for name, (key, value) in earlier.items():
                later = current[name]
                current[name] = torch.where(now == phase, key, later[0]), torch.where(now == phase, value, later[1])
        return current

    @property
    def adapters(self) -> Mapping[str, AdapterUpdates]:
        """What the rows' LoRAs add to the U-Net's projections, by name."""
        return self._adapters.updates

    @contextmanager
    def adapted(
        self, unet: Any, modules: Mapping[str, Any], *, in_graphs: bool = False, perturbed: bool = False
    ) -> Iterator[None]:
        """While it lasts, a U-Net's projections, by name, add what the rows' LoRAs do.

        Say if parts of it are compiled, and if rows are perturbed.
        """
        with ExitStack() as held:
            if perturbed:
                held.enter_context(in_one_call(unet))
            held.enter_context(adapting(unet, modules, self.adapters, in_graphs=in_graphs))
            yield

    def confine(self, maps: Mapping[tuple[int, int], Tensor]) -> None:
        """Puts in place where LoRAs that are bound to words count: by row and number, weights [height, width]."""
        self._adapters.confine(maps)

    def release(self) -> None:
        """Gives the LoRAs' places back to their pool, after the last step; `prepare` takes them again."""
        self._adapters.release()

    @property
    def scheduled(self) -> bool:
        """Whether `at_step` must be called between steps."""
        return self._routing.scheduled or any(row.scheduled for row in self.rows)

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
            self._images.weigh(self._steps)
        phase = self._phases.at(self._steps)
        if phase != self._phase:
            self._phase = phase
            self._adapters.switch([row.state(*at).loras for row, at in zip(self.rows, self._steps, strict=True)])
            self.kv = filled_pairs(self.kv, self._current())

    def _each(self, step: int | Sequence[int], steps: int | Sequence[int]) -> list[tuple[int, int]]:
        """Every row's (step, of how many)."""
        each = [[given] * len(self.rows) if isinstance(given, int) else list(given) for given in (step, steps)]
        return list(zip(*each, strict=True))

    def outdated(self) -> bool:
        """Whether somebody changed the projections since keys and values were made."""
        return self._made_with is not None and self._made_with.changed()

    def remake(self, pipe: Any) -> None:
        """Makes keys and values again, of the same text, with the projections as they are now."""
        assert self._again is not None
        text, options = self._again
        step, steps = zip(*self._steps, strict=True)
        self.prepare(pipe, text, **options, step=step, steps=steps)

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
        return self._images.streams(layer, pixels, self._steps)

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
        self._images.scale({adapter: factor for adapter, factor in factors.items() if factor != 1}, self._steps)

    def tensors(self) -> list[Tensor]:
        """Everything that stays in memory for a generation."""
        pairs = list(self.kv.values())
        single = [t for t in (self._text, self._key_regions) if t is not None]
        pairs += [pair for phase in self._of_phases for pair in phase.values()]
        own = [t for pair in pairs for t in pair]
        return [*own, *self._query_regions.values(), *single, *self._images.tensors(), *self._adapter_buffers.values()]

    def _read(self, key_text: Tensor | None) -> dict[str, list[Tensor]]:
        """The tensors beside the text that what was prepared depends on, by what they belong to."""
        sources: dict[str, list[Tensor]] = {}
        for concept in self._concepts.concepts:  # of which several may have one placeholder
            sources.setdefault(f"concept {concept.placeholder}", []).extend(concept.edits)
        for number, use in enumerate(self._routing.uses):
            sources[f"image prompt {number}"] = [use.tokens, *([] if use.region is None else [use.region])]
        for row, regions in enumerate(self._regions.rows):
            if regions.uses:
                sources[f"a region of row {row}"] = [mask for use in regions.uses for mask in use.masks]
        return sources if key_text is None else {**sources, "key_text": [key_text]}

    def _check_sources(self) -> None:
        for name, tensor, seen in self._sources:
            if (found := tensor()) is not None and version_of(found) != seen:
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
            shapes = [use.masks[0].shape for row in self._regions.rows for use in row.uses if use.masks]
            height, width = shapes[0] if shapes else (1, 1)
            rows = max(1, round(math.sqrt(pixels * height / width)))
            size = rows, pixels // rows
            if math.prod(size) != pixels:
                raise ValueError(f"Personalization: {pixels} pixels are no picture of {size}; give prepare latent_size")
        return self._regions.query_regions(size).to(device)
