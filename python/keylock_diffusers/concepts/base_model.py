"""What a concept was trained for: the text encoders and cross-attention layers of a pipeline, and their weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from keylock_diffusers.denoisers.neighbours import loading
from keylock_diffusers.denoisers.unet import base_layer, cross_attention_layers, uncompiled

# A pipeline's `load_textual_inversion` appends rows to the word embeddings. That is the same text encoder; one with
# another tokenizer is not, and its vocabulary differs by more than this fraction.
MAX_VOCABULARY_GROWTH = 1 / 16

_SAMPLED_WEIGHTS = 16384  # per matrix
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Formats with a sign bit for every value, zero included. float8_*fnuz has no negative zero.
_SIGNED_FORMATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LAYER = re.compile(r"([A-Za-z0-9_.]*)=([1-9][0-9]{0,7})")
_HASH = re.compile(r"[0-9a-f]{0,64}")
_MAX_NAME = 256
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 4096
_MAX_TEXT_ENCODERS = 4


@dataclass(frozen=True)
class TextEncoderInfo:
    """One text encoder, as far as a concept depends on it."""

    architecture: str
    """Class name, such as ``CLIPTextModel``."""
    hidden_size: int
    """Width of its word embeddings."""
    num_layers: int
    vocab_size: int

    def __post_init__(self) -> None:
        _require_name("TextEncoderInfo: architecture", self.architecture)
        for field in ("hidden_size", "num_layers", "vocab_size"):
            _require_size(f"TextEncoderInfo: {field}", getattr(self, field))

    @classmethod
    def of(cls, text_encoder: nn.Module) -> TextEncoderInfo:
        """Describe a transformers text encoder, whatever wraps its layers."""
        config: Any = text_encoder.config
        vocab_size, hidden_size = _word_embeddings(text_encoder).shape
        num_layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
        return cls(type(text_encoder).__name__, int(hidden_size), int(num_layers or 0), int(vocab_size))

    def differences(self, other: TextEncoderInfo) -> list[str]:
        """Say in words what makes ``other`` another text encoder; a slightly grown vocabulary does not."""
        found = [
            f"{field} {getattr(self, field)} there, {getattr(other, field)} here"
            for field in ("architecture", "hidden_size", "num_layers")
            if getattr(self, field) != getattr(other, field)
        ]
        smaller, larger = sorted((self.vocab_size, other.vocab_size))
        if larger - smaller > smaller * MAX_VOCABULARY_GROWTH:
            found.append(f"vocab_size {self.vocab_size} there, {other.vocab_size} here")
        return found


@dataclass(frozen=True)
class BaseModel:
    """The fingerprint of a base model: what has to fit before a concept can be used with a pipeline.

    ``weights_hash`` covers the matrices of the text encoders and ``to_k``/``to_v`` of the cross-attention layers,
    that is, what a concept's vectors were computed from. It hashes the *signs* of a fixed sample of each matrix,
    because a sign survives every cast: float32, float16, bfloat16 and float8 copies of a model have one hash. A
    fine-tune that changes all weights by a relative amount r flips about r/3 of them, so among the nearly two million
    sampled on SD1.5 it is noticed down to r of about 2e-6. An empty hash means unknown (weights on the meta
    device under sequential offload, or packed by a quantiser) and never counts as a difference.

    Example:
        >>> base = BaseModel(
        ...     text_encoders=(TextEncoderInfo("CLIPTextModel", 768, 12, 49408),),
        ...     layers=(("mid_block.attentions.0.transformer_blocks.0.attn2", 1280),),
        ...     cross_attention_dim=768,
        ... )
        >>> base.values_width
        1280
    """

    text_encoders: tuple[TextEncoderInfo, ...]
    layers: tuple[tuple[str, int], ...]
    """Cross-attention modules' names and ``to_v`` output widths, in the order of `cross_attention_layers`."""
    cross_attention_dim: int
    weights_hash: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.text_encoders) <= _MAX_TEXT_ENCODERS:
            raise ValueError(
                f"BaseModel: text_encoders must hold 1 to {_MAX_TEXT_ENCODERS} encoders, got {len(self.text_encoders)}"
            )
        if not 1 <= len(self.layers) <= _MAX_LAYERS:
            raise ValueError(f"BaseModel: layers must hold 1 to {_MAX_LAYERS} layers, got {len(self.layers)}")
        for name, width in self.layers:
            _require_name("BaseModel: a layer's name", name)
            _require_size(f"BaseModel: width of {name}", width)
        if len(dict(self.layers)) != len(self.layers):
            raise ValueError("BaseModel: layers must have distinct names")
        _require_size("BaseModel: cross_attention_dim", self.cross_attention_dim)
        if not isinstance(self.weights_hash, str) or not _HASH.fullmatch(self.weights_hash):
            raise ValueError(f"BaseModel: weights_hash must be hexadecimal or empty, got {self.weights_hash!r:.80}")

    @classmethod
    def of(cls, pipe: Any) -> BaseModel:
        """Fingerprint a diffusers pipeline.

        Args:
            pipe: any pipeline with a ``unet`` and at least one of ``text_encoder``, ``text_encoder_2``. Adapters
                loaded through PEFT are looked through; merged ones change the hash. Nothing is cached: call it once
                per batch rather than once per concept.

        Raises:
            TypeError: the pipeline has no U-Net or no text encoder.
            ValueError: its U-Net has no cross-attention layers, or their inputs differ in width.
        """
        unet = getattr(pipe, "unet", None)
        if not isinstance(unet, nn.Module):
            raise TypeError(f"BaseModel.of: pipe must be a pipeline with a U-Net, got {type(pipe).__name__}")
        candidates = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        encoders = [uncompiled(encoder) for encoder in candidates if isinstance(encoder, nn.Module)]
        if not encoders:
            raise TypeError(f"BaseModel.of: {type(pipe).__name__} has no text encoder loaded")
        layers = cross_attention_layers(unet)
        dims = sorted({int(base_layer(attn.to_k).in_features) for attn in layers.values()})
        if len(dims) != 1:
            raise ValueError(
                "BaseModel.of: the U-Net's cross-attention layers must exist and share one input width, "
                f"got {len(layers)} layers of widths {dims}"
            )
        return cls(
            text_encoders=tuple(TextEncoderInfo.of(encoder) for encoder in encoders),
            layers=tuple((name, int(base_layer(attn.to_v).out_features)) for name, attn in layers.items()),
            cross_attention_dim=dims[0],
            weights_hash=_weights_hash(encoders, uncompiled(unet), layers),
        )

    @property
    def values_width(self) -> int:
        """Length of the value outputs of all layers, concatenated."""
        return sum(width for _, width in self.layers)

    def differences(self, other: BaseModel) -> list[str]:
        """Say in words why a concept made for this model cannot be used with ``other``; empty if it can.

        The weights are not compared here: see `other_weights`.
        """
        found = []
        if len(self.text_encoders) != len(other.text_encoders):
            found.append(f"{len(self.text_encoders)} text encoders there, {len(other.text_encoders)} here")
        else:
            for index, encoder in enumerate(self.text_encoders):
                differences = encoder.differences(other.text_encoders[index])
                found += [f"text encoder {index}: {difference}" for difference in differences]
        if self.cross_attention_dim != other.cross_attention_dim:
            found.append(f"cross_attention_dim {self.cross_attention_dim} there, {other.cross_attention_dim} here")
        mine, theirs = dict(self.layers), dict(other.layers)
        for label, names in (("missing here", mine.keys() - theirs.keys()), ("new here", theirs.keys() - mine.keys())):
            if names:
                found.append(f"{len(names)} cross-attention layers {label}, such as {min(names)}")
        widths = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        if widths:
            name = widths[0]
            found.append(
                f"{len(widths)} layers of another width, such as {name}: {mine[name]} there, {theirs[name]} here"
            )
        return found

    def other_weights(self, other: BaseModel) -> bool:
        """Whether both weights are known and differ, as those of a fine-tune of the same base do."""
        return bool(self.weights_hash and other.weights_hash) and self.weights_hash != other.weights_hash

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as JSON, kept short because it goes into every concept file.

        The layers are one string, ``name=width name=width``, without the ending that all names have in common.
        """
        suffix = os.path.commonprefix([name[::-1] for name, _ in self.layers])[::-1]
        return {
            "text_encoders": [[e.architecture, e.hidden_size, e.num_layers, e.vocab_size] for e in self.text_encoders],
            "layers": " ".join(f"{name.removesuffix(suffix)}={width}" for name, width in self.layers),
            "layer_suffix": suffix,
            "cross_attention_dim": self.cross_attention_dim,
            "weights_hash": self.weights_hash,
        }

    @classmethod
    def from_json(cls, fields: object) -> BaseModel:
        """Read what `to_json` wrote.

        Raises:
            ValueError: anything is missing, unknown, or of the wrong type.
        """
        names = {"text_encoders", "layers", "layer_suffix", "cross_attention_dim", "weights_hash"}
        if not isinstance(fields, Mapping) or fields.keys() != names:
            raise ValueError(f"base must be an object with the fields {sorted(names)}")
        encoders, layers, suffix = fields["text_encoders"], fields["layers"], fields["layer_suffix"]
        if not isinstance(encoders, list) or not all(isinstance(row, list) and len(row) == 4 for row in encoders):
            raise ValueError("base: text_encoders must be a list of lists of 4")
        if not isinstance(suffix, str) or not isinstance(layers, str):
            raise ValueError("base: layers and layer_suffix must be strings")
        parsed = [_LAYER.fullmatch(layer) for layer in layers.split(" ", _MAX_LAYERS)]
        if None in parsed or len(suffix) > _MAX_NAME:
            raise ValueError(f"base: layers must be name=width, separated by spaces, got {layers!r:.80}")
        return cls(
            text_encoders=tuple(TextEncoderInfo(*row) for row in encoders),
            layers=tuple((match[1] + suffix, int(match[2])) for match in parsed if match),
            cross_attention_dim=fields["cross_attention_dim"],
            weights_hash=fields["weights_hash"],
        )


def _word_embeddings(text_encoder: Any) -> Tensor:
    return base_layer(text_encoder.get_input_embeddings()).weight


def _weights_hash(encoders: list[nn.Module], unet: nn.Module, layers: Mapping[str, Attention]) -> str:
    digest = hashlib.sha256()
    try:
        for encoder in encoders:
            words = _word_embeddings(encoder)
            known = 1 << (words.shape[0].bit_length() - 1)  # rows added behind them change nothing
            signs = [_signs(weight[:known] if weight is words else weight) for weight in _matrices(encoder)]
            # Sorted: releases of transformers name and order the same matrices differently.
            digest.update(b"".join(sorted(hashlib.sha256(row).digest() for row in signs)))
        with loading(unet, emptied=True) as bring:
            for layer, attn in layers.items():
                for side in ("to_k", "to_v"):
                    name, projection = _unwrapped(f"{layer}.{side}", getattr(attn, side))
                    bring(name)
                    digest.update(_signs(projection.weight))
    except _UnreadableWeights:
        return ""
    return digest.hexdigest()[:32]


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    """Every two-dimensional weight below a module once, adapters left out, each while it is loaded."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", module)]
    with loading(module, emptied=True) as bring:
        while pending:
            name, current = _unwrapped(*pending.pop())
            bring(name)
            weight = getattr(current, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and id(weight) not in seen:
                seen.add(id(weight))
                yield weight
            pending.extend((f"{name}.{child}", part) for child, part in current.named_children())


def _unwrapped(name: str, module: Any) -> tuple[str, Any]:
    """A module without the adapters around it, and its name."""
    while hasattr(module, "base_layer"):
        name, module = f"{name}.base_layer", module.base_layer
    return name, module


def _signs(weight: Tensor) -> bytes:
    """The sign bits of evenly spaced rows of a matrix, and its shape."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in _SIGNED_FORMATS and not weight.is_meta
    if not plain:
        raise _UnreadableWeights
    rows = weight.detach()[:: max(1, weight.numel() // _SAMPLED_WEIGHTS)]
    bits = (rows.view(_INTEGER_OF_SIZE[rows.element_size()]) < 0).cpu().numpy()
    return f"{tuple(weight.shape)}".encode() + np.packbits(bits).tobytes()


class _UnreadableWeights(Exception):
    """Weights that are elsewhere (offloaded) or packed (quantised)."""


def _require_name(what: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > _MAX_NAME or not _NAME.fullmatch(value):
        raise ValueError(f"{what} must be dotted words of at most {_MAX_NAME} characters, got {value!r:.80}")


def _require_size(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{what} must be a whole number from 1 to {_MAX_SIZE}, got {value!r:.80}")
