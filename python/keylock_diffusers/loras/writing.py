"""Writing adapters and learned words as files that diffusers loads unchanged."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from keylock_diffusers.checks import path_text
from keylock_diffusers.files import write_tensors
from keylock_diffusers.loras.adapter import Adapter, AdapterFacts, LearnedWord, LowRank, component_name
from keylock_diffusers.loras.facts import MODEL_TEXTS, TRIGGER_TEXTS
from keylock_diffusers.loras.model import ModelShapes
from keylock_diffusers.loras.modules import DENOISER
from keylock_diffusers.loras.peft_config import HEADER_KEY

_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(\.|$)")


def write_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    facts: AdapterFacts | None = None,
    *,
    model: ModelShapes | None = None,
) -> int:
    """Write an adapter as ``pipe.load_lora_weights`` reproduces it exactly: every layer with its own rank and scale.

    The spelling is diffusers' own, PEFT's pair, with every scale in the header, as diffusers saves it. What has become
    a product of low rank (LoCon, LoHa, LoKr, a whole difference) is written as that product; that a truncation left
    something out is not said.

    Args:
        path: the file, whose folder is made if need be.
        adapter: its tensors keep their dtypes.
        facts: what the header says of its training; default the adapter's own.
        model: that it is for. Only it tells a convolution over single pixels from a Linear where `down` is a matrix;
            without it, `down` [r, C, 1, 1] means one.

    Returns:
        The file's bytes.

    Raises:
        ValueError: what diffusers cannot hold: learned words (see `write_word`), DoRA on some modules of a component
            only, modules whose names PEFT cannot tell apart; or a module that the model has not, or of another shape.
        OSError: writing failed; what was there before is unchanged.

    Example:
        >>> adapter = read_adapter("kohya.safetensors", denoiser=unet, text_encoders=[clip])  # doctest: +SKIP
        >>> write_adapter("style.safetensors", adapter)  # doctest: +SKIP
    """
    path_text(path, "write_adapter: path")
    if adapter.words:
        raise ValueError(
            f"write_adapter: diffusers reads no words from a LoRA file, got {', '.join(adapter.words):.200}; "
            f"write_word writes them as files of their own"
        )
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, updates in enumerate((adapter.denoiser, *adapter.text_encoders), DENOISER):
        if not updates:
            continue
        prefix = component_name(component)
        if component == DENOISER:
            prefix = "unet" if any(map(_UNET.match, updates)) else "transformer"
        settings |= {f"{prefix}.{name}": value for name, value in _settings(prefix, updates).items()}
        shapes = None if model is None else model.components.get(component, {})
        for name, update in updates.items():
            is_convolution = _is_convolution(
                f"{prefix}.{name}", update, None if shapes is None else shapes.get(name, ())
            )
            spelled = f"text_model.{name}" if component >= 0 and name.startswith("encoder.layers.") else name
            for part, tensor in _parts(update, is_convolution):
                tensors[f"{prefix}.{spelled}.{part}"] = tensor
    texts = _texts(adapter.facts if facts is None else facts)
    return write_tensors(path, tensors, {**texts, "format": "pt", HEADER_KEY: json.dumps(settings)})


def write_word(path: str | os.PathLike[str], word: LearnedWord) -> int:
    """Write a learned word as an embedding file.

    One text encoder's is ``{name: vectors}``, which ``pipe.load_textual_inversion`` takes; two encoders' is ``clip_l``
    with ``clip_g``, as tools for SDXL have it, whose word is called as the file is.

    Args:
        path: the file, whose folder is made if need be.
        word: the word.

    Returns:
        The file's bytes.

    Raises:
        ValueError: it is of more encoders.
        OSError: writing failed.
    """
    path_text(path, "write_word: path")
    if len(word.vectors) == 1:
        return write_tensors(path, {word.name: word.vectors[0]}, {"format": "pt"})
    if len(word.vectors) != 2:
        raise ValueError(f"write_word: files hold words of one or two text encoders, got {len(word.vectors)}")
    return write_tensors(path, dict(zip(("clip_l", "clip_g"), word.vectors, strict=True)), {"format": "pt"})


def _parts(update: LowRank, is_convolution: bool) -> Iterator[tuple[str, Tensor]]:
    up, down, magnitude = update.up, update.down, update.magnitude
    if is_convolution:
        ones = (1,) * max(2, down.ndim - 2)
        up = up.reshape(*up.shape, *ones)
        down = down if down.ndim > 2 else down.reshape(*down.shape, *ones)
        magnitude = None if magnitude is None else magnitude.reshape(1, -1, *ones)
    yield "lora_A.weight", down
    yield "lora_B.weight", up
    if magnitude is not None:
        yield "lora_magnitude_vector.weight", magnitude  # transformers, unlike diffusers, takes it so only


def _is_convolution(name: str, update: LowRank, weight: tuple[int, ...] | None) -> bool:
    """Whether a module is one; its weight is None where the model is not known, and empty where it has none.

    Raises:
        ValueError: the update is not of that weight's shape.
    """
    if weight is None:
        return update.down.ndim > 2
    inner = update.down.shape[1:]
    if not weight or update.up.shape[0] != weight[0] or math.prod(inner) != math.prod(weight[1:]):
        raise ValueError(
            f"write_adapter: {name:.200} must fit the model's weight {list(weight) or 'of that name'}, got up "
            f"{list(update.up.shape)} and down {list(update.down.shape)}"
        )
    return len(weight) > 2


def _settings(prefix: str, updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """PEFT's, of one component."""
    dora = {update.magnitude is not None for update in updates.values()}
    if len(dora) > 1:
        some = next(name for name, update in updates.items() if update.magnitude is None)
        raise ValueError(
            f"write_adapter: diffusers takes DoRA on all modules of {prefix} or on none, got none on {some}"
        )
    # PEFT asks for the first pattern that a name ends with: longer ones come first, so that each meets its own.
    names = [(name.removeprefix("text_model."), name) for name in updates]
    names.sort(key=lambda pair: -len(pair[0]))
    ranks = {short: updates[name].rank for short, name in names}
    alphas = {short: _alpha(updates[name]) for short, name in names}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks if len({*ranks.values()}) > 1 else {},
        "alpha_pattern": alphas if len({*alphas.values()}) > 1 else {},
        "target_modules": list(ranks),
        "use_dora": dora.pop(),
        "use_rslora": False,
        "bias": "none",
    }


def _alpha(update: LowRank) -> float:
    """What divided by the rank is the scale, to the last bit where there is such a number."""
    product = update.scale * update.rank
    near = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    alpha = next((one for one in near if one / update.rank == update.scale), product)
    return int(alpha) if alpha.is_integer() else alpha


def _texts(facts: AdapterFacts) -> dict[str, str]:
    texts = {name: text for name, text in facts.training.items() if name != HEADER_KEY}
    if facts.trigger_words and not any(name in texts for name in TRIGGER_TEXTS):
        texts[TRIGGER_TEXTS[0]] = ", ".join(facts.trigger_words)
    if facts.base and not any(name in texts for name in MODEL_TEXTS):
        texts[MODEL_TEXTS[0]] = facts.base
    return texts
