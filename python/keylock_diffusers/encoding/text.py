"""Prompts with placeholders: tokens, positions and encodings, without touching tokenizer or embedding matrix.

A placeholder such as ``<alice-cat>`` takes the token ids of its concept's super-class. The concept's
learned word embedding replaces the last of them (the noun, in "teddy bear") while that batch is
encoded; at the start of training it equals that token's own embedding, so a new concept's prompt
encodes exactly as its super-class's prompt does.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]*>", re.IGNORECASE)


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt's token ids, and where its placeholders' words are."""

    ids: tuple[int, ...]  # padded to the tokenizer's length
    attention: tuple[int, ...]  # 1 for a token, 0 for padding
    words: tuple[tuple[int, str], ...]  # (position, placeholder) of each learned word
    spans: tuple[tuple[int, int, str], ...] = ()  # (first, last + 1, placeholder) of each super-class's tokens

    @property
    def ending(self) -> tuple[int, ...]:
        """The positions of the end token and the padding."""
        return tuple(range(sum(self.attention) - 1, len(self.ids)))


def tokenize(tokenizer: Any, prompt: str, super_classes: Mapping[str, str] | None = None) -> TokenizedPrompt:
    """Tokenizes a prompt whose placeholders stand for concepts.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text.
        super_classes: per placeholder, the super-class whose tokens it takes.

    Raises:
        ValueError: a placeholder without a concept, a concept whose placeholder is not in the prompt, or a
            placeholder beyond the tokenizer's length.
    """
    super_classes = super_classes or {}
    found = [match.group().lower() for match in PLACEHOLDER.finditer(prompt)]
    own_tokens = {token.lower() for token in tokenizer.get_added_vocab()}
    for placeholder in found:
        if placeholder not in super_classes and placeholder not in own_tokens:
            known = ", ".join(sorted(super_classes)) or "none"
            raise ValueError(f"prompt {prompt!r}: {placeholder} is no concept of this request (concepts: {known})")
    for placeholder in super_classes:
        if placeholder not in found:
            raise ValueError(f"prompt {prompt!r}: the concept {placeholder} was given but is not in the prompt")

    ids: list[int] = []
    words: list[tuple[int, str]] = []
    spans: list[tuple[int, int, str]] = []
    start = 0
    for match in PLACEHOLDER.finditer(prompt):
        placeholder = match.group().lower()
        if placeholder in super_classes:
            ids += _ids(tokenizer, prompt[start : match.start()])
            first = len(ids) + 1
            ids += super_class_ids(tokenizer, super_classes[placeholder])
            spans.append((first, len(ids) + 1, placeholder))
            words.append((len(ids), placeholder))  # the last of the super-class's tokens, counted with BOS
            start = match.end()
    ids += _ids(tokenizer, prompt[start:])

    return _padded(tokenizer, ids, words, spans, repr(prompt))


def as_given(tokenizer: Any, prompt: str) -> TokenizedPrompt:
    """Tokenizes a prompt as pipelines do, in which placeholders are words like others."""
    tokens = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return TokenizedPrompt(tuple(tokens.input_ids), tuple(tokens.attention_mask), ())


def converted(pipe: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt with diffusers' multi-vector textual inversion words spelled out."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return prompt if convert is None else convert(prompt, tokenizer)


def _padded(
    tokenizer: Any,
    ids: Sequence[int],
    words: Sequence[tuple[int, str]],
    spans: Sequence[tuple[int, int, str]],
    name: str,
) -> TokenizedPrompt:
    """A prompt of the tokens between start and end; words and spans count the start token."""
    length = tokenizer.model_max_length
    if len(ids) > length - 2:
        cut = [placeholder for position, placeholder in words if position > length - 2]
        if cut:
            raise ValueError(f"prompt {name}: {cut[0]} lies beyond the {length - 2} tokens that the text encoder reads")
        logger.warning("prompt %s is cut after %d tokens", name, length - 2)
        ids = ids[: length - 2]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    padding = length - len(ids)
    return TokenizedPrompt(
        ids=(*ids, *[tokenizer.pad_token_id] * padding),
        attention=(1,) * len(ids) + (0,) * padding,
        words=tuple(words),
        spans=tuple(spans),
    )


def with_own_words(
    tokenizer: Any, prompt: TokenizedPrompt, own: Sequence[int], others: Sequence[int]
) -> TokenizedPrompt:
    """A prompt in which some of its words stand in the place of others: "a cat and a dog" as "a cat and a cat".

    Args:
        tokenizer: what tokenized the prompt.
        prompt: the prompt.
        own: the positions of the words that stay; the first run of them is what is put in place of the others.
        others: the positions of the words that are replaced, run by run; those that are also in `own` stay.

    Raises:
        ValueError: a placeholder would be cut off.
    """
    ending = prompt.ending[0]
    keep = sorted(position for position in set(own) if 0 < position < ending)
    run = [position for n, position in enumerate(keep) if position == keep[0] + n]
    replaced = {position for position in others if 0 < position < ending} - set(own)
    order: list[int] = []  # positions of the prompt, in the new order
    for position in range(1, ending):
        if position not in replaced:
            order.append(position)
        elif position - 1 not in replaced:
            order += run
    learned = dict(prompt.words)
    starts = {first: (end, placeholder) for first, end, placeholder in prompt.spans}
    words, spans = [], []
    for place, position in enumerate(order, 1):
        end, placeholder = starts.get(position, (position, ""))
        if end > position and order[place - 1 : place - 1 + end - position] == list(range(position, end)):
            spans.append((place, place + end - position, placeholder))
        if position in learned:
            words.append((place, learned[position]))
    ids = [prompt.ids[position] for position in order]
    return _padded(tokenizer, ids, words, spans, repr(tokenizer.decode(ids)))


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
    position = 1
    while position < prompt.ending[0]:
        end, placeholder = starts.get(position, (position + 1, None))
        units.append(((prompt.ids[position] if placeholder is None else None, placeholder), range(position, end)))
        position = end
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
        prompts: what `tokenize` made.
        embeddings: each prompt's learned word embeddings; a placeholder that is missing keeps its super-class's.
        clip_skip: as in diffusers, how many of the last layers are left out.

    Returns:
        Encodings [B, T, D], differentiable in the embeddings.
    """
    out = _run(text_encoder, prompts, embeddings, states=clip_skip is not None)
    if clip_skip is None:
        return out.last_hidden_state
    model = getattr(text_encoder, "text_model", text_encoder)
    return model.final_layer_norm(out.hidden_states[-(clip_skip + 1)])


def encode_penultimate(
    text_encoder: Any,
    prompts: Sequence[TokenizedPrompt],
    embeddings: Sequence[Mapping[str, Tensor]] | None = None,  # per prompt, placeholder -> [W]
    *,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B, T, D], [B, P]
    """Encodes a batch of prompts as SDXL's pipelines do: the last layer but one, not normalised, and pooled.

    Args:
        text_encoder, prompts, embeddings: as for `encode`.
        clip_skip: how many further layers are left out.

    Returns:
        Encodings [B, T, D], and the pooled projection [B, P] of an encoder that has one.
    """
    out = _run(text_encoder, prompts, embeddings, states=True)
    return out.hidden_states[-((clip_skip or 0) + 2)], getattr(out, "text_embeds", None)


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
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = torch.tensor([prompt.attention for prompt in prompts], device=device)
    places = [
        (row, position, learned[placeholder])
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
    return tokenizer(text, add_special_tokens=False).input_ids if text.strip() else []
