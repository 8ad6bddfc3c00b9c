"""Where words were attended to: maps read out of the attention while pictures are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keylock_diffusers.checks import shown
from keylock_diffusers.denoisers.neighbours import check_pixels
from keylock_diffusers.denoisers.unet import cross_attention_layers, resolutions_of
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.tokens import TokenizedPrompt
from keylock_diffusers.routing.rows import TextLayout


@dataclass(frozen=True)
class WordMaps:
    """One drawn picture's maps: how much of each pixel's attention its words got, averaged over heads.

    Args:
        prompt: the picture's.
        maps: per word that the prompt has, per layer, [steps, height, width] float32 on the CPU, one map a step in
            which the layer was computed, or the mean of these alone.
    """

    prompt: str
    maps: Mapping[str, Mapping[str, Tensor]]  # word -> layer -> [S, h, w]

    def mean(
        self, word: str, size: tuple[int, int] | None = None, layers: Sequence[str] | None = None
    ) -> Tensor:  # [height, width]
        """The mean map of a word over steps and layers, each resized (bilinear) to one resolution.

        Args:
            word: one of those recorded.
            size: (height, width); default the finest layer's.
            layers: which; default all that were recorded.

        Raises:
            KeyError: the prompt does not have the word, or there is no such layer.
        """
        if word not in self.maps:
            known = ", ".join(self.maps) or "none"
            raise KeyError(f"prompt {self.prompt!r} has no map of {word!r}; it has those of: {known}")
        found = self.maps[word]
        chosen = [found[layer] for layer in (found if layers is None else layers)]
        if size is None:
            size = max(((m.shape[1], m.shape[2]) for m in chosen), key=math.prod)
        resized = [F.interpolate(m.mean(0)[None, None], size, mode="bilinear")[0, 0] for m in chosen]
        return torch.stack(resized).mean(0)


@dataclass
class AttentionMaps:
    """What is recorded of words' attention: given to `generate` as ``record``, or made by `record_attention`.

    Args:
        words: what is recorded, each by itself: a phrase as it stands in prompts, placeholders included; all its tokens
            count together, wherever they stand. ``<|startoftext|>`` and ``<|endoftext|>`` are a prompt's start and its
            end and padding; a number n is a request's n-th image prompt, from 0; several of these in a tuple count
            together. Or a mapping that gives them names. A picture without a word has no map of it.
        layers: names of cross-attention layers; default all.
        every_step: whether to keep each step's maps, or their mean alone.
        images: what was recorded so far, in the order in which it was asked for.

    Raises:
        ValueError: no words, or something that is none.

    Paper: maps of words as in Tang et al., DAAM, arXiv 2210.04885.
    """

    words: Sequence[Any] | Mapping[str, Any]
    layers: Sequence[str] | None = None
    every_step: bool = False
    images: list[WordMaps] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = self.words
        if not isinstance(given, (list, tuple, set, frozenset, Mapping)) or not given:
            raise ValueError(f"AttentionMaps: words must be a list of words, got {shown(given)}")
        if self.layers is not None and not isinstance(self.layers, (list, tuple)):
            raise TypeError(f"AttentionMaps: layers must be a list of names, got {type(self.layers).__name__}")
        named = given.items() if isinstance(given, Mapping) else [(_name(word), word) for word in given]
        self.named: dict[str, tuple[str | int, ...]] = {}
        for name, word in named:
            parts = word if isinstance(word, tuple) else (word,)
            if not parts or not all(_is_word(part) for part in parts):
                raise ValueError(f"AttentionMaps: words must be a list of words, got {shown(given)}")
            self.named[name] = parts
        self.words = tuple(self.named)

    def layers_of(self, unet: Any) -> tuple[str, ...]:
        """The layers that are recorded.

        Raises:
            ValueError: there is none of that name, or pixels are merged before them.
        """
        check_pixels(unet, "AttentionMaps: maps")
        known = list(cross_attention_layers(unet))
        chosen = known if self.layers is None else list(self.layers)
        absent = [name for name in chosen if name not in known]
        if absent or not chosen:
            raise ValueError(f"AttentionMaps: layers must be cross-attention layers of the U-Net, got {shown(absent)}")
        return tuple(chosen)

    def readout(
        self,
        unet: Any,
        prompts: Sequence[Sequence[TokenizedPrompt] | None],
        tokenizer: Any,
        latent_size: tuple[int, int],
        images: Sequence[Sequence[range]] = (),
    ) -> BatchReadout:
        """The readout of a batch's pictures.

        Args:
            unet: the U-Net.
            prompts: per picture, the wordings it reads one after another (see `keylock_diffusers.Request.endings`);
                None: nothing is recorded of its words.
            tokenizer: what tokenized them.
            latent_size: (height, width) of the latents.
            images: per picture, where its image prompts' tokens stand among all that it attends to.
        """
        places = []
        for row, wordings in enumerate(prompts):
            found: list[tuple[int, int]] = []  # (word, position)
            for word, parts in enumerate(self.named.values()):
                spots: dict[int, None] = {}
                for part in parts:
                    if isinstance(part, int):
                        own = images[row] if row < len(images) else ()
                        spots |= dict.fromkeys(own[part] if part < len(own) else ())
                        continue
                    for number, wording in enumerate(wordings or ()):
                        positions = TextLayout(len(wording.ids)).positions(number)
                        spots |= {positions[spot]: None for spot in _spots(tokenizer, wording, part)}
                found += [(word, spot) for spot in spots]
            places.append(found)
        return BatchReadout(self, places, resolutions_of(unet, self.layers_of(unet), latent_size))


def _name(word: Any) -> str:
    if isinstance(word, tuple):
        return " + ".join(_name(part) for part in word)
    return f"image prompt {word}" if isinstance(word, int) else str(word)


def _is_word(word: Any) -> bool:
    if isinstance(word, int) and not isinstance(word, bool):
        return word >= 0
    return isinstance(word, str) and bool(word.strip())


def _spots(tokenizer: Any, prompt: TokenizedPrompt, phrase: str) -> tuple[int, ...]:
    """The positions of a phrase's tokens, wherever it stands."""
    if phrase == tokenizer.bos_token:
        return prompt.starts
    if phrase == tokenizer.eos_token:
        return prompt.ending
    return tuple(place for spot in text.find(tokenizer, prompt, phrase) for place in spot)


class BatchReadout:
    """Collects the maps of one batch; a `keylock_diffusers.processors.Readout`.

    Args:
        owner: what is recorded.
        places: per picture, (word, position) of every token that is.
        sizes: per layer, its height and width.
    """

    def __init__(
        self,
        owner: AttentionMaps,
        places: Sequence[Sequence[tuple[int, int]]],
        sizes: Mapping[str, tuple[int, int]],
    ) -> None:
        self._owner, self._places, self._sizes = owner, places, sizes
        width = max((len(row) for row in places), default=0)
        self._own = torch.full((len(places), width), -1, dtype=torch.int32)
        self._words = torch.zeros(len(places), width, len(owner.named), dtype=torch.float32)
        for row, found in enumerate(places):
            for place, (word, position) in enumerate(found):
                self._own[row, place] = position
                self._words[row, place, word] = 1
        self._sums: dict[str, list[Tensor]] = {}  # [B, N, words]: of every step, or of all together
        self._read: dict[str, Tensor] = {}  # in the step at hand
        self._steps: dict[str, list[int]] = {}  # of each picture, in which a layer was computed: some skip steps
        self.at_step([True] * len(places))
        self.lay_out(("cond",))

    def at_step(self, live: Sequence[bool]) -> None:
        """Which pictures are drawn in the step that comes; those that join later leave no maps of it."""
        self._drawn = list(live)
        self._live = torch.tensor(self._drawn).view(-1, 1, 1).to(self._words.device)

    def lay_out(self, parts: Sequence[str]) -> BatchReadout:
        """Takes the conditional rows of a row layout."""
        self._tokens, self._rows = conditional(self._own, parts)
        return self

    def wanted(self, layer: str, rows: int, pixels: int) -> tuple[Tensor, None] | None:
        """See `keylock_diffusers.processors.Readout`."""
        if layer not in self._sizes or not self._tokens.shape[1]:
            return None
        if rows != len(self._tokens) or pixels != math.prod(self._sizes[layer]):
            raise ValueError(
                f"record_attention: expected {len(self._tokens)} rows and {self._sizes[layer]} pixels in {layer}, got "
                f"{rows} rows and {pixels} pixels"
            )
        return self._tokens, None

    def receive(self, layer: str, read: Tensor) -> None:  # [B, H, N, M]
        """See `keylock_diffusers.processors.Readout`."""
        maps = read[self._rows].detach().float().mean(1) @ self._words  # [B, N, words]: all of a word's tokens together
        self._read[layer] = torch.where(self._live, maps, 0)

    def commit(self) -> None:
        """Keeps what a step has read, once it has not failed."""
        for layer, maps in self._read.items():
            held = self._sums.setdefault(layer, [])
            if held and not self._owner.every_step:
                held[0] = held[0] + maps
            else:
                held.append(maps)
            steps = self._steps.setdefault(layer, [0] * len(self._drawn))
            self._steps[layer] = [count + drawn for count, drawn in zip(steps, self._drawn, strict=True)]
        self._read = {}

    def to(self, device: torch.device) -> BatchReadout:
        """Moves what the layers are given to their device."""
        self._own, self._tokens, self._words = (t.to(device) for t in (self._own, self._tokens, self._words))
        self._live = self._live.to(device)
        return self

    def picture(self, row: int, prompt: str) -> WordMaps:
        """The maps of one picture."""
        self.commit()
        every = self._owner.every_step

        def mapped(layer: str, word: int) -> Tensor:  # [S, h, w]
            own, count = [maps[row, :, word] for maps in self._sums[layer]], max(self._steps[layer][row], 1)
            stacked = torch.stack(own[-count:]) if every else torch.stack(own) / count
            return stacked.view(-1, *self._sizes[layer]).cpu()

        return WordMaps(
            prompt,
            {
                word: {layer: mapped(layer, number) for layer in self._sums}
                for number, word in enumerate(self._owner.named)
                if any(place == number for place, _ in self._places[row])
            },
        )


def conditional(own: Tensor, parts: Sequence[str]) -> tuple[Tensor, slice]:
    """Tokens to read [B, M] of pictures in a row layout, -1 in all but its conditional rows; and which these are."""
    nothing = torch.full_like(own, -1)
    first = parts.index("cond") * len(own)
    return torch.cat([own if part == "cond" else nothing for part in parts]), slice(first, first + len(own))


def check_words(
    maps: AttentionMaps, tokenizer: Any, prompts: Sequence[Sequence[TokenizedPrompt] | None], images: int = 0
) -> None:
    """Every word that is to be recorded stands in a prompt, and there are as many image prompts.

    Raises:
        ValueError: one does not; it is named.
    """
    first = [prompt[0] for prompt in prompts if prompt is not None]
    unknown = "" if len(first) == len(prompts) else "; in prompt_embeds no words are known"
    for name, parts in maps.named.items():
        seen = (
            part < images if isinstance(part, int) else any(_spots(tokenizer, prompt, part) for prompt in first)
            for part in parts
        )
        if not any(seen):
            raise ValueError(f"AttentionMaps: the word {name!r} is in none of the prompts{unknown}")
