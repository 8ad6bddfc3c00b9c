"""A concept that adds what it learned to keys and values, at the tokens of its own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from keylock_diffusers.checks import number, whole
from keylock_diffusers.concepts.base_model import BaseModel
from keylock_diffusers.concepts.concept import Concept, vector

MOST_WORDS = 16
PARTS = ("encodings", "keys", "values")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AddedConcept(Concept):
    """Words of one subject's own, and what is added to keys and values where they stand.

    A placeholder stands for n words in the place of its super-class's noun, so that a subject may have parts. Without
    word embeddings the text encoders read the super-class's own prompt, all of whose other tokens stay what they are to
    the bit, and each of the n begins as the noun's encoding in it. With them the text encoders read n learned words. At
    the tokens of the i-th, chosen by position, the encoding e becomes

        e' = e + strength * encodings_i

    for all layers, and a layer's projections give

        keys   W_K e' + strength * keys_i               values  W_V e' + strength * values_i

    and nothing is changed anywhere else: two rank-one updates with given coefficients for each word. Concepts of one
    prompt stand at different tokens, so their combination is exact. Each of the three may be learned of the first
    words alone, or of none.

    Args:
        placeholder, super_class, base, training: see `Concept`.
        word_embeddings: [n, W_k] per text encoder, kept in float16; default none.
        encodings: [m, D], of the first m <= n words; kept in float16. Default of none. Without word embeddings n is the
            largest of the three m.
        keys: [m, sum of to_k widths of ``layers``], of the first m <= n words; kept in float16. Default of none.
        values: [m, sum of to_v widths of ``layers``], of the first m <= n words; kept in float16. Default of none.
        layers: names of the cross-attention layers that it changes, in the order of ``base.layers``; default all.
        start: the share of the steps that are drawn with the plain super-class before it counts, where a request does
            not say so.

    Raises:
        TypeError, ValueError: as `Concept`.

    Example:
        >>> from keylock_diffusers.concepts import TextEncoderInfo
        >>> base = BaseModel((TextEncoderInfo("CLIPTextModel", 2, 1, 99),), (("mid_block.attn2", 3),), 2)
        >>> concept = AddedConcept(
        ...     "<alice-cat>", "cat", word_embeddings=(torch.ones(2, 2),), values=torch.ones(2, 3), base=base
        ... )
        >>> Concept.load(concept.to_bytes()).words
        2
    """

    edit: ClassVar[str] = "added"
    _versions: ClassVar[tuple[int, ...]] = (2, 3)  # with word embeddings, and without
    _field_names: ClassVar[frozenset[str]] = frozenset(
        {"edit", "placeholder", "super_class", "words", *PARTS, "layers", "start", "base", "training"}
    )

    word_embeddings: tuple[Tensor, ...] = ()  # [n, W_k] float16
    encodings: Tensor = None  # type: ignore[assignment]  # [m, D] float16
    keys: Tensor = None  # type: ignore[assignment]  # [m, sum of to_k widths] float16
    values: Tensor = None  # type: ignore[assignment]  # [m, sum of to_v widths] float16
    layers: Sequence[str] = ()
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name, _ in self.base.layers]
        layers = tuple(self.layers) or tuple(names)
        if isinstance(self.layers, str) or list(layers) != [name for name in names if name in layers]:
            raise ValueError(
                f"Concept: layers must be names of cross-attention layers in the model's order, got {layers!r:.200}"
            )
        self._set("layers", layers)
        self._set("start", number(self.start, "Concept: start", 0, 1))
        parts = [part for part in (getattr(self, name) for name in PARTS) if part is not None]
        counts = [
            part.shape[0] for part in self.word_embeddings or parts if isinstance(part, Tensor) and part.ndim == 2
        ]
        words = max(counts, default=0)
        where = "word_embeddings" if self.word_embeddings else "encodings, keys and values"
        whole(words, f"Concept: the number of words in {where}", 1, MOST_WORDS)
        sizes = (encoder.hidden_size for encoder in self.base.text_encoders)
        given = enumerate(zip(self.word_embeddings, sizes, strict=False))  # as many, or none
        self._set(
            "word_embeddings",
            tuple(_rows(f"word_embeddings[{n}]", each, words, size) for n, (each, size) in given),
        )
        for part in PARTS:
            width, held = _width(part, self.base, layers), getattr(self, part)
            held = torch.zeros(0, width) if held is None else held
            rows = held.shape[0] if isinstance(held, Tensor) and held.ndim == 2 else 0
            self._set(part, _rows(part, held, min(rows, words), width))

    @property
    def words(self) -> int:
        return max(map(len, self.word_embeddings or self.edits))

    @property
    def _version(self) -> int:
        return self._versions[0 if self.word_embeddings else 1]

    @property
    def edits(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, part) for part in PARTS)

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {f"word_embedding.{k}": embedding for k, embedding in enumerate(self.word_embeddings)}
        held |= {part: getattr(self, part) for part in PARTS}
        return {name: tensor.flatten() for name, tensor in held.items() if len(tensor)}

    def per_layer(self, side: str) -> dict[str, Tensor]:
        """Views of ``keys`` or ``values``, [m, width] per name of a layer that it changes."""
        widths = [width for name, width in self.base.layers if name in self.layers]
        return dict(zip(self.layers, getattr(self, side).split(widths, 1), strict=True))

    @property
    def _fields(self) -> dict[str, Any]:
        names = [name for name, _ in self.base.layers]
        return {
            "edit": self.edit,
            "placeholder": self.placeholder,
            "super_class": self.super_class,
            "words": self.words,
            **{part: len(getattr(self, part)) for part in PARTS},
            "layers": [names.index(name) for name in self.layers],
            "start": self.start,
            "base": self.base.to_json(),
            "training": self.training,
        }

    @classmethod
    def _settings(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"words": fields["words"], "start": number(fields["start"], "Concept: start", 0, 1)}

    @classmethod
    def _lengths(cls, fields: Mapping[str, Any], base: BaseModel) -> dict[str, tuple[str, int]]:
        if fields["edit"] != cls.edit:
            raise ValueError(f"edit must be {cls.edit!r}, got {fields['edit']!r:.80}")
        words = whole(fields["words"], "words", 1, MOST_WORDS)
        encoders = base.text_encoders if fields["format_version"] == cls._versions[0] else ()
        lengths = {f"word_embedding.{k}": ("F16", words * e.hidden_size) for k, e in enumerate(encoders)}
        places = fields["layers"]
        numbers = range(len(base.layers))
        if not isinstance(places, list) or not places or places != [n for n in numbers if n in places]:
            raise ValueError(
                f"layers must be numbers from 0 to {numbers[-1]} in rising order, and at least one, got {places!r:.80}"
            )
        layers = [base.layers[place][0] for place in places]
        for part in PARTS:
            if count := whole(fields[part], part, 0, words):
                lengths[part] = ("F16", count * _width(part, base, layers))
        if not encoders and words != max(fields[part] for part in PARTS):
            raise ValueError(f"words must be as many as the most of {', '.join(PARTS)}, got {words}")
        return lengths

    @classmethod
    def _read(cls, fields: Mapping[str, Any], base: BaseModel, tensors: dict[str, Tensor]) -> AddedConcept:
        layers = tuple(base.layers[place][0] for place in fields["layers"])
        parts = {p: tensors[p].view(fields[p], _width(p, base, layers)) for p in PARTS if p in tensors}
        names = (f"word_embedding.{k}" for k in range(len(base.text_encoders)))
        words = tuple(tensors[name].view(fields["words"], -1) for name in names if name in tensors)
        own: dict[str, Any] = {name: fields[name] for name in ("placeholder", "super_class", "start", "training")}
        return cls(base=base, word_embeddings=words, layers=layers, **(own | parts))


def _width(part: str, base: BaseModel, layers: Sequence[str]) -> int:
    """How many numbers of a part a word has."""
    return base.cross_attention_dim if part == "encodings" else sum(w for name, w in base.layers if name in layers)


def _rows(name: str, value: object, rows: int, width: int) -> Tensor:
    """A [rows, width] tensor, checked as `vector` checks."""
    if isinstance(value, Tensor) and tuple(value.shape) == (rows, width):
        return vector(name, value.flatten(), rows * width).view(rows, width)
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise (ValueError if isinstance(value, Tensor) else TypeError)(
        f"Concept: {name} must be [{rows}, {width}], got {got}"
    )
