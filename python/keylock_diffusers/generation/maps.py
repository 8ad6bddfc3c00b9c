"""Where words were attended to: maps read out of the attention while pictures are drawn."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keylock_diffusers.checks import shown
from keylock_diffusers.denoisers.unet import cross_attention_layers, resolutions_of, unet_of
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.tokens import TokenizedPrompt
from keylock_diffusers.processors import verify
from keylock_diffusers.routing.rows import TextLayout

_RECORDING: ContextVar[AttentionMaps | None] = ContextVar("recording", default=None)


@dataclass(frozen=True)
class WordMaps:
    """One drawn picture's maps: how much of each pixel's attention its words got, averaged over heads.

    Args:
        prompt: the picture's.
        maps: per word that the prompt has, per layer, [steps, height, width] float32 on the CPU, one map a step, or the
            mean of all steps alone.
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
            ValueError: there is none of that name.
        """
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
        self._words = torch.zeros(len(places), width, len(owner.named))
        for row, found in enumerate(places):
            for place, (word, position) in enumerate(found):
                self._own[row, place] = position
                self._words[row, place, word] = 1
        self._sums: dict[str, list[Tensor]] = {}  # [B, N, words]: of every step, or of all together
        self._read: dict[str, Tensor] = {}  # in the step at hand
        self._live = torch.ones(len(places), 1, 1, dtype=torch.bool)  # the pictures that are drawn in this step
        self.steps = [0] * len(places)  # of each picture
        self.lay_out(("cond",))

    def at_step(self, live: Sequence[bool]) -> None:
        """Which pictures are drawn in the step that comes; those that join later leave no maps of it."""
        self._live = torch.tensor(live).view(-1, 1, 1).to(self._words.device)

    def lay_out(self, parts: Sequence[str]) -> BatchReadout:
        """Takes the conditional rows of a row layout."""
        nothing = torch.full_like(self._own, -1)
        self._tokens = torch.cat([self._own if part == "cond" else nothing for part in parts])
        first = parts.index("cond") * len(self._own)
        self._rows = slice(first, first + len(self._own))
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
        if self._read:
            self.steps = [steps + bool(live) for steps, live in zip(self.steps, self._live.flatten(), strict=True)]
        self._read = {}

    def to(self, device: torch.device) -> BatchReadout:
        """Moves what the layers are given to their device."""
        self._own, self._tokens, self._words = (t.to(device) for t in (self._own, self._tokens, self._words))
        self._live = self._live.to(device)
        return self

    def picture(self, row: int, prompt: str) -> WordMaps:
        """The maps of one picture."""
        self.commit()
        every, count = self._owner.every_step, max(self.steps[row], 1)

        def mapped(layer: str, word: int) -> Tensor:  # [S, h, w]
            own = [maps[row, :, word] for maps in self._sums[layer]]
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


def check_words(
    maps: AttentionMaps, tokenizer: Any, prompts: Iterable[Sequence[TokenizedPrompt] | None], images: int = 0
) -> None:
    """Every word that is to be recorded stands in a prompt, and there are as many image prompts.

    Raises:
        ValueError: one does not; it is named.
    """
    first = [prompt[0] for prompt in prompts if prompt is not None]
    for name, parts in maps.named.items():
        seen = (
            part < images if isinstance(part, int) else any(_spots(tokenizer, prompt, part) for prompt in first)
            for part in parts
        )
        if not any(seen):
            raise ValueError(f"AttentionMaps: the word {name!r} is in none of the prompts")


@contextmanager
def record_attention(
    pipe: Any, words: Sequence[str], *, layers: Sequence[str] | None = None, every_step: bool = False
) -> Iterator[AttentionMaps]:
    """While it lasts, what the pipeline's own call draws in this thread leaves maps of chosen words.

    (`generate` is given ``record=AttentionMaps(words)`` instead.)

    They are read out of the attention in the same pass, whatever backend computes it, for each row of a mixed batch by
    itself, and the pictures do not change. Only the conditional half of guidance is recorded.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline after `install`.
        words: phrases as they stand in prompts, placeholders included; all their tokens count together, wherever they
            stand. A prompt without a word has no map of it.
        layers: names of cross-attention layers; default all.
        every_step: whether to keep each step's maps, or their mean alone.

    Yields:
        The maps, filled as pictures are finished.

    Raises:
        ValueError: no words, or a layer that is not there.
        TypeError: `pipe` is no pipeline.
        RuntimeError: a layer does not have our processor.

    Paper: maps of words as in Tang et al., DAAM, arXiv 2210.04885.

    Example:
        >>> with kd.record_attention(pipe, ["cat"]) as maps:  # doctest: +SKIP
        ...     image = pipe("a cat on blue").images[0]
        >>> maps.images[0].mean("cat")  # [height, width]
    """
    maps = AttentionMaps(words, layers, every_step)
    unet = unet_of(pipe)
    verify(pipe)
    maps.layers_of(unet)
    if not hasattr(pipe, "encode_prompt"):
        raise TypeError(f"record_attention: pipe must be a text-to-image pipeline, got {type(pipe).__name__}")
    plain = _PlainCalls(pipe, maps)
    token = _RECORDING.set(maps)
    try:
        yield maps
        plain.finish()
    finally:
        _RECORDING.reset(token)
        plain.close()


class _PlainCalls:
    """Records calls of the pipeline itself, whose rows are known from what it encodes."""

    def __init__(self, pipe: Any, maps: AttentionMaps) -> None:
        self._pipe, self._maps = pipe, maps
        self._prompts: list[str] = []  # per picture
        self._guided = False
        self._batch: BatchReadout | None = None
        _watch(pipe, self)
        # On what the pipeline calls, so that a compiled U-Net does not trace the hook.
        self._hook = pipe.unet.register_forward_pre_hook(self._before, with_kwargs=True)

    def encoding(self, given: Mapping[str, Any]) -> None:
        """Takes the arguments of the pipeline's encode_prompt."""
        if _RECORDING.get() is not self._maps:
            return
        self.finish()
        prompt = given.get("prompt")
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            self._prompts = [one for one in prompts for _ in range(given.get("num_images_per_prompt") or 1)]
            self._guided = bool(given.get("do_classifier_free_guidance"))

    def _before(self, _unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        options = kwargs.get("cross_attention_kwargs") or {}
        if _RECORDING.get() is not self._maps or not self._prompts or "readout" in options:
            return None
        sample = args[0] if args else kwargs["sample"]
        if self._batch is None:
            tokenizer = self._pipe.tokenizer or self._pipe.tokenizer_2
            prompts = [[text.as_given(tokenizer, text.converted(self._pipe, tokenizer, p))] for p in self._prompts]
            self._batch = self._maps.readout(unet_of(self._pipe), prompts, tokenizer, tuple(sample.shape[-2:]))
            self._batch.lay_out(("uncond", "cond") if self._guided else ("cond",)).to(sample.device)
        self._batch.commit()  # of the step before
        return args, {**kwargs, "cross_attention_kwargs": {**options, "readout": self._batch}}

    def finish(self) -> None:
        """Keeps the last call's maps, unless it was broken off."""
        if self._batch is not None:
            self._batch.commit()
        if self._batch is not None and min(self._batch.steps) >= getattr(self._pipe, "num_timesteps", 0):
            self._maps.images += [self._batch.picture(row, prompt) for row, prompt in enumerate(self._prompts)]
        self._prompts, self._batch = [], None

    def close(self) -> None:
        self._hook.remove()
        _unwatch(self._pipe, self)


# Per pipeline that is recorded, who wants to know what it encodes: several may record it, in one thread or in many.
_WATCHERS: dict[int, list[_PlainCalls]] = {}
_LOCK = threading.Lock()


def _watch(pipe: Any, watcher: _PlainCalls) -> None:
    with _LOCK:
        watchers = _WATCHERS.setdefault(id(pipe), [])
        if not watchers:
            encode = pipe.encode_prompt
            signature = inspect.signature(encode)

            def watched(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs)
                given.apply_defaults()
                for each in tuple(watchers):
                    each.encoding(given.arguments)
                return encode(*args, **kwargs)

            pipe.encode_prompt = watched
        watchers.append(watcher)


def _unwatch(pipe: Any, watcher: _PlainCalls) -> None:
    with _LOCK:
        watchers = _WATCHERS[id(pipe)]
        watchers.remove(watcher)
        if not watchers:
            del _WATCHERS[id(pipe)], pipe.encode_prompt
