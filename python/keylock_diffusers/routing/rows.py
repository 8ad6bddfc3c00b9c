"""A row is a record: all that one row of the denoiser's batch carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from keylock_diffusers.concepts import Concept
from keylock_diffusers.routing import edits
from keylock_diffusers.routing.buffers import version_of


@dataclass(frozen=True)
class ConceptUse:
    """One concept in one row: its gate, its strength, and which streams it edits."""

    concept: Concept
    beta: float
    tau: float
    strength: float = 1.0
    lock: str = "local"  # "local": keys and values are edited; "global": values only


@dataclass(frozen=True, eq=False)
class ImageUse:
    """One image prompt in one row."""

    tokens: Tensor  # [L, D], projected
    scale: float | Mapping[str, float] = 1.0  # a number, or one per layer's name or its beginning; elsewhere 0
    region: Tensor | None = None  # [height, width]
    start: float = 0.0
    end: float = 1.0
    adapter: int = 0

    def scale_of(self, layer: str) -> float:
        if not isinstance(self.scale, Mapping):
            return float(self.scale)
        found = 0.0
        for name, number in self.scale.items():
            if layer.startswith(name):
                found = float(number)
        return found

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts in a step: diffusers' rule for ControlNets."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(frozen=True, eq=False)
class RegionUse:
    """One region of a row: a mask, and the positions of the tokens that may be seen from inside alone."""

    mask: Tensor  # [height, width]
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RowRegions:
    """All regions of one row.

    Args:
        uses: the regions.
        outside: the positions of tokens that are seen only where no region is.
        hidden: those of tokens that are seen nowhere.
        tokens: how many the row has; those after them are nowhere seen. None: all there are.
        placeholders: those in each wording that the row reads after its prompt.
    """

    uses: tuple[RegionUse, ...] = ()
    outside: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    tokens: int | None = None
    placeholders: tuple[frozenset[str], ...] = ()

    def has(self, wording: int, placeholder: str) -> bool:
        """Whether a placeholder of the prompt (wording 0) is also in a wording of its own; they count from 1."""
        return wording == 0 or (wording <= len(self.placeholders) and placeholder in self.placeholders[wording - 1])


class TextLayout(NamedTuple):
    """Where a row's wordings stand in the text that it reads: one after another, the prompt first."""

    tokens: int  # of one wording
    wordings: int = 1

    @property
    def length(self) -> int:
        """Of all the text that a row reads."""
        return self.tokens * self.wordings

    def positions(self, wording: int) -> range:
        """The tokens of one wording; 0 is the prompt."""
        return range(self.tokens * wording, self.tokens * (wording + 1))

    def split(self, text: Tensor) -> Sequence[Tensor]:  # [B, T * wordings, D] -> [B, T, D] each
        """Text by wording."""
        return text.split(self.tokens, 1)


@dataclass(frozen=True, eq=False)
class Row:
    """What one row of the denoiser's batch carries; an unconditional row is one without uses.

    Args:
        uses: its concepts.
        images: its image prompts.
        regions: where its words may be seen from.
        start: the share of the steps that are drawn before its concepts and subjects count (delayed subject
            conditioning: FastComposer's 1 - alpha).

    Raises:
        ValueError: a concept that is used twice, concepts that cannot be combined, or a start outside [0, 1].
    """

    uses: tuple[ConceptUse, ...] = ()
    images: tuple[ImageUse, ...] = ()
    regions: RowRegions = RowRegions()
    start: float = 0.0
    _mixes: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise ValueError(f"Row: start must lie in [0, 1], got {self.start!r}")
        if self.uses:
            self.mix(range(len(self.uses)))

    def mix(self, places: Sequence[int]) -> Tensor:  # [R, R] float32
        """How those of its concepts that count combine (see `edits.mixing`), solved once for each set of them."""
        held = [self.uses[place] for place in places]
        key = (
            tuple(places),
            *(version_of(tensor) for use in held for tensor in (use.concept.target_input, use.concept.direction)),
        )
        if key not in self._mixes:
            self._mixes[key] = edits.mixing([use.concept for use in held], [use.strength for use in held])
        return self._mixes[key]
