"""The engine of one batch: plan, load, step, draw. `generate` is a loop over it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.concepts import Concept
from keylock_diffusers.denoisers.base import RowLayout
from keylock_diffusers.denoisers.families import denoiser_of
from keylock_diffusers.denoisers.unet import cross_attention_layers, resolutions_of
from keylock_diffusers.encoding.fusion import SubjectFusion
from keylock_diffusers.encoding.wordings import PhaseText, encode_batch
from keylock_diffusers.generation.batch import Batch, Buffers, Filling, Picture, RowState
from keylock_diffusers.generation.gates import Gates, Several
from keylock_diffusers.generation.loras import LoraSource
from keylock_diffusers.generation.maps import AttentionMaps
from keylock_diffusers.generation.plan import Plan, Planner
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.loras import LoraBank
from keylock_diffusers.masks import latent_mask
from keylock_diffusers.processors import verify
from keylock_diffusers.requests import RequestError
from keylock_diffusers.routing.adapters import LoraCapacity, Store, store_of
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import Phases, Row

_NOT_FINITE = "its numbers became infinite or no numbers at all while it was drawn: lower its strengths and scales"


@dataclass(frozen=True)
class Settings:
    """What all batches of an engine share; the arguments of `generate`."""

    bank: Mapping[str, Concept] | None = None
    controlnets: Mapping[str, Any] = field(default_factory=dict)
    num_inference_steps: int = 50
    height: int | None = None
    width: int | None = None
    scheduler: Any = None
    image_lengths: Sequence[Sequence[int]] | None = None
    max_regions: int | None = None
    fusion: SubjectFusion | None = None
    loras: LoraSource | None = None
    lora_capacity: LoraCapacity | None = None
    record: AttentionMaps | None = None
    output_type: str = "pil"
    strict: bool = False
    limits: RequestLimits = RequestLimits()
    options: Mapping[str, Any] = field(default_factory=dict)  # keywords of the pipeline's own call


class Engine:
    """Draws batches of a pipeline's rows in a loop of its own: one call of the denoiser a step, whoever the rows are.

    Buffers are kept from batch to batch: where their shapes are the same, so are their addresses, and a step that was
    compiled or captured stays valid.

    Args:
        pipe: a pipeline after `install`.
        settings: what its batches share.

    Raises:
        TypeError: no family knows the pipeline, or a keyword is none of its own.
        RuntimeError: a cross-attention layer does not have our processor.
    """

    def __init__(self, pipe: Any, settings: Settings = Settings()) -> None:
        self._caller = pipe
        self.pipe = copy.copy(pipe)  # per-call state of its own; modules are shared
        self.settings = settings
        self.denoiser = denoiser_of(self.pipe, settings.options)
        verify(pipe)
        given = next((own for name in ("timesteps", "sigmas") if (own := settings.options.get(name)) is not None), None)
        self.planner = Planner(
            self.denoiser,
            settings.bank,
            settings.controlnets,
            settings.fusion,
            settings.image_lengths,
            settings.max_regions,
            settings.height,
            settings.width,
            settings.strict,
            settings.num_inference_steps if given is None else len(given),
            settings.limits,
            settings.loras,
        )
        bank = settings.loras if isinstance(settings.loras, LoraBank) else None
        self._store: Store = store_of(bank, settings.lora_capacity)
        self._spare: dict[tuple[Any, ...], list[Buffers]] = {}
        self.pipe.scheduler = pipe.scheduler if settings.scheduler is None else settings.scheduler
        self.pipe._interrupt = False

    def plan(self, request: Any) -> Plan:
        """Looks up, tokenizes and checks everything that a request names; no tensors of the batch.

        Raises:
            Exception: what is wrong with the request.
        """
        return self.planner.plan(request)

    @property
    def stopped(self) -> bool:
        """Whether somebody has set the pipeline's stop flag, on the caller's pipeline or in a callback."""
        return bool(getattr(self._caller, "_interrupt", False) or getattr(self.pipe, "_interrupt", False))

    @torch.no_grad()
    def load(self, batch: Sequence[Picture]) -> Batch:
        """Encodes what a batch's rows read, draws their first latents, and fills the buffers that layers read.

        Args:
            batch: pictures whose plans are of one `Plan.group`.
        """
        plans = [picture.plan for picture in batch]
        denoiser, size = self.denoiser, plans[0].size
        layout = denoiser.rows(plans[0].guided)
        capacity = self.settings.max_regions
        if capacity is None:
            capacity = max(max(plan.wordings.own, plan.negative_wordings.own) for plan in plans)
        rows, latents = [], []
        for picture in batch:
            row, first = self._begin(picture)
            rows.append(row)
            latents.append(first)
        halves = [plan.row for plan in plans] + [plan.negative_row for plan in plans if layout.guided]
        phases = Phases(halves, [row.steps for row in rows] * (2 if layout.guided else 1))
        adapted = self.settings.lora_capacity is not None or any(plan.wordings.loras for plan in plans)
        with denoiser.encoding():
            text = encode_batch(
                denoiser,
                [plan.wordings for plan in plans],
                [plan.negative_wordings for plan in plans] if layout.guided else [],
                capacity,
                phases,
                self.settings.fusion,
                self._store if adapted else None,
                self.settings.lora_capacity,
            )
        steps = max(row.steps for row in rows)
        for row in rows:
            row.first = steps - row.steps
        scales = [plan.request.guidance_scale for plan in plans]
        made = Batch(rows, layout, size, text, phases, scales, torch.cat(latents), steps)
        self._lay_out(made, layout)
        return made

    @torch.no_grad()
    def step(self, batch: Batch) -> None:
        """One call of the denoiser and one scheduler step for every row, each at its own time.

        It commits or leaves the batch untouched: what raises inside changes nothing.
        """
        buffers = batch.held
        own = [row.own(batch.position) for row in batch.rows]
        parts = len(batch.layout.parts)
        times = [row.schedule.times[step] for row, step in zip(batch.rows, own, strict=True)]
        if batch.position != batch.laid_out:
            totals = self._of_rows([row.steps for row in batch.rows], parts)
            buffers.personalization.at_step(self._of_rows(own, parts), totals)
            if batch.phase != batch.conditioned:
                self._condition(batch)
        with ExitStack() as held:
            for row in batch.rows:
                held.enter_context(row.untouched_by_failure())
            joined = [row.first <= batch.position for row in batch.rows]
            if batch.readout is not None:
                batch.readout.at_step(joined)
            inputs = [
                row.schedule.scheduler.scale_model_input(latents, time) if there else latents
                for row, latents, time, there in zip(batch.rows, batch.latents.split(1), times, joined, strict=True)
            ]
            guided = self._predicted(batch, torch.cat(inputs), torch.stack(times), own)
            latents = [
                self._stepped(row, prediction, latents, time, step) if there else latents
                for row, prediction, latents, time, step, there in zip(
                    batch.rows, guided.split(1), batch.latents.split(1), times, own, joined, strict=True
                )
            ]
            made = torch.cat(latents)
            if batch.readout is not None:
                batch.readout.commit()
            if batch.gates is not None:
                batch.gates.commit(joined, parts, buffers.personalization)
        batch.latents = made
        batch.position += 1

    def draw(self, batch: Batch, after_step: Callable[[Engine, Batch], None] | None = None) -> list[Any]:
        """Steps to the end, or until somebody sets the pipeline's stop flag, and decodes.

        Args:
            batch: what `load` made; it is given back to the engine.
            after_step: called after every step.

        Returns:
            A picture a row; None where no step was made, a RequestError where its numbers are not finite.
        """
        started = batch.position
        self.pipe._num_timesteps = batch.steps
        self.show_guidance(batch)
        try:
            with self.pipe.progress_bar(total=batch.steps) as bar:
                while batch.position < batch.steps and not self.stopped:
                    self.step(batch)
                    if after_step is not None:
                        after_step(self, batch)
                    bar.update()
            if batch.position == started and batch.steps > started:
                return [None] * len(batch.rows)
            with torch.no_grad():
                pictures, finite = self.denoiser.decode(batch.latents, self.settings.output_type)
            return [
                picture if right else RequestError(row.picture.request, row.picture.plan.request, _NOT_FINITE)
                for row, picture, right in zip(batch.rows, pictures, finite.tolist(), strict=True)
            ]
        finally:
            self.release(batch)
            self.pipe.maybe_free_model_hooks()

    def release(self, batch: Batch) -> None:
        """Gives a batch's buffers to the ones that come."""
        if batch.buffers is not None:
            batch.buffers.personalization.release()
            self._spare.setdefault(self._key(batch), []).append(batch.buffers)
            batch.buffers = None

    def show_guidance(self, batch: Batch) -> float:
        """Puts the largest of the rows' guidance where callbacks read a pipeline's, and returns it."""
        guided = batch.layout.guided or self.denoiser.distilled
        self.pipe._guidance_scale = max(batch.scales) if guided else 0.0
        return self.pipe._guidance_scale

    @torch.no_grad()
    def without_guidance(self, batch: Batch) -> None:
        """Goes on with the conditional rows alone, as after a callback that turns guidance off."""
        parts = tuple(part for part in batch.layout.parts if part != "uncond")
        if parts == batch.layout.parts:
            return
        self.release(batch)
        self._lay_out(batch, RowLayout(parts))

    def _lay_out(self, batch: Batch, layout: RowLayout) -> None:
        """Everything of a batch that depends on its row layout."""
        denoiser, plans, text = self.denoiser, batch.plans, batch.text
        batch.layout = layout
        frames = denoiser.frames
        rows: list[Row] = []
        for part in layout.parts:
            own = [plan.negative_row if part == "uncond" else plan.row for plan in plans]
            rows += [row for row in own for _ in range(frames)]

        def laid_out(phase: PhaseText, variant: Tensor) -> Tensor:
            rows = phase.rows(variant, layout.parts)
            return rows if frames == 1 else rows.repeat_interleave(frames, 0)

        read = laid_out(text.last, text.last.read)
        spare = self._spare.get(self._key(batch))
        if spare:
            buffers = spare.pop()
            buffers.personalization.assign(rows)
        else:
            room: Any = {"image_lengths": self.settings.image_lengths, "lora_capacity": self.settings.lora_capacity}
            buffers = Buffers(Personalization(rows, **room, store=self._store))
        batch.buffers = buffers
        locked = any(use.lock == "global" for plan in plans for use in plan.row.uses)
        parts = len(layout.parts)
        batch.laid_out = batch.position
        with denoiser.scaled():
            buffers.personalization.prepare(
                self.pipe,
                buffers.fill("prompts", read[:, : text.layout.tokens].contiguous()),
                laid_out(text.last, text.last.keys) if locked else None,
                read_text=read if text.layout.wordings > 1 else None,
                earlier=[(laid_out(phase, phase.read), laid_out(phase, phase.keys)) for phase in text.phases[:-1]],
                latent_size=denoiser.latent_size(batch.size),
                steps=self._of_rows([row.steps for row in batch.rows], parts),
                step=self._of_rows([row.own(batch.position) for row in batch.rows], parts),
            )
        self._condition(batch)
        for number, control in enumerate(plans[0].controls):
            pixels = torch.cat([plan.controls[number].pixels for plan in plans] * parts)
            dtype = self.settings.controlnets[control.name].dtype
            buffers.fill(f"control {control.name}", pixels.to(self.pipe._execution_device, dtype))
        record = self.settings.record
        if record is not None and batch.readout is None:
            prompts = [[p[0] for p in plan.wordings.prompts] or None for plan in plans]
            tokenizer, unet = denoiser.tokenizer, denoiser.unet
            held, first = buffers.personalization, layout.parts.index("cond") * len(plans)
            images = [held.image_positions(first + row) for row in range(len(plans))]
            batch.readout = record.readout(unet, prompts, tokenizer, denoiser.latent_size(batch.size), images)
        if batch.readout is not None:
            batch.readout.lay_out(layout.parts).to(batch.latents.device)
        self._bind(batch)
        readouts = [one for one in (batch.readout, batch.gates) if one is not None]
        batch.read = Several(*readouts) if len(readouts) > 1 else readouts[0] if readouts else None

    def _bind(self, batch: Batch) -> None:
        """Lets the batch's LoRAs that are bound to words count where these are seen."""
        rows, unet = [plan.row for plan in batch.plans], self.denoiser.unet
        if not any(use.bound is not None for row in rows for use in row.loras):
            return
        if batch.gates is None:
            sizes = resolutions_of(unet, cross_attention_layers(unet), self.denoiser.latent_size(batch.size))
            batch.gates = Gates(rows, batch.text.layout, sizes, batch.latents.device)
        batch.gates.lay_out(batch.layout.parts)
        batch.gates.confine(len(batch.layout.parts), batch.held.personalization)

    def _condition(self, batch: Batch) -> None:
        """What the denoiser is given beside latents, times and text, in the phases that rows are in."""
        batch.conditioned = batch.phase
        requests, pooled = [plan.request for plan in batch.plans], batch.text.pooled(batch.conditioned)
        batch.conditions = self.denoiser.conditions(requests, batch.size, batch.layout, pooled)

    def _of_rows(self, each: Sequence[int], parts: int) -> int | list[int]:
        """A number of every picture for every row of the layers; one number where all are the same."""
        if len(set(each)) == 1:
            return each[0]
        return [number for number in each for _ in range(self.denoiser.frames)] * parts

    def _key(self, batch: Batch) -> tuple[Any, ...]:
        return batch.layout.parts, len(batch.rows), batch.text.layout, batch.size

    def _begin(self, picture: Picture) -> tuple[RowState, Tensor]:
        """A row's state and first latents [1, C, h, w]."""
        plan, denoiser = picture.plan, self.denoiser
        request, dtype, device = plan.request, denoiser.text_dtype, self.pipe._execution_device
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed + picture.image)
        share = None if plan.image is None else float(request.strength)
        schedule = denoiser.schedule(self.pipe.scheduler, self.settings.num_inference_steps, share)
        seed_noise(schedule.scheduler, generator)
        scheduler = schedule.scheduler
        row = RowState(picture, generator, schedule)
        if plan.image is None:
            if request.latents is not None:
                noise = request.latents.to(device, dtype)[None]
            else:
                noise = denoiser.noise(plan.size, generator, dtype)
            return row, noise * scheduler.init_noise_sigma
        whole = plan.mask is not None and request.strength == 1
        latents = None
        if plan.mask is None or not whole or not denoiser.fills_in:
            latents = denoiser.encode(plan.image, generator, dtype)
        if plan.mask is None and denoiser.begins_without_noise:
            return row, latents  # type: ignore[return-value]
        noise = denoiser.noise(plan.size, generator, dtype)
        if whole:
            first = noise * scheduler.init_noise_sigma
        else:
            first = scheduler.add_noise(latents, noise, schedule.times[:1])
        if plan.mask is not None:
            masked = denoiser.encode(plan.image * (plan.mask < 0.5), generator, dtype)
            mask = latent_mask(plan.mask, denoiser.latent_size(plan.size)).to(device, dtype)
            row.filling = Filling(mask, masked, noise if latents is None else latents, noise)
        return row, first

    def _predicted(self, batch: Batch, inputs: Tensor, times: Tensor, own: Sequence[int]) -> Tensor:
        """The guided prediction [B, C, h, w] of a step."""
        denoiser, parts = self.denoiser, len(batch.layout.parts)
        device = batch.latents.device
        sample = torch.cat([inputs] * parts)
        keywords = dict(batch.conditions)
        options = {"readout": batch.read}
        moved = torch.cat([times] * parts).to(device)
        personalization = batch.held.personalization
        if personalization.outdated():
            with denoiser.scaled():  # and not bound, or LoRAs would count twice in keys and values
                personalization.remake(self.pipe)
        with denoiser.bound(personalization, batch.layout, options) as bound:
            if batch.plans[0].controls:
                keywords |= self._controlled(batch, sample, moved, own)
            if denoiser.fills_in:
                masks = torch.cat([row.filling.mask for row in batch.rows if row.filling])
                masked = torch.cat([row.filling.masked for row in batch.rows if row.filling])
                sample = torch.cat([sample, torch.cat([masks] * parts), torch.cat([masked] * parts)], 1)
            predictions = denoiser.predict(sample, moved, batch.prompts, {**keywords, **bound})
        return denoiser.guide(predictions, torch.tensor(batch.scales, dtype=torch.float32), batch.layout, times)

    def _controlled(self, batch: Batch, sample: Tensor, times: Tensor, own: Sequence[int]) -> dict[str, Any]:
        """The residuals of all ControlNets, each row's at its own scale; 0 is exactly nothing."""
        down: list[Tensor] = []
        middle: Tensor | None = None
        added = {
            key: value
            for key, value in (batch.conditions.get("added_cond_kwargs") or {}).items()
            if "ids" in key or "text" in key
        }
        for number, control in enumerate(batch.plans[0].controls):
            uses = [plan.controls[number] for plan in batch.plans]
            counts = [
                use.scale if use.active(step, row.steps) else 0.0
                for use, row, step in zip(uses, batch.rows, own, strict=True)
            ]
            scale = torch.tensor(counts * len(batch.layout.parts), device=sample.device).view(-1, 1, 1, 1)
            more, last = self.settings.controlnets[control.name](
                sample,
                times,
                encoder_hidden_states=batch.prompts,
                controlnet_cond=batch.control(control.name),
                conditioning_scale=1.0,
                return_dict=False,
                **({"added_cond_kwargs": added} if added else {}),
            )
            weighed = [
                torch.where(scale == 0, 0, residual.float() * scale).to(residual.dtype) for residual in (*more, last)
            ]
            down = [a + b for a, b in zip(down, weighed, strict=False)] if down else weighed[:-1]
            middle = weighed[-1] if middle is None else middle + weighed[-1]
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}

    def _stepped(self, row: RowState, prediction: Tensor, latents: Tensor, time: Tensor, step: int) -> Tensor:
        """A row's next latents [1, C, h, w]."""
        scheduler = row.schedule.scheduler
        kind: Any = type(scheduler)
        extra = {"eta": self.denoiser.options["eta"], "generator": row.generator}
        extra = {name: value for name, value in extra.items() if name in _accepted(kind)}
        made = scheduler.step(prediction, time, latents, **extra, return_dict=False)[0]
        filling = row.filling
        if filling is None or self.denoiser.fills_in:
            return made
        kept = filling.latents
        if step + 1 < row.steps:
            kept = scheduler.add_noise(kept, filling.noise, row.schedule.times[step + 1 : step + 2])
        return (1 - filling.mask) * kept + filling.mask * made


@cache
def _accepted(scheduler: Hashable) -> frozenset[str]:
    """What the step of a class of schedulers takes."""
    return frozenset(inspect.signature(scheduler.step).parameters)  # type: ignore[attr-defined]


def seed_noise(scheduler: Any, generator: torch.Generator) -> None:
    """Schedulers that draw noise from a source of their own draw it from the row's seed."""
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = generator.initial_seed()
