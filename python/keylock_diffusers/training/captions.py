"""How captions are read while something is learned: by all text encoders of a pipeline, with each row's own words."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keylock_diffusers.denoisers.base import RowLayout
from keylock_diffusers.denoisers.families import denoiser_of
from keylock_diffusers.denoisers.unet import TextEncoder
from keylock_diffusers.encoding import text
from keylock_diffusers.pictures import turned
from keylock_diffusers.requests import Request
from keylock_diffusers.training.config import Subject, is_word
from keylock_diffusers.training.learners import Learner, Lesson, captions_of, lesson

Prompts = tuple[text.TokenizedPrompt, ...]  # one per text encoder
Words = Mapping[str, Sequence[Tensor]]  # per name, vectors [W] or [n, W] for each text encoder
_ROWS = RowLayout(("cond",))


class Read(NamedTuple):
    """What text encoders make of a batch's captions."""

    states: Tensor  # [B, T, D]
    pooled: Tensor | None  # [B, P]

    def rows(self, chosen: Sequence[int]) -> Read:
        """Some of them."""
        return Read(self.states[chosen], None if self.pooled is None else self.pooled[chosen])


def joined(parts: Sequence[Read]) -> Read:
    """Several batches' in one."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Read(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def word_encodings(states: Tensor, prompts: Sequence[Prompts]) -> Tensor:  # [n, D]
    """The encodings of the captions' placeholders, among encodings [B, T, D]."""
    places = [(row, position) for row, prompt in enumerate(prompts) for position, *_ in prompt[0].words]
    rows, positions = (torch.tensor(side, device=states.device) for side in zip(*places, strict=True))
    return states[rows, positions]


@dataclass(kw_only=True)
class Captioned(Learner):
    """A learner whose pictures are told by captions."""

    prompts: list[Prompts]  # per picture
    orders: list[Request]  # per picture
    plain: Read  # of the captions, without what is learned

    @property
    def ids(self) -> list[Any]:
        return [[prompt.ids for prompt in prompts] for prompts in self.prompts]


class Told(NamedTuple):
    """What a step shows and tells."""

    given: Lesson
    rows: list[Any]  # whose each row is
    captions: list[int]  # of each row, which of its learner's
    orders: list[Request]
    without: Tensor | None  # [B, c, h, w], what the model says of it without what is learned, for the prior

    @property
    def prompts(self) -> list[Prompts]:
        return [row.prompts[n] for row, n in zip(self.rows, self.captions, strict=True)]

    def losses(self, predicted: Tensor, prior: float, weights: Tensor | None = None) -> Tensor:  # [B]
        """Each row's error by its weight, and `prior` times how far it strays from what is said without the subject."""
        losses = self.given.losses(predicted) * (1 if weights is None else weights)
        return losses if self.without is None else losses + prior * self.given.strayed(predicted, self.without)


class Captions:
    """The text side of a pipeline while something is learned.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        name: of who learns, for errors.

    Raises:
        ValueError: its model is distilled.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        self.denoiser = denoiser_of(copy.copy(pipe), {})
        if self.denoiser.distilled:
            raise ValueError(f"{name}: pipe must have no distilled model, which reads guidance as an input")
        self.encoders = self.denoiser.encoders()

    def tokenized(self, caption: str, super_classes: Mapping[str, str] | None = None, **names: Any) -> Prompts:
        """A caption for each text encoder; the rest as for `text.tokenize`."""
        return tuple(
            text.tokenize(
                tokenizer,
                caption,
                super_classes,
                spelled=partial(text.converted, self.denoiser.pipe, tokenizer),
                **names,
            )
            for tokenizer, *_ in self.encoders
        )

    def of(self, subject: Subject, nouns: int = 1) -> list[Prompts]:
        """A subject's captions, in which its placeholder stands for a concept of so many words."""
        name = subject.placeholder
        return [
            self.tokenized(caption, {name: subject.super_class}, nouns={name: nouns})
            for caption in captions_of(subject)
        ]

    @torch.no_grad()
    def plain(self, subject: Subject) -> Read:
        """A subject's captions as nothing learned reads them: its super-class for its word, plain words as they are."""
        if is_word(subject.placeholder):
            return self.read(self.of(subject))
        return self.read([self.tokenized(caption) for caption in captions_of(subject)])

    def read(self, prompts: Sequence[Prompts], words: Sequence[Words] | None = None) -> Read:
        """Encodings in the U-Net's dtype, differentiable in the rows' own words."""
        states, pooled = [], None
        for number, encoder in enumerate(self.encoders):
            own = None if words is None else [{name: each[number] for name, each in row.items()} for row in words]
            encoded, pooled = text.encode_rows(encoder, [row[number] for row in prompts], own)
            states.append(encoded)
        dtype = self.denoiser.unet.dtype
        return Read(torch.cat(states, -1).to(dtype), None if pooled is None else pooled.to(dtype))

    def noun(self, encoder: TextEncoder, subject: Subject) -> Tensor:  # [W]
        """A text encoder's embedding of the last token of a subject's super-class, in float32."""
        number = text.super_class_ids(encoder.tokenizer, subject.super_class)[-1]
        return encoder.model.get_input_embeddings().weight.detach()[number].float()

    def orders(self, subject: Subject) -> list[Request]:
        """Each picture's size before its middle square is taken, and where that lies, as SDXL is told."""
        side = self.denoiser.size(None, None)[0]
        made = []
        for image in subject.images:
            width, height = turned(image).size
            top, left = (round((length * side / min(width, height) - side) / 2) for length in (height, width))
            made.append(Request("", original_size=(height, width), crops_coords_top_left=(top, left)))
        return made

    def told(self, learners: Sequence[Captioned], config: Any, step: int, start: float = 0.0) -> Told:
        """What the learners are shown in a step, and by which captions it is told; the rest as for `lesson`."""
        given = lesson(self.denoiser.pipe, learners, config, step, start)
        rows = [learner for learner in learners for _ in range(config.batch_size)]
        # A view's is its picture's.
        captions = [n % len(row.prompts) for row, n in zip(rows, given.pictures, strict=True)]
        orders = [row.orders[n] for row, n in zip(rows, captions, strict=True)]
        without = None
        if config.prior:
            with torch.no_grad():
                read = joined([row.plain.rows([n]) for row, n in zip(rows, captions, strict=True)])
                without = self.predicted(given, read, orders)
        return Told(given, rows, captions, orders, without)

    def predicted(self, given: Lesson, read: Read, orders: Sequence[Request], **attention: Any) -> Tensor:
        """What the U-Net says of a lesson [B, c, h, w]; `attention` is passed to its attention layers."""
        return self.denoised(given.noisy, given.times, read, orders, **attention)

    def denoised(
        self,
        noisy: Tensor,  # [B, c, h, w]
        times: Tensor,  # [B]
        read: Read,
        orders: Sequence[Request],
        **attention: Any,
    ) -> Tensor:  # [B, c, h, w]
        """The same of any noisy latents."""
        size = self.denoiser.size(None, None)
        pooled = {} if read.pooled is None else {"cond": read.pooled}
        keywords = self.denoiser.conditions(orders, size, _ROWS, pooled)
        if attention:
            keywords["cross_attention_kwargs"] = attention
        return self.denoiser.predict(noisy, times, read.states, keywords)
