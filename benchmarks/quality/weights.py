"""Baselines that train the model's own weights: DreamBooth the U-Net's, Custom Diffusion those of keys and values.

Each user has weights of their own, so that nothing is shared: one model is trained after the other, and draws alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import keylock_diffusers as kd
from keylock_diffusers.embedded.glyphs import BACKGROUNDS
from keylock_diffusers.loras.adapter import Adapter, LearnedWord
from keylock_diffusers.loras.facts import facts_of
from keylock_diffusers.training import ConceptTrainingError, Subject, loop
from keylock_diffusers.training.captions import Captioned, Captions
from keylock_diffusers.training.config import is_word
from keylock_diffusers.training.frozen import encode_images, frozen
from keylock_diffusers.training.learners import Together, captions_of, lessons_of

_CLASS_PICTURES = 16
_OF_KIND = 1_000_003  # added to a subject's seed for draws of its kind's pictures


@dataclass(frozen=True)
class WeightsConfig:
    """How weights are trained.

    Args:
        steps: of the optimiser.
        batch_size: pictures of the subject a step, and as many of its kind, where there are any.
        learning_rate: of the weights.
        embedding_rate: of the word, in units of its size; 0 leaves it.
        of_kind: weight of the loss on pictures of the subject's kind that the model draws itself, which is DreamBooth's
            prior; 0: there are none.
        prior, timestep_power, views: see `AddedConfig`; of the papers Custom Diffusion's has views.
        targets: what the names of the modules that learn contain; empty: all.
        weight_decay: of the weights.
        max_grad_norm: at which gradients are clipped.
        patience: none; training does not stop early.
    """

    steps: int = 100
    batch_size: int = 6
    learning_rate: float = 1e-4
    embedding_rate: float = 0.15
    of_kind: float = 1.0
    prior: float = 0.0
    timestep_power: float = 1.0
    views: float = 0.0
    targets: tuple[str, ...] = ()
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    patience: int | None = None


@dataclass(frozen=True)
class Weights:
    """What one user's model became: the weights that differ from everybody's, and a word."""

    changed: dict[str, Tensor]
    words: tuple[Tensor, ...] = ()  # [n, W] per text encoder

    @property
    def nbytes(self) -> int:
        return 2 * sum(tensor.numel() for tensor in (*self.changed.values(), *self.words))

    def scaled(self, pipe: Any, strength: float) -> Weights:
        """A share of the way from the pipeline's weights to these."""
        if strength == 1:
            return self
        own = dict(pipe.unet.named_parameters())
        with torch.no_grad():
            return replace(self, changed={n: own[n].lerp(value, strength) for n, value in self.changed.items()})

    def adapter(self, placeholder: str) -> Adapter:
        """Its word alone, as a request takes it."""
        words = {placeholder: LearnedWord(placeholder, self.words)} if self.words else {}
        return Adapter({}, (), words, facts_of({}, words, {}))

    @contextmanager
    def within(self, pipe: Any) -> Iterator[None]:
        """While it lasts, the pipeline's U-Net has these weights."""
        own = dict(pipe.unet.named_parameters())
        before = {name: own[name].detach().clone() for name in self.changed}
        try:
            with torch.no_grad():
                for name, value in self.changed.items():
                    own[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    own[name].copy_(value)


@torch.enable_grad()
def train_weights(pipe: Any, subject: Subject, config: WeightsConfig) -> Weights:
    """Trains one user's weights, beginning from the pipeline's, which stay as they are.

    Papers: DreamBooth, Ruiz et al. 2022, arXiv 2208.12242; Custom Diffusion, Kumari et al. 2022, arXiv 2212.04488.
    """
    own = copy.copy(pipe)
    own.unet = copy.deepcopy(pipe.unet)
    kind = subject.super_class or subject.placeholder.split()[-1]
    others = _of_kind(pipe, kind) if config.of_kind else None
    with frozen(own):
        trained = _Training(own, Captions(pipe, "train_weights"), subject, config, others)
        (found,) = trained.run(loop.Run(config.steps, progress=False))
    if isinstance(found, Exception):
        raise found
    return found


@cache
def _of_kind(pipe: Any, kind: str) -> tuple[list[str], Tensor]:
    """Captions and latents [n, c, h, w] of pictures of a kind that the model draws."""
    backgrounds = list(BACKGROUNDS)
    captions = [f"a {kind} on {backgrounds[n % len(backgrounds)]}" for n in range(_CLASS_PICTURES)]
    orders = [kd.Request(words, seed=7000 + n, guidance_scale=4.0) for n, words in enumerate(captions)]
    with torch.no_grad():
        images = kd.generate(pipe, orders, num_inference_steps=25)
        return captions, encode_images(pipe, images).float()


@dataclass(kw_only=True)
class _Learner(Captioned):
    changed: dict[str, nn.Parameter]
    words: tuple[nn.Parameter, ...]
    of_kind: _Learner | None = None  # pictures of its kind, which teach the same weights

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.changed, **{f"word/{number}": word for number, word in enumerate(self.words)}}


class _Training(Together[_Learner, Weights]):
    error = ConceptTrainingError

    def __init__(
        self,
        pipe: Any,
        untrained: Captions,
        subject: Subject,
        config: WeightsConfig,
        others: tuple[list[str], Tensor] | None,
    ) -> None:
        self.captions, self.untrained, self.others = Captions(pipe, "train_weights"), untrained, others
        super().__init__(pipe, [subject], config, None)

    def begin(self, subject: Subject) -> _Learner:
        config, captions = self.config, self.captions
        chosen = {
            name: parameter.requires_grad_(True)
            for name, parameter in self.pipe.unet.named_parameters()
            if not config.targets or any(target in name for target in config.targets)
        }
        words: tuple[nn.Parameter, ...] = ()
        if is_word(subject.placeholder):
            words = tuple(nn.Parameter(captions.noun(encoder, subject)[None].clone()) for encoder in captions.encoders)
        groups: list[dict[str, Any]] = [
            {"params": [*chosen.values()], "lr": config.learning_rate, "weight_decay": config.weight_decay}
        ]
        for word in words if config.embedding_rate else ():
            size = float(word.detach().square().mean().sqrt())
            groups.append({"params": [word], "lr": config.embedding_rate * size, "weight_decay": 0.0})
        latents, weights = lessons_of(self.pipe, subject, config.views > 0)
        names = {subject.placeholder: 1} if words else {}
        learner = _Learner(
            subject=subject,
            latents=latents,
            weights=weights,
            optimizer=torch.optim.AdamW(groups),
            prompts=[captions.tokenized(caption, words=names) for caption in captions_of(subject)],
            orders=captions.orders(subject),
            plain=captions.plain(subject),
            changed=chosen,
            words=words,
        )
        if self.others is not None:
            texts, shown = self.others
            learner.of_kind = replace(
                learner,
                subject=replace(subject, seed=subject.seed + _OF_KIND),
                latents=shown,
                weights=torch.ones(len(shown), 1, *shown.shape[-2:]),
                prompts=[captions.tokenized(caption) for caption in texts],
                orders=learner.orders[:1] * len(shown),
                words=(),
            )
        return learner

    def learn(self, learners: Sequence[_Learner], step: int) -> Tensor:  # [1]
        (learner,) = learners
        losses = self._losses(learner, self.config, step)
        total = losses.mean()
        if learner.of_kind is not None:
            plain = replace(self.config, prior=0.0, views=0.0)
            total = total + self.config.of_kind * self._losses(learner.of_kind, plain, step).mean()
        total.backward()
        return losses.detach().mean()[None]

    def _losses(self, learner: _Learner, config: WeightsConfig, step: int) -> Tensor:  # [B]
        told = self.untrained.told([learner], config, step)
        words = {learner.subject.placeholder: learner.words} if learner.words else {}
        read = self.captions.read(told.prompts, [words] * len(told.prompts))
        return told.losses(self.captions.predicted(told.given, read, told.orders), config.prior)

    def result(self, learner: _Learner, seconds: float) -> Weights:
        changed = {name: value.detach().clone() for name, value in learner.changed.items()}
        return Weights(changed, tuple(word.detach().clone() for word in learner.words))
