"""Reading the words that textual inversion taught a model, as every tool stores them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from keylock_diffusers.loras.adapter import LearnedWord, LoraFileError
from keylock_diffusers.loras.opening import open_tensors, read_finite

BUNDLED = "bundle_emb."  # begins the keys of a LoRA file's embeddings: bundle_emb.<name>.<layout>
_ONE_ENCODER = ("emb_params", "string_to_param.*")
_TWO_ENCODERS = ("clip_l", "clip_g")
_SHOWN = 5


def read_embedding(path: str | os.PathLike[str], widths: Sequence[int], most: int = 1_024) -> LearnedWord:
    """Read an embedding file: ``{token: vectors}`` as diffusers writes it, ``emb_params`` as A1111 and kohya do, and
    ``clip_l`` with ``clip_g`` for SDXL.

    Args:
        path: a safetensors file.
        widths: of the word embeddings of each of the model's text encoders.
        most: how many vectors the word may have, which is checked before they are read.

    Returns:
        The word; where the file does not name it, it is called as the file is.

    Raises:
        LoraFileError: the file is a pickle, damaged, of no such layout, not finite, or for a model of other widths.
        OSError: it cannot be opened.
    """
    with open_tensors(path) as file:
        names = set(file.tensors)
        if not names or (len(names) > 1 and names != {*_TWO_ENCODERS}):
            listed = ", ".join(f"{name:.80}" for name in sorted(names)[:_SHOWN])
            raise LoraFileError(
                f"{file.source}: must hold one tensor, or {' and '.join(_TWO_ENCODERS)}, got {len(names)}: {listed}"
            )
        own = not names <= {*_ONE_ENCODER, *_TWO_ENCODERS}
        name = next(iter(names)) if own else Path(file.source).stem
        for key in names:
            shape = file.tensors[key].shape
            if prod(shape) > most * max(widths, default=0):
                raise LoraFileError(
                    f"{file.source}: a word must have at most {most} vectors of the widths {list(widths)}, "
                    f"got {list(shape)}"
                )
        tensors = {("emb_params" if own else key): read_finite(file, key) for key in names}
        return learned_word(name, tensors, widths, file.source)


def split_bundled(key: str) -> tuple[str, str] | None:
    """The word's name and the layout in the key of a LoRA file's embedding; None where it is none."""
    for layout in (*_ONE_ENCODER, *_TWO_ENCODERS):
        if key.startswith(BUNDLED) and key.endswith(f".{layout}") and len(key) > len(BUNDLED) + len(layout) + 1:
            return key[len(BUNDLED) : -len(layout) - 1], layout
    return None


def learned_word(name: str, tensors: Mapping[str, Tensor], widths: Sequence[int], source: str) -> LearnedWord:
    """A word from its tensors by layout.

    Args:
        name: of the word.
        tensors: [width] or [n, width] each.
        widths: of the word embeddings of each text encoder.
        source: names the file in errors.

    Raises:
        LoraFileError: the tensors are of no layout, or for a model of other widths.
    """
    order = _TWO_ENCODERS if set(tensors) == {*_TWO_ENCODERS} else tuple(tensors)
    if len(order) != 1 and order != _TWO_ENCODERS:
        raise LoraFileError(f"{source}: the word {name!r:.80} has the layouts {', '.join(order)}, expected one")
    given = [tensors[layout] for layout in order]
    if any(one.ndim not in (1, 2) for one in given) or [one.shape[-1] for one in given] != list(widths):
        raise LoraFileError(
            f"{source}: the word {name!r:.80} must have vectors [n, width] of the widths {list(widths)}, those of the "
            f"model's text encoders, got {[list(one.shape) for one in given]}"
        )
    try:
        return LearnedWord(name, tuple(one if one.ndim == 2 else one[None] for one in given))
    except (TypeError, ValueError) as error:
        raise LoraFileError(f"{source}: {error}") from None
