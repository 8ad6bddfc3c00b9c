"""One concept: everything a subject's personalisation adds to a base model, in one small file."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Self

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

_PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]*>")
_MAX_WORDS = 64
_MAX_FACTS = 64 << 10


@dataclass(frozen=True, eq=False)
class Concept(ABC):
    """What personalisation learned about one subject: a `KeyLockedConcept` or an `AddedConcept`.

    Two concepts are never compared by content; `digest` does that. Tensors are stored as copies on the CPU and must
    not be written to.

    Args:
        placeholder: the word that stands for the subject in prompts, such as ``<alice-cat>``; lower case, at most 64
            characters.
        super_class: what the subject is, such as ``cat`` or ``teddy bear``; at most 64 characters.
        word_embeddings: what was learned in the place of the super-class's noun, for each text encoder; kept in
            float16.
        base: the model all of this was trained for.
        training: facts worth keeping about the training run, as JSON.

    Raises:
        TypeError, ValueError: an argument is not what this says; infinities and NaN are refused, as are values that
            float16 cannot hold.
    """

    placeholder: str
    super_class: str
    _: KW_ONLY
    word_embeddings: tuple[Tensor, ...]
    base: BaseModel
    training: Mapping[str, Any] = field(default_factory=dict)

    edit: ClassVar[str]
    """What it does to keys and values: "perfusion" or "added"."""
    start: float = field(default=0.0, init=False)
    """The share of the steps that are drawn before it counts, where a request does not say so."""
    _versions: ClassVar[tuple[int, ...]]  # of its file
    _field_names: ClassVar[frozenset[str]]  # of its file, beside the version
    _kinds: ClassVar[dict[int, type[Concept]]] = {}  # by their files' version

    def __init_subclass__(cls) -> None:
        for version in vars(cls).get("_versions", ()):
            Concept._kinds.setdefault(version, cls)

    def __post_init__(self) -> None:
        check_placeholder(self.placeholder)
        check_super_class(self.super_class)
        if not isinstance(self.base, BaseModel):
            raise TypeError(f"Concept: base must be a BaseModel, got {type(self.base).__name__}")
        given, encoders = tuple(self.word_embeddings), self.base.text_encoders
        if len(given) != len(encoders) and (given or len(self._versions) == 1):
            raise ValueError(
                f"Concept: word_embeddings must hold one per text encoder, {len(encoders)}, got {len(given)}"
            )
        self._set("word_embeddings", given)
        self._set("training", facts("training", self.training))

    @property
    @abstractmethod
    def words(self) -> int:
        """How many tokens it stands for in the place of the super-class's noun."""

    @property
    def _version(self) -> int:
        """Of its file."""
        return self._versions[0]

    @property
    @abstractmethod
    def edits(self) -> tuple[Tensor, ...]:
        """The tensors that keys and values are made with."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All its tensors by the names that they have in the file."""

    @property
    @abstractmethod
    def _fields(self) -> dict[str, Any]:
        """What its file says beside the tensors, as JSON."""

    @classmethod
    @abstractmethod
    def _settings(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """How a file's concept counts where a request does not say so.

        Raises:
            TypeError, ValueError: a field that says so is not what it must be.
        """

    @classmethod
    @abstractmethod
    def _lengths(cls, fields: Mapping[str, Any], base: BaseModel) -> dict[str, tuple[str, int]]:
        """The types and lengths of a file's tensors, by name.

        Raises:
            TypeError, ValueError: a field that says so is not what it must be.
        """

    @classmethod
    @abstractmethod
    def _read(cls, fields: Mapping[str, Any], base: BaseModel, tensors: dict[str, Tensor]) -> Concept:
        """The concept of a file whose fields' names and tensors' lengths are right."""

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
            kind, base = _checked(header)
            if not issubclass(kind, cls):
                raise ValueError(f"the concept's edit is {kind.edit!r}, not {cls.edit!r}")
            return kind._read(header.fields, base, read_tensors(data, header, source))
        except ConceptFileError:
            raise
        except (ValueError, TypeError) as error:
            raise ConceptFileError(f"{source}: {error}") from None

    def to_bytes(self) -> bytes:
        """The concept file's content; equal concepts give equal bytes."""
        return pack({"format_version": self._version, **self._fields}, self.tensors)

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

    @property
    def settings(self) -> dict[str, Any]:
        """How it counts where a request does not say so, as JSON."""
        return self._settings(self._fields)

    def with_(self, **changes: Any) -> Self:
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


@dataclass(frozen=True)
class ConceptSummary:
    """What the header of a concept file says; its tensors are neither read nor compared with the checksum.

    Args:
        placeholder, super_class, edit, settings: see `Concept`.
        nbytes: size of the file.
    """

    placeholder: str
    super_class: str
    edit: str
    settings: Mapping[str, Any]
    nbytes: int

    @classmethod
    def of(cls, header: Header, nbytes: int, source: str) -> ConceptSummary:
        """Check and read a header.

        Raises:
            ConceptFileError: it is not of a concept.
        """
        fields = header.fields
        try:
            kind, _ = _checked(header)
            check_placeholder(fields["placeholder"])
            check_super_class(fields["super_class"])
            settings = kind._settings(fields)
        except (ValueError, TypeError) as error:
            raise ConceptFileError(f"{source}: {error}") from None
        return cls(fields["placeholder"], fields["super_class"], kind.edit, settings, nbytes)


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


def finite_number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"Concept: {name} must be a number, got {type(value).__name__}")
    if not abs(value) <= 1e300 or not math.isfinite(value):  # the first also keeps float() of a large int from raising
        raise ValueError(f"Concept: {name} must be finite, got {value!r:.80}")
    return float(value)


def vector(name: str, value: object, length: int, dtype: torch.dtype = torch.float16) -> Tensor:
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


def facts(name: str, value: object) -> dict[str, Any]:
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


def _checked(header: Header) -> tuple[type[Concept], BaseModel]:
    """Which concept a file holds, and of which model; its fields' names and its tensors are then what they must be."""
    fields = header.fields
    version = fields.get("format_version")
    known = " or ".join(map(str, sorted(Concept._kinds)))
    if not isinstance(version, int) or isinstance(version, bool) or version not in Concept._kinds:
        raise ValueError(f"format_version must be {known}, which this release reads, got {version!r:.80}")
    kind = Concept._kinds[version]
    names = {"format_version", *kind._field_names}
    if fields.keys() != names:
        odd = sorted(fields.keys() ^ names)
        raise ValueError(f"the fields must be {sorted(names)}; missing or unknown: {odd!r:.200}")
    base = BaseModel.from_json(fields["base"])
    expected = kind._lengths(fields, base)
    if header.tensors.keys() != expected.keys():
        odd = sorted(header.tensors.keys() ^ expected.keys())
        raise ValueError(f"the tensors must be {sorted(expected)}; missing or unknown: {odd!r:.200}")
    for name, (dtype, length) in expected.items():
        entry = header.tensors[name]
        if (entry.dtype, entry.length) != (dtype, length):
            raise ValueError(f"tensor {name} must be {dtype} [{length}], got {entry.dtype} [{entry.length}]")
    return kind, base


@functools.lru_cache(maxsize=1 << 16)
def _warn_once(concept_digest: str, base_hash: str, message: str) -> None:
    """The cache of this function is the memory of what was said."""
    warnings.warn(message, UserWarning, stacklevel=3)
