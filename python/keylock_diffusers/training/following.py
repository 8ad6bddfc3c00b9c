"""How far pictures still follow the words beside a subject while it is learned, and an end where they no longer do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.checks import listed, number, reason_of, shown, whole
from keylock_diffusers.concepts import Concept
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.requests import Request
from keylock_diffusers.training.config import Subject
from keylock_diffusers.training.learners import check_subjects

logger = logging.getLogger(__name__)

PROMPTS = (
    "a {} wearing a hat",
    "a smiling {}",
    "a sleeping {}",
    "a {} next to a house",
    "a {} and a dog",
    "a {} in the snow",
    "an oil painting of a {}",
)
_BARE = "a {}"
_AT_A_TIME = 32  # pictures


class PromptFollowing:
    """Measures what other words still change in a subject's pictures, and ends its training where that is too little.

    What overtraining costs is not seen in the loss: the subject is drawn as in its pictures, whatever the words ask of
    it. So from the same noise, in a few steps and without guidance, each prompt and the bare "a {}" are drawn with what
    was learned so far, and with the super-class. Of the latents z_p and z of the subject, c_p and c of the super-class,

        following = sum over prompts and seeds of (z_p - z) . (c_p - c)  /  sum of |c_p - c|^2

    It is 1 where words do what they do to the super-class, 0 where they do nothing. An ``on_step`` of `train_concepts`
    and `train_loras`; what is learned until the end is not changed by it.

    Args:
        pipe: the pipeline that is trained on.
        subjects: those that are trained, in their order; of each with plain words (of a LoRA) they are the placeholder.
        every: steps between two measurements.
        least: a subject that follows less stops there; None: none does.
        prompts: what is asked, with {} where the subject is named.
        seeds: of each prompt's pictures.
        num_inference_steps: of every picture.

    Attributes:
        measured: of each subject, how far its pictures followed after so many steps.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of its range.
    """

    def __init__(
        self,
        pipe: Any,
        subjects: Sequence[Subject],
        every: int,
        *,
        least: float | None = None,
        prompts: Sequence[str] = PROMPTS,
        seeds: Sequence[int] = (0, 1),
        num_inference_steps: int = 4,
    ) -> None:
        check_subjects(subjects, "PromptFollowing")
        self.pipe, self.subjects, self.every = pipe, subjects, whole(every, "PromptFollowing: every", 1)
        self.least = None if least is None else number(least, "PromptFollowing: least")
        for name, given in (("prompts", prompts), ("seeds", seeds)):
            if not listed(given, f"PromptFollowing: {name}"):
                raise ValueError(f"PromptFollowing: {name} must not be empty")
        for prompt in prompts:
            if not isinstance(prompt, str) or prompt.count("{}") != 1:
                raise ValueError(f"PromptFollowing: prompts must each hold one {{}}, got {shown(prompt)}")
        self.prompts, self.seeds, self.num_inference_steps = prompts, seeds, num_inference_steps
        self.measured: list[dict[int, float]] = [{} for _ in subjects]
        self._ended: set[int] = set()
        self._plain: dict[str, Tensor] = {}  # by super-class, what the prompts change [seeds, prompts, numbers]

    def __call__(self, step: int, results: Callable[[], list[Any]]) -> list[int]:
        """Measures after so many steps; the places of the subjects that are to stop."""
        if step % self.every:
            return []
        for place, (subject, learned) in enumerate(zip(self.subjects, results(), strict=True)):
            if place in self._ended or isinstance(learned, Exception):
                continue
            try:
                found = self._following(subject, learned)
            except Exception as error:  # training goes on
                logger.warning("%s: step %d was not measured: %s", subject.placeholder, step, reason_of(error))
                continue
            self.measured[place][step] = round(found, 4)
            if self.least is not None and found < self.least:
                self._ended.add(place)
        return sorted(self._ended)

    def _following(self, subject: Subject, learned: Any) -> float:
        kind = subject.super_class or subject.placeholder
        if kind not in self._plain:
            self._plain[kind] = self._changes(kind)
        use = {"concepts": [learned]} if isinstance(learned, Concept) else {"loras": [learned]}
        changed, plain = self._changes(subject.placeholder, **use), self._plain[kind]
        return float((changed * plain).sum() / plain.square().sum().clamp(min=torch.finfo(torch.float32).tiny))

    def _changes(self, named: str, **use: Any) -> Tensor:  # [seeds, prompts, numbers]
        """What each prompt changes in the latents of the bare one's pictures."""
        orders = [
            Request(prompt.format(named), seed=seed, guidance_scale=1.0, **use)
            for seed in self.seeds
            for prompt in (_BARE, *self.prompts)
        ]
        drawn = generate(
            self.pipe,
            orders,
            num_inference_steps=self.num_inference_steps,
            output_type="latent",
            max_batch=_AT_A_TIME,
        )
        latents = torch.stack([one.float().cpu() for one in drawn]).view(len(self.seeds), len(self.prompts) + 1, -1)
        return latents[:, 1:] - latents[:, :1]
