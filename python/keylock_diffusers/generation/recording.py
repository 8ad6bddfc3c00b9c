"""Recording where words were attended to in a pipeline's own calls."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from keylock_diffusers.denoisers.neighbours import quiet
from keylock_diffusers.denoisers.unet import unet_of
from keylock_diffusers.encoding import text
from keylock_diffusers.generation.maps import AttentionMaps, BatchReadout
from keylock_diffusers.processors import verify

logger = logging.getLogger(__name__)

_RECORDING: ContextVar[AttentionMaps | None] = ContextVar("recording", default=None)


@contextmanager
def record_attention(
    pipe: Any, words: Sequence[str], *, layers: Sequence[str] | None = None, every_step: bool = False
) -> Iterator[AttentionMaps]:
    """While it lasts, what the pipeline's own call draws in this thread leaves maps of chosen words.

    (`generate` is given ``record=AttentionMaps(words)`` instead.)

    They are read out of the attention in the same pass, whatever backend computes it, for each row of a mixed batch by
    itself, and the pictures do not change. Only the conditional half of guidance is recorded. A call that was
    interrupted leaves the maps of its steps; one that raised, none. What leaves none without an error, such as a call
    with prompt_embeds, is told in the log.

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
        with quiet():
            yield maps
        plain.say_if_nothing()
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
        self._told = False
        _watch(pipe, self)
        # On what the pipeline calls, so that a compiled U-Net does not trace the hook.
        self._hook = pipe.unet.register_forward_pre_hook(self._before, with_kwargs=True)

    def encoding(self, given: Mapping[str, Any]) -> None:
        """Takes the arguments of the pipeline's encode_prompt."""
        if _RECORDING.get() is not self._maps:
            return
        self._prompts, self._batch = [], None  # of a call that was broken off
        prompt = given.get("prompt")
        if prompt is None:
            self._tell("a call with prompt_embeds leaves no maps, since no words are known in them: give it the prompt")
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            self._prompts = [one for one in prompts for _ in range(given.get("num_images_per_prompt") or 1)]
            self._guided = bool(given.get("do_classifier_free_guidance"))

    def _before(self, _unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        options = kwargs.get("cross_attention_kwargs") or {}
        if _RECORDING.get() is not self._maps or not self._prompts:
            return None
        if "readout" in options:  # of `generate`: a call before it was broken off, and leaves nothing
            self._prompts, self._batch = [], None
            return None
        sample = args[0] if args else kwargs["sample"]
        if self._batch is None:
            tokenizer = self._pipe.tokenizer or self._pipe.tokenizer_2
            prompts = [[text.as_given(tokenizer, text.converted(self._pipe, tokenizer, p))] for p in self._prompts]
            self._batch = self._maps.readout(unet_of(self._pipe), prompts, tokenizer, tuple(sample.shape[-2:]))
            self._batch.lay_out(("uncond", "cond") if self._guided else ("cond",)).to(sample.device)
        self._batch.commit()  # of the step before
        return args, {**kwargs, "cross_attention_kwargs": {**options, "readout": self._batch}}

    def ended(self) -> None:
        """Keeps the maps of a call at its end, interrupted or not; what calls the U-Net after it is another's."""
        if _RECORDING.get() is not self._maps:
            return
        if self._batch is not None:
            self._maps.images += [self._batch.picture(row, prompt) for row, prompt in enumerate(self._prompts)]
        self._prompts, self._batch = [], None

    def say_if_nothing(self) -> None:
        """An empty result is told, if its reason was not."""
        if not self._maps.images and not self._told:
            self._tell(
                "nothing was recorded: no call of this pipeline was drawn to its end in this thread "
                "(generate has record=AttentionMaps(words))"
            )

    def _tell(self, what: str) -> None:
        self._told = True
        logger.warning("record_attention: %s", what)

    def close(self) -> None:
        self._hook.remove()
        _unwatch(self._pipe, self)


# Per pipeline that is recorded, who wants to know what it encodes: several may record it, in one thread or in many.
_WATCHERS: dict[int, list[_PlainCalls]] = {}
_WATCHED = ("encode_prompt", "maybe_free_model_hooks")
_BEFORE: dict[int, dict[str, Any]] = {}  # what somebody had put in their place on the pipeline itself
_LOCK = threading.Lock()


def _watch(pipe: Any, watcher: _PlainCalls) -> None:
    with _LOCK:
        watchers = _WATCHERS.setdefault(id(pipe), [])
        if not watchers:
            _BEFORE[id(pipe)] = {name: vars(pipe)[name] for name in _WATCHED if name in vars(pipe)}
            pipe.encode_prompt = _told(pipe, "encode_prompt", watchers, _PlainCalls.encoding)
            # What pipelines do last, whatever comes of a call but an exception.
            pipe.maybe_free_model_hooks = _told(
                pipe, "maybe_free_model_hooks", watchers, lambda watcher, _: watcher.ended()
            )
        watchers.append(watcher)


def _told(
    pipe: Any, name: str, watchers: list[_PlainCalls], tell: Callable[[_PlainCalls, Mapping[str, Any]], None]
) -> Callable[..., Any]:
    """A method that tells watchers of its arguments, by the names of the pipeline's class, when it is called."""
    method, signature = getattr(pipe, name), inspect.signature(getattr(type(pipe), name).__get__(pipe))

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for each in tuple(watchers):
            tell(each, given.arguments)
        return method(*args, **kwargs)

    return watched


def _unwatch(pipe: Any, watcher: _PlainCalls) -> None:
    with _LOCK:
        watchers = _WATCHERS[id(pipe)]
        watchers.remove(watcher)
        if not watchers:
            del _WATCHERS[id(pipe)], pipe.encode_prompt, pipe.maybe_free_model_hooks
            vars(pipe).update(_BEFORE.pop(id(pipe)))
