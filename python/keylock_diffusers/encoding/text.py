"""Prompts with placeholders: tokens, positions and encodings, without touching tokenizer or embedding matrix.

A placeholder such as ``<alice-cat>`` takes the token ids of its concept's super-class. The concept's
learned word embedding replaces the last of them (the noun, in "teddy bear") while that batch is
encoded; at the start of training it equals that token's own embedding, so a new concept's prompt
encodes exactly as its super-class's prompt does.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from keylock_diffusers.checks import shown
from keylock_diffusers.denoisers.unet import TextEncoder
from keylock_diffusers.encoding.tokens import TokenizedPrompt, Unit, pack, units_of

_LEAST_MEAN = 1e-3  # of encodings, in units of their root mean square: below it a mean is chance
PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]*>", re.IGNORECASE)


def tokenize(
    tokenizer: Any,
    prompt: str | Sequence[tuple[str, float]],
    super_classes: Mapping[str, str] | None = None,
    *,
    chunks: int | None = 1,
) -> TokenizedPrompt:
    """Tokenizes a prompt whose placeholders stand for concepts.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text, or its parts with their weights (see `weighted`).
        super_classes: per placeholder, the super-class whose tokens it takes.
        chunks: how many of the tokenizer's length there may be; None: as many as the prompt needs.

    Raises:
        ValueError: a placeholder without a concept, a concept whose placeholder is not in the prompt, or a
            placeholder beyond the chunks.
    """
    super_classes = super_classes or {}
    parts = [(prompt, 1.0)] if isinstance(prompt, str) else list(prompt)
    whole = "".join(words for words, _ in parts)
    found = [match.group().lower() for match in PLACEHOLDER.finditer(whole)]
    own_tokens = {token.lower() for token in tokenizer.get_added_vocab()}
    for placeholder in found:
        if placeholder not in super_classes and placeholder not in own_tokens:
            known = ", ".join(sorted(super_classes)) or "none"
            raise ValueError(f"prompt {shown(whole)}: {placeholder} is no concept of this request (concepts: {known})")
    for placeholder in super_classes:
        if placeholder not in found:
            raise ValueError(f"prompt {shown(whole)}: the concept {placeholder} was given but is not in the prompt")

    units: list[Unit] = []
    for words, weight in parts:
        start = 0
        for match in PLACEHOLDER.finditer(words):
            placeholder = match.group().lower()
            if placeholder in super_classes:
                units += units_of(tokenizer, _ids(tokenizer, words[start : match.start()]), weight)
                ids = tuple(super_class_ids(tokenizer, super_classes[placeholder]))
                units.append(Unit(ids, placeholder, placeholder, weight))
                start = match.end()
        units += units_of(tokenizer, _ids(tokenizer, words[start:]), weight)
    return pack(tokenizer, units, repr(whole), chunks)


def as_given(tokenizer: Any, prompt: str) -> TokenizedPrompt:
    """Tokenizes a prompt as pipelines do, in which placeholders are words like others."""
    return pack(tokenizer, units_of(tokenizer, _ids(tokenizer, prompt)), repr(prompt), 1)


def converted(pipe: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt with diffusers' multi-vector textual inversion words spelled out."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return prompt if convert is None else convert(prompt, tokenizer)


def with_own_words(
    tokenizer: Any, prompt: TokenizedPrompt, own: Sequence[int], others: Sequence[int], *, chunks: int | None = 1
) -> TokenizedPrompt:
    """A prompt in which some of its words stand in the place of others: "a cat and a dog" as "a cat and a cat".

    Args:
        tokenizer: what tokenized the prompt.
        prompt: the prompt.
        own: the positions of the words that stay; the first run of them is what is put in place of the others.
        others: the positions of the words that are replaced, run by run; those that are also in `own` stay.
        chunks: as for `tokenize`.

    Raises:
        ValueError: a placeholder would be cut off.
    """
    content = prompt.content
    place_of = {position: place for place, position in enumerate(content)}
    keep = sorted(place_of[position] for position in set(own) if position in place_of)
    run = [place for n, place in enumerate(keep) if place == keep[0] + n]
    replaced = {place_of[position] for position in others if position in place_of} - set(keep)
    order: list[int] = []  # places of the prompt's tokens, in the new order
    for place in range(len(content)):
        if place not in replaced:
            order.append(place)
        elif place - 1 not in replaced:
            order += run
    learned = {place_of[position]: placeholder for position, placeholder in prompt.words}
    spans = {place_of[first]: (end - first, placeholder) for first, end, placeholder in prompt.spans}
    units: list[Unit] = []
    taken = 0
    while taken < len(order):
        place = order[taken]
        length, placeholder = spans.get(place, (1, None))
        if order[taken : taken + length] != list(range(place, place + length)):  # not the whole of a super-class
            length, placeholder = 1, None
        places = order[taken : taken + length]
        ids = tuple(prompt.ids[content[n]] for n in places)
        weight = prompt.weights[content[place]] if prompt.weights else 1.0
        units.append(Unit(ids, placeholder, learned.get(places[-1]), weight))
        taken += length
    name = repr(tokenizer.decode([prompt.ids[content[place]] for place in order]))
    return pack(tokenizer, units, name, chunks)


def find(tokenizer: Any, prompt: TokenizedPrompt, phrase: str) -> tuple[tuple[int, ...], ...]:
    """The positions of a phrase's tokens in a prompt, for each place where it stands.

    Args:
        tokenizer: what tokenized the prompt.
        prompt: where to look.
        phrase: words and placeholders. A placeholder is found only as such, and its super-class's word only where it
            is written out.
    """
    wanted: list[tuple[int | None, str | None]] = []  # a token's id, or a placeholder's one whole span
    start = 0
    for match in PLACEHOLDER.finditer(phrase):
        if match.group().lower() in (placeholder for *_, placeholder in prompt.spans):
            wanted += [(number, None) for number in _ids(tokenizer, phrase[start : match.start()])]
            wanted.append((None, match.group().lower()))
            start = match.end()
    wanted += [(number, None) for number in _ids(tokenizer, phrase[start:])]
    # The prompt as such units, each with its positions.
    units: list[tuple[tuple[int | None, str | None], range]] = []
    starts = {first: (end, placeholder) for first, end, placeholder in prompt.spans}
    content, taken = prompt.content, 0
    while taken < len(content):
        position = content[taken]
        end, placeholder = starts.get(position, (position + 1, None))
        units.append(((prompt.ids[position] if placeholder is None else None, placeholder), range(position, end)))
        taken += end - position
    found = []
    for at in range(len(units) - len(wanted) + 1 if wanted else 0):
        window = units[at : at + len(wanted)]
        if [unit for unit, _ in window] == wanted:
            found.append(tuple(place for _, places in window for place in places))
    return tuple(found)


def super_class_ids(tokenizer: Any, super_class: str) -> list[int]:
    """The token ids of a super-class."""
    ids = _ids(tokenizer, super_class)
    if not ids:
        raise ValueError(f"super_class must be a word, got {super_class!r}")
    return ids


def encode(
    text_encoder: Any,
    prompts: Sequence[TokenizedPrompt],
    embeddings: Sequence[Mapping[str, Tensor]] | None = None,  # per prompt, placeholder -> [W]
    *,
    clip_skip: int | None = None,
) -> Tensor:  # [B, T, D]
    """Encodes a batch of prompts, each with its own learned words, as Stable Diffusion's pipelines do.

    Args:
        text_encoder: a CLIP text encoder.
        prompts: what `tokenize` made, all in as many chunks.
        embeddings: each prompt's learned word embeddings; a placeholder that is missing keeps its super-class's.
        clip_skip: as in diffusers, how many of the last layers are left out.

    Returns:
        Encodings [B, T, D], differentiable in the embeddings.
    """
    out = _run(text_encoder, prompts, embeddings, states=clip_skip is not None)
    return _weighed(final_states(text_encoder, out, clip_skip), prompts)


def final_states(text_encoder: Any, out: Any, clip_skip: int | None) -> Tensor:  # [B, T, D]
    """What Stable Diffusion's pipelines read of a text encoder's output."""
    if clip_skip is None:
        return out.last_hidden_state
    model = getattr(text_encoder, "text_model", text_encoder)
    return model.final_layer_norm(out.hidden_states[-(clip_skip + 1)])


def encode_rows(
    encoder: TextEncoder,
    prompts: Sequence[TokenizedPrompt],
    embeddings: Sequence[Mapping[str, Tensor]] | None = None,  # per prompt, placeholder -> [W]
    clip_skips: Sequence[int | None] = (),  # per prompt
) -> tuple[Tensor, Tensor | None]:  # [B, T, D], [B, P]
    """Encodes a batch of prompts in one call of a text encoder, as the pipeline it belongs to does.

    Returns:
        Encodings [B, T, D], and the pooled projection [B, P] of the first chunk where the encoder has one.
    """
    skips = list(clip_skips) or [None] * len(prompts)
    out = _run(encoder.model, prompts, embeddings, states=encoder.penultimate or any(s is not None for s in skips))
    made: dict[int | None, Tensor] = {}
    for skip in dict.fromkeys(skips):
        if encoder.penultimate:
            made[skip] = out.hidden_states[-((skip or 0) + 2)]
        else:
            made[skip] = final_states(encoder.model, out, skip)
    states = next(iter(made.values()))
    if len(made) > 1:
        per = [skip for skip, prompt in zip(skips, prompts, strict=True) for _ in range(prompt.chunks)]
        states = torch.stack([made[skip][row] for row, skip in enumerate(per)])
    pooled = getattr(out, "text_embeds", None)
    if pooled is not None and len(pooled) != len(prompts):
        pooled = pooled[:: len(pooled) // len(prompts)]
    return _weighed(states, prompts), pooled


def _weighed(states: Tensor, prompts: Sequence[TokenizedPrompt]) -> Tensor:  # [B * chunks, L, D] -> [B, T, D]
    """Encodings times their tokens' weights; each prompt's mean stays what it was, unless it is nearly 0."""
    states = states.reshape(len(prompts), -1, states.shape[-1])
    if not any(prompt.weights for prompt in prompts):
        return states
    rows = []
    for row, prompt in zip(states, prompts, strict=True):
        if prompt.weights:
            weights = torch.tensor(prompt.weights, dtype=torch.float32, device=row.device)[:, None]
            whole = row.float()
            scaled = whole * weights
            before, after = whole.mean(), scaled.mean()
            told = torch.minimum(before.abs(), after.abs()) > _LEAST_MEAN * whole.square().mean().sqrt()
            row = (scaled * torch.where(told, before / after, 1.0)).to(row)
        rows.append(row)
    return torch.stack(rows)


def _run(
    text_encoder: Any,
    prompts: Sequence[TokenizedPrompt],
    embeddings: Sequence[Mapping[str, Tensor]] | None,
    states: bool,
) -> Any:
    """The text encoder's output, of every layer if `states`, with each prompt's learned words in place."""
    device = text_encoder.get_input_embeddings().weight.device
    if device.type == "meta":  # sequential offloading: hooks move inputs to where the weights will be
        device = torch.device("cpu")
    size = prompts[0].chunk or len(prompts[0].ids)
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device).view(-1, size)
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = torch.tensor([prompt.attention for prompt in prompts], device=device).view(-1, size)
    places = [
        (row * prompt.chunks + position // size, position % size, learned[placeholder])
        for row, (prompt, learned) in enumerate(zip(prompts, embeddings or (), strict=embeddings is not None))
        for position, placeholder in prompt.words
        if placeholder in learned
    ]
    with _learned_words(text_encoder, places):
        return text_encoder(ids, attention_mask=mask, output_hidden_states=states)


@contextmanager
def _learned_words(text_encoder: Any, places: list[tuple[int, int, Tensor]]) -> Iterator[None]:
    """While it lasts, this thread's token embeddings have the given vectors at the given (row, position)."""
    if not places:
        yield
        return
    thread = threading.get_ident()
    rows, positions, vectors = zip(*places, strict=True)

    def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:  # [B, T, W]
        if threading.get_ident() != thread:
            return output
        where = (torch.tensor(rows, device=output.device), torch.tensor(positions, device=output.device))
        return output.index_put(where, torch.stack([v.to(output.device, output.dtype) for v in vectors]))

    handle = text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return _own(tokenizer)(text, add_special_tokens=False).input_ids if text.strip() else []


_OWN: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()
_OWN_LOCK = threading.Lock()


def _own(tokenizer: Any) -> Any:
    """A copy of a tokenizer for this module alone.

    Padding and truncation are a state that all callers of a fast tokenizer share: a pipeline's own call in another
    thread, which pads and cuts, would pad or cut what is tokenized here.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    with _OWN_LOCK:
        size, own = _OWN.get(tokenizer, (0, None))
        if own is None or size != len(tokenizer):  # textual inversion adds words
            size, own = len(tokenizer), copy.deepcopy(tokenizer)
            _OWN[tokenizer] = size, own
        return own
