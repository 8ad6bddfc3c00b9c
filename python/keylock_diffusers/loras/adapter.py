"""What a LoRA file holds, as plain data: low-rank updates of a model's modules, learned words, and facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from keylock_diffusers.checks import floats, number

_LONGEST_NAME = 200


class LoraFileError(ValueError):
    """A LoRA or embedding file is damaged, holds what is not supported, or was made for another model."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank update of one module's weight.

        W' = W + strength * scale * up @ down            without a magnitude
        W' = magnitude * W'' / |W''|, row by row         with one (DoRA), W'' being the line above

    `scale` stays a number of its own: folding it into half-precision factors would round them again.

    Args:
        down: [r, K], or [r, C, kh, kw] where the module is a convolution; floating point.
        up: [O, r] of the same dtype.
        scale: alpha / rank, or alpha / sqrt(rank) with rank stabilisation; negative reverses the update.
        magnitude: [O] float32, the norms of DoRA's rows.
        residual: relative Frobenius error of a truncation; 0 where nothing was left out.

    Raises:
        TypeError, ValueError: an argument is not what this says, or holds a NaN or an infinity.

    Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; rsLoRA, Kalajdzievski 2023, arXiv 2312.03732; DoRA, Liu et al.
    2024, arXiv 2402.09353.

    Example:
        >>> LowRank(torch.ones(2, 3), torch.ones(4, 2), scale=0.5).rank
        2
    """

    down: Tensor  # [r, K] or [r, C, kh, kw]
    up: Tensor  # [O, r]
    scale: float = 1.0
    magnitude: Tensor | None = None  # [O] float32
    residual: float = 0.0

    def __post_init__(self) -> None:
        for name in ("down", "up"):
            _finite(getattr(self, name), f"LowRank: {name}")
        if self.up.ndim != 2 or self.down.ndim < 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"LowRank: up must be [O, r] and down [r, K] or [r, C, kh, kw], "
                f"got {list(self.up.shape)} and {list(self.down.shape)}"
            )
        if self.up.dtype != self.down.dtype:
            raise TypeError(f"LowRank: up and down must have one dtype, got {self.up.dtype} and {self.down.dtype}")
        object.__setattr__(self, "scale", number(self.scale, "LowRank: scale"))
        object.__setattr__(self, "residual", number(self.residual, "LowRank: residual", 0, 1))
        if self.magnitude is not None:
            _finite(self.magnitude, "LowRank: magnitude")
            if self.magnitude.shape != self.up.shape[:1]:
                raise ValueError(f"LowRank: magnitude must be [{self.up.shape[0]}], got {list(self.magnitude.shape)}")

    @classmethod
    def _checked(cls, **fields: Any) -> LowRank:
        """One whose numbers were checked before they were stored: nothing is looked at again."""
        update = object.__new__(cls)
        update.__dict__.update(fields)
        return update

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, eq=False)
class LearnedWord:
    """A word that textual inversion taught a model: the embeddings that stand for it.

    Args:
        name: what the file calls it, such as ``<alice-cat>``; otherwise the file's own name.
        vectors: one [n, width] per text encoder, floating point; n is the same for all.

    Raises:
        TypeError, ValueError: an argument is not what this says, or holds a NaN or an infinity.

    Paper: Gal et al. 2022, arXiv 2208.01618.
    """

    name: str
    vectors: tuple[Tensor, ...]  # [n, width] each

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= _LONGEST_NAME or not self.name.isprintable():
            raise ValueError(
                f"LearnedWord: a word must be called by at most {_LONGEST_NAME} printable characters, "
                f"got {self.name!r:.80}"
            )
        for vectors in self.vectors:
            _finite(vectors, f"LearnedWord: vectors of {self.name!r:.80}")
            if vectors.ndim != 2:
                raise ValueError(
                    f"LearnedWord: {self.name!r:.80} must have vectors [n, width], got {list(vectors.shape)}"
                )
        if len({len(vectors) for vectors in self.vectors}) != 1:
            counts = [len(vectors) for vectors in self.vectors]
            raise ValueError(f"LearnedWord: {self.name!r:.80} must have as many vectors for each encoder, got {counts}")


@dataclass(frozen=True)
class AdapterFacts:
    """What a LoRA file says of itself; the texts are as its author wrote them, and nobody checked them.

    Args:
        kinds: ``LoRA``, ``LoCon`` (of convolutions), ``LoHa``, ``LoKr``, ``full`` and ``DoRA``, as far as they occur.
        base: the model that its layers look made for, such as ``SDXL``; None where they do not tell.
        layers: how many it changes, per component: ``denoiser``, ``text_encoder``, ``text_encoder_2``.
        ranks: per component, how many layers have each rank, as trained; a product's factors count, not the product.
        trigger_words: what its author says to put into prompts, then the words of its training captions, frequent
            ones first.
        words: names of the embeddings in it.
        training: other texts of its header, each cut to 1000 characters.
        unsupported: what it holds that `read_adapter` refuses, in words.
    """

    kinds: tuple[str, ...] = ()
    base: str | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    trigger_words: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file's content, every key of it accounted for.

    Args:
        denoiser: the updates by the denoiser's own module names, in the model's order.
        text_encoders: likewise for each text encoder.
        words: embeddings that came in the same file, by name.
        facts: what the file says of itself.

    Raises:
        ValueError: there is neither an update nor a word.
    """

    denoiser: Mapping[str, LowRank]
    text_encoders: tuple[Mapping[str, LowRank], ...] = ()
    words: Mapping[str, LearnedWord] = field(default_factory=dict)
    facts: AdapterFacts = AdapterFacts()

    def __post_init__(self) -> None:
        if not (self.denoiser or any(self.text_encoders) or self.words):
            raise ValueError("Adapter: must update a module or bring a word, got neither")


def component_name(component: int) -> str:
    """What diffusers calls a component: -1 is the denoiser, 0 and above are text encoders."""
    return "denoiser" if component < 0 else "text_encoder" + (f"_{component + 1}" if component else "")


def _finite(tensor: Tensor, name: str) -> None:
    floats(tensor, name)
    largest = float(tensor.float().abs().max())  # NaN where there is one
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, got {largest}")
