"""A prompt as token ids, in as many chunks as it needs, each with a start and an end of its own."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt's token ids, and where its placeholders' words are.

    Args:
        ids: those of all chunks, one after another, each padded to the tokenizer's length.
        attention: 1 for a token, 0 for padding.
        words: (position, name, n) of each learned vector: the n-th of the placeholder or word of that name.
        spans: (first, last + 1, name) of the tokens that stand for a placeholder or a learned word.
        chunk: how many tokens a chunk has, 0 for all.
        weights: of the tokens, or none where all are 1.
    """

    ids: tuple[int, ...]
    attention: tuple[int, ...]
    words: tuple[tuple[int, str, int], ...]
    spans: tuple[tuple[int, int, str], ...] = ()
    chunk: int = 0
    weights: tuple[float, ...] = ()

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.ids) // (self.chunk or len(self.ids))

    @property
    def content(self) -> tuple[int, ...]:
        """The positions of the prompt's own tokens: neither starts nor ends nor padding."""
        size = self.chunk or len(self.ids)
        used = [sum(self.attention[first : first + size]) for first in range(0, len(self.ids), size)]
        return tuple(n * size + place for n, count in enumerate(used) for place in range(1, count - 1))

    @property
    def starts(self) -> tuple[int, ...]:
        """The positions of the chunks' start tokens."""
        return tuple(range(0, len(self.ids), self.chunk or len(self.ids)))

    @property
    def ending(self) -> tuple[int, ...]:
        """The positions of the end tokens and the padding."""
        inside = {*self.content, *self.starts}
        return tuple(position for position in range(len(self.ids)) if position not in inside)


def plain(
    tokenizer: Any, prompt: TokenizedPrompt, names: Collection[str], copied: Collection[str] = ()
) -> tuple[TokenizedPrompt, tuple[int, ...]]:
    """A prompt in which each of some placeholders is its super-class's words, and no noun stands several times.

    Args:
        tokenizer: what tokenized the prompt.
        prompt: the prompt.
        names: the placeholders.
        copied: those of them whose noun's encoding belongs in all its places.

    Returns:
        That prompt, and for each position of `prompt` the position of it whose encoding belongs there: that of the same
        word, and for a noun that stands again one of padding, so that all encodings are there once, or its own.
    """
    again = {position for position, name, number in prompt.words if name in names and number > 0}
    size = prompt.chunk or len(prompt.ids)
    order: list[int] = []
    for first in range(0, len(prompt.ids), size):
        kept = [position for position in range(first, first + size) if position not in again]
        places, padding = (
            {position: first + n for n, position in enumerate(kept)},
            iter(range(first + len(kept), first + size)),
        )
        order += [places[p] if p in places else next(padding) for p in range(first, first + size)]
    back = {place: position for position, place in enumerate(order)}
    nouns = {position: position - number for position, name, number in prompt.words if name in copied}

    def moved(values: Sequence[Any], filler: Any) -> tuple[Any, ...]:
        return tuple(filler if back[n] in again else values[back[n]] for n in range(len(values)))

    return replace(
        prompt,
        ids=moved(prompt.ids, tokenizer.pad_token_id),
        attention=moved(prompt.attention, 0),
        words=tuple((order[position], name, n) for position, name, n in prompt.words if position not in again),
        spans=(),
        weights=prompt.weights and moved(prompt.weights, 1.0),
    ), tuple(order[nouns.get(position, position)] for position in range(len(order)))


class Unit(NamedTuple):
    """Tokens that stand together: a word, or what stands for a placeholder or a learned word."""

    ids: tuple[int, ...]
    name: str | None = None  # of what they stand for
    words: tuple[tuple[int, str, int], ...] = ()  # as a `TokenizedPrompt`'s, by their places in it
    weight: float = 1.0


def units_of(tokenizer: Any, ids: Sequence[int], weight: float = 1.0) -> list[Unit]:
    """Tokens by words; a CLIP tokenizer marks the end of each."""
    found: list[Unit] = []
    word: list[int] = []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        word.append(number)
        if token.endswith("</w>"):
            found.append(Unit(tuple(word), weight=weight))
            word = []
    return [*found, Unit(tuple(word), weight=weight)] if word else found


def pack(
    tokenizer: Any, units: Iterable[Unit], name: str, limit: int | None = None, most: int | None = None
) -> TokenizedPrompt:
    """Lays units out in chunks; none is divided between two of them unless it is longer than one.

    Args:
        tokenizer: a CLIP tokenizer; a chunk has its ``model_max_length`` tokens.
        units: the prompt.
        name: of the prompt, for messages.
        limit: how many chunks there may be; what does not fit is cut off, with a warning. None: as many as it needs.
        most: how many tokens there may be, padding included; None: any number.

    Raises:
        ValueError: a learned word would be cut off, or there are too many tokens.
    """
    size = tokenizer.model_max_length
    room = size - 2
    chunks: list[list[Unit]] = [[]]
    for unit in units:
        if limit is not None or len(unit.ids) > room:  # cut or divided where it must be, as pipelines cut
            words_at = {place: ((0, word, n),) for place, word, n in unit.words}
            pieces = [
                Unit((number,), words=words_at.get(place, ()), weight=unit.weight)
                for place, number in enumerate(unit.ids)
            ]
        else:
            pieces = [unit]
        for piece in pieces:
            if sum(len(held.ids) for held in chunks[-1]) + len(piece.ids) > room:
                chunks.append([])
            if most is not None and len(chunks) * size > most:
                raise ValueError(f"a prompt must have at most {most} tokens, got more: {name:.80}")
            chunks[-1].append(piece)
    spans = _spans(units, chunks, size) if limit is None else _spans(units, [sum(chunks, [])], size)
    if limit is not None and len(chunks) > limit:
        cut = [word for chunk in chunks[limit:] for piece in chunk for _, word, _ in piece.words]
        if cut:
            raise ValueError(
                f"prompt {name}: {cut[0]} lies beyond the {room * limit} tokens that the text encoder reads"
            )
        logger.warning("prompt %s is cut after %d tokens", name, room * limit)
        chunks = chunks[:limit]
    ids: list[int] = []
    attention: list[int] = []
    weights: list[float] = []
    words: list[tuple[int, str, int]] = []
    for chunk in chunks:
        ids.append(tokenizer.bos_token_id)
        weights.append(1.0)
        for piece in chunk:
            words += [(len(ids) + place, word, n) for place, word, n in piece.words]
            ids += piece.ids
            weights += [piece.weight] * len(piece.ids)
        ids.append(tokenizer.eos_token_id)
        attention += [1] * (len(ids) - len(attention))
        padding = -len(ids) % size
        ids += [tokenizer.pad_token_id] * padding
        attention += [0] * padding
        weights += [1.0] * (len(ids) - len(weights))
    weighted = any(weight != 1 for weight in weights)
    spans = tuple(span for span in spans if span[1] <= len(ids))
    return TokenizedPrompt(tuple(ids), tuple(attention), tuple(words), spans, size, tuple(weights) if weighted else ())


def extended(tokenizer: Any, prompt: TokenizedPrompt, chunks: int) -> TokenizedPrompt:
    """The prompt with empty chunks after it, `chunks` in all."""
    more = chunks - prompt.chunks
    if more <= 0:
        return prompt
    size = prompt.chunk or len(prompt.ids)
    padding = size - 2
    empty = (tokenizer.bos_token_id, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding)
    return replace(
        prompt,
        ids=prompt.ids + empty * more,
        attention=prompt.attention + (1, 1, *[0] * padding) * more,
        chunk=size,
        weights=prompt.weights + (1.0,) * size * more if prompt.weights else (),
    )


def _spans(units: Iterable[Unit], chunks: Sequence[Sequence[Unit]], size: int) -> tuple[tuple[int, int, str], ...]:
    """Where the tokens lie that stand for placeholders and learned words."""
    positions = [
        n * size + 1 + place for n, chunk in enumerate(chunks) for place in range(sum(len(unit.ids) for unit in chunk))
    ]
    found, first = [], 0
    for unit in units:
        if unit.name:
            found.append((positions[first], positions[first + len(unit.ids) - 1] + 1, unit.name))
        first += len(unit.ids)
    return tuple(found)
