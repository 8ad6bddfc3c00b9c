"""Prompts with placeholders: tokens, positions and encodings, without touching tokenizer or embedding matrix.

A placeholder such as ``<alice-cat>`` takes the token ids of its concept's super-class. The concept's
learned word embedding replaces the last of them (the noun, in "teddy bear") while that batch is
encoded; at the start of training it equals that token's own embedding, so a new concept's prompt
encodes exactly as its super-class's prompt does. A concept of several words has the noun as many
times. A word that textual inversion taught stands for as many tokens as it has vectors, which replace all of them.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from keylock_diffusers.checks import shown
from keylock_diffusers.denoisers.unet import TextEncoder
from keylock_diffusers.encoding.names import PLACEHOLDER, split
from keylock_diffusers.encoding.tokens import TokenizedPrompt, Unit, pack, units_of

_LEAST_MEAN = 1e-3  # of encodings, in units of their root mean square: below it a mean is chance


def tokenize(
    tokenizer: Any,
    prompt: str | Sequence[tuple[str, float]],
    super_classes: Mapping[str, str] | None = None,
    words: Mapping[str, int] | None = None,
    *,
    nouns: Mapping[str, int] | None = None,
    chunks: int | None = 1,
    most: int | None = None,
    spelled: Callable[[str], str] | None = None,
) -> TokenizedPrompt:
    """Tokenizes a prompt in which placeholders stand for concepts, and names for learned words.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text, or its parts with their weights (see `weighted`).
        super_classes: per placeholder, the super-class whose tokens it takes.
        words: per name of a learned word that may stand in it, how many vectors it has.
        nouns: per placeholder, how many times its super-class's last token stands there; default once.
        chunks: how many of the tokenizer's length there may be; None: as many as the prompt needs.
        most: how many tokens there may be, padding included; None: any number.
        spelled: what is made of the text between names before it is tokenized.

    Raises:
        ValueError: a placeholder that stands for nothing, a concept whose placeholder is not in the prompt, a
            placeholder or learned word beyond the chunks, or too many tokens.
    """
    super_classes, words = super_classes or {}, words or {}
    parts = [(prompt, 1.0)] if isinstance(prompt, str) else list(prompt)
    whole = "".join(part for part, _ in parts)
    own_tokens = {token.lower() for token in tokenizer.get_added_vocab()}
    stands: dict[str, Unit] = {}
    for word, count in words.items():
        filler = _ids(tokenizer, "a")[:1]  # of all its tokens, whose embeddings are never read
        stands[word] = Unit(tuple(filler * count), word, tuple((n, word, n) for n in range(count)))
    for placeholder, super_class in super_classes.items():
        *before, noun = super_class_ids(tokenizer, super_class)
        count = (nouns or {}).get(placeholder, 1)
        own = tuple((len(before) + n, placeholder, n) for n in range(count))
        stands[placeholder] = Unit((*before, *[noun] * count), placeholder, own)

    units: list[Unit] = []
    for part, weight in parts:
        for piece, name in split(part, stands):
            if name is not None:
                units.append(stands[name]._replace(weight=weight))
                continue
            for match in PLACEHOLDER.finditer(piece):
                if match.group().lower() not in own_tokens:
                    concepts, known = (", ".join(sorted(names)) or "none" for names in (super_classes, words))
                    raise ValueError(
                        f"prompt {shown(whole)}: {match.group().lower()} is no concept of this request, and no "
                        f"embedding (concepts: {concepts}; embeddings: {known:.80})"
                    )
            text = spelled(piece) if spelled is not None and piece.strip() else piece
            units += units_of(tokenizer, _ids(tokenizer, text), weight)
    found = {unit.name for unit in units}
    for placeholder in super_classes:
        if placeholder not in found:
            raise ValueError(f"prompt {shown(whole)}: the concept {placeholder} was given but is not in the prompt")
    return pack(tokenizer, units, repr(whole), chunks, most)


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
    words = {place_of[position]: (name, n) for position, name, n in prompt.words}
    spans = {place_of[first]: (place_of[end - 1] + 1 - place_of[first], name) for first, end, name in prompt.spans}
    units: list[Unit] = []
    taken = 0
    while taken < len(order):
        place = order[taken]
        length, stands_for = spans.get(place, (1, None))
        if order[taken : taken + length] != list(range(place, place + length)):  # not the whole of it
            length, stands_for = 1, None
        places = order[taken : taken + length]
        ids = tuple(prompt.ids[content[n]] for n in places)
        weight = prompt.weights[content[place]] if prompt.weights else 1.0
        own_words = tuple((n, *words[place]) for n, place in enumerate(places) if place in words)
        units.append(Unit(ids, stands_for, own_words, weight))
        taken += length
    name = repr(tokenizer.decode([prompt.ids[content[place]] for place in order]))
    return pack(tokenizer, units, name, chunks)


def find(tokenizer: Any, prompt: TokenizedPrompt, phrase: str) -> tuple[tuple[int, ...], ...]:
    """The positions of a phrase's tokens in a prompt, for each place where it stands.

    Args:
        tokenizer: what tokenized the prompt.
        prompt: where to look.
        phrase: words, placeholders and learned words. A placeholder is found only as such, and its super-class's word
            only where it is written out.
    """
    wanted: list[tuple[int | None, str | None]] = []  # a token's id, or the name of one whole span
    for piece, name in split(phrase, {name for *_, name in prompt.spans}):
        wanted += [(None, name)] if name is not None else [(number, None) for number in _ids(tokenizer, piece)]
    # The prompt as such units, each with its positions.
    units: list[tuple[tuple[int | None, str | None], tuple[int, ...]]] = []
    starts = {first: (end, name) for first, end, name in prompt.spans}
    content, taken = prompt.content, 0
    while taken < len(content):
        position = content[taken]
        end, name = starts.get(position, (position + 1, None))
        places = content[taken : bisect_left(content, end)]  # a span of several chunks has their ends between
        units.append(((prompt.ids[position] if name is None else None, name), places))
        taken += len(places)
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
    embeddings: Sequence[Mapping[str, Tensor]] | None = None,  # per prompt, name -> [W] or [n, W]
    *,
    clip_skip: int | None = None,
) -> Tensor:  # [B, T, D]
    """Encodes a batch of prompts, each with its own learned words, as Stable Diffusion's pipelines do.

    Args:
        text_encoder: a CLIP text encoder.
        prompts: what `tokenize` made, all in as many chunks.
        embeddings: each prompt's learned word embeddings; a placeholder that is missing keeps its super-class's.
            Vectors are cast to the encoder's dtype.
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
    embeddings: Sequence[Mapping[str, Tensor]] | None = None,  # per prompt, name -> [W] or [n, W]
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
        (row * prompt.chunks + position // size, position % size, torch.atleast_2d(learned[name])[number])
        for row, (prompt, learned) in enumerate(zip(prompts, embeddings or (), strict=embeddings is not None))
        for position, name, number in prompt.words
        if name in learned
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
