"""Weights in prompts: ``(word:1.3)``, ``(word)``, ``[word]``, nested."""

from __future__ import annotations

import math
import re

from keylock_diffusers.checks import shown

STEP = 1.1  # what one pair of brackets multiplies by, or divides by
_TOKEN = re.compile(
    r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*\)|[^\\()\[\]:]+|.", re.DOTALL
)
_LARGEST = 1e4


def weighted(prompt: str) -> list[tuple[str, float]]:
    """A prompt's parts with their weights.

    ``(x:w)`` multiplies the weight of x by w, ``(x)`` by 1.1, ``[x]`` divides it by 1.1; they nest, and each factor
    counts once. A backslash before a bracket makes it a letter. A bracket that is never closed, or was never opened, is
    a letter too, and so is a colon that no number and closing bracket follow.

    Raises:
        ValueError: a weight that is not finite, or beyond 10,000.

    Example:
        >>> weighted("a (red:1.5) [cat]")
        [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('cat', 0.9090909090909091)]
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # each open bracket, and the part it begins at

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        _, first = opened.pop()
        del parts[first]  # the bracket itself
        parts[first:] = [(words, weight * factor) for words, weight in parts[first:]]
        return True

    for match in _TOKEN.finditer(prompt):
        token, number = match.group(), match.group(1)
        if number is not None:
            factor = float(number)
            if not math.isfinite(factor) or abs(factor) > _LARGEST:
                raise ValueError(f"prompt {shown(prompt)}: a weight must be at most {_LARGEST:g}, got {number}")
            if not close("(", factor):
                parts.append((token, 1.0))
        elif token in "([":
            opened.append((token, len(parts)))
            parts.append((token, 1.0))
        elif token == ")" and close("(", STEP) or token == "]" and close("[", 1 / STEP):
            continue
        else:
            parts.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    joined: list[tuple[str, float]] = []
    for words, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = joined[-1][0] + words, weight
        else:
            joined.append((words, weight))
    wrong = [weight for _, weight in joined if not abs(weight) <= _LARGEST]
    if wrong:  # factors multiply where they nest
        raise ValueError(f"prompt {shown(prompt)}: weights must be at most {_LARGEST:g} together, got {wrong[0]:g}")
    return joined
