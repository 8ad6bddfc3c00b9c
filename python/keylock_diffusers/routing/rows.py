"""A row is a record: all that one row of the denoiser's batch carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from keylock_diffusers.concepts import AddedConcept, Concept, KeyLockedConcept
from keylock_diffusers.loras import LowRank
from keylock_diffusers.routing import edits
from keylock_diffusers.routing.adapters import AdapterUse, BoundTo
from keylock_diffusers.routing.buffers import version_of


class State(NamedTuple):
    """What of a row counts in a step."""

    subjects: bool
    concepts: tuple[bool, ...]
    loras: tuple[bool, ...]


def is_on(start: float, end: float, step: int, steps: int) -> bool:
    """Whether what has a start and an end, shares of the steps, counts in a step: diffusers' rule for ControlNets."""
    return step / steps >= start and (step + 1) / steps <= end


@dataclass(frozen=True)
class ConceptUse:
    """One concept in one row.

    Args:
        concept: the concept.
        beta, tau: its gate, where it has one.
        strength: a factor on what it does.
        lock: "local": keys and values are edited; "global": values only.
        start: the share of the steps before it counts; default the row's.
        places: for a concept that adds at its own words, per wording of the row, where each of them stands: (position,
            which of them).
    """

    concept: Concept
    beta: float = 0.0
    tau: float = 1.0
    strength: float = 1.0
    lock: str = "local"
    start: float | None = None
    places: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def absent(self) -> bool:
        """Whether not even its words stand in the prompt."""
        return isinstance(self.concept, AddedConcept) and self.strength == 0


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
        """Whether it counts in a step."""
        return is_on(self.start, self.end, step, steps)


@dataclass(frozen=True, eq=False)
class LoraUse:
    """One LoRA in one row.

    Args:
        updates: of the denoiser's projections, by name.
        text: of each text encoder's.
        strength: a factor on the denoiser's.
        text_strength: a factor on the text encoders'.
        blocks: further factors by the name of a projection of the denoiser.
        region: where it counts, weights in 0..1; None: everywhere.
        start, end: the share of the steps before it is switched on, and by whose end it is switched off.
        wordings: which of the row's wordings it counts in; None: all.
        bound: the word it is bound to, in the place of a region.
    """

    updates: Mapping[str, LowRank]
    text: tuple[Mapping[str, LowRank], ...] = ()
    strength: float = 1.0
    text_strength: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    region: Tensor | None = None  # [height, width]
    start: float = 0.0
    end: float = 1.0
    wordings: frozenset[int] | None = None
    bound: BoundTo | None = None

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts in a step."""
        return is_on(self.start, self.end, step, steps)

    @property
    def in_denoiser(self) -> AdapterUse:
        """Its half in the denoiser."""
        return AdapterUse(self.updates, self.strength, self.blocks, self.region, self.wordings, self.bound)

    def in_text(self, encoder: int, wording: int) -> AdapterUse | None:
        """Its half in a text encoder, where that reads one of the row's wordings; None: it has none there."""
        counts = self.wordings is None or wording in self.wordings
        if not counts or encoder >= len(self.text) or not self.text[encoder]:
            return None
        bound = None if self.bound is None else replace(self.bound, places=self.bound.places[wording : wording + 1])
        return AdapterUse(self.text[encoder], self.text_strength, bound=bound)


@dataclass(frozen=True, eq=False)
class RegionUse:
    """One region of a row, and the positions of the tokens that may be seen from inside alone.

    Args:
        mask: [height, width]; None: everywhere.
        tokens: the positions.
        within: masks that the region is inside of as well.
        without: masks that the region is outside of.
    """

    mask: Tensor | None  # [height, width]
    tokens: tuple[int, ...]
    within: tuple[Tensor, ...] = ()
    without: tuple[Tensor, ...] = ()

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """All its masks."""
        return (*([] if self.mask is None else [self.mask]), *self.within, *self.without)


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
        loras: its LoRAs.
        images: its image prompts.
        regions: where its words may be seen from.
        start: the share of the steps that are drawn before its subjects count, and those of its concepts that do not
            say so themselves (delayed subject conditioning: FastComposer's 1 - alpha).

    Raises:
        ValueError: a concept that is used twice, concepts that cannot be combined, or a start outside [0, 1].
    """

    uses: tuple[ConceptUse, ...] = ()
    images: tuple[ImageUse, ...] = ()
    regions: RowRegions = RowRegions()
    start: float = 0.0
    loras: tuple[LoraUse, ...] = ()
    _mixes: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise ValueError(f"Row: start must lie in [0, 1], got {self.start!r}")
        locked = [place for place, use in enumerate(self.uses) if isinstance(use.concept, KeyLockedConcept)]
        if locked:
            self.mix(locked)

    @property
    def scheduled(self) -> bool:
        """Whether its keys and values are not the same in all steps."""
        starts = [self.start, *(self._start(use) for use in self.uses)]
        return max(starts) > 0 or any(use.start > 0 or use.end < 1 for use in self.loras)

    def state(self, step: int, steps: int) -> State:
        """What of it counts in a step."""
        at = step / steps
        concepts = tuple(at >= self._start(use) and not use.absent for use in self.uses)
        return State(at >= self.start, concepts, tuple(use.active(step, steps) for use in self.loras))

    def _start(self, use: ConceptUse) -> float:
        return self.start if use.start is None else use.start

    def mix(self, places: Sequence[int]) -> Tensor:  # [R, R] float32
        """How those of its key-locked concepts that count combine (see `edits.mixing`), solved once for each set."""
        held: list[Any] = [self.uses[place].concept for place in places]
        key = tuple(places), *(version_of(t) for concept in held for t in (concept.target_input, concept.direction))
        if key not in self._mixes:
            self._mixes[key] = edits.mixing(held, [self.uses[place].strength for place in places])
        return self._mixes[key]


class Phases:
    """Which states a batch's rows go through, in which their keys and values differ.

    Every row's last state lies in the last phase, whatever it begins with and whenever it changes; a row with fewer
    states than others stays in its first for longer.

    Args:
        rows: the batch.
        steps: how many each row makes.
    """

    def __init__(self, rows: Sequence[Row], steps: Sequence[int]) -> None:
        self._rows = list(rows)
        self._states: list[list[State]] = []
        for row, total in zip(rows, steps, strict=True):
            in_order = [row.state(step, total) for step in range(total if row.scheduled else 1)]
            self._states.append(list(dict.fromkeys(reversed(in_order)))[::-1])
        self.count = max(map(len, self._states), default=1)

    @property
    def waiting(self) -> bool:
        """Whether a row's subjects or concepts count later than others of its."""
        return any(len({state[:2] for state in states}) > 1 for states in self._states)

    def states(self, phase: int) -> list[State]:
        """Each row's state in a phase."""
        return [states[max(phase - self.count, -len(states))] for states in self._states]

    def at(self, steps: Sequence[tuple[int, int]]) -> list[int]:
        """The phase that each row is in, each in its own (step, of how many).

        Raises:
            ValueError: a row is not meant to make so many steps.
        """
        found = []
        for row, states, at in zip(self._rows, self._states, steps, strict=True):
            if len(states) > 1 and row.state(*at) not in states:
                raise ValueError(f"Personalization: prepared for other steps than {at[1]}")
            place = states.index(row.state(*at)) if len(states) > 1 else 0
            found.append(self.count - len(states) + place)
        return found
