"""What one batch carries: each row's concepts and image prompts, and the keys and values they give."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers import edits
from keylock_diffusers.concepts import Concept, cross_attention_layers
from keylock_diffusers.image_streams import ImageRouting, ImageUse, projected_images
from keylock_diffusers.processors.images import ImageStreams
from keylock_diffusers.processors.swap import unet_of
from keylock_kernels.ops.precision import accumulate_dtype


@dataclass(frozen=True)
class ConceptUse:
    """One concept in one row: its gate, its strength, and which streams it edits."""

    concept: Concept
    beta: float
    tau: float
    strength: float = 1.0
    lock: str = "local"  # "local": keys and values are edited; "global": values only


class Personalization:
    """Different users' concepts and images in one batch, passed as ``cross_attention_kwargs={"personalization": p}``.

    Routing is data: row b of the U-Net's batch belongs to prompt ``row_index[b]``, or to none (-1), as the
    unconditional rows of guidance do. Such a row is computed without any update of its keys and values.

    What `prepare` makes lies in buffers that later calls fill again where shapes are the same. With `image_lengths`,
    and the latent_size given to `prepare`, they always are: a step that was compiled, or captured as a CUDA graph, then
    stays valid for other users (see `assign`).

    Args:
        uses: per prompt, the concepts it uses.
        row_index: int64 [B], the prompt of each row of the U-Net's batch; -1 for none.
        images: per row of the U-Net's batch, its image prompts, of unconditional rows too; None: no row has any.
        image_lengths: per adapter, the tokens of each image stream that a batch has room for; default as many as
            `images` need. Given, all shapes are the same whatever the rows carry.

    Raises:
        ValueError: a row index outside [-1, len(uses)), one prompt that uses the same concept twice, or images that do
            not fit.
    """

    def __init__(
        self,
        uses: Sequence[Sequence[ConceptUse]],
        row_index: Tensor,
        images: Sequence[Sequence[ImageUse]] | None = None,
        image_lengths: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.kv: dict[str, tuple[Tensor, Tensor]] = {}
        self._spare: dict[str, tuple[Tensor, Tensor]] = {}  # buffers of the users before
        self._image_lengths = image_lengths
        self.image_kv: dict[str, tuple[Tensor, Tensor]] = {}
        self._image_bias: Tensor | None = None
        self._layer_of: dict[int, str] = {}  # one of each group
        self._image_groups: dict[str, int] = {}
        self._image_weights: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int, Tensor] = {}
        self._sizes: dict[int, tuple[int, int]] = {}  # height and width, by number of pixels
        self._sources: list[tuple[str, Any, int | None]] = []
        self._seen: tuple[Any, int | None] | None = None  # the text a layer was given last, and its version
        self._step = (0, 1)
        self._text: Tensor | None = None
        self.assign(uses, row_index, images)

    def assign(
        self,
        uses: Sequence[Sequence[ConceptUse]],
        row_index: Tensor,
        images: Sequence[Sequence[ImageUse]] | None = None,
    ) -> Personalization:
        """Gives the batch to other users; `prepare` must follow and keeps the buffers whose shapes have not changed.

        Args, raises: as for the class.

        Returns:
            This object.
        """
        if row_index.ndim != 1 or row_index.dtype != torch.int64:
            raise ValueError(
                f"Personalization: row_index must be int64 [B], got {row_index.dtype} {list(row_index.shape)}"
            )
        if row_index.numel() and not -1 <= int(row_index.min()) <= int(row_index.max()) < len(uses):
            raise ValueError(
                f"Personalization: row_index must lie in [-1, {len(uses)}), "
                f"got {int(row_index.min())} to {int(row_index.max())}"
            )
        if images is not None and len(images) != len(row_index):
            raise ValueError(f"Personalization: images must be given for {len(row_index)} rows, got {len(images)}")
        rows = [list(row) for row in uses]
        concepts = list({id(use.concept): use.concept for row in rows for use in row}.values())
        for row in rows:
            _gates_of([row], concepts)
        routing = ImageRouting(images or [()] * len(row_index), self._image_lengths)
        self.row_index, self._uses, self._concepts, self._routing = row_index, rows, concepts, routing
        self._spare, self.kv = self.kv or self._spare, {}  # nothing can be read before `prepare`
        return self

    @torch.no_grad()
    def prepare(
        self,
        pipe: Any,
        text: Tensor,
        key_text: Tensor | None = None,
        *,
        latent_size: tuple[int, int] | None = None,
        steps: int = 1,
    ) -> Personalization:
        """Projects every layer's keys and values, which no timestep changes, once for the whole generation.

        Args:
            pipe: the pipeline or U-Net whose layers are projected.
            text: the encodings the U-Net is given, [B, T, D], one row per entry of ``row_index``.
            key_text: what keys read where that differs (global key-locking), [B, T, D].
            latent_size: (height, width) of the latents, which says at which resolutions regions are needed; without it
                they are resized when a layer first asks, which a compiled step cannot do.
            steps: of the generation, for image prompts that are switched on or off between steps (see `at_step`).

        Returns:
            This object; a second call fills what the first one made.

        Raises:
            ValueError: the number of rows does not match, or the layers cannot hold what the rows carry.
        """
        for name, tensor in (("text", text), ("key_text", key_text)):
            if tensor is not None and (tensor.ndim != 3 or len(tensor) != len(self.row_index)):
                raise ValueError(
                    f"Personalization.prepare: {name} must be [{len(self.row_index)}, T, D], got {list(tensor.shape)}"
                )
        self._spare, self.kv = self.kv or self._spare, {}  # nor if this fails
        self._sources = _versions(self._read(key_text))
        key_text = text if key_text is None else key_text
        unet = unet_of(pipe)
        hook: Any = getattr(unet, "_hf_hook", None)
        if type(hook).__name__ == "CpuOffload":  # whole-model offloading moves the U-Net in when it is called, or here
            hook.pre_forward(unet)
        layers = cross_attention_layers(unet)
        key_edits = self._edits(key_text, locks=("local",))
        value_edits = self._edits(text, locks=("local", "global"))
        edited = key_edits is not None or value_edits is not None
        tables = self._tables(layers, text) if edited else {}
        projected = edits.project_layers(layers, (key_text, text), tables, (key_edits, value_edits))
        self._prepare_images(unet, layers, text, latent_size, steps)
        self._text = _filled(self._text, text.clone())
        self._seen = weakref.ref(text), _version(text)
        self.kv, self._spare = _filled_pairs(self._spare, projected), {}
        return self

    @property
    def scheduled(self) -> bool:
        """Whether `at_step` must be called between steps."""
        return self._routing.scheduled

    @torch.no_grad()
    def at_step(self, step: int, steps: int) -> None:
        """Puts every image prompt's weight for one step in place, by its start and end.

        Args:
            step: the step that comes next, from 0.
            steps: of the whole generation.
        """
        before, self._step = self._step, (step, steps)
        if self._routing.active(*before) != self._routing.active(*self._step):
            for group, pixels in list(self._image_weights):
                self._weigh(group, pixels)

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
        if key.shape[0] != rows or (text is not None and text.shape[:2] != key.shape[:2]):
            raise ValueError(
                f"Personalization: prepared for {list(key.shape[:2])} rows and tokens, but {layer} runs on {rows} rows"
                + ("" if text is None else f" with text {list(text.shape)}")
            )
        if self._text is not None and not torch.compiler.is_compiling():
            if layer == next(iter(self.kv)):
                self._check_sources()
            if text is not None:
                self._check_text(layer, text, self._text)
        return key, value

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

    def tensors(self) -> list[Tensor]:
        """Everything that stays in memory for a generation."""
        pairs = [*self.kv.values(), *self.image_kv.values()]
        single = [t for t in (self._text, self._image_bias) if t is not None]
        return [*(t for pair in pairs for t in pair), *self._image_weights.values(), *self._masks.values(), *single]

    def _read(self, key_text: Tensor | None) -> dict[str, list[Tensor]]:
        """The tensors beside the text that what was prepared depends on, by what they belong to."""
        sources = {
            f"concept {concept.placeholder}": [
                concept.target_input, concept.direction, concept.super_class_encoding, concept.values
            ]
            for concept in self._concepts
        }  # fmt: skip
        for number, use in enumerate(self._routing.uses):
            sources[f"image prompt {number}"] = [use.tokens, *([] if use.region is None else [use.region])]
        return sources if key_text is None else {**sources, "key_text": [key_text]}

    def _check_sources(self) -> None:
        for name, tensor, version in self._sources:
            found = tensor()
            if found is not None and _version(found) != version:
                raise ValueError(f"Personalization: {name} was written to after it was prepared; prepare it again")

    def _check_text(self, layer: str, text: Tensor, prepared: Tensor) -> None:
        version = _version(text)
        if self._seen is not None and self._seen[0]() is text:
            # Inference tensors do not count how often they were written to: those are compared once a step.
            if version == self._seen[1] and (version is not None or layer != next(iter(self.kv))):
                return
        if not torch.allclose(text, prepared.to(text), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"Personalization: {layer} was given another text than was prepared; prepare it again")
        self._seen = weakref.ref(text), version

    def _prepare_images(
        self,
        unet: Any,
        layers: Mapping[str, Any],
        text: Tensor,
        latent_size: tuple[int, int] | None,
        steps: int,
    ) -> None:
        routing, self._step = self._routing, (0, steps)
        if not routing.flat_lengths:
            self.image_kv, self._image_weights, self._image_groups, self._image_bias = {}, {}, {}, None
            self._masks, self._sizes = {}, {}
            return
        places = routing.places().to(text.device)
        projected = {name: projected_images(attn, routing.uses, places, text) for name, attn in layers.items()}
        self.image_kv = _filled_pairs(self.image_kv, projected)
        dtype = accumulate_dtype(text.dtype)
        bias = routing.key_bias(dtype)
        self._image_bias = None if bias is None else _filled(self._image_bias, bias.to(text.device))
        # Layers whose streams count equally share their weights, but never where that could change between users.
        patterns = {name: name if routing.fixed else routing.scale_pattern(name) for name in layers}
        numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns.values()))}
        self._image_groups = {name: numbers[pattern] for name, pattern in patterns.items()}
        self._layer_of = {group: name for name, group in self._image_groups.items()}
        sizes = resolutions_of(unet, layers, latent_size)
        self._sizes = {math.prod(size): size for size in sizes.values()}
        resolutions = {name: math.prod(size) for name, size in sizes.items()}
        if not routing.per_pixel:
            resolutions = dict.fromkeys(layers, 0)
        wanted = {(self._image_groups[name], pixels) for name, pixels in resolutions.items()}
        self._image_weights = {key: tensor for key, tensor in self._image_weights.items() if key in wanted}
        self._masks = {
            pixels: _filled(self._masks.get(pixels), routing.masks(pixels, self._sizes[pixels], dtype).to(text.device))
            for pixels in sorted({pixels for _, pixels in wanted} - {0})
        }
        for group, pixels in sorted(wanted):
            self._weigh(group, pixels)

    def _weigh(self, group: int, pixels: int) -> None:
        """Fills the weights [B, I] (no pixels: [B, I, N] with them) of a group of layers in the current step."""
        like = next(iter(self.image_kv.values()))[0]
        dtype = accumulate_dtype(like.dtype)
        weights = torch.tensor(self._routing.scales(self._layer_of[group], *self._step), dtype=dtype).to(like.device)
        if pixels:
            if pixels not in self._masks:
                self._masks[pixels] = self._routing.masks(pixels, None, dtype).to(like.device)
            weights = weights[..., None] * self._masks[pixels]
        self._image_weights[group, pixels] = _filled(self._image_weights.get((group, pixels)), weights)

    def _edits(self, text: Tensor, locks: tuple[str, ...]) -> edits.Edit | None:
        """The edit of the rows' concepts with one of `locks`; None if there are none."""
        rows = [
            [use for use in self._uses[row] if use.lock in locks] if row >= 0 else [] for row in self.row_index.tolist()
        ]
        if not any(rows):
            return None
        gates, mix = _gates_of(rows, self._concepts)
        gates = edits.Gates(*(t.to(text.device) for t in (gates.slots, gates.beta, gates.tau, gates.strength)))
        directions = torch.stack([concept.direction for concept in self._concepts]).to(text.device)
        slots = gates.pairs(len(self._concepts))
        return slots, edits.coefficients(text, directions, gates, mix.to(text.device))

    def _tables(self, layers: Mapping[str, Any], text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer, the output vectors [2S, O] of keys and of values."""
        device, dtype = text.device, text.dtype
        targets = torch.stack([concept.target_input for concept in self._concepts]).to(device)
        supers = torch.stack([concept.super_class_encoding for concept in self._concepts]).to(device).float()
        values = [concept.values_per_layer() for concept in self._concepts]
        return {
            name: edits.tables(attn, targets, supers, torch.stack([value[name] for value in values]).to(device), dtype)
            for name, attn in layers.items()
        }


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for inference tensors, which do not count it."""
    return None if tensor.is_inference() else tensor._version


def _versions(sources: Mapping[str, Sequence[Tensor]]) -> list[tuple[str, Any, int | None]]:
    return [(name, weakref.ref(tensor), _version(tensor)) for name, tensors in sources.items() for tensor in tensors]


def _filled(buffer: Tensor | None, value: Tensor) -> Tensor:
    """The buffer with this value, or the value itself where it does not fit."""
    if buffer is None or any(
        of(buffer) != of(value)
        for of in (lambda t: t.shape, lambda t: t.dtype, lambda t: t.device, Tensor.is_inference)
    ):
        return value
    return buffer.copy_(value)


def _filled_pairs(
    buffers: Mapping[str, tuple[Tensor, Tensor]], values: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    filled = {}
    for name, (key, value) in values.items():
        before = buffers.get(name, (None, None))
        filled[name] = _filled(before[0], key), _filled(before[1], value)
    return filled


def resolutions_of(unet: Any, layers: Iterable[str], latent_size: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
    """Height and width that each layer runs at: every level of a U-Net is half as high and wide as the one above."""
    if latent_size is None:
        return {}
    last = len(unet.config.block_out_channels) - 1

    def level(layer: str) -> int:
        block, _, rest = layer.partition(".")
        if block not in ("down_blocks", "up_blocks"):
            return last
        number = int(rest.partition(".")[0])
        return number if block == "down_blocks" else last - number

    height, width = latent_size
    return {layer: (-(-height // 2 ** level(layer)), -(-width // 2 ** level(layer))) for layer in layers}


def _gates_of(rows: Sequence[Sequence[ConceptUse]], concepts: Sequence[Concept]) -> tuple[edits.Gates, Tensor]:
    """The gates of a batch's rows and how each row's concepts combine [B, R, R].

    Raises:
        ValueError: a row uses a concept twice.
    """
    slot_of = {id(concept): slot for slot, concept in enumerate(concepts)}
    width = max((len(row) for row in rows), default=0)

    def table(value: Callable[[ConceptUse], float], empty: float, dtype: torch.dtype) -> Tensor:  # [B, R]
        filled = [[value(use) for use in row] + [empty] * (width - len(row)) for row in rows]
        return torch.tensor(filled, dtype=dtype).reshape(len(rows), width)

    gates = edits.Gates(
        slots=table(lambda use: slot_of[id(use.concept)], -1, torch.int32),
        beta=table(lambda use: use.beta, 0.0, torch.float32),
        tau=table(lambda use: use.tau, 1.0, torch.float32),
        strength=table(lambda use: use.strength, 0.0, torch.float32),
    )
    return gates, edits.mixing(concepts, gates.slots, gates.strength)
