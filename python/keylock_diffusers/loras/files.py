"""Reading LoRA files of every tool's spelling; a key that is not understood is an error, never left out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from keylock_diffusers.checks import number, path_text
from keylock_diffusers.files import read_text, strict_json
from keylock_diffusers.loras.adapter import Adapter, AdapterFacts, LearnedWord, LoraFileError, LowRank, component_name
from keylock_diffusers.loras.embeddings import BUNDLED, learned_word, split_bundled
from keylock_diffusers.loras.facts import facts_of, looks_like
from keylock_diffusers.loras.model import ModelShapes
from keylock_diffusers.loras.modules import DENOISER, ModuleNames, Shapes
from keylock_diffusers.loras.opening import open_tensors, read_finite
from keylock_diffusers.loras.peft_config import HEADER_KEY, PeftConfig, parse, parse_header
from keylock_diffusers.loras.products import WrongShape, check_shapes, kind_of, low_rank, rank_of
from keylock_diffusers.loras.spellings import refused, split_key
from keylock_diffusers.tensor_file import TensorFile

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 8  # keys or modules of an error's list


@dataclass
class _Contents:
    """A file's keys, sorted by what they belong to."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)  # the file's name -> part -> key
    words: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> layout -> key
    refused: dict[str, list[str]] = field(default_factory=dict)  # kind -> keys
    unknown: list[str] = field(default_factory=list)

    def shapes(self, file: TensorFile) -> dict[str, dict[str, tuple[int, ...]]]:
        return {
            spelled: {part: file.tensors[key].shape for part, key in parts.items()}
            for spelled, parts in self.modules.items()
        }


@dataclass
class _Module:
    """One module that a file changes: the file's name for it, and the model's; several where the file joins them."""

    spelled: str
    component: int
    names: tuple[str, ...]
    weight: tuple[int, ...]
    kind: str
    keys: Mapping[str, str]
    rank: int | None


def read_adapter(
    path: str | os.PathLike[str],
    *,
    denoiser: Shapes,
    text_encoders: Sequence[Shapes],
    max_error: float | None = None,
) -> Adapter:
    """Read a LoRA file: of kohya's tools, LyCORIS, diffusers old and new, PEFT, ComfyUI, OneTrainer or SimpleTuner.

    A LoRA, a LoCon, and every LoHa, LoKr or whole difference whose rank is at most 128 is taken exactly. Anything of
    higher rank is refused, unless `max_error` allows a truncation; what that leaves out is the update's `residual`.

    Args:
        path: a safetensors file, or PEFT's folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        denoiser: shapes of the denoiser's weights, by their modules' names, in the model's order: at least of every
            Linear and every convolution.
        text_encoders: likewise for each text encoder.
        max_error: relative Frobenius error that the truncation of one module's update may make, below 1.

    Raises:
        LoraFileError: the file is a pickle, damaged, not finite, for another model, or holds anything else than this
            reads; its keys are named.
        ValueError: another argument is not what this says.
        OSError: the file cannot be opened.
    """
    if max_error is not None:
        max_error = number(max_error, "read_adapter: max_error", 0, 1)
    model = ModelShapes(denoiser, tuple(text_encoders))
    model.names  # noqa: B018 - that one name would mean two modules is said before a file is opened
    file, config = _open(path)
    with file:
        return read_opened(file, config, model, max_error)


def read_opened(file: TensorFile, config: str | None, model: ModelShapes, max_error: float | None) -> Adapter:
    """Read an open LoRA file.

    Args:
        file: of the weights.
        config: the text of PEFT's ``adapter_config.json`` where that lay beside it.
        model: that it is for.
        max_error: as of `read_adapter`.

    Raises:
        LoraFileError: as `read_adapter`.
    """
    try:
        return _read(file, _configs(file, config), model, max_error)
    except LoraFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{file.source}: {error}") from None


def inspect_opened(file: TensorFile, config: str | None) -> AdapterFacts:
    """What an open LoRA file says of itself; arguments and errors as of `read_opened`."""
    _configs(file, config)
    return _facts(file, _contents(file))


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterFacts:
    """What a LoRA file says of itself, from its header: no model is needed, and no weight is read.

    Args:
        path: as of `read_adapter`.

    Raises:
        LoraFileError: the file is a pickle or damaged.
        OSError: it cannot be opened.
    """
    file, config = _open(path)
    with file:
        return inspect_opened(file, config)


def _open(path: str | os.PathLike[str]) -> tuple[TensorFile, str | None]:
    """The file of weights, and PEFT's settings."""
    try:
        source = path_text(path, "path")
        if not os.path.isdir(source):
            return open_tensors(source), None
        weights = Path(source) / PEFT_WEIGHTS
        if not weights.exists():
            pickled = (Path(source) / "adapter_model.bin").exists()
            raise ValueError(
                f"{source}: a folder must hold PEFT's {PEFT_WEIGHTS}" + (", got a pickle, which is not read" * pickled)
            )
        config = read_text(Path(source) / PEFT_CONFIG)
        return open_tensors(weights), config
    except LoraFileError:
        raise
    except ValueError as error:
        raise LoraFileError(str(error)) from None


def _configs(file: TensorFile, config: str | None) -> dict[int, PeftConfig]:
    """PEFT's settings by component: those beside the file, or those that diffusers put into its header."""
    source = f"{HEADER_KEY} of its header" if config is None else PEFT_CONFIG
    try:
        if config is None:
            return parse_header(file.texts[HEADER_KEY]) if HEADER_KEY in file.texts else {}
        fields: Any = strict_json(config)
        if not isinstance(fields, dict):
            raise ValueError("must be a JSON object")
        return dict.fromkeys((DENOISER, 0, 1, 2), parse(fields))
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{file.source}: {source}: {error}") from None


def _contents(file: TensorFile) -> _Contents:
    contents = _Contents()
    for key in file.tensors:
        if key.startswith(BUNDLED):
            if word := split_bundled(key):
                contents.words.setdefault(word[0], {})[word[1]] = key
            else:
                contents.unknown.append(key)
        elif kind := refused(key):
            contents.refused.setdefault(kind, []).append(key)
        elif split := split_key(key):
            parts = contents.modules.setdefault(split[0], {})
            if split[1] in parts:
                raise LoraFileError(
                    f"{file.source}: one tensor in two spellings: {parts[split[1]]:.200} and {key:.200}"
                )
            parts[split[1]] = key
        else:
            contents.unknown.append(key)
    return contents


def _facts(file: TensorFile, contents: _Contents) -> AdapterFacts:
    facts = facts_of(contents.shapes(file), contents.words, file.texts)
    return replace(facts, unsupported=tuple(contents.refused))


def _read(file: TensorFile, configs: Mapping[int, PeftConfig], model: ModelShapes, max_error: float | None) -> Adapter:
    shapes = model.components
    contents = _contents(file)
    for kind, keys in contents.refused.items():
        raise ValueError(f"{kind} is not supported: {_some(keys)}")
    modules = _located(file, contents, model.names, shapes)
    updates: dict[int, dict[str, LowRank]] = {component: {} for component in shapes}
    for module in modules:
        for name, update in _updates(file, module, configs.get(module.component), shapes, max_error).items():
            updates[module.component][name] = update
    ordered = {
        component: {name: found[name] for name in shapes[component] if name in found}
        for component, found in updates.items()
    }
    encoders = [component for component in shapes if component != DENOISER]
    return Adapter(
        ordered[DENOISER],
        tuple(ordered[component] for component in encoders),
        _words(file, contents, [shapes[component] for component in encoders]),
        _facts(file, contents),
    )


def _located(file: TensorFile, contents: _Contents, names: ModuleNames, shapes: Mapping[int, Shapes]) -> list[_Module]:
    """Every module that the file changes, all checked by names and shapes before any tensor is read."""
    unknown, wrong, located = list(contents.unknown), [], []
    taken: dict[tuple[int, str], str] = {}
    for spelled, parts in contents.modules.items():
        found = names.find(spelled)
        if found is None:
            unknown += parts.values()
            continue
        component, modules = found
        for module in modules:
            if other := taken.get((component, module)):
                raise ValueError(
                    f"{component_name(component)}'s {module} in two spellings: {other:.200} and {spelled:.200}"
                )
            taken[component, module] = spelled
        given = {part: file.tensors[key].shape for part, key in parts.items()}
        weights = [shapes[component][module] for module in modules]
        weight = (sum(one[0] for one in weights), *weights[0][1:])
        try:
            kind = kind_of(given)
            check_shapes(kind, given, weight)
            located.append(_Module(spelled, component, modules, weight, kind, parts, rank_of(kind, given)))
        except WrongShape as error:
            wrong.append(f"{spelled:.200}: {error}")
        except ValueError as error:
            raise ValueError(f"{spelled:.200}: {error}") from None
    whose = looks_like(contents.shapes(file))
    hint = f"; it looks made for {whose}" if whose else ""
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(file.tensors)} keys name nothing in this model: {_some(unknown)}{hint}"
        )
    if wrong:
        hint *= 2 * len(wrong) > len(contents.modules)
        raise ValueError(f"{len(wrong)} of {len(contents.modules)} modules do not fit this model: {_some(wrong)}{hint}")
    return located


def _updates(
    file: TensorFile,
    module: _Module,
    config: PeftConfig | None,
    shapes: Mapping[int, Shapes],
    max_error: float | None,
) -> dict[str, LowRank]:
    """The updates of one module's names."""
    parts = {part: read_finite(file, key) for part, key in module.keys.items() if part != "alpha"}
    alpha = _alpha(file, module.keys["alpha"]) if "alpha" in module.keys else None
    try:
        scale = _scale(module, alpha, config)
        # What a truncation leaves out of several modules' rows says nothing about each, so there it is not allowed.
        update = low_rank(module.kind, parts, module.weight, scale, max_error if len(module.names) == 1 else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{module.spelled:.200}: {module.kind}: {error}") from None
    if len(module.names) == 1:
        return {module.names[0]: update}
    rows = [shapes[module.component][name][0] for name in module.names]
    magnitudes: Sequence[Tensor | None] = [None] * len(rows)
    if update.magnitude is not None:
        magnitudes = update.magnitude.split(rows)
    return {
        name: replace(update, up=up.contiguous(), magnitude=magnitude)
        for name, up, magnitude in zip(module.names, update.up.split(rows), magnitudes, strict=True)
    }


def _alpha(file: TensorFile, key: str) -> float:
    alpha = float(file.read(key).item())
    if not math.isfinite(alpha):
        raise ValueError(f"{key:.200} must be finite, got {alpha}")
    if not alpha:
        raise ValueError(f"{key:.200} is 0, which kohya's tools read as the rank and ComfyUI as no update")
    return alpha


def _scale(module: _Module, alpha: float | None, config: PeftConfig | None) -> float:
    """What multiplies the product: 1 where the file says nothing, as every tool has it."""
    rank = module.rank
    if config is None or module.kind != "LoRA" or rank is None:
        return 1.0 if alpha is None or rank is None else alpha / rank
    said, own = config.rank_and_alpha(module.spelled)
    if said != rank:
        raise ValueError(f"PEFT's settings say rank {said}, the tensors have {rank}")
    if alpha not in (None, own):
        raise ValueError(f"PEFT's settings say alpha {own}, the file's own tensor {alpha}")
    if config.dora != ("magnitude" in module.keys):
        raise ValueError(f"PEFT's settings say use_dora = {config.dora}, the file's tensors the opposite")
    return own / (math.sqrt(rank) if config.rank_stabilised else rank)


def _words(file: TensorFile, contents: _Contents, text_encoders: Sequence[Shapes]) -> dict[str, LearnedWord]:
    # The first module of a text encoder takes the word embeddings themselves.
    widths = [next(iter(shapes.values()))[1] for shapes in text_encoders if shapes]
    return {
        name: learned_word(name, {layout: read_finite(file, key) for layout, key in keys.items()}, widths, file.source)
        for name, keys in contents.words.items()
    }


def _some(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(f"{item:.300}" for item in items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
