"""What a LoRA file says of itself, from its header alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from keylock_diffusers.files import strict_json
from keylock_diffusers.loras.adapter import AdapterFacts, component_name
from keylock_diffusers.loras.modules import DENOISER, split_prefix
from keylock_diffusers.loras.products import kind_of, rank_of

Shape = tuple[int, ...]

_LONGEST_TEXT = 1000
_MOST_WORDS = 100
_MODELS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by width of the text's encodings
# Where trainers and sites write what to put into a prompt, in one text, commas between.
TRIGGER_TEXTS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word", "trigger_words", "activation text")
MODEL_TEXTS = ("modelspec.architecture", "ss_base_model_version")
_OF_TAGS = "ss_tag_frequency"  # kohya's: {folder: {caption's tag: how often}}


def facts_of(
    modules: Mapping[str, Mapping[str, Shape]], words: Iterable[str], texts: Mapping[str, str]
) -> AdapterFacts:
    """The facts of a file.

    Args:
        modules: by the name that the file gives a module, the shapes of its tensors by what they are to it.
        words: names of its embeddings.
        texts: of its header.
    """
    kinds: set[str] = set()
    layers: Counter[str] = Counter()
    ranks: dict[str, Counter[int]] = {}
    for module, shapes in modules.items():
        component, name = split_prefix(module)
        if component is None:  # only a text encoder's modules are called so
            component = 0 if re.match(r"(text_model\.)?encoder\.layers\.", name) else DENOISER
        title = component_name(component)
        layers[title] += 1
        try:
            kind = kind_of(shapes)
            rank = rank_of(kind, shapes)
        except ValueError:  # reading it says so
            continue
        convolution = kind == "LoRA" and len(shapes["down"]) == 4 and shapes["down"][2:] != (1, 1)
        kinds.add("LoCon" if convolution else kind)
        if {"dora_scale", "magnitude"} & shapes.keys():
            kinds.add("DoRA")
        if rank is not None:
            ranks.setdefault(title, Counter())[rank] += 1
    return AdapterFacts(
        tuple(sorted(kinds)),
        looks_like(modules) or next((texts[name] for name in MODEL_TEXTS if name in texts), None),
        dict(layers),
        {title: dict(sorted(counts.items())) for title, counts in ranks.items()},
        _trigger_words(texts),
        tuple(sorted(words)),
        {name: text[:_LONGEST_TEXT] for name, text in texts.items() if name != _OF_TAGS},
    )


def looks_like(modules: Mapping[str, Mapping[str, Shape]]) -> str | None:
    """The model that a file's layers look made for; None where they do not tell."""
    widths: Counter[int] = Counter()
    for module, shapes in modules.items():
        shape = shapes.get("down", shapes.get("hada_w1_b", ()))
        if re.search(r"attn2[._](processor\.)?to_[kv]$", module) and len(shape) >= 2:
            widths[shape[1]] += 1
    for width, _ in widths.most_common(1):
        return _MODELS.get(width)
    if any(split_prefix(module)[0] == 1 for module in modules):
        return "SDXL"
    return None


def _trigger_words(texts: Mapping[str, str]) -> tuple[str, ...]:
    found = [word.strip() for name in TRIGGER_TEXTS for word in texts.get(name, "")[:_LONGEST_TEXT].split(",")]
    tags: Counter[str] = Counter()
    try:
        folders = strict_json(texts.get(_OF_TAGS, "{}"))
    except (ValueError, RecursionError):
        folders = {}
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if type(count) is int:
                tags[tag.strip()] += count
    found += [tag for tag, _ in tags.most_common(_MOST_WORDS)]
    return tuple(dict.fromkeys(word[:_LONGEST_TEXT] for word in found if word))[:_MOST_WORDS]
