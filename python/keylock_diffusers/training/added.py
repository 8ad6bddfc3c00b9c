"""Learns concepts that add to keys and values at their own words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keylock_diffusers.concepts import AddedConcept
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.encoding.tokens import plain as plain_prompt
from keylock_diffusers.processors import RowUpdates
from keylock_diffusers.processors.projection import project_vectors
from keylock_diffusers.training import loop
from keylock_diffusers.training.captions import Captioned, Captions, Prompts, joined, word_encodings
from keylock_diffusers.training.config import AddedConfig, ConceptTrainingError, Subject
from keylock_diffusers.training.learners import OnStep, Together, lessons_of
from keylock_diffusers.training.localization import Localization, localization_loss

_SIDES = {"to_k": "keys", "to_v": "values"}


@dataclass(kw_only=True)
class _Learner(Captioned):
    """One concept while it is learned; what is added is in units of the super-class's own, layer by layer."""

    places: list[Tensor]  # per picture, the tokens of `plain` that are read in the words' places [T]
    words: tuple[nn.Parameter, ...]  # [n, W] per text encoder; none where they are not learned
    added: Mapping[str, nn.Parameter]  # encodings [m, D], keys and values [m, sum of widths]
    units: Mapping[str, Tensor]  # of each, [D] or [sum of widths]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.added, **{f"word/{n}": word for n, word in enumerate(self.words)}}

    def outputs(self, part: str) -> Tensor:  # [m, D] or [m, sum of widths]
        """What is added to encodings, keys or values."""
        return self.added[part] * self.units[part]


class AddedTraining(Together[_Learner, AddedConcept]):
    """A run of `train_concepts` with an `AddedConfig`."""

    error = ConceptTrainingError
    whole_schedule = True

    def __init__(self, pipe: Any, subjects: Sequence[Subject], config: AddedConfig, on_step: OnStep | None) -> None:
        self.captions = Captions(pipe, "train_concepts")
        self.layers = {name: attn for name, attn in cross_attention_layers(pipe.unet).items() if config.learns(name)}
        if not self.layers:
            raise ValueError(f"AddedConfig: layers must be of this U-Net, got {config.layers!r:.80}")
        super().__init__(pipe, subjects, config, on_step)

    def begin(self, subject: Subject) -> _Learner:
        config, captions, device = self.config, self.captions, self.pipe.unet.device
        if config.localize and subject.masks is None:
            raise ValueError("localize needs masks, and the subject has none")
        prompts = captions.of(subject, config.words)
        with torch.no_grad():
            once = captions.of(subject)
            plain = captions.read(once)
            noun = word_encodings(plain.states, once).mean(0).float()
            units = {"encodings": _rms(noun)} | {
                side: torch.cat(
                    [_rms(project_vectors(getattr(attn, name), noun[None])[0]) for attn in self.layers.values()]
                )
                for name, side in _SIDES.items()
            }
        random = loop.generator(subject.seed, -1)  # before the first step
        encoders = captions.encoders if config.embeddings else ()
        words = tuple(self._word(encoder, subject, random) for encoder in encoders)
        begin = {part: torch.zeros(config.learned(part), len(unit)) for part, unit in units.items()}
        if not encoders and config.words > 1:  # or they would stay one
            begin["encodings"] = config.spread * torch.randn(begin["encodings"].shape, generator=random)
        added = {part: nn.Parameter(start.to(device, torch.float32)) for part, start in begin.items()}
        name = {subject.placeholder}
        orders = [plain_prompt(captions.encoders[0].tokenizer, prompt[0], name, name)[1] for prompt in prompts]
        latents, weights = lessons_of(self.pipe, subject, config.views > 0)
        groups: list[dict[str, Any]] = [
            {"params": [parameter], "lr": getattr(config, f"{part}_rate")} for part, parameter in added.items()
        ]
        groups += [
            {"params": [w], "lr": config.embedding_rate * float(w.detach().square().mean().sqrt())} for w in words
        ]
        return _Learner(
            subject=subject,
            latents=latents,
            weights=weights,
            optimizer=torch.optim.AdamW([group for group in groups if group["params"][0].numel()], weight_decay=0.0),
            prompts=prompts,
            orders=captions.orders(subject),
            plain=plain,
            places=[torch.tensor(order, device=device) for order in orders],
            words=words,
            added=added,
            units=units,
        )

    def learn(self, learners: Sequence[_Learner], step: int) -> Tensor:  # [S]
        config, captions = self.config, self.captions
        factor = min(1.0, (step + 1) / config.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        for learner in learners:
            for group in learner.optimizer.param_groups:
                group["lr"] = group.setdefault("full", group["lr"]) * factor
        with torch.autocast(self.pipe.unet.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            told = captions.told(learners, config, step, config.start)
            given, prompts, rows = told.given, told.prompts, list(zip(told.rows, told.captions, strict=True))
            if config.embeddings:
                read = captions.read(prompts, [{row.subject.placeholder: row.words} for row, _ in rows])
            else:
                read = joined([row.plain.rows([n]) for row, n in rows])
                places = torch.stack([row.places[n] for row, n in rows])
                read = read._replace(states=read.states.gather(1, places[..., None].expand_as(read.states)))
            read = read._replace(states=_moved(read.states, told.rows, prompts))
            options: dict[str, Any] = {"personalization": _Inputs(self.layers, learners, prompts, config.batch_size)}
            if config.localize:
                # Of a word that stands several times, where it stands first: captions differ in how often it does.
                first = [[place for place, *_ in prompt[0].words[: config.words]] for prompt in prompts]
                tokens = torch.tensor(first, device=given.noisy.device)
                masks = given.weights.expand(-1, tokens.shape[1], -1, -1)
                grid = (given.noisy.shape[2], given.noisy.shape[3])
                options["readout"] = Localization(self.pipe.unet, tokens, masks, grid, form=config.localization_form)
            predicted = captions.predicted(given, read, told.orders, **options)
            losses = told.losses(predicted, config.prior)
        total = losses.sum() / config.batch_size
        if config.localize:
            localized = localization_loss(options["readout"], per_row=True).sum()
            total = total + config.localize * localized / config.batch_size
        total.backward()
        return losses.detach().view(len(learners), -1).mean(1)

    def result(self, learner: _Learner, seconds: float) -> AddedConcept:
        recipe = {name: value for name, value in asdict(self.config).items() if name != "start"}
        return AddedConcept(
            placeholder=learner.subject.placeholder,
            super_class=learner.subject.super_class,
            word_embeddings=tuple(word.detach() for word in learner.words),
            **{part: learner.outputs(part).detach() for part in learner.added},
            layers=tuple(self.layers),
            start=self.config.start,
            base=self.base,
            training=learner.facts(recipe, seconds),
        )

    def _word(self, encoder: Any, subject: Subject, random: torch.Generator) -> nn.Parameter:  # [n, W]
        """The noun's embedding for each word; they begin a little apart, or they would stay one."""
        vector = self.captions.noun(encoder, subject)
        apart = torch.randn(self.config.words, len(vector), generator=random) * (self.config.words > 1)
        spread = self.config.spread * vector.square().mean().sqrt()
        return nn.Parameter(vector + spread * apart.to(vector))


class _Inputs:
    """What layers ask of a step: what is added at the learners' words, differentiable in it.

    Args:
        layers: those that learn.
        learners: the concepts; each has `size` rows.
        prompts: the rows'.
        size: how many rows a concept has.
    """

    def __init__(
        self, layers: Mapping[str, Any], learners: Sequence[_Learner], prompts: Sequence[Prompts], size: int
    ) -> None:
        length, device = len(prompts[0][0].ids), learners[0].added["values"].device
        widths = [attn.to_v.out_features for attn in layers.values()]
        self._tables: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Tensor, Tensor]] = {}
        for name, side in _SIDES.items():
            outputs = [learner.outputs(side) for learner in learners]
            count = len(outputs[0])
            if not count:
                continue
            parts = torch.cat(outputs).split(widths, 1)
            self._tables |= {f"{layer}.{name}": part for layer, part in zip(layers, parts, strict=True)}
            coefficients = torch.zeros(len(prompts), length, count, dtype=torch.float32)
            for row, prompt in enumerate(prompts):
                for position, _, word in prompt[0].words:
                    if word < count:
                        coefficients[row, position, word] = 1.0
            slots = torch.arange(len(learners) * count, dtype=torch.int32).view(len(learners), count)
            self._places[name] = slots.repeat_interleave(size, 0).to(device), coefficients.to(device)

    def keys_and_values(self, layer: str, rows: int, text: Tensor | None) -> None:
        return None

    def updates(self, projection: str) -> RowUpdates | None:
        if projection not in self._tables:
            return None
        return RowUpdates(self._tables[projection], *self._places[projection.rpartition(".")[2]])

    def image_streams(self, layer: str, pixels: int) -> None:
        return None

    def visibility(self, layer: str, pixels: int) -> None:
        return None


def _moved(states: Tensor, rows: Sequence[_Learner], prompts: Sequence[Prompts]) -> Tensor:  # [B, T, D]
    """Encodings with what the rows' learners add to them at their words."""
    added = [learner.outputs("encodings") for learner in rows]
    places = [
        (row, position, word)
        for row, prompt in enumerate(prompts)
        for position, _, word in prompt[0].words
        if word < len(added[row])
    ]
    if not places:
        return states
    where = tuple(torch.tensor(side, device=states.device) for side in zip(*places, strict=True))
    more = torch.stack([added[row][word] for row, _, word in places])
    return states.index_put(where[:2], (states[where[:2]].float() + more).to(states))


def _rms(vector: Tensor) -> Tensor:  # [O]
    return vector.square().mean().sqrt().expand_as(vector)
