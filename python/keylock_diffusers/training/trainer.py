"""Trains many users' concepts in one run, each row of the batch its own concept, each as if alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keylock_diffusers.checks import listed, reason_of, shown, whole
from keylock_diffusers.concepts import BaseModel, Concept
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.encoding import text
from keylock_diffusers.masks import soft_mask
from keylock_diffusers.pictures import decode, turned
from keylock_diffusers.processors import RowUpdates
from keylock_diffusers.processors.projection import project_vectors
from keylock_diffusers.routing import edits
from keylock_diffusers.training import checkpoint, loop
from keylock_diffusers.training.advice import quarters
from keylock_diffusers.training.config import DEFAULT_CAPTIONS, ConceptTrainingError, Subject, TrainingConfig
from keylock_diffusers.training.covariance import Covariance
from keylock_diffusers.training.frozen import (
    check_pipeline,
    encode_images,
    frozen,
    named,
    noise_levels,
    prediction_target,
)
from keylock_diffusers.training.localization import Localization, localization_loss

# After a step: how many there were, and what gives the concepts as they are.
OnStep = Callable[[int, Callable[[], list[Concept | ConceptTrainingError]]], None]
# Of a learner, what a checkpoint keeps.
_TENSORS = ("embedding", "values", "target")
_FACTS = ("loss", "best", "best_step", "steps", "stopped", "losses")


@dataclass
class _Learner:
    """One concept while it is learned."""

    subject: Subject
    prompts: list[text.TokenizedPrompt]  # per picture
    latents: Tensor  # [n, c, h, w]
    weights: Tensor  # [n, 1, h, w], the soft masks over their maximum
    super_encoding: Tensor  # [D]
    embedding: nn.Parameter  # [W]
    values: nn.Parameter  # [sum O]
    target: Tensor  # [D]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of every step
    loss: float = float("nan")  # smoothed
    best: float = float("inf")
    best_step: int = 0
    steps: int = 0
    stopped: str | None = None
    failure: ConceptTrainingError | None = None
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [self.embedding, self.values]


@torch.inference_mode(False)
@torch.enable_grad()
def train_concepts(
    pipe: Any,
    subjects: Sequence[Subject],
    config: TrainingConfig = TrainingConfig(),
    *,
    metric: Covariance,
    checkpoint_path: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> list[Concept | ConceptTrainingError]:
    """Learns a concept per subject; all of them share the U-Net's calls, and none influences another.

    Every draw is a function of the subject's seed and the step, so a run resumed from its checkpoint ends where an
    uninterrupted one does, and a subject learns what it would have learned alone.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x pipeline; its weights, flags and processors are as before afterwards.
        subjects: what to learn.
        config: how.
        metric: C: see `covariance`.
        checkpoint_path: a safetensors file to resume from and to write; it is written on Ctrl-C, too.
        checkpoint_every: steps between two writes of it; there is one every two minutes besides.
        progress: whether to show a progress bar.
        on_step: called after every step with how many there were, and what gives the concepts as they are then, such
            as `Samples`.

    Returns:
        Per subject its concept, or the error that stopped it: a picture, mask or caption that cannot be used, or a loss
        that was not finite.

    Raises:
        ValueError: no subjects, a pipeline in float16 or with an IP-Adapter, or a checkpoint of another run.
        TypeError: an argument is of another kind, or the pipeline has two text encoders.

    Paper: Perfusion, Tewel et al. 2023, arXiv 2305.01644.
    """
    for name, value, kind in (("config", config, TrainingConfig), ("metric", metric, Covariance)):
        if not isinstance(value, kind):
            raise TypeError(f"train_concepts: {name} must be a {kind.__name__}, got {shown(value)}")
    whole(checkpoint_every, "train_concepts: checkpoint_every", 1)
    checkpoint.check_path(checkpoint_path)
    for subject in listed(subjects, "train_concepts: subjects"):
        if not isinstance(subject, Subject):
            raise TypeError(f"train_concepts: subjects must be Subject objects, got {shown(subject)}")
    if not subjects:
        raise ValueError("train_concepts: subjects must not be empty")
    check_pipeline(pipe, "train_concepts")
    width = pipe.unet.config.cross_attention_dim
    if len(metric.matrix) != width:
        shape = list(metric.matrix.shape)
        raise ValueError(f"train_concepts: metric must be of this pipeline, [{width}, {width}], got {shape}")
    with frozen(pipe):
        trained = _Training(pipe, [_admit(pipe, subject, config) for subject in subjects], config, metric, on_step)
        run = loop.Run(config.steps, checkpoint_path, trained.digest(), checkpoint_every, "training concepts", progress)
        if trained.learners:
            loop.run(trained, run)
        return trained.concepts()


class _Training:
    """Many concepts, each with an optimiser of its own; a `loop.Trainable`.

    Args:
        pipe: the pipeline.
        admitted: who learns, and whose subject could not be used.
        config: how.
        metric: C.
        on_step: see `train_concepts`.
    """

    def __init__(
        self,
        pipe: Any,
        admitted: list[_Learner | ConceptTrainingError],
        config: TrainingConfig,
        metric: Covariance,
        on_step: OnStep | None,
    ) -> None:
        self.pipe, self.config, self.metric, self.on_step = pipe, config, metric, on_step
        self.admitted = admitted
        self.learners = [one for one in admitted if isinstance(one, _Learner)]
        self.base, self.started = BaseModel.of(pipe), time.monotonic()

    def concepts(self) -> list[Concept | ConceptTrainingError]:
        """What was learned so far, or went wrong, in the order of the subjects."""
        seconds = time.monotonic() - self.started
        return [
            _finish(one, self.base, self.config, self.metric, seconds) if isinstance(one, _Learner) else one
            for one in self.admitted
        ]

    def step(self, number: int) -> dict[str, float] | None:
        active = [learner for learner in self.learners if learner.stopped is None]
        if not active:
            return None
        _step(self.pipe, active, self.config, self.metric, number)
        if self.on_step is not None:
            self.on_step(number + 1, self.concepts)
        shown = [learner.loss for learner in self.learners if learner.failure is None]
        return {"loss": sum(shown) / max(len(shown), 1), "active": len(active)}

    def state(self) -> tuple[dict[str, Tensor], Any]:
        tensors: dict[str, Tensor] = {}
        facts = []
        for number, learner in enumerate(self.learners):
            tensors |= {f"{number}/{name}": getattr(learner, name) for name in _TENSORS}
            tensors |= checkpoint.optimizer_tensors(learner.optimizer, f"{number}/optimizer/")
            failure = learner.failure and str(learner.failure)
            facts.append({name: getattr(learner, name) for name in _FACTS} | {"failure": failure})
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Any) -> None:
        for number, (learner, fact) in enumerate(zip(self.learners, facts, strict=True)):
            with torch.no_grad():
                for name in _TENSORS:
                    getattr(learner, name).copy_(tensors[f"{number}/{name}"])
            for name in _FACTS:
                setattr(learner, name, fact[name])
            learner.failure = fact["failure"] and ConceptTrainingError(fact["failure"])
            checkpoint.restore_optimizer(learner.optimizer, tensors, f"{number}/optimizer/")

    def digest(self) -> str:
        """Names what makes a run the same run; more steps continue it."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "steps"}
        subjects = [
            [one.subject.placeholder, one.subject.super_class, one.subject.seed, [p.ids for p in one.prompts]]
            for one in self.learners
        ]
        given = (tensor for one in self.learners for tensor in (one.latents, one.weights, one.super_encoding))
        return checkpoint.digest([settings, subjects, self.base.to_json(), _FACTS], (self.metric.matrix, *given))


def _step(pipe: Any, learners: list[_Learner], config: TrainingConfig, metric: Covariance, step: int) -> None:
    device, size = pipe.unet.device, config.batch_size
    draws = [_draws(learner, config, step, pipe.scheduler) for learner in learners]
    chosen, times, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
    rows = [learner for learner in learners for _ in range(size)]
    clean = torch.stack([row.latents[n] for row, n in zip(rows, chosen, strict=True)]).to(device)
    weights = torch.stack([row.weights[n] for row, n in zip(rows, chosen, strict=True)]).to(device)
    times, noise = times.to(device), noise.to(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        prompts = [row.prompts[n] for row, n in zip(rows, chosen, strict=True)]
        words = [{row.subject.placeholder: row.embedding} for row in rows]
        encodings = text.encode(pipe.text_encoder, prompts, words).to(pipe.unet.dtype)
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
        # Not the scheduler's add_noise: those that count in sigmas leave their input unscaled.
        signal, sigma = noise_levels(pipe.scheduler, times, device)
        noisy = (signal * clean + sigma * noise).to(pipe.unet.dtype)
        options: dict[str, Any] = {"personalization": inputs}
        if config.localize:
            tokens = torch.tensor([[prompt.words[0][0]] for prompt in prompts], device=device)
            options["readout"] = Localization(
                pipe.unet, tokens, weights, (clean.shape[2], clean.shape[3]), form=config.localization_form
            )
        predicted = pipe.unet(noisy, times, encodings, cross_attention_kwargs=options).sample
    error = (predicted.float() - prediction_target(pipe.scheduler, clean, noise, signal, sigma)) ** 2
    per_row = (error * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * error.shape[1])
    losses = per_row.view(len(learners), size).mean(1)
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)
    total = losses.sum()
    if config.localize:
        total = total + config.localize * localization_loss(options["readout"], per_row=True).sum() / size
    total.backward()
    for learner, loss in zip(learners, losses.detach().tolist(), strict=True):
        _update(learner, loss, config, step)


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
        learners: list[_Learner],
        targets: Tensor,
        encodings: Tensor,
        config: TrainingConfig,
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
        u = edits.table(attn, side, self._targets, self._supers, values, self._dtype)
        return RowUpdates(u, self._slots, self._coefficients)

    def image_streams(self, layer: str, pixels: int) -> None:
        return None

    def visibility(self, layer: str, pixels: int) -> None:
        return None


def _update(learner: _Learner, loss: float, config: TrainingConfig, step: int) -> None:
    gradients = [parameter.grad for parameter in learner.parameters]
    if not torch.isfinite(torch.tensor(loss)) or not all(g is not None and g.isfinite().all() for g in gradients):
        learner.stopped = "failed"
        learner.failure = ConceptTrainingError(
            f"{learner.subject.placeholder}: the loss or its gradient was not finite at step {step}; "
            "check the pictures and masks, or lower the learning rates"
        )
        return
    if config.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(learner.parameters, config.max_grad_norm)
    learner.optimizer.step()
    learner.steps = step + 1
    learner.losses.append(round(loss, 6))
    learner.loss = loss if learner.loss != learner.loss else 0.95 * learner.loss + 0.05 * loss
    if learner.loss < learner.best:
        learner.best, learner.best_step = learner.loss, step
    elif config.patience is not None and step - learner.best_step >= config.patience:
        learner.stopped = "converged"


def _draws(learner: _Learner, config: TrainingConfig, step: int, scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Which pictures, times and noise this concept sees in this step."""
    generator = torch.Generator().manual_seed((learner.subject.seed * 1_000_003 + step) % 2**63)
    size = config.batch_size
    pictures = torch.randint(len(learner.latents), (size,), generator=generator)
    times = torch.randint(scheduler.config.num_train_timesteps, (size,), generator=generator)
    noise = torch.randn(size, *learner.latents.shape[1:], generator=generator, dtype=torch.float32)
    return pictures, times, noise


def word_encodings(encodings: Tensor, prompts: Sequence[text.TokenizedPrompt]) -> Tensor:
    """The encodings [n, D] of the prompts' placeholders, among encodings [B, T, D]."""
    places = [(row, position) for row, prompt in enumerate(prompts) for position, _ in prompt.words]
    rows, positions = (torch.tensor(side, device=encodings.device) for side in zip(*places, strict=True))
    return encodings[rows, positions]


def _admit(pipe: Any, subject: Subject, config: TrainingConfig) -> _Learner | ConceptTrainingError:
    """One user's pictures and words must not cost the others theirs, whatever is wrong with them."""
    try:
        return _begin(pipe, subject, config)
    except Exception as error:
        failure = ConceptTrainingError(f"{subject.placeholder}: {reason_of(error)}")
        failure.__cause__ = error
        return failure


def _begin(pipe: Any, subject: Subject, config: TrainingConfig) -> _Learner:
    if config.localize and subject.masks is None:
        raise ValueError("localize needs masks, and the subject has none")
    super_ids = text.super_class_ids(pipe.tokenizer, subject.super_class)
    captions = subject.captions or [
        DEFAULT_CAPTIONS[n % len(DEFAULT_CAPTIONS)].format(subject.placeholder) for n in range(len(subject.images))
    ]
    prompts = [text.tokenize(pipe.tokenizer, c, {subject.placeholder: subject.super_class}) for c in captions]
    device = pipe.unet.device
    with torch.no_grad():
        super_encoding = word_encodings(text.encode(pipe.text_encoder, prompts), prompts).mean(0).float()
        embedding = pipe.text_encoder.get_input_embeddings().weight[super_ids[-1]].float()
        values = torch.cat(
            [project_vectors(attn.to_v, super_encoding[None])[0] for attn in cross_attention_layers(pipe.unet).values()]
        )
        latents = encode_images(pipe, subject.images)
    if subject.masks is None:
        weights = torch.ones(len(latents), 1, *latents.shape[-2:], dtype=torch.float32)
    else:
        weights = torch.stack([_soft(subject, n, latents) for n in range(len(latents))])
    learned = nn.Parameter(embedding.clone().to(device)), nn.Parameter(values.clone().to(device))
    rates = (config.embedding_rate, config.values_rate)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "lr": rate * float(parameter.detach().square().mean().sqrt())}
            for parameter, rate in zip(learned, rates, strict=True)
        ],
        weight_decay=0.0,
    )
    return _Learner(
        subject=subject,
        prompts=prompts,
        latents=latents.float().cpu(),
        weights=weights,
        super_encoding=super_encoding.to(device),
        embedding=learned[0],
        values=learned[1],
        target=super_encoding.clone().to(device),
        optimizer=optimizer,
    )


def _soft(subject: Subject, number: int, latents: Tensor) -> Tensor:  # [1, h, w]
    """A picture's mask, which must be of its shape: of both it is the middle square that is taken."""
    assert subject.masks is not None
    mask = subject.masks[number]
    what = named(f"mask {number}", mask)
    decode(mask, what)
    (width, height), (across, down) = turned(subject.images[number]).size, turned(mask).size
    if abs(width * down - height * across) > max(width + height, across + down):  # more than rounding
        raise ValueError(f"{what} must have its picture's shape, {width} x {height}, got {across} x {down} upright")
    return soft_mask(mask, latents.shape[-2:], what)


def _finish(
    learner: _Learner, base: BaseModel, config: TrainingConfig, metric: Covariance, seconds: float
) -> Concept | ConceptTrainingError:
    if learner.failure is not None:
        return learner.failure
    try:
        return _concept(learner, base, config, metric, seconds)
    except ValueError as error:  # one user's extreme values must not cost the others theirs
        return ConceptTrainingError(f"{learner.subject.placeholder}: {error}")


def _concept(learner: _Learner, base: BaseModel, config: TrainingConfig, metric: Covariance, seconds: float) -> Concept:
    direction, energy = metric.direction(learner.target)
    recipe = {key: value for key, value in asdict(config).items() if not key.startswith("inference")}
    return Concept(
        placeholder=learner.subject.placeholder,
        super_class=learner.subject.super_class,
        target_input=learner.target,
        energy=float(energy),
        direction=direction,
        super_class_encoding=learner.super_encoding,
        word_embeddings=(learner.embedding.detach(),),
        values=learner.values.detach(),
        base=base,
        beta=config.inference_beta,
        tau=config.inference_tau,
        covariance=dict(metric.recipe),
        training={
            **recipe,
            "steps": learner.steps,
            "stopped": learner.stopped or "finished",
            "pictures": len(learner.subject.images),
            "seed": learner.subject.seed,
            "loss": round(learner.loss, 5),
            **quarters(learner.losses),
            "seconds": round(seconds, 1),
        },
    )
