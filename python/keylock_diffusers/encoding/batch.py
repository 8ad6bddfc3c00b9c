"""The text encodings of a batch's rows, each with its own learned words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from keylock_diffusers.denoisers.unet import text_encoders
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.fusion import FusionUse, SubjectFusion, fuse

if TYPE_CHECKING:
    from keylock_diffusers.generation.plan import Plan
    from keylock_diffusers.requests import Request
    from keylock_diffusers.routing.concepts import ConceptUse


class Encodings(NamedTuple):
    """One half of guidance: what cross-attention reads, and SDXL's pooled encodings."""

    text: Tensor  # [B, T, D]
    pooled: Tensor | None  # [B, P]


class BatchEncoder:
    """Encodes the prompts of a batch's rows.

    Args:
        pipe: the pipeline.
        orders: each row's request.
        plans: what was made of it.
        clip_skip: the pipeline's argument.
        fusion: mixes the rows' subjects into their words.
        max_regions: how many wordings of their own the regions of one row have room for; default as many as are there,
            which is then in ``wordings``.
    """

    def __init__(
        self,
        pipe: Any,
        orders: Sequence[Request],
        plans: Sequence[Plan],
        clip_skip: int | None,
        fusion: SubjectFusion | None,
        max_regions: int | None = None,
    ) -> None:
        self._pipe, self._orders, self._plans, self._clip_skip = pipe, orders, plans, clip_skip
        self._fusion = fusion
        own = [len(half.own) for plan in plans for half in (plan.regions, plan.negative_regions)]
        self.wordings = max(own) if max_regions is None else max_regions

    def positive(self, learned: Callable[[ConceptUse], bool], *, fused: bool = True) -> Encodings:
        """The rows' prompts; a concept that `learned` refuses is encoded as its super-class.

        Args:
            learned: which concepts' words are encoded as they were learned.
            fused: whether subjects are mixed into their words.
        """
        given = [(order.prompt_embeds, order.pooled_prompt_embeds) for order in self._orders]
        return self._positive([plan.prompts for plan in self._plans], given, learned, fused)

    def negative(self) -> Encodings:
        """The rows' negative prompts; where there is none, SDXL's pipelines may want zeros."""
        given = [(order.negative_prompt_embeds, order.negative_pooled_prompt_embeds) for order in self._orders]
        prompts = [plan.negatives for plan in self._plans]
        if getattr(self._pipe.config, "force_zeros_for_empty_prompt", False):
            encoders = text_encoders(self._pipe)
            width = sum(encoder.config.hidden_size for _, encoder in encoders)
            zeros = (
                torch.zeros(encoders[0][0].model_max_length, width),
                torch.zeros(encoders[-1][1].config.projection_dim),
            )
            for row, order in enumerate(self._orders):
                if order.negative_prompt is None and order.negative_prompt_embeds is None:
                    given[row], prompts[row] = zeros, None
        return self._encode(prompts, given, None, None)

    def own_wordings(self, learned: Callable[[ConceptUse], bool], *, fused: bool = True) -> list[Tensor]:
        """Per region of a row, what it reads [B, T, D]; a row without so many regions has its prompt's there."""
        wordings = []
        for region in range(self.wordings):
            prompts = [
                plan.regions.own[region] if region < len(plan.regions.own) else plan.prompts for plan in self._plans
            ]
            given = [(order.prompt_embeds, order.pooled_prompt_embeds) for order in self._orders]
            wordings.append(self._positive(prompts, given, learned, fused).text)
        return wordings

    def own_negative_wordings(self, text: Tensor) -> list[Tensor]:  # [B, T, D]
        """The same for the unconditional rows, whose text is given."""
        wordings = []
        for region in range(self.wordings):
            prompts = [
                plan.negative_regions.own[region] if region < len(plan.negative_regions.own) else plan.negatives
                for plan in self._plans
            ]
            wordings.append(self._encode(prompts, [(row, None) for row in text], None, None).text)
        return wordings

    def _positive(
        self,
        prompts: Sequence[tuple[text.TokenizedPrompt, ...] | None],
        given: Sequence[tuple[Tensor | None, Tensor | None]],
        learned: Callable[[ConceptUse], bool],
        fused: bool,
    ) -> Encodings:
        words = [
            [
                {use.concept.placeholder: use.concept.word_embeddings[encoder] for use in plan.uses if learned(use)}
                for plan in self._plans
            ]
            for encoder in range(len(text_encoders(self._pipe)))
        ]
        encoded = self._encode(prompts, given, words, self._clip_skip)
        if self._fusion is None or not fused:
            return encoded
        rows = []
        for plan, prompt in zip(self._plans, prompts, strict=True):
            places = {
                phrase: text.find(self._pipe.tokenizer, prompt[0], phrase) if prompt is not None else ()
                for phrase, _ in plan.subjects
            }
            rows.append(
                [
                    FusionUse(tuple(dict.fromkeys(place[-1] for place in places[phrase])), embeds)
                    for phrase, embeds in plan.subjects
                ]
            )
        return encoded._replace(text=fuse(self._fusion, encoded.text, rows))

    def _encode(
        self,
        prompts: Sequence[tuple[text.TokenizedPrompt, ...] | None],
        given: Sequence[tuple[Tensor | None, Tensor | None]],
        words: Sequence[Sequence[Mapping[str, Tensor]]] | None,  # per text encoder and row
        clip_skip: int | None,
    ) -> Encodings:
        encoders = [encoder for _, encoder in text_encoders(self._pipe)]
        places = [row for row, prompt in enumerate(prompts) if prompt is not None]
        out: list[Any] = [row_text for row_text, _ in given]
        pooled: list[Any] = [row_pooled for _, row_pooled in given]
        if places:
            parts = []
            for index, encoder in enumerate(encoders):
                own = [prompts[row][index] for row in places]  # type: ignore[index]
                learned = None if words is None else [words[index][row] for row in places]
                if len(encoders) == 1:
                    parts.append(text.encode(encoder, own, learned, clip_skip=clip_skip))
                    continue
                part, last = text.encode_penultimate(encoder, own, learned, clip_skip=clip_skip)
                parts.append(part)
                if last is not None:
                    for row, vector in zip(places, last, strict=True):
                        pooled[row] = vector
            for row, encoding in zip(places, torch.cat(parts, -1), strict=True):
                out[row] = encoding

        device, dtype = self._pipe._execution_device, encoders[-1].dtype  # both search all modules: once, not per row

        def stacked(rows: list[Any]) -> Tensor:
            return torch.stack([row.to(device, dtype) for row in rows])

        whole = len(encoders) > 1 and all(vector is not None for vector in pooled)
        return Encodings(stacked(out), stacked(pooled) if whole else None)


@contextmanager
def lora_scale(pipe: Any, scale: float | None) -> Iterator[None]:
    """LoRA weights at the scale that the pipeline's own call will give them."""
    modules = [] if scale is None else [*(encoder for _, encoder in text_encoders(pipe)), pipe.unet]
    for module in modules:
        scale_lora_layers(module, scale)
    try:
        yield
    finally:
        for module in modules:
            unscale_lora_layers(module, scale)
