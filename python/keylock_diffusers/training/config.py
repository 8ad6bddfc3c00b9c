"""What a user gives to learn a concept from, and how it is learned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from keylock_diffusers.checks import check_field, listed, number, one_of, shown, whole
from keylock_diffusers.concepts.added import MOST_WORDS
from keylock_diffusers.concepts.concept import check_placeholder, check_super_class
from keylock_diffusers.training.localization import FORMS

DEFAULT_CAPTIONS = ("a photo of a {}", "a picture of the {}", "a {}", "the {}")
TARGETS = ("linear", "all")
_LONGEST_WORDS = 200  # characters
_GRADIENTS = ("none", "straight-through", "exact")
# Perfusion's learning rates, and the root mean squares on Stable Diffusion 1.5 of what they were chosen for: CLIP
# ViT-L/14's word embeddings have a norm of about 0.39 in 768 dimensions; to_v's outputs are of the order of one.
_VALUES_RATE, _VALUES_RMS = 0.03, 1.0
_EMBEDDING_RATE, _EMBEDDING_RMS = 0.006, 0.014
_INVERSION_RATE = 5e-4  # of a word beside a LoRA: that of diffusers' script for textual inversion


class SubjectTrainingError(RuntimeError):
    """One subject's training had to stop; the others' goes on."""


class ConceptTrainingError(SubjectTrainingError):
    """One subject's concept could not be learned; the others' are."""


class LoraTrainingError(SubjectTrainingError):
    """One subject's LoRA could not be learned; the others' are."""


def is_word(placeholder: str) -> bool:
    """Whether a placeholder is a word of its own, or means to be; otherwise it is plain words."""
    return not isinstance(placeholder, str) or "<" in placeholder or ">" in placeholder


@dataclass(frozen=True)
class Subject:
    """One user's subject and the pictures of it.

    Args:
        placeholder: the word that will stand for it in prompts, such as ``<alice-cat>``; for a LoRA also plain words,
            such as ``sks cat``, of which nothing is learned.
        super_class: what it is, such as ``cat``, from which the word begins; may be empty beside plain words.
        images: its pictures, PIL images of any size and aspect ratio; the middle square is used.
        captions: per picture, a prompt with the placeholder, or beside plain words any; default a few neutral ones.
        masks: per picture, a PIL image that is white where the subject is; default everywhere.
        seed: of this subject's draws.
    """

    placeholder: str
    super_class: str
    images: Sequence[Image.Image]
    captions: Sequence[str] | None = None
    masks: Sequence[Image.Image] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if is_word(self.placeholder):
            check_placeholder(self.placeholder)
            check_super_class(self.super_class)
        elif not 0 < len(self.placeholder.strip()) <= _LONGEST_WORDS or not self.placeholder.isprintable():
            raise ValueError(
                f"Subject: placeholder must be a word such as <alice-cat>, or plain words of at most {_LONGEST_WORDS} "
                f"characters, got {self.placeholder!r:.80}"
            )
        elif self.super_class != "":
            check_super_class(self.super_class)
        self._check("images", Image.Image, "PIL images")
        if not self.images:
            raise ValueError(f"Subject {self.placeholder}: images must not be empty")
        for name, kind, wanted in (("captions", str, "texts"), ("masks", Image.Image, "PIL images")):
            if getattr(self, name) is None:
                continue
            self._check(name, kind, wanted)
            given = len(getattr(self, name))
            if given != len(self.images):
                raise ValueError(
                    f"Subject {self.placeholder}: {name} must hold one per picture, {len(self.images)}, got {given}"
                )
        check_field(self, "seed", whole, 0)

    def _check(self, name: str, kind: type, wanted: str) -> None:
        values = getattr(self, name)
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise TypeError(f"Subject {self.placeholder}: {name} must be a list of {wanted}, got {shown(values)}")
        for place, value in enumerate(values):
            if not isinstance(value, kind):
                hint = "; open it first" if isinstance(value, (str, os.PathLike)) else ""
                raise TypeError(
                    f"Subject {self.placeholder}: {name} must be {wanted}, got {shown(value)} as number {place}{hint}"
                )


@dataclass(frozen=True)
class AddedConfig:
    """How concepts are trained that add to keys and values at their own words (`AddedConcept`).

    Rates rise over `warmup` steps and fall to zero as a cosine.

    Args:
        words: how many a concept has in the place of its super-class's noun.
        embeddings: whether text encoders read words that are learned; else they read the super-class's own prompt, and
            the words begin as its noun's encoding in it.
        encodings, keys, values: of how many of them at most, the first ones, what is added to encodings, keys and
            values is learned; None: of all.
        layers: which cross-attention layers learn: "all", or names or beginnings of them.
        start: the share of the steps that are drawn with the super-class before the concept counts; the times of the
            steps that remain are what it learns on. Stored with the concept.
        steps: optimiser steps.
        batch_size: pictures per concept and step.
        encodings_rate, keys_rate, values_rate: learning rates, in units of the root mean square of the super-class's
            own encoding, and of its keys and values layer by layer.
        embedding_rate: learning rate of the words' embeddings, in units of the noun's root mean square.
        spread: how far apart the words begin, in the same units, or without embeddings in those of encodings.
        prior: weight of the prior: outside a picture's mask the model should say what it says without the concept.
            Without masks there is no outside.
        timestep_power: times are drawn as T (1 - u^p), u uniform: 1 takes all alike, more takes more of the noisy ones,
            in which what a picture shows is decided (3 is the cubic sampling of T2I-Adapter-SDXL's training).
        views: the share of a step's rows that show a smaller view of their picture, told by its caption, as Custom
            Diffusion does: pictures show a subject large, and beside others it is drawn small.
        warmup: steps.
        max_grad_norm: each concept's gradients are clipped to this norm; None: not at all.
        patience: a concept stops when its smoothed loss has not improved for so many steps; None: never.
        localize: weight of the localization loss of the concept's words (FastComposer's is 1e-3), which needs the
            subjects' masks; 0: none.
        localization_form: see `Localization`.
        mixed_precision: "no" or "bf16".
    """

    words: int = 5
    embeddings: bool = False
    encodings: int | None = None
    keys: int | None = 1
    values: int | None = 2
    layers: str | Sequence[str] = "all"
    start: float = 0.0
    steps: int = 400
    batch_size: int = 16
    encodings_rate: float = 0.05
    keys_rate: float = 0.015
    values_rate: float = 0.05
    embedding_rate: float = 0.15
    spread: float = 0.2
    prior: float = 1.0
    timestep_power: float = 2.0
    views: float = 0.25
    warmup: int = 10
    max_grad_norm: float | None = 1.0
    patience: int | None = None
    localize: float = 0.0
    localization_form: str = "balanced"
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        check_field(self, "words", whole, 1, MOST_WORDS)
        for name in ("encodings", "keys", "values"):
            check_field(self, name, whole, 0, MOST_WORDS, optional=True)
        if not isinstance(self.embeddings, bool):
            raise TypeError(f"{type(self).__name__}: embeddings must be True or False, got {self.embeddings!r:.80}")
        most = max(map(self.learned, ("encodings", "keys", "values")))
        if not self.embeddings and most < self.words:
            raise ValueError(
                f"{type(self).__name__}: words must be at most {most}, of which encodings, keys or values are learned "
                f"where embeddings are not, got {self.words}"
            )
        if self.layers != "all":
            check_field(self, "layers", _names)
        for name in ("start", "views"):
            check_field(self, name, number, 0, 1)
        check_field(self, "mixed_precision", one_of, ("no", "bf16"))
        check_field(self, "localization_form", one_of, FORMS)
        for name in ("steps", "batch_size", "warmup", "patience"):
            check_field(self, name, whole, 1, optional=name == "patience")
        for name in ("encodings_rate", "keys_rate", "values_rate", "embedding_rate", "spread", "prior", "localize"):
            check_field(self, name, number, 0)
        check_field(self, "timestep_power", number, 1)
        check_field(self, "max_grad_norm", _bound, optional=True)

    def learned(self, part: str) -> int:
        """Of how many words "encodings", "keys" or "values" are learned."""
        given = getattr(self, part)
        return self.words if given is None else min(given, self.words)

    def learns(self, layer: str) -> bool:
        """Whether a cross-attention layer learns."""
        return self.layers == "all" or layer.startswith(tuple(self.layers))


@dataclass(frozen=True)
class PerfusionConfig:
    """How key-locked concepts are trained (`KeyLockedConcept`); the defaults are Perfusion's on Stable Diffusion 1.5.

    Args:
        steps: optimiser steps.
        batch_size: pictures per concept and step.
        values_rate: learning rate of the value outputs, in units of their root mean square at the start.
        embedding_rate: learning rate of the word embedding, in units of its root mean square at the start.
        beta: training gate's threshold, in units of the similarity.
        tau: training gate's temperature.
        target_decay: of the moving average that is the target input i*.
        target_gradient: what i* passes back: "none", "straight-through" (as if it were this step's encoding), or
            "exact" (through this step's share of the average).
        prior, timestep_power, views: see `AddedConfig`; Perfusion has none of them.
        max_grad_norm: each concept's gradients are clipped to this norm; None: not at all.
        patience: a concept stops when its smoothed loss has not improved for so many steps; None: never.
        localize: weight of the localization loss of the subject's word (FastComposer's is 1e-3), which needs the
            subjects' masks; 0: none.
        localization_form: see `Localization`.
        mixed_precision: "no" or "bf16".
        inference_beta, inference_tau: the gate stored with the concept.
    """

    steps: int = 400
    batch_size: int = 16
    values_rate: float = _VALUES_RATE / _VALUES_RMS
    embedding_rate: float = _EMBEDDING_RATE / _EMBEDDING_RMS
    beta: float = 0.75
    tau: float = 0.1
    target_decay: float = 0.99
    target_gradient: str = "none"
    prior: float = 0.0
    timestep_power: float = 1.0
    views: float = 0.0
    max_grad_norm: float | None = 1.0
    patience: int | None = None
    localize: float = 0.0
    localization_form: str = "balanced"
    mixed_precision: str = "no"
    inference_beta: float = 0.75
    inference_tau: float = 0.15

    def __post_init__(self) -> None:
        check_field(self, "target_gradient", one_of, _GRADIENTS)
        check_field(self, "mixed_precision", one_of, ("no", "bf16"))
        check_field(self, "localization_form", one_of, FORMS)
        for name in ("steps", "batch_size", "patience"):
            check_field(self, name, whole, 1, optional=name == "patience")
        for name in ("beta", "inference_beta"):
            check_field(self, name, number)
        for name in ("values_rate", "embedding_rate", "localize", "prior", "tau", "inference_tau", "target_decay"):
            check_field(self, name, number, 0)
        check_field(self, "timestep_power", number, 1)
        check_field(self, "views", number, 0, 1)
        check_field(self, "max_grad_norm", _bound, optional=True)
        if self.target_decay >= 1:
            raise ValueError(f"PerfusionConfig: target_decay must lie in [0, 1), got {self.target_decay}")


@dataclass(frozen=True)
class LoraTrainingConfig:
    """How LoRAs are trained; the defaults are those of diffusers' training scripts.

    Args:
        rank: of every update.
        alpha: an update counts alpha / rank times; None: once.
        targets: which projections of the denoiser learn: their names or the ends of those, as PEFT has them, or one
            word: "linear" for every linear layer and convolution over one pixel, "all" for all convolutions besides.
        text_targets: the same for the text encoders, such as ("q_proj", "k_proj", "v_proj", "out_proj").
        steps: optimiser steps.
        batch_size: pictures per subject and step.
        learning_rate: AdamW's, of the updates.
        embedding_rate: learning rate of a subject's own word, in units of its root mean square at the start; 0: the
            word stays its super-class's.
        weight_decay: AdamW's, of the updates.
        max_grad_norm: each subject's gradients are clipped to this norm; None: not at all.
        prior, timestep_power, views: see `AddedConfig`.
        snr_gamma: bounds how much steps with little noise count (min-SNR, usually 5); None: all count alike.
        patience: a subject stops when its smoothed loss has not improved for so many steps; None: never.
        gradient_checkpointing: whether the U-Net is computed twice, for a fraction of the memory.
        mixed_precision: "no" or "bf16".

    Papers: LoRA, Hu et al. 2021, arXiv 2106.09685; min-SNR, Hang et al. 2023, arXiv 2303.09556.
    """

    rank: int = 4
    alpha: float | None = None
    targets: str | Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    text_targets: str | Sequence[str] = ()
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 1e-4
    embedding_rate: float = _INVERSION_RATE / _EMBEDDING_RMS
    weight_decay: float = 1e-2
    max_grad_norm: float | None = 1.0
    prior: float = 0.0
    timestep_power: float = 1.0
    views: float = 0.0
    snr_gamma: float | None = None
    patience: int | None = None
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        check_field(self, "mixed_precision", one_of, ("no", "bf16"))
        for name in ("rank", "steps", "batch_size", "patience"):
            check_field(self, name, whole, 1, optional=name == "patience")
        for name in ("learning_rate", "embedding_rate", "weight_decay", "prior"):
            check_field(self, name, number, 0)
        check_field(self, "timestep_power", number, 1)
        check_field(self, "views", number, 0, 1)
        for name in ("alpha", "max_grad_norm", "snr_gamma"):
            check_field(self, name, _bound, optional=True)
        if not isinstance(self.gradient_checkpointing, bool):
            got = shown(self.gradient_checkpointing)
            raise TypeError(f"LoraTrainingConfig: gradient_checkpointing must be True or False, got {got}")
        for name in ("targets", "text_targets"):
            check_field(self, name, _targets)
        if not self.targets and not self.text_targets:
            raise ValueError("LoraTrainingConfig: targets and text_targets must not both be empty")

    @property
    def scale(self) -> float:
        """How much an update counts."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _targets(value: Any, name: str) -> str | tuple[str, ...]:
    return one_of(value, name, TARGETS) if isinstance(value, str) else _names(value, name)


def _names(value: Any, name: str) -> tuple[str, ...]:
    for one in listed(value, name):
        if not isinstance(one, str) or not one:
            raise TypeError(f"{name} must be names of modules, got {shown(one)} among them")
    return tuple(value)


def _bound(value: Any, name: str) -> float:
    found = number(value, name, 0)
    if found == 0:
        raise ValueError(f"{name} must be above 0, or None, got 0")
    return found
