"""Calls of the public functions with one argument that is not what it should be."""

from __future__ import annotations

import contextlib
import functools
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers.training import Covariance, PerfusionConfig, Subject, covariance, train_concepts
from tests.diffusers.compatibility import WIDTH
from tests.hostile import world
from tests.hostile.values import python_value, told

LONG = 1_000
_ANY = (object,)
_TEXT, _LIST, _NUMBER = (str,), (list, tuple), (numbers.Real,)
_PLACE = (str, os.PathLike)
_NONE = (type(None),)
_SEVERAL = (*_LIST, Mapping, set)


@dataclass(frozen=True)
class Function:
    """What is called, and by argument what is right there: a value of these types may be taken, no other is.

    Args:
        call: takes a place for files and the argument that is changed, by name.
        takes: per argument, its types.
        also: what else a message may call an argument.
    """

    call: Callable[..., Any]
    takes: Mapping[str, tuple[type, ...]]
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One call."""

    kind: str
    argument: str
    name: str
    value: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.kind}({self.argument}={self.name})"


def make(rng: Random) -> Case:
    kind = rng.choice(sorted(FUNCTIONS))
    argument = rng.choice(sorted(FUNCTIONS[kind].takes))
    name, value = python_value(rng)
    # A caller's own object or function may raise its own error, and a file of its own may be opened.
    while "spiteful" in name or "/etc/" in name or name == "path" or (name == "function" and "callback" in argument):
        name, value = python_value(rng)
    return Case(kind, argument, name, value)


def check(case: Case, place: Path) -> str:
    """TypeError, ValueError or OSError that names the argument; or the call is right, where the value may be."""
    function, value = FUNCTIONS[case.kind], case.value()
    try:
        function.call(place, **{case.argument: value})
    except OSError as error:  # the system's own words, of the path that it was given
        assert isinstance(value, (str, os.PathLike)), f"{case}: {error}"
        return "refused, OSError"
    except (TypeError, ValueError, KeyError) as error:
        return told(error, case.argument, *function.also.get(case.argument, ()))
    right = isinstance(value, function.takes[case.argument])
    assert right and not (isinstance(value, bool) and function.takes[case.argument] == _NUMBER), f"{case} was taken"
    return "accepted"


def _generate(place: Path, **changed: Any) -> None:
    requests = [kd.Request("a cat", seed=1, guidance_scale=4.0)]
    kd.generate(**{"pipe": world.pipeline(), "requests": requests, **world.options(), **changed})


def _bank(place: Path, **changed: Any) -> None:
    with _inside(place):
        bank = kd.ConceptBank(**{"path_or_url": "bank", **changed})
        with contextlib.suppress(kd.concepts.UnknownConceptError):
            bank["alice/cat"]


def _add(place: Path, **changed: Any) -> None:
    given = {"concept_id": "alice/cat", "concept": world.concepts()["alice/cat"], **changed}
    kd.ConceptBank(place / "bank").add(**given, overwrite=True)


def _record(place: Path, **changed: Any) -> None:
    with kd.record_attention(**{"pipe": world.pipeline(), "words": ["cat"], **changed}):
        pass


def _covariance(place: Path, **changed: Any) -> Any:
    with _inside(place):
        return covariance(**{"pipe": _bare(), "captions": ["a cat", "a dog"], "cache": place / "cache", **changed})


def _train(place: Path, **changed: Any) -> None:
    pictures = [Image.new("RGB", (16, 16), "red")]
    subjects = [Subject("<alice-cat>", "cat", pictures)]
    given = {
        "subjects": subjects,
        "config": PerfusionConfig(steps=1, batch_size=1),
        "metric": Covariance(torch.eye(WIDTH, dtype=torch.float64), {}),
        "progress": False,
    }
    with _inside(place):
        for learned in train_concepts(**{"pipe": _bare(), **given, **changed}):
            if isinstance(learned, Exception):
                raise ValueError(str(learned)) from learned


@functools.cache
def _bare() -> Any:
    return world.build_tiny()


@contextlib.contextmanager
def _inside(place: Path) -> Any:
    """Relative names are names here."""
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _subject(place: Path, **changed: Any) -> None:
    picture = Image.new("RGB", (16, 16), "red")
    Subject(**{"placeholder": "<alice-cat>", "super_class": "cat", "images": [picture], **changed})


FUNCTIONS: dict[str, Function] = {
    "generate": Function(
        _generate,
        {
            "pipe": (),
            "requests": _LIST,
            "bank": (Mapping, *_NONE),
            "controlnets": (Mapping, *_NONE),
            "num_inference_steps": _NUMBER,
            "height": (*_NUMBER, *_NONE),
            "width": (*_NUMBER, *_NONE),
            "scheduler": _NONE,
            "max_batch": _NUMBER,
            "record": _NONE,
            "callback_on_step_end": _NONE,
            "callback_on_image": _NONE,
            "on_error": _TEXT,
            "output_type": _TEXT,
            "image_lengths": (*_LIST, *_NONE),
            "max_regions": (*_NUMBER, *_NONE),
            "fusion": _NONE,
            "limits": (),
            "eta": _NUMBER,
            "clip_skip": (*_NUMBER, *_NONE),
            "guidance_rescale": _NUMBER,
            "cross_attention_kwargs": (Mapping, *_NONE),
            "strenght": (),
        },
        {"requests": ("request", "Request"), "height": ("divisible", "width"), "width": ("divisible", "height")},
    ),
    "install": Function(lambda place, pipe: kd.install(pipe), {"pipe": ()}),
    "uninstall": Function(lambda place, pipe: kd.uninstall(pipe), {"pipe": ()}),
    "ConceptBank": Function(_bank, {"path_or_url": _PLACE, "cache_size": _NUMBER}),
    "ConceptBank.add": Function(_add, {"concept_id": _TEXT, "concept": ()}, {"concept_id": ("id", "concept")}),
    "Concept.load": Function(
        # The path is the caller's own word: of names that lead out of the folder, none is asked for.
        lambda place, path_or_bytes: kd.Concept.load(
            "elsewhere" if isinstance(path_or_bytes, str) and ".." in path_or_bytes else path_or_bytes
        ),
        {"path_or_bytes": ()},
        {"path_or_bytes": ("path", "file")},
    ),
    "AttentionMaps": Function(
        lambda place, **changed: kd.AttentionMaps(**{"words": ["cat"], **changed}),
        {"words": _SEVERAL, "layers": (*_LIST, *_NONE), "every_step": _ANY},
    ),
    "record_attention": Function(
        _record, {"pipe": (), "words": _SEVERAL, "layers": (*_LIST, *_NONE)}, {"layers": ("layer",)}
    ),
    "Subject": Function(
        _subject,
        {
            "placeholder": _TEXT,
            "super_class": _TEXT,
            "images": _LIST,
            "captions": (*_LIST, *_NONE),
            "masks": (*_LIST, *_NONE),
            "seed": _NUMBER,
        },
    ),
    "PerfusionConfig": Function(
        lambda place, **changed: PerfusionConfig(**changed),
        {
            name: _TEXT if one.type == "str" else (*_NUMBER, *_NONE) if "None" in one.type else _NUMBER
            for name, one in PerfusionConfig.__dataclass_fields__.items()
        },
    ),
    "covariance": Function(
        _covariance,
        {"pipe": (), "captions": _LIST, "positions": _TEXT, "ridge": _NUMBER, "cache": (*_PLACE, *_NONE)},
        {"captions": ("caption",)},
    ),
    "train_concepts": Function(
        _train,
        {
            "pipe": (),
            "subjects": (),
            "config": (),
            "metric": (),
            "checkpoint_path": (*_PLACE, *_NONE),
            "checkpoint_every": _NUMBER,
        },
        {"checkpoint_path": ("checkpoint",)},
    ),
}
