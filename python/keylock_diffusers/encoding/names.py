"""Names in prompts: what stands for something learned, told from the text around it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator

PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]*>", re.IGNORECASE)
_LETTER = r"[\w-]"  # of which words are made


def normal(text: str) -> str:
    """Text in Unicode's composed form, as CLIP's tokenizers read it: file systems decompose what prompts do not."""
    return unicodedata.normalize("NFC", text)


def split(text: str, names: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """A text's pieces in their order: (piece, None), and (what stands there, name) where a name is a word of its own.

    Capitals do not matter. A name that begins or ends with a letter, digit, ``-`` or ``_`` is no part of a longer word
    of these, and none is part of a placeholder. Of several that begin at one place the longest is found.

    Args:
        text: of a prompt.
        names: in their `normal` form.

    Example:
        >>> list(split("a BadHand, badhandv4", ["badhand"]))
        [('a ', None), ('BadHand', 'badhand'), (', badhandv4', None)]
    """
    text, ordered = normal(text), sorted(names, key=len, reverse=True)
    start = 0
    for match in re.finditer("|".join([*map(_whole, ordered), PLACEHOLDER.pattern]), text, re.IGNORECASE):
        if match.lastindex is None:  # a placeholder of nobody's
            continue
        if match.start() > start:
            yield text[start : match.start()], None
        yield match.group(), ordered[match.lastindex - 1]
        start = match.end()
    if start < len(text):
        yield text[start:], None


def _whole(name: str) -> str:
    before, after = (re.match(_LETTER, edge) is not None for edge in (name[0], name[-1]))
    return f"({f'(?<!{_LETTER})' if before else ''}{re.escape(name)}{f'(?!{_LETTER})' if after else ''})"
