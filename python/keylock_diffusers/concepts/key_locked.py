"""A concept as Perfusion has it: a gated rank-one edit whose keys are locked to the super-class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from keylock_diffusers.concepts.base_model import BaseModel
from keylock_diffusers.concepts.concept import Concept, facts, finite_number, vector


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class KeyLockedConcept(Concept):
    """A key-locked rank-one edit of a base model's cross-attention, for one subject.

    With i* the target input and C the second moment of text encodings, one token's encoding e takes part by

        s(e) = (e^T C^-1 i*) / (i*^T C^-1 i*) = direction . e        g(e) = sigmoid((s(e) - beta) / tau)
        keys   W_K e - s(e) W_K i* + g(e) W_K e_super                values  W_V e - s(e) W_V i* + g(e) values

    so neither C nor any weight matrix needs keeping: 34 KB hold a concept of Stable Diffusion 1.5.

    Args:
        placeholder, super_class, base, training: see `Concept`.
        target_input: [D], i*; kept in float32.
        energy: i*^T C^-1 i*, positive.
        direction: [D], C^-1 i* / energy; kept in float32. Its product with ``target_input`` is 1.
        super_class_encoding: [D], e_super; kept in float16.
        word_embeddings: one learned [W_k] per text encoder; kept in float16.
        values: [sum of to_v widths], o*_V of all layers in the order of ``base.layers``; kept in float16.
        beta: where the gate opens at inference, in units of s.
        tau: the gate's temperature at inference; 0 is linear.
        covariance: how C was made, as JSON.

    Raises:
        TypeError, ValueError: as `Concept`.

    Paper: Perfusion, Tewel et al. 2023, arXiv 2305.01644.

    Example:
        >>> from keylock_diffusers.concepts import TextEncoderInfo
        >>> base = BaseModel((TextEncoderInfo("CLIPTextModel", 2, 1, 99),), (("mid_block.attn2", 3),), 2)
        >>> concept = KeyLockedConcept(
        ...     "<alice-cat>", "cat", target_input=torch.tensor([2.0, 0.0]), energy=4.0,
        ...     direction=torch.tensor([0.5, 0.0]), super_class_encoding=torch.ones(2),
        ...     word_embeddings=(torch.ones(2),), values=torch.ones(3), base=base,
        ... )
        >>> Concept.load(concept.to_bytes()).placeholder
        '<alice-cat>'
    """

    edit: ClassVar[str] = "perfusion"
    _versions: ClassVar[tuple[int, ...]] = (1,)
    _field_names: ClassVar[frozenset[str]] = frozenset(
        {"placeholder", "super_class", "energy", "beta", "tau", "base", "covariance", "training"}
    )

    target_input: Tensor  # [D] float32
    energy: float
    direction: Tensor  # [D] float32
    super_class_encoding: Tensor  # [D] float16
    values: Tensor  # [sum of to_v widths] float16
    beta: float = 0.75
    tau: float = 0.15
    covariance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("energy", "beta", "tau"):
            self._set(name, finite_number(name, getattr(self, name)))
        if self.energy <= 0:
            raise ValueError(f"Concept: energy must be positive, got {self.energy}")
        dim = self.base.cross_attention_dim
        self._set("target_input", vector("target_input", self.target_input, dim, torch.float32))
        self._set("direction", vector("direction", self.direction, dim, torch.float32))
        self._set("super_class_encoding", vector("super_class_encoding", self.super_class_encoding, dim))
        self._set("values", vector("values", self.values, self.base.values_width))
        sizes = (encoder.hidden_size for encoder in self.base.text_encoders)
        given = enumerate(zip(self.word_embeddings, sizes, strict=True))
        self._set("word_embeddings", tuple(vector(f"word_embeddings[{n}]", *each) for n, each in given))
        self._check_direction()
        self._set("covariance", facts("covariance", self.covariance))

    @property
    def words(self) -> int:
        return 1

    @property
    def edits(self) -> tuple[Tensor, ...]:
        return self.target_input, self.direction, self.super_class_encoding, self.values

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            "target_input": self.target_input,
            "direction": self.direction,
            "super_class_encoding": self.super_class_encoding,
            "values": self.values,
            **{f"word_embedding.{k}": embedding for k, embedding in enumerate(self.word_embeddings)},
        }

    def values_per_layer(self) -> dict[str, Tensor]:
        """Views of ``values``, one [to_v width] per cross-attention layer's name."""
        names, widths = zip(*self.base.layers, strict=True)
        return dict(zip(names, self.values.split(widths), strict=True))

    @property
    def _fields(self) -> dict[str, Any]:
        return {
            "placeholder": self.placeholder,
            "super_class": self.super_class,
            "energy": self.energy,
            "beta": self.beta,
            "tau": self.tau,
            "base": self.base.to_json(),
            "covariance": self.covariance,
            "training": self.training,
        }

    @classmethod
    def _settings(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: finite_number(name, fields[name]) for name in ("beta", "tau")}

    @classmethod
    def _lengths(cls, fields: Mapping[str, Any], base: BaseModel) -> dict[str, tuple[str, int]]:
        dim = base.cross_attention_dim
        lengths = {"target_input": ("F32", dim), "direction": ("F32", dim), "super_class_encoding": ("F16", dim)}
        lengths["values"] = ("F16", base.values_width)
        return lengths | {f"word_embedding.{k}": ("F16", e.hidden_size) for k, e in enumerate(base.text_encoders)}

    @classmethod
    def _read(cls, fields: Mapping[str, Any], base: BaseModel, tensors: dict[str, Tensor]) -> KeyLockedConcept:
        words = tuple(tensors.pop(f"word_embedding.{k}") for k in range(len(base.text_encoders)))
        own: dict[str, Any] = {name: fields[name] for name in cls._field_names - {"base"}}
        return cls(base=base, word_embeddings=words, **(own | tensors))

    def _check_direction(self) -> None:
        terms = self.direction.double() * self.target_input.double()  # [D]
        # Where C is nearly singular large terms cancel, and each was rounded to float32 twice.
        rounding = 2 * torch.finfo(torch.float32).eps * terms.abs().sum().item()
        product = terms.sum().item()
        if abs(product - 1) > min(1e-4 + rounding, 1e-2):
            raise ValueError(f"Concept: direction . target_input must be 1, got {product:.6g}")
