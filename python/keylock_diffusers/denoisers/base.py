"""What is said of a denoiser: where its layers are, what reads text, and what one step computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Size = tuple[int, int]  # height and width


class RowLayout(NamedTuple):
    """The denoiser's batch: each picture's rows by what they are, one part after another."""

    parts: tuple[str, ...]  # of "uncond", "cond" and "perturbed"

    @property
    def guided(self) -> bool:
        return "uncond" in self.parts


class Schedule(NamedTuple):
    """One row's scheduler, ready to step, and the times it goes through."""

    scheduler: Any
    times: Tensor  # [S], on the CPU


class Denoiser(Protocol):
    """Everything that is known of one family of models; nothing else asks which model it is.

    Where things are, text, and one step, for the engine's loop: what pipelines' own calls do between encoding and
    decoding.
    """

    pipe: Any
    options: Mapping[str, Any]  # keywords of the pipeline's call that a batch shares

    @staticmethod
    def knows(pipe: Any) -> bool:
        """Whether a pipeline is of this family."""

    # Where things are.

    def layers(self) -> Mapping[str, Any]:
        """The cross-attention layers by name, in the order of a concept's file."""

    def projections(self) -> Mapping[str, Any]:
        """The linear layers and convolutions that low-rank updates may reach, by the names that LoRA files use."""

    def grid(self, layers: Sequence[str], latent: Size) -> Mapping[str, Size]:
        """Height and width that each layer runs at."""

    def bound(
        self, inputs: Any, layout: RowLayout, options: Mapping[str, Any]
    ) -> AbstractContextManager[dict[str, Any]]:
        """How a batch reaches its layers: the keywords to call the model with, while they are bound."""

    def scaled(self) -> AbstractContextManager[None]:
        """While it lasts, LoRA weights of the model count as this call wants them to."""

    # Text.

    def encoders(self) -> Sequence[Any]:
        """The text encoders."""

    def encoding(self) -> AbstractContextManager[None]:
        """As `scaled`, of the text encoders."""

    @property
    def tokenizer(self) -> Any:
        """Of the words of prompts; None where no text encoder is loaded."""

    @property
    def can_encode(self) -> bool:
        """Whether all its text encoders are loaded: where all encodings are given, they need not be."""

    @property
    def text_width(self) -> int:
        """Of what cross-attention reads."""

    @property
    def text_dtype(self) -> torch.dtype:
        """Of the encodings."""

    @property
    def pooled_width(self) -> int | None:
        """Of the pooled encodings that the model is given; None: of none."""

    @property
    def zeros_without_negative(self) -> bool:
        """Whether a negative prompt that is not given is encoded as zeros."""

    # One step.

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the model rather than two calls of it."""

    @property
    def fills_in(self) -> bool:
        """Whether the model reads the mask and the masked picture itself."""

    @property
    def begins_without_noise(self) -> bool:
        """Whether a picture to begin from is one that another model has left unfinished."""

    @property
    def followed(self) -> bool:
        """Whether somebody's code around the model follows the steps, so that rows of a batch must make the same."""

    @property
    def frames(self) -> int:
        """How many rows of the layers one row of latents is."""

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width of what is drawn, in pixels, where a call asks for these."""

    def latent_size(self, size: Size) -> Size:
        """Height and width of its latents."""

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Of one row of latents, [C, h, w]."""

    def noise(self, size: Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """A row's noise [1, C, h, w], from its own generator."""

    def encode(self, pixels: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Latents [1, C, h, w] of a picture [1, 3, height, width] in -1..1, or of what is latents already."""

    def schedule(self, scheduler: Any, steps: int, share: float | None) -> Schedule:
        """A copy of the scheduler with its times: all of them, or those of an image that is changed by a share."""

    def rows(self, guided: bool) -> RowLayout:
        """The row layout of guidance."""

    def conditions(
        self, requests: Sequence[Any], size: Size, layout: RowLayout, pooled: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What the model is given beside latents, times and text: keywords, with rows in the row layout."""

    def predict(self, latents: Tensor, times: Tensor, text: Tensor, keywords: Mapping[str, Any]) -> Tensor:
        """One call of the model on all rows."""

    def guide(self, predictions: Tensor, scales: Tensor, layout: RowLayout, times: Tensor) -> Tensor:
        """The family's formula of guidance, each picture with its own scale."""

    def decode(self, latents: Tensor, output_type: str) -> tuple[list[Any], Tensor]:
        """Pictures of latents, in the form that the pipeline's call returns, and which are of finite numbers [B]."""
