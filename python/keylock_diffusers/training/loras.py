"""Trains many users' low-rank adapters in one run, each row of the batch its own user's, each as if alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keylock_diffusers.checks import shown, whole
from keylock_diffusers.denoisers.unet import uncompiled
from keylock_diffusers.encoding import text
from keylock_diffusers.loras.adapter import Adapter, LearnedWord, component_name
from keylock_diffusers.loras.facts import facts_of
from keylock_diffusers.processors import verify_routes
from keylock_diffusers.processors.routed import handed_out
from keylock_diffusers.training import checkpoint, loop
from keylock_diffusers.training.captions import Captioned, Captions, Prompts
from keylock_diffusers.training.config import LoraTrainingConfig, LoraTrainingError, Subject, is_word
from keylock_diffusers.training.factors import Factors
from keylock_diffusers.training.frozen import check_pipeline, frozen
from keylock_diffusers.training.learners import Lesson, OnStep, Together, captions_of, check_subjects, lessons_of
from keylock_kernels.ops.precision import accumulate_dtype

_FACT = "keylock_"  # begins the names of facts in a file's header


@dataclass(kw_only=True)
class _Learner(Captioned):
    """One adapter while it is learned."""

    factors: nn.Parameter  # as `Factors` has them
    words: tuple[nn.Parameter, ...]  # [n, W] per text encoder; none beside plain words

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors, **{f"word/{number}": word for number, word in enumerate(self.words)}}


@torch.inference_mode(False)
@torch.enable_grad()
def train_loras(
    pipe: Any,
    subjects: Sequence[Subject],
    config: LoraTrainingConfig = LoraTrainingConfig(),
    *,
    checkpoint_path: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> list[Adapter | LoraTrainingError]:
    """Learns a low-rank adapter per subject; all of them share the U-Net's calls, and none influences another.

        W' = W + alpha / rank * B A,   A [r, K] from U(-1, 1) / sqrt(K), B [O, r] from zero

    Where a subject's placeholder is a word of its own, that is learned beside the adapter as textual inversion does:
    a vector for each token of its super-class, from which it begins. With plain words captions are read as they are.
    Every draw is a function of the subject's seed and the step, so a run resumed from its checkpoint ends where an
    uninterrupted one does, and a subject learns what it would have learned alone.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline; its weights, flags, processors and forwards are as before
            afterwards. A LoRA that is loaded in it stays as it is, beneath what is learned.
        subjects: what to learn.
        config: how. What is learned is kept in float32, whatever the pipeline's weights are in.
        checkpoint_path: a safetensors file to resume from and to write; it is written on Ctrl-C, too.
        checkpoint_every: steps between two writes of it; there is one every two minutes besides.
        progress: whether to show a progress bar.
        on_step: called after every step with how many there were, and what gives the adapters as they are then;
            subjects whose places it gives stop, such as `PromptFollowing`.

    Returns:
        Per subject its adapter, with its word where it has one, for `Lora` and `write_adapter`; or the error that
        stopped it: a picture, mask or caption that cannot be used, or a loss that was not finite.

    Raises:
        ValueError: no subjects, targets that are none, a checkpoint of another run, or a pipeline in float16, with an
            IP-Adapter, of a distilled model or one that reads more than noisy latents.
        TypeError: an argument is of another kind.

    Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; textual inversion, Gal et al. 2022, arXiv 2208.01618.

    Example:
        >>> subject = Subject("<alice-cat>", "cat", pictures, seed=1)  # doctest: +SKIP
        >>> (adapter,) = train_loras(pipe, [subject])  # doctest: +SKIP
        >>> kd.generate(pipe, [kd.Request("<alice-cat> on the moon", loras=[adapter])])  # doctest: +SKIP
    """
    if not isinstance(config, LoraTrainingConfig):
        raise TypeError(f"train_loras: config must be a LoraTrainingConfig, got {shown(config)}")
    whole(checkpoint_every, "train_loras: checkpoint_every", 1)
    checkpoint.check_path(checkpoint_path)
    check_subjects(subjects, "train_loras")
    check_pipeline(pipe, "train_loras", two=True)
    with frozen(pipe), _computed_twice(uncompiled(pipe.unet), config.gradient_checkpointing):
        trained = _Training(pipe, subjects, config, on_step)
        run = loop.Run(config.steps, checkpoint_path, trained.digest(), checkpoint_every, "training LoRAs", progress)
        return trained.run(run)


def training_facts(adapter: Adapter) -> dict[str, Any]:
    """What an adapter's own file says of its training, if `train_loras` made it: what `advice` reads."""
    found = adapter.facts.training.items()
    return {name.removeprefix(_FACT): json.loads(value) for name, value in found if name.startswith(_FACT)}


class _Training(Together[_Learner, Adapter]):
    error = LoraTrainingError

    def __init__(
        self, pipe: Any, subjects: Sequence[Subject], config: LoraTrainingConfig, on_step: OnStep | None
    ) -> None:
        self.captions = Captions(pipe, "train_loras")
        self.factors = Factors(self.captions.denoiser, config)
        for modules in self.factors.modules:
            verify_routes(modules, modules)
        super().__init__(pipe, subjects, config, on_step)

    def begin(self, subject: Subject) -> _Learner:
        words = self._words(subject) if is_word(subject.placeholder) else ()
        latents, weights = lessons_of(self.pipe, subject, self.config.views > 0)
        random = loop.generator(subject.seed, -1)  # before the first step
        dtype, device = accumulate_dtype(self.pipe.unet.dtype), self.pipe.unet.device
        factors = nn.Parameter(self.factors.begin(random, dtype).to(device))
        config = self.config
        groups = [{"params": [factors], "lr": config.learning_rate, "weight_decay": config.weight_decay}]
        for word in words if config.embedding_rate else ():
            size = float(word.detach().square().mean().sqrt())
            groups.append({"params": [word], "lr": config.embedding_rate * size, "weight_decay": 0.0})
        return _Learner(
            subject=subject,
            latents=latents,
            weights=weights,
            optimizer=torch.optim.AdamW(groups),
            prompts=[self._tokenized(subject, caption, words) for caption in captions_of(subject)],
            orders=self.captions.orders(subject),
            plain=self.captions.plain(subject),
            factors=factors,
            words=words,
        )

    def learn(self, learners: Sequence[_Learner], step: int) -> Tensor:  # [S]
        config, captions = self.config, self.captions
        precision = partial(
            torch.autocast, self.pipe.unet.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"
        )
        with precision():
            told = captions.told(learners, config, step)
        updates = self.factors.updates([learner.factors for learner in learners], config.batch_size)
        with ExitStack() as held:
            for modules, own in zip(self.factors.modules, updates, strict=True):
                held.enter_context(handed_out(modules, own))  # for the backward pass, which may compute it again
            with precision():
                words = [{row.subject.placeholder: row.words} if row.words else {} for row in told.rows]
                read = captions.read(told.prompts, words)
                predicted = captions.predicted(told.given, read, told.orders)
            losses = told.losses(predicted, config.prior, self._weights(told.given)).view(len(learners), -1).mean(1)
            losses.sum().backward()
        return losses.detach()

    def result(self, learner: _Learner, seconds: float) -> Adapter:
        denoiser, *encoders = self.factors.low_rank(learner.factors)
        subject, words = learner.subject, {}
        if learner.words:
            vectors = tuple(word.detach().cpu().clone() for word in learner.words)
            words[subject.placeholder] = LearnedWord(subject.placeholder, vectors)
        recipe = learner.facts(asdict(self.config), seconds)
        texts = {"trigger_words": subject.placeholder} | {_FACT + name: json.dumps(v) for name, v in recipe.items()}
        shapes = {
            f"{'unet' if number == 0 else component_name(number - 1)}.{name}": {
                "down": tuple(update.down.shape),
                "up": tuple(update.up.shape),
            }
            for number, updates in enumerate((denoiser, *encoders))
            for name, update in updates.items()
        }
        return Adapter(denoiser, tuple(encoders) if any(encoders) else (), words, facts_of(shapes, words, texts))

    def _words(self, subject: Subject) -> tuple[nn.Parameter, ...]:  # [n, W]
        """A vector for each token of the super-class, in each text encoder."""
        found = []
        for encoder in self.captions.encoders:
            ids = text.super_class_ids(encoder.tokenizer, subject.super_class)
            table = encoder.model.get_input_embeddings().weight
            vectors = table.detach()[ids].to(accumulate_dtype(table.dtype), copy=True)
            found.append(nn.Parameter(vectors, requires_grad=self.config.embedding_rate > 0))
        if len({len(word) for word in found}) > 1:
            raise ValueError(f"super_class must be as many tokens of each tokenizer, got {[len(w) for w in found]}")
        return tuple(found)

    def _tokenized(self, subject: Subject, caption: str, words: Sequence[Tensor]) -> Prompts:
        found = self.captions.tokenized(caption, words={subject.placeholder: len(words[0])} if words else {})
        if words and not all(prompt.words for prompt in found):
            raise ValueError(f"prompt {shown(caption)}: the word {subject.placeholder} is not in the prompt")
        return found

    def _weights(self, given: Lesson) -> Tensor | None:  # [B]
        gamma = self.config.snr_gamma
        return None if gamma is None else snr_weights(given, gamma, self.pipe.scheduler.config.prediction_type)


def snr_weights(given: Lesson, gamma: float, prediction: str) -> Tensor:  # [B]
    """How much each row counts by min-SNR: min(SNR, gamma) in units of what the model predicts.

        epsilon min(SNR, gamma) / SNR,   v min(SNR, gamma) / (SNR + 1),   sample min(SNR, gamma)

    Paper: Hang et al. 2023, arXiv 2303.09556.
    """
    signal, noise = given.signal.flatten() ** 2, given.sigma.flatten() ** 2  # which add up to 1
    if prediction == "epsilon":
        return (gamma * noise / signal).clamp(max=1)
    if prediction == "v_prediction":
        return torch.minimum(signal, gamma * noise)
    return (signal / noise).clamp(max=gamma)


@contextmanager
def _computed_twice(unet: Any, on: bool) -> Iterator[None]:
    """While it lasts, blocks' activations are computed again in the backward pass instead of being kept, if `on`."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    modules = [vars(module) for module in unet.modules()] if on else []
    before = [{name: held[name] for name in names if name in held} for held in modules]
    try:
        if on:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        for held, own in zip(modules, before, strict=True):
            for name in names:
                held.pop(name, None)
            held.update(own)
