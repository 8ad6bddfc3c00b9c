"""The words of one request that textual inversion taught, by the names that its prompts call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from keylock_diffusers.checks import shown
from keylock_diffusers.encoding.names import normal
from keylock_diffusers.encoding.tokens import TokenizedPrompt
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.loras import LearnedWord, read_embedding
from keylock_diffusers.requests import Embedding


@dataclass(frozen=True, eq=False)
class LearnedWords:
    """Words for the prompts of one request, each with a vector per token and text encoder.

    Args:
        vectors: by name, as `encoding.names.split` finds it, [n, W] per text encoder.
        asked: names of those that must stand in a prompt.
        unclear: names that two different words have.

    Paper: Gal et al., Textual Inversion, arXiv 2208.01618.
    """

    vectors: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)  # [n, W]
    asked: tuple[str, ...] = ()
    unclear: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        embeddings: Sequence[Embedding],
        placeholders: Iterable[str],
        widths: Sequence[int],
        limits: RequestLimits,
        bundled: Sequence[LearnedWord] = (),
    ) -> LearnedWords:
        """The words that a request names, and those that come with its LoRA files.

        What the request itself calls by a name, a concept or an embedding, hides a bundled word of that name. Bundled
        words that stand in no prompt are not used.

        Args:
            embeddings: of the request.
            placeholders: of its concepts.
            widths: of the word embeddings of each of the model's text encoders.
            limits: how many words there may be, and how many vectors each.
            bundled: words of its LoRA files.

        Raises:
            ValueError: a name that cannot be one or is taken, vectors of other widths, or too many of them; a
                `LoraFileError` where a file is to blame.
            OSError: a file cannot be opened.

        Example:
            >>> word = LearnedWord("<hat>", (torch.zeros(2, 8),))
            >>> LearnedWords.of([Embedding(word)], [], [8], RequestLimits()).lengths
            {'<hat>': 2}
        """
        if len(embeddings) + len(bundled) > limits.embeddings:
            raise ValueError(
                f"embeddings must be at most {limits.embeddings} with those of its LoRA files, "
                f"got {len(embeddings)} and {len(bundled)}"
            )
        taken = {placeholder.casefold() for placeholder in placeholders}
        vectors: dict[str, tuple[Tensor, ...]] = {}
        for embedding in embeddings:
            source = embedding.source
            word = source if isinstance(source, LearnedWord) else read_embedding(source, widths, limits.tokens)
            word = replace(word, name=normal(word.name if embedding.name is None else embedding.name))  # checked anew
            name = word.name
            if " " in name:
                raise ValueError(f"name of an Embedding must be without spaces, got {shown(name)}")
            if name.casefold() in taken:
                raise ValueError(f"name of an Embedding: a concept or another embedding is called {shown(name)} too")
            taken.add(name.casefold())
            vectors[name] = _fitting(word, widths, limits)
        asked = tuple(vectors)
        names: dict[str, str] = {}  # of bundled words, by what makes two names one
        unclear = set()
        for word in bundled:
            name = normal(word.name)
            if name.casefold() in taken:
                continue
            known = names.setdefault(name.casefold(), name)
            made = _fitting(word, widths, limits)
            if known in vectors and not all(map(_same, vectors[known], made)):
                unclear.add(known)
            vectors.setdefault(known, made)
        return cls(vectors, asked, frozenset(unclear))

    @property
    def lengths(self) -> dict[str, int]:
        """How many tokens each stands for."""
        return {name: len(vectors[0]) for name, vectors in self.vectors.items()}

    def check(self, prompts: Iterable[TokenizedPrompt]) -> None:
        """Every word that the request names stands in one of its prompts, and none in them is unclear.

        Raises:
            ValueError: naming the word.
        """
        found = {name for prompt in prompts for _, name, _ in prompt.words}
        for name in self.asked:
            if name not in found:
                hint = r"; in prompts, brackets that are letters are written \( \) \[ \]" if {*name} & {*"()[]"} else ""
                raise ValueError(f"the embedding {shown(name)} is in none of the prompts as a word of its own{hint}")
        for name in sorted(self.unclear & found):
            raise ValueError(
                f"two of its LoRA files bring different words {shown(name)}: give the one that is meant as an Embedding"
            )


def _fitting(word: LearnedWord, widths: Sequence[int], limits: RequestLimits) -> tuple[Tensor, ...]:
    if [vectors.shape[1] for vectors in word.vectors] != list(widths) or len(word.vectors[0]) > limits.tokens:
        raise ValueError(
            f"the embedding {shown(word.name)} must have at most {limits.tokens} vectors of the widths {list(widths)}, "
            f"those of the model's text encoders, got {[list(vectors.shape) for vectors in word.vectors]}"
        )
    return word.vectors


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one.cpu(), other.to("cpu", one.dtype))
