"""Trains many users' concepts in one run, each row of the batch its own concept, each as if alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keylock_diffusers.checks import shown, whole
from keylock_diffusers.concepts import BaseModel, Concept, KeyLockedConcept
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.processors import RowUpdates
from keylock_diffusers.processors.projection import project_vectors
from keylock_diffusers.routing import edits
from keylock_diffusers.training import checkpoint, loop
from keylock_diffusers.training.added import AddedTraining
from keylock_diffusers.training.captions import Captioned, Captions, word_encodings
from keylock_diffusers.training.config import AddedConfig, ConceptTrainingError, PerfusionConfig, Subject, is_word
from keylock_diffusers.training.covariance import Covariance
from keylock_diffusers.training.frozen import check_pipeline, frozen
from keylock_diffusers.training.learners import OnStep, Together, check_subjects, lessons_of
from keylock_diffusers.training.localization import Localization, localization_loss

_DEFAULT = AddedConfig()


@dataclass(kw_only=True)
class _Learner(Captioned):
    """One concept while it is learned."""

    super_encoding: Tensor  # [D]
    embeddings: tuple[nn.Parameter, ...]  # [W] per text encoder
    values: nn.Parameter  # [sum O]
    target: Tensor  # [D]

    @property
    def tensors(self) -> dict[str, Tensor]:
        words = {f"embedding{n or ''}": embedding for n, embedding in enumerate(self.embeddings)}
        return {**words, "values": self.values, "target": self.target}


@torch.inference_mode(False)
@torch.enable_grad()
def train_concepts(
    pipe: Any,
    subjects: Sequence[Subject],
    config: PerfusionConfig | AddedConfig = _DEFAULT,
    *,
    metric: Covariance | None = None,
    checkpoint_path: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> list[Concept | ConceptTrainingError]:
    """Learns a concept per subject; all of them share the U-Net's calls, and none influences another.

    Every draw is a function of the subject's seed and the step, so a run resumed from its checkpoint ends where an
    uninterrupted one does, and a subject learns what it would have learned alone.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline; its weights, flags and processors are as before afterwards.
        subjects: what to learn.
        config: how, and which edit: an `AddedConfig` gives `AddedConcept`s, a `PerfusionConfig` `KeyLockedConcept`s.
        metric: C, of key-locked concepts: see `covariance`.
        checkpoint_path: a safetensors file to resume from and to write; it is written on Ctrl-C, too.
        checkpoint_every: steps between two writes of it; there is one every two minutes besides.
        progress: whether to show a progress bar.
        on_step: called after every step with how many there were, and what gives the concepts as they are then, such
            as `Samples`; subjects whose places it gives stop, such as `PromptFollowing`.

    Returns:
        Per subject its concept, or the error that stopped it: a picture, mask or caption that cannot be used, or a loss
        that was not finite.

    Raises:
        ValueError: no subjects, a checkpoint of another run, or a pipeline in float16, with an IP-Adapter, of a
            distilled model or one that reads more than noisy latents.
        TypeError: an argument is of another kind.

    Paper: Perfusion, Tewel et al. 2023, arXiv 2305.01644.
    """
    if not isinstance(config, (PerfusionConfig, AddedConfig)):
        raise TypeError(f"train_concepts: config must be a PerfusionConfig or an AddedConfig, got {shown(config)}")
    wanted = "a Covariance" if isinstance(config, PerfusionConfig) else "None beside an AddedConfig"
    if not isinstance(metric, Covariance if isinstance(config, PerfusionConfig) else type(None)):
        raise TypeError(f"train_concepts: metric must be {wanted}, got {shown(metric)}")
    whole(checkpoint_every, "train_concepts: checkpoint_every", 1)
    checkpoint.check_path(checkpoint_path)
    check_subjects(subjects, "train_concepts")
    plain = [subject.placeholder for subject in subjects if not is_word(subject.placeholder)]
    if plain:
        raise ValueError(f"train_concepts: subjects must have a placeholder such as <alice-cat>, got {plain[0]!r}")
    check_pipeline(pipe, "train_concepts", two=True)
    width = pipe.unet.config.cross_attention_dim
    if metric is not None and len(metric.matrix) != width:
        shape = list(metric.matrix.shape)
        raise ValueError(f"train_concepts: metric must be of this pipeline, [{width}, {width}], got {shape}")
    trained: Together[Any, Any]
    with frozen(pipe):
        if isinstance(config, AddedConfig):
            trained = AddedTraining(pipe, subjects, config, on_step)
        else:
            trained = _Training(pipe, subjects, config, on_step, metric)
        run = loop.Run(config.steps, checkpoint_path, trained.digest(), checkpoint_every, "training concepts", progress)
        return trained.run(run)


class _Training(Together[_Learner, KeyLockedConcept]):
    error = ConceptTrainingError

    def __init__(
        self,
        pipe: Any,
        subjects: Sequence[Subject],
        config: PerfusionConfig,
        on_step: OnStep | None,
        metric: Any,
    ) -> None:
        self.metric, self.captions = metric, Captions(pipe, "train_concepts")
        super().__init__(pipe, subjects, config, on_step)

    def begin(self, subject: Subject) -> _Learner:
        return _begin(self.pipe, self.captions, subject, self.config)

    def learn(self, learners: Sequence[_Learner], step: int) -> Tensor:  # [S]
        return _learn(self.pipe, self.captions, learners, self.config, self.metric, step)

    def result(self, learner: _Learner, seconds: float) -> KeyLockedConcept:
        return _concept(learner, self.base, self.config, self.metric, seconds)

    @property
    def given(self) -> list[Tensor]:
        return [self.metric.matrix, *(learner.super_encoding for learner in self.learners)]


def _learn(
    pipe: Any,
    captions: Captions,
    learners: Sequence[_Learner],
    config: PerfusionConfig,
    metric: Covariance,
    step: int,
) -> Tensor:  # [S]
    device, size = pipe.unet.device, config.batch_size
    with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        told = captions.told(learners, config, step)
        shown, prompts = told.given, told.prompts
        read = captions.read(prompts, [{row.subject.placeholder: row.embeddings} for row in told.rows])
        encodings = read.states
        targets = []
        for number, learner in enumerate(learners):
            mine = slice(number * size, (number + 1) * size)
            now = word_encodings(encodings[mine], prompts[mine]).mean(0).float()
            target = config.target_decay * learner.target + (1 - config.target_decay) * now
            learner.target = target.detach()
            if config.target_gradient == "none":
                target = target.detach()
            elif config.target_gradient == "straight-through":
                target = target.detach() + now - now.detach()
            targets.append(target)
        inputs = _Inputs(pipe, learners, torch.stack(targets), encodings, config, metric)
        options: dict[str, Any] = {"personalization": inputs}
        if config.localize:
            tokens = torch.tensor([[prompt[0].words[0][0]] for prompt in prompts], device=device)
            grid = (shown.noisy.shape[2], shown.noisy.shape[3])
            options["readout"] = Localization(pipe.unet, tokens, shown.weights, grid, form=config.localization_form)
        losses = told.losses(captions.predicted(shown, read, told.orders, **options), config.prior)
    losses = losses.view(len(learners), size).mean(1)
    total = losses.sum()
    if config.localize:
        total = total + config.localize * localization_loss(options["readout"], per_row=True).sum() / size
    total.backward()
    return losses.detach()


class _Inputs:
    """What layers ask of a step: the concepts' updates of keys and values, differentiable in all that is learned.

    Args:
        pipe: the pipeline.
        learners: the concepts; each has `config.batch_size` rows.
        targets: their target inputs [S, D].
        encodings: the rows' text [B, T, D].
        config: how they are trained.
        metric: C.
    """

    def __init__(
        self,
        pipe: Any,
        learners: Sequence[_Learner],
        targets: Tensor,
        encodings: Tensor,
        config: PerfusionConfig,
        metric: Covariance,
    ) -> None:
        numbers = torch.arange(len(learners), dtype=torch.int32, device=encodings.device)
        slots = numbers.repeat_interleave(config.batch_size)[:, None]
        full = torch.ones(slots.shape, dtype=torch.float32, device=encodings.device)
        gates = edits.Gates(slots, full * config.beta, full * config.tau, full)
        directions, _ = metric.direction(targets)
        self._coefficients = edits.coefficients(encodings, directions, gates)
        self._slots = gates.pairs(len(learners))
        self._targets, self._dtype = targets, encodings.dtype
        self._supers = torch.stack([learner.super_encoding for learner in learners])
        self._layers = cross_attention_layers(pipe.unet)
        widths = [attn.to_v.out_features for attn in self._layers.values()]
        values = torch.stack([learner.values for learner in learners]).split(widths, dim=1)
        self._values = dict(zip(self._layers, values, strict=True))

    def keys_and_values(self, layer: str, rows: int, text: Tensor | None) -> None:
        return None

    def updates(self, projection: str) -> RowUpdates:
        layer, _, side = projection.rpartition(".")
        attn, values = self._layers[layer], self._values[layer]
        project = partial(project_vectors, getattr(attn, side), dtype=self._dtype)
        u = edits.table(project, side, self._targets, self._supers, values)
        return RowUpdates(u, self._slots, self._coefficients)

    def image_streams(self, layer: str, pixels: int) -> None:
        return None

    def visibility(self, layer: str, pixels: int) -> None:
        return None


def _begin(pipe: Any, captions: Captions, subject: Subject, config: PerfusionConfig) -> _Learner:
    if config.localize and subject.masks is None:
        raise ValueError("localize needs masks, and the subject has none")
    prompts = captions.of(subject)
    device = pipe.unet.device
    with torch.no_grad():
        plain = captions.read(prompts)
        super_encoding = word_encodings(plain.states, prompts).mean(0).float()
        embeddings = [captions.noun(encoder, subject) for encoder in captions.encoders]
        values = torch.cat(
            [project_vectors(attn.to_v, super_encoding[None])[0] for attn in cross_attention_layers(pipe.unet).values()]
        )
    latents, weights = lessons_of(pipe, subject, config.views > 0)
    learned = [nn.Parameter(start.clone().to(device)) for start in (*embeddings, values)]
    rates = [*[config.embedding_rate] * len(embeddings), config.values_rate]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "lr": rate * float(parameter.detach().square().mean().sqrt())}
            for parameter, rate in zip(learned, rates, strict=True)
        ],
        weight_decay=0.0,
    )
    return _Learner(
        subject=subject,
        latents=latents,
        weights=weights,
        prompts=prompts,
        orders=captions.orders(subject),
        plain=plain,
        super_encoding=super_encoding.to(device),
        embeddings=tuple(learned[:-1]),
        values=learned[-1],
        target=super_encoding.clone().to(device),
        optimizer=optimizer,
    )


def _concept(
    learner: _Learner, base: BaseModel, config: PerfusionConfig, metric: Covariance, seconds: float
) -> KeyLockedConcept:
    direction, energy = metric.direction(learner.target)
    recipe = {key: value for key, value in asdict(config).items() if not key.startswith("inference")}
    return KeyLockedConcept(
        placeholder=learner.subject.placeholder,
        super_class=learner.subject.super_class,
        target_input=learner.target,
        energy=float(energy),
        direction=direction,
        super_class_encoding=learner.super_encoding,
        word_embeddings=tuple(embedding.detach() for embedding in learner.embeddings),
        values=learner.values.detach(),
        base=base,
        beta=config.inference_beta,
        tau=config.inference_tau,
        covariance=dict(metric.recipe),
        training=learner.facts(recipe, seconds),
    )
