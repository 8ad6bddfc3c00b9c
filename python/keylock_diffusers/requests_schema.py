"""The JSON Schema of a list of requests, made from the classes that read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from keylock_diffusers.requests import (
    ENDINGS,
    LISTS,
    LOCKS,
    NAMED,
    PICTURES,
    TENSORS,
    Attention,
    ImagePrompt,
    Lora,
    Request,
)

_SCALARS = {str: "string", int: "integer", float: "number", NoneType: "null"}
_CHOICES = {"endings": ENDINGS, "lock": LOCKS}


def schema() -> dict[str, Any]:
    """What `Request.from_json` reads, as JSON Schema (draft 2020-12) of a list of it."""
    kinds = (Request, *dict.fromkeys(LISTS.values()), Attention)
    picture = {"type": "string", "description": "A picture's file, named from the folder of the file of requests."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Requests of keylock generate",
        "type": "array",
        "items": _reference(Request),
        "$defs": {"Picture": picture, **{kind.__name__: _object(kind) for kind in kinds}},
    }


def _object(kind: type) -> dict[str, Any]:
    hints, meanings = get_type_hints(kind), _arguments(kind)
    properties, required = {}, []
    for field in fields(kind):
        if field.name.endswith(TENSORS):
            continue
        described = {**_value(kind, field.name, hints[field.name]), "description": meanings[field.name]}
        if field.default is MISSING or (kind is Request and field.name == "prompt"):  # JSON has no encodings
            required.append(field.name)
        elif field.default is not None:
            described["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        if field.default is None and hints[field.name] is Any:
            described["anyOf"] = [*described["anyOf"], {"type": "null"}]
        properties[field.name] = described
    return {
        "type": "object",
        "description": cleandoc(kind.__doc__ or "").splitlines()[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _value(kind: type, name: str, hint: Any) -> dict[str, Any]:
    """What a field may hold."""
    if kind is Request and name in LISTS:
        item = _reference(LISTS[name])
        return {"type": "array", "items": {"anyOf": [{"type": "string"}, item]} if LISTS[name] in NAMED else item}
    if name in PICTURES:
        picture = {"$ref": "#/$defs/Picture"}
        several = [{"type": "array", "items": picture}] if kind is ImagePrompt and name == "image" else []
        seen = [_reference(Attention)] if kind is Lora and name == "region" else []
        return {"anyOf": [picture, *several, *seen]}
    if name in _CHOICES:
        return {"enum": list(_CHOICES[name])}
    return {"type": "string"} if hint is Any else _typed(hint)  # the former: a concept's id


def _typed(hint: Any) -> dict[str, Any]:
    kind, inner = get_origin(hint), get_args(hint)
    if kind is UnionType:
        scalars = [_SCALARS[member] for member in inner if member in _SCALARS]
        return {"type": scalars} if len(scalars) == len(inner) else {"anyOf": [_typed(member) for member in inner]}
    if kind is tuple:
        return {"type": "array", "items": _typed(inner[0]), "minItems": len(inner), "maxItems": len(inner)}
    if kind is None:
        return {"type": _SCALARS[hint]}
    return {"type": "object"} if issubclass(kind, Mapping) else {"type": "array", "items": _typed(inner[0])}


def _reference(kind: type) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _arguments(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each of its arguments, by name."""
    section = cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2]
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", section, re.M):
        found.update(dict.fromkeys(names.split(", "), " ".join(meaning.split())))
    return found
