"""One concept: everything a subject's personalisation adds to a base model, in one small file."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.checks import path_text
from keylock_diffusers.concepts.base_model import BaseModel
from keylock_diffusers.concepts.files import (
    MAX_FILE_BYTES,
    ConceptFileError,
    Header,
    pack,
    read_header,
    read_tensors,
)
from keylock_diffusers.files import open_regular, strict_json, write_atomically
from keylock_diffusers.ids import VERSION_DIGITS

FORMAT_VERSION = 1

_PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]*>")
_MAX_WORDS = 64
_MAX_FACTS = 64 << 10
_FIELDS = {
    "format_version",
    "placeholder",
    "super_class",
    "energy",
    "beta",
    "tau",
    "base",
    "covariance",
    "training",
}


@dataclass(frozen=True, eq=False)
class Concept:
    """A key-locked rank-one edit of a base model's cross-attention, for one subject.

    With i* the target input and C the second moment of text encodings, one token's encoding e takes part by

        s(e) = (e^T C^-1 i*) / (i*^T C^-1 i*) = direction . e        g(e) = sigmoid((s(e) - beta) / tau)
        keys   W_K e - s(e) W_K i* + g(e) W_K e_super                values  W_V e - s(e) W_V i* + g(e) values

    so neither C nor any weight matrix needs keeping: 34 KB hold a concept of Stable Diffusion 1.5. Two concepts are
    never compared by content; `digest` does that. Tensors are stored as copies on the CPU and must not be written to.

    Args:
        placeholder: the word that stands for the subject in prompts, such as ``<alice-cat>``; lower case, at most 64
            characters.
        super_class: what the subject is, such as ``cat`` or ``teddy bear``; at most 64 characters.
        target_input: [D], i*; kept in float32.
        energy: i*^T C^-1 i*, positive.
        direction: [D], C^-1 i* / energy; kept in float32. Its product with ``target_input`` is 1.
        super_class_encoding: [D], e_super; kept in float16.
        word_embeddings: one learned [W_k] per text encoder; kept in float16.
        values: [sum of to_v widths], o*_V of all layers in the order of ``base.layers``; kept in float16.
        base: the model all of this was trained for.
        beta: where the gate opens at inference, in units of s.
        tau: the gate's temperature at inference; 0 is linear.
        covariance: how C was made, as JSON.
        training: facts worth keeping about the training run, as JSON.

    Raises:
        TypeError, ValueError: an argument is not what this says; infinities and NaN are refused, as are values that
            float16 cannot hold.

    Paper: Perfusion, Tewel et al. 2023, arXiv 2305.01644.

    Example:
        >>> from keylock_diffusers.concepts import TextEncoderInfo
        >>> base = BaseModel((TextEncoderInfo("CLIPTextModel", 2, 1, 99),), (("mid_block.attn2", 3),), 2)
        >>> concept = Concept(
        ...     "<alice-cat>", "cat", target_input=torch.tensor([2.0, 0.0]), energy=4.0,
        ...     direction=torch.tensor([0.5, 0.0]), super_class_encoding=torch.ones(2),
        ...     word_embeddings=(torch.ones(2),), values=torch.ones(3), base=base,
        ... )
        >>> Concept.load(concept.to_bytes()).placeholder
        '<alice-cat>'
    """

    placeholder: str
    super_class: str
    target_input: Tensor  # [D] float32
    energy: float
    direction: Tensor  # [D] float32
    super_class_encoding: Tensor  # [D] float16
    word_embeddings: tuple[Tensor, ...]  # K times [W_k] float16
    values: Tensor  # [sum of to_v widths] float16
    base: BaseModel
    beta: float = 0.75
    tau: float = 0.15
    covariance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_placeholder(self.placeholder)
        check_super_class(self.super_class)
        if not isinstance(self.base, BaseModel):
            raise TypeError(f"Concept: base must be a BaseModel, got {type(self.base).__name__}")
        for name in ("energy", "beta", "tau"):
            self._set(name, _finite_number(name, getattr(self, name)))
        if self.energy <= 0:
            raise ValueError(f"Concept: energy must be positive, got {self.energy}")
        dim = self.base.cross_attention_dim
        self._set("target_input", _vector("target_input", self.target_input, dim, torch.float32))
        self._set("direction", _vector("direction", self.direction, dim, torch.float32))
        self._set("super_class_encoding", _vector("super_class_encoding", self.super_class_encoding, dim))
        self._set("values", _vector("values", self.values, self.base.values_width))
        embeddings, encoders = tuple(self.word_embeddings), self.base.text_encoders
        if len(embeddings) != len(encoders):
            raise ValueError(
                f"Concept: word_embeddings must hold one vector per text encoder, {len(encoders)}, "
                f"got {len(embeddings)}"
            )
        self._set(
            "word_embeddings",
            tuple(
                _vector(f"word_embeddings[{index}]", embedding, encoder.hidden_size)
                for index, (embedding, encoder) in enumerate(zip(embeddings, encoders, strict=True))
            ),
        )
        self._check_direction()
        for name in ("covariance", "training"):
            self._set(name, _facts(name, getattr(self, name)))

    @classmethod
    def load(
        cls,
        path_or_bytes: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        pipe: Any = None,
        strict: bool = False,
    ) -> Concept:
        """Read a concept file, or its bytes.

        Args:
            path_or_bytes: the file's path or content.
            pipe: a pipeline or `BaseModel` the concept has to fit; see `check`.
            strict: with ``pipe``, refuse other weights of the same model too.

        Raises:
            ConceptFileError: the file is not a whole, valid concept file; a ValueError.
            ValueError: the concept does not fit ``pipe``.
            OSError: the file cannot be opened.
        """
        if strict and pipe is None:
            raise ValueError("Concept.load: strict=True needs the pipe to compare with")
        if isinstance(path_or_bytes, (bytes, bytearray, memoryview)):
            concept = cls.from_bytes(bytes(path_or_bytes))
        else:
            source = path_text(path_or_bytes, "Concept.load: path_or_bytes")
            try:
                opened = open_regular(source)
            except ValueError as error:
                raise ConceptFileError(str(error)) from None
            with opened as stream:
                concept = cls.from_bytes(stream.read(MAX_FILE_BYTES + 1), source=source)
        if pipe is not None:
            concept.check(pipe, strict=strict)
        return concept

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "concept file") -> Concept:
        """Read a concept file's content; ``source`` is what errors call it.

        Raises:
            ConceptFileError: it is not a whole, valid concept file.
        """
        header = read_header(data, source)
        try:
            base = _check_fields(header.fields)
            _check_tensors(header, base)
            tensors: dict[str, Any] = dict(read_tensors(data, header, source))
            fields = {name: header.fields[name] for name in _FIELDS - {"format_version", "base"}}
            embeddings = tuple(tensors.pop(f"word_embedding.{k}") for k in range(len(base.text_encoders)))
            return cls(base=base, word_embeddings=embeddings, **fields, **tensors)
        except ConceptFileError:
            raise
        except (ValueError, TypeError) as error:
            raise ConceptFileError(f"{source}: {error}") from None

    def to_bytes(self) -> bytes:
        """The concept file's content; equal concepts give equal bytes."""
        fields = {
            "format_version": FORMAT_VERSION,
            "placeholder": self.placeholder,
            "super_class": self.super_class,
            "energy": self.energy,
            "beta": self.beta,
            "tau": self.tau,
            "base": self.base.to_json(),
            "covariance": self.covariance,
            "training": self.training,
        }
        tensors = {
            "target_input": self.target_input,
            "direction": self.direction,
            "super_class_encoding": self.super_class_encoding,
            "values": self.values,
        }
        tensors |= {f"word_embedding.{k}": embedding for k, embedding in enumerate(self.word_embeddings)}
        return pack(fields, tensors)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the concept file, replacing one that is there only once the new one is whole.

        Returns:
            its size in bytes.

        Raises:
            OSError: the folder does not exist or cannot be written; a file that was there is unchanged.
        """
        data = self.to_bytes()
        write_atomically(path_text(path, "Concept.save: path"), data)
        return len(data)

    def check(self, pipe: Any, *, strict: bool = False) -> None:
        """Make sure that the concept fits a base model.

        Other weights of the same architecture, as a fine-tune has, are worth a UserWarning, once per concept and
        model; weights that cannot be read (see `BaseModel`) pass.

        Args:
            pipe: a diffusers pipeline, or its `BaseModel`, which is quicker for many concepts.
            strict: refuse other weights too.

        Raises:
            ValueError: naming what differs.
        """
        base = pipe if isinstance(pipe, BaseModel) else BaseModel.of(pipe)
        differences = self.base.differences(base)
        if differences:
            raise ValueError(
                f"concept {self.placeholder} was made for another base model: {'; '.join(differences)} "
                "(there: the concept's model)"
            )
        if self.base.other_weights(base):
            message = (
                f"concept {self.placeholder} was made for a base model with other weights "
                f"({self.base.weights_hash} there, {base.weights_hash} here)"
            )
            if strict:
                raise ValueError(message)
            _warn_once(self.digest, base.weights_hash, f"{message}; it may look different here")

    def values_per_layer(self) -> dict[str, Tensor]:
        """Views of ``values``, one [to_v width] per cross-attention layer's name."""
        names, widths = zip(*self.base.layers, strict=True)
        return dict(zip(names, self.values.split(widths), strict=True))

    def with_(self, **changes: Any) -> Concept:
        """A copy with some fields changed, checked like a new one."""
        return replace(self, **changes)

    @property
    def nbytes(self) -> int:
        """Size of the concept file."""
        return len(self.to_bytes())

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything the concept holds."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    @property
    def version(self) -> str:
        """The digest's first 16 digits, which name this content in ``bank["alice/cat@..."]``."""
        return self.digest[:VERSION_DIGITS]

    def __repr__(self) -> str:
        layers = len(self.base.layers)
        return f"Concept({self.placeholder}, {self.super_class!r}, {layers} layers, digest {self.digest[:8]})"

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_direction(self) -> None:
        terms = self.direction.double() * self.target_input.double()  # [D]
        # Where C is nearly singular large terms cancel, and each was rounded to float32 twice.
        rounding = 2 * torch.finfo(torch.float32).eps * terms.abs().sum().item()
        product = terms.sum().item()
        if abs(product - 1) > min(1e-4 + rounding, 1e-2):
            raise ValueError(f"Concept: direction . target_input must be 1, got {product:.6g}")


@dataclass(frozen=True)
class ConceptSummary:
    """What the header of a concept file says; its tensors are neither read nor compared with the checksum.

    Args:
        placeholder, super_class, beta, tau: see `Concept`.
        nbytes: size of the file.
    """

    placeholder: str
    super_class: str
    beta: float
    tau: float
    nbytes: int

    @classmethod
    def of(cls, header: Header, nbytes: int, source: str) -> ConceptSummary:
        """Check and read a header.

        Raises:
            ConceptFileError: it is not of a concept.
        """
        fields = header.fields
        try:
            _check_tensors(header, _check_fields(fields))
            check_placeholder(fields["placeholder"])
            check_super_class(fields["super_class"])
            beta, tau = (_finite_number(name, fields[name]) for name in ("beta", "tau"))
        except (ValueError, TypeError) as error:
            raise ConceptFileError(f"{source}: {error}") from None
        return cls(fields["placeholder"], fields["super_class"], beta, tau, nbytes)


def check_placeholder(placeholder: object) -> None:
    """Refuse what cannot stand for a concept in a prompt.

    Raises:
        TypeError, ValueError: saying what a placeholder looks like.
    """
    if not isinstance(placeholder, str):
        raise TypeError(f"Concept: placeholder must be a string, got {type(placeholder).__name__}")
    if _PLACEHOLDER.fullmatch(placeholder) and len(placeholder) <= _MAX_WORDS:
        return
    lowered = placeholder.lower()
    hint = f"; write {lowered}" if lowered != placeholder and _PLACEHOLDER.fullmatch(lowered) else ""
    raise ValueError(
        "Concept: placeholder must look like <alice-cat>: lower-case letters, digits, - and _ between < and >, "
        f"a letter or digit first, at most {_MAX_WORDS} characters; got {placeholder!r:.80}{hint}"
    )


def check_super_class(words: object) -> None:
    if not isinstance(words, str):
        raise TypeError(f"Concept: super_class must be a string, got {type(words).__name__}")
    if not words or len(words) > _MAX_WORDS or words != " ".join(words.split()) or not words.isprintable():
        raise ValueError(
            f"Concept: super_class must be one or more words of at most {_MAX_WORDS} characters in all, separated by "
            f"single spaces, got {words!r:.80}"
        )
    if "<" in words or ">" in words:
        raise ValueError(f"Concept: super_class must not hold a placeholder, got {words!r:.80}")


def _finite_number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"Concept: {name} must be a number, got {type(value).__name__}")
    if not abs(value) <= 1e300 or not math.isfinite(value):  # the first also keeps float() of a large int from raising
        raise ValueError(f"Concept: {name} must be finite, got {value!r:.80}")
    return float(value)


def _vector(name: str, value: object, length: int, dtype: torch.dtype = torch.float16) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Concept: {name} must be a floating-point tensor, got {got}")
    if tuple(value.shape) != (length,):
        raise ValueError(f"Concept: {name} must be [{length}], got {list(value.shape)}")
    stored = value.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(stored).all():
        where = "NaN or infinite values" if not torch.isfinite(value).all() else f"values {dtype} cannot hold"
        raise ValueError(f"Concept: {name} must be finite, got {where}")
    return stored


def _facts(name: str, value: object) -> dict[str, Any]:
    """A copy of ``value`` as JSON will give it back."""
    if not isinstance(value, Mapping):
        raise TypeError(f"Concept: {name} must be a mapping, got {type(value).__name__}")
    try:
        text = json.dumps(dict(value), allow_nan=False)
        facts = strict_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Concept: {name} must be JSON, got {error}") from None
    if len(text) > _MAX_FACTS:
        raise ValueError(f"Concept: {name} must be at most {_MAX_FACTS} bytes of JSON, got {len(text)}")
    return facts


def _check_fields(fields: Mapping[str, Any]) -> BaseModel:
    """Check the names and version of a file's fields; the constructor checks their values."""
    version = fields.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f"format_version must be {FORMAT_VERSION}, the one this release reads, got {version!r:.80}")
    if fields.keys() != _FIELDS:
        odd = sorted(fields.keys() ^ _FIELDS)
        raise ValueError(f"the fields must be {sorted(_FIELDS)}; missing or unknown: {odd!r:.200}")
    return BaseModel.from_json(fields["base"])


def _check_tensors(header: Header, base: BaseModel) -> None:
    dim = base.cross_attention_dim
    expected = {"target_input": ("F32", dim), "direction": ("F32", dim), "super_class_encoding": ("F16", dim)}
    expected["values"] = ("F16", base.values_width)
    expected |= {f"word_embedding.{k}": ("F16", encoder.hidden_size) for k, encoder in enumerate(base.text_encoders)}
    if header.tensors.keys() != expected.keys():
        odd = sorted(header.tensors.keys() ^ expected.keys())
        raise ValueError(f"the tensors must be {sorted(expected)}; missing or unknown: {odd!r:.200}")
    for name, (dtype, length) in expected.items():
        entry = header.tensors[name]
        if (entry.dtype, entry.length) != (dtype, length):
            raise ValueError(f"tensor {name} must be {dtype} [{length}], got {entry.dtype} [{entry.length}]")


@functools.lru_cache(maxsize=1 << 16)
def _warn_once(concept_digest: str, base_hash: str, message: str) -> None:
    """The cache of this function is the memory of what was said."""
    warnings.warn(message, UserWarning, stacklevel=3)
