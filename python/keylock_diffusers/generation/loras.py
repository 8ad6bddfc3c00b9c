"""A request's LoRAs: looking them up, reading them for this model, and what its rows and wordings carry of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from keylock_diffusers.checks import number, reason_of, shown
from keylock_diffusers.denoisers.projections import reads_text
from keylock_diffusers.denoisers.unet import face_updates
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.blocks import factors, of_modules
from keylock_diffusers.encoding.tokens import TokenizedPrompt
from keylock_diffusers.loras import Adapter, LoraBank, LowRank, ModelShapes, read_adapter
from keylock_diffusers.masks import region_mask
from keylock_diffusers.pictures import PictureLimits
from keylock_diffusers.requests import Attention, Lora, Request
from keylock_diffusers.routing.adapters import BoundTo
from keylock_diffusers.routing.rows import LoraUse

LoraSource = LoraBank | Mapping[str, Any]
_IN_PROMPT = re.compile(r"<\s*(lora|lyco|hypernet)\s*:[^<>]*>", re.IGNORECASE)


class LoraPlanner:
    """Makes the LoRAs that requests name into what rows carry; a file that several of them name is read once.

    Args:
        denoiser: the pipeline's description.
        source: where ids are looked up.
        limits: of regions.
    """

    def __init__(self, denoiser: Any, source: LoraSource | None, limits: PictureLimits) -> None:
        self._denoiser, self._source, self._limits = denoiser, source, limits
        self._read: dict[tuple[Any, ...], Adapter] = {}
        self._blocks: dict[str, Mapping[str, float]] = {}
        self._faces: dict[tuple[Any, ...], Mapping[str, LowRank]] = {}
        self._shapes: ModelShapes | None = None

    @property
    def shapes(self) -> ModelShapes:
        """Those of the model's weights."""
        if self._shapes is None:
            self._shapes = ModelShapes.of(self._denoiser.pipe)
        return self._shapes

    def plan(self, request: Request) -> tuple[tuple[LoraUse, ...], tuple[Adapter, ...]]:
        """A request's LoRAs as rows carry them, and the files' contents.

        Raises:
            KeyError: there is no LoRA of that id.
            LoraFileError: a file is not for this model.
            TypeError, ValueError: what is wrong, by the argument's name.
        """
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            found = _IN_PROMPT.search(getattr(request, name) or "")
            if found:
                raise ValueError(
                    f"{name} has {shown(found.group())}, which is not read as words: give loras=[Lora(...)] instead"
                )
        orders = [order if isinstance(order, Lora) else Lora(order) for order in request.loras]
        adapters = tuple(self._adapter(order.lora) for order in orders)
        uses = tuple(self._use(order, adapter) for order, adapter in zip(orders, adapters, strict=True))
        _check_together(uses)
        return uses, adapters

    def with_faces(self, uses: Sequence[LoraUse], request: Request) -> tuple[LoraUse, ...]:
        """A request's LoRAs, and those that came with the FaceID adapters of its image prompts."""
        numbers = sorted({image.adapter for image in request.image_prompts})
        made = *uses, *(LoraUse(updates) for number in numbers if (updates := self._of_faces(number)))
        _check_together(made)
        return made

    def _of_faces(self, adapter: int) -> Mapping[str, LowRank]:
        """What came with a FaceID adapter, which `Denoiser.scaled` switches off in all rows alike."""
        found = face_updates(self._denoiser.unet, adapter)
        key = tuple((name, id(down), id(up), scale) for name, (down, up, scale) in found.items())
        if key not in self._faces:
            self._faces[key] = {name: LowRank(a.detach(), b.detach(), scale) for name, (a, b, scale) in found.items()}
        return self._faces[key]

    def _use(self, order: Lora, adapter: Adapter) -> LoraUse:
        strength = number(order.strength, "strength of a Lora")
        start, end = (number(getattr(order, name), f"{name} of a Lora", 0, 1) for name in ("start", "end"))
        region = bound = None
        if isinstance(order.region, Attention):
            threshold = number(order.region.threshold, "threshold of an Attention", 0, 1)
            word = order.region.word
            if not isinstance(word, str) or not word.strip():
                raise TypeError(f"word of an Attention must be a word of the prompt, got {shown(word)}")
            bound = BoundTo(word, threshold)
        elif order.region is not None:
            region = region_mask(order.region, "region of a Lora", self._limits)
        return LoraUse(
            adapter.denoiser,
            adapter.text_encoders,
            strength,
            strength if order.text_strength is None else number(order.text_strength, "text_strength of a Lora"),
            self._factors(order.blocks),
            region,
            start,
            end,
            bound=bound,
        )

    def _factors(self, blocks: Any) -> Mapping[str, float]:
        if blocks is None:
            return {}
        found = factors(blocks, self._denoiser.unet, "blocks of a Lora", default=1.0)
        if isinstance(found, float):
            found = {"": found}
        key = repr(sorted(found.items()))
        return self._blocks.setdefault(key, of_modules(found, self.shapes.denoiser))

    def _adapter(self, lora: Any) -> Adapter:
        if isinstance(lora, Adapter):
            self._check_fit(lora)
            return lora
        if isinstance(lora, str):
            return self._of_id(lora)
        if isinstance(lora, os.PathLike):
            return self._of_file(Path(lora))
        raise TypeError(f"lora of a Lora must be an id, a Path or an Adapter, got {type(lora).__name__}")

    def _of_id(self, name: str) -> Adapter:
        if self._source is None:
            raise ValueError(f"LoRA {shown(name)} is an id, but generate was given no loras; a file is a Path")
        if isinstance(self._source, LoraBank):
            return self._source.load(name, self.shapes)
        try:
            found = self._source[name]
        except KeyError:
            raise KeyError(f"no LoRA {shown(name)} in loras") from None
        return self._adapter(Path(found) if isinstance(found, str) else found)

    def _of_file(self, path: Path) -> Adapter:
        try:
            seen = path.stat()
            key = str(path), seen.st_mtime_ns, seen.st_size, seen.st_ino
        except OSError as error:
            raise type(error)(error.errno, f"a LoRA's file: {error.strerror or reason_of(error)}", str(path)) from error
        if key not in self._read:
            self._read[key] = read_adapter(
                path, denoiser=self.shapes.denoiser, text_encoders=list(self.shapes.text_encoders)
            )
        return self._read[key]

    def _check_fit(self, adapter: Adapter) -> None:
        """An adapter that was read for another model."""
        halves = [(adapter.denoiser, self.shapes.denoiser)]
        if len(adapter.text_encoders) > len(self.shapes.text_encoders):
            raise ValueError(
                f"a Lora's Adapter is of a model with {len(adapter.text_encoders)} text encoders, "
                f"this one has {len(self.shapes.text_encoders)}"
            )
        halves += list(zip(adapter.text_encoders, self.shapes.text_encoders, strict=False))
        for updates, shapes in halves:
            for name, update in updates.items():
                own = (update.up.shape[0], *update.down.shape[1:])
                wanted = shapes.get(name)
                if wanted is None or own not in (wanted, wanted[:2] if wanted[2:] == (1, 1) else wanted):
                    raise ValueError(
                        f"a Lora's Adapter does not fit this model: {name} must be "
                        f"{'nothing' if wanted is None else list(wanted)}, got {list(own)}"
                    )


def reads_otherwise(use: LoraUse) -> bool:
    """Whether text, or what is made of it, is another with a LoRA."""
    return any(use.text) or any(reads_text(name) for name in use.updates)


def in_wordings(uses: Sequence[LoraUse], span: int) -> tuple[tuple[LoraUse, ...], tuple[Tensor, ...]]:
    """LoRAs with the wordings that each counts in, and the masks of those that have wordings of their own.

    Args:
        uses: a row's.
        span: how many wordings the row has without them: the prompt, and those of its words' regions.
    """
    placed, masks = [], []
    for use in uses:
        if use.region is None:
            placed.append(use)
        elif reads_otherwise(use):
            masks.append(use.region)
            placed.append(replace(use, wordings=frozenset(range(len(masks) * span, (1 + len(masks)) * span))))
        else:
            placed.append(replace(use, wordings=frozenset()))
    return tuple(placed), tuple(masks)


def at_their_words(
    uses: Sequence[LoraUse], tokenizer: Any, wordings: Sequence[Sequence[TokenizedPrompt]]
) -> tuple[LoraUse, ...]:
    """LoRAs with the places of the words that they are bound to.

    Args:
        uses: a row's.
        tokenizer: what tokenized its wordings.
        wordings: each for every text encoder; none where encodings are given.

    Raises:
        ValueError: a word is not in the prompt.
    """
    made = []
    for use in uses:
        if use.bound is not None:
            places = [
                tuple(place for spot in text.find(tokenizer, wording[0], use.bound.word) for place in spot)
                for wording in wordings
            ]
            if not places or not places[0]:
                raise ValueError(f"the word {shown(use.bound.word)} of a Lora's region is not in the prompt")
            use = replace(use, bound=replace(use.bound, places=tuple(places)))
        made.append(use)
    return tuple(made)


def _check_together(uses: Sequence[LoraUse]) -> None:
    """What several weight-decomposed adapters make of a weight depends on an order that nobody gives."""
    decomposed = [
        use
        for use in uses
        if any(update.magnitude is not None for updates in (use.updates, *use.text) for update in updates.values())
    ]
    if decomposed and len(uses) > 1:
        raise ValueError("a weight-decomposed LoRA (DoRA) must be a request's only one, got more beside it")
    if decomposed and (decomposed[0].region is not None or decomposed[0].bound is not None):
        raise ValueError("a weight-decomposed LoRA (DoRA) must have no region: it scales whole outputs")
