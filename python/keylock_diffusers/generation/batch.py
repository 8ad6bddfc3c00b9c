"""The pictures of one batch while they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.denoisers.base import RowLayout, Schedule, Size
from keylock_diffusers.encoding.wordings import BatchText
from keylock_diffusers.generation.gates import Gates
from keylock_diffusers.generation.maps import BatchReadout
from keylock_diffusers.generation.plan import Plan
from keylock_diffusers.processors.contract import Readout
from keylock_diffusers.routing.buffers import filled
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import Phases


@dataclass(frozen=True)
class Picture:
    """One picture to draw: a request's plan, and which of its pictures."""

    plan: Plan
    request: int = 0
    image: int = 0


@dataclass(frozen=True)
class Filling:
    """What an inpainting row keeps of its picture."""

    mask: Tensor  # [1, 1, h, w], 1 where it is filled in
    masked: Tensor  # [1, C, h, w], latents of the picture without what is filled in
    latents: Tensor  # [1, C, h, w], of the whole picture; only where the U-Net does not read the mask itself
    noise: Tensor  # [1, C, h, w]


@dataclass
class RowState:
    """One picture's own state in the loop: its noise, its scheduler with its history, its times."""

    picture: Picture
    generator: torch.Generator
    schedule: Schedule
    filling: Filling | None = None
    first: int = 0  # the batch's step at which it joins

    @property
    def steps(self) -> int:
        """How many steps the picture takes."""
        return len(self.schedule.times)

    def own(self, step: int) -> int:
        """Its own step in a step of the batch; before it joins, its first."""
        return max(step - self.first, 0)

    @contextmanager
    def untouched_by_failure(self) -> Iterator[None]:
        """What the scheduler and the generator hold is put back where the block raises."""
        scheduler = self.schedule.scheduler
        held = {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
        noise = self.generator.get_state()
        try:
            yield
        except BaseException:
            vars(scheduler).clear()
            vars(scheduler).update(held)
            self.generator.set_state(noise)
            raise


@dataclass
class Buffers:
    """Tensors that stay where they are from batch to batch."""

    personalization: Personalization
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the denoiser, by name

    def fill(self, name: str, value: Tensor) -> Tensor:
        """The value in the buffer of that name, where it fits."""
        self.inputs[name] = filled(self.inputs.get(name), value)
        return self.inputs[name]


@dataclass
class Batch:
    """Pictures that share the denoiser's calls; what a step changes, it changes last."""

    rows: list[RowState]
    layout: RowLayout
    size: Size
    text: BatchText
    phases: Phases  # of the conditional rows, and after them the unconditional ones
    scales: list[float]  # of guidance
    latents: Tensor  # [B, C, h, w]
    steps: int
    position: int = 0  # the step that comes next
    laid_out: int = 0  # the one that buffers were filled for
    buffers: Buffers | None = None  # None once the engine has them back
    conditions: dict[str, Any] = field(default_factory=dict)
    conditioned: list[int] = field(default_factory=list)  # the phases that they are of
    readout: BatchReadout | None = None
    gates: Gates | None = None
    read: Readout | None = None  # all that is read out of the attention

    @property
    def held(self) -> Buffers:
        """Its buffers.

        Raises:
            RuntimeError: the batch is finished.
        """
        if self.buffers is None:
            raise RuntimeError("Engine: the batch was drawn to its end, and its buffers given back; load it again")
        return self.buffers

    @property
    def prompts(self) -> Tensor:  # [B * parts, T, D]
        """What the denoiser is given as text."""
        return self.held.inputs["prompts"]

    def control(self, name: str) -> Tensor:  # [B * parts, 3, height, width]
        """The pictures that a ControlNet follows."""
        return self.held.inputs[f"control {name}"]

    @property
    def pictures(self) -> list[Picture]:
        """What its rows draw."""
        return [row.picture for row in self.rows]

    @property
    def phase(self) -> list[int]:
        """The phases that its rows are in, as `phases` has them."""
        steps = [(row.own(self.position), row.steps) for row in self.rows]
        return self.phases.at(steps * (2 if self.text.last.uncond is not None else 1))

    @property
    def plans(self) -> list[Plan]:
        """The rows' plans."""
        return [picture.plan for picture in self.pictures]
