"""Concept files that are damaged, or that somebody made so: the concept that was saved, or a ConceptFileError."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from keylock_diffusers.concepts import Concept, ConceptBank, ConceptFileError
from keylock_diffusers.concepts.files import _checksum, read_header, read_tensors
from tests.diffusers.conftest import make_added
from tests.diffusers.test_concept_file import BASE, make_concept
from tests.hostile.values import json_value, told

LONG = 80_000
KINDS = ("bytes", "header", "fields, sealed", "tensors, sealed", "both, sealed")


class Saved:
    """A concept's file before anything was done to it."""

    def __init__(self, concept: Concept) -> None:
        self.digest, self.data = concept.digest, concept.to_bytes()
        self.header = read_header(self.data, "")
        self.tensors = read_tensors(self.data, self.header, "")
        self.begin = self.header.payload_begin


SAVED = (
    Saved(make_concept()),
    Saved(make_added(BASE, keys=1, start=0.25)),
    Saved(make_added(BASE, keys=1, start=0.25).with_(word_embeddings=())),
)


@dataclass(frozen=True)
class Case:
    """A file's bytes; `sealed` where its checksum was computed anew, so that whatever it says is vouched for."""

    name: str
    data: bytes
    sealed: bool


def make(rng: Random) -> Case:
    kind, saved = rng.choice(KINDS), rng.choice(SAVED)
    if kind == "bytes":
        return Case(kind, _damaged(rng, saved.data), False)
    if kind == "header":
        return Case(kind, _with_header(rng, saved), False)
    fields, tensors = dict(saved.header.fields), dict(saved.tensors)
    if kind != "tensors, sealed":
        for _ in range(rng.randint(1, 3)):
            _change(rng, fields)
    if kind != "fields, sealed":
        for _ in range(rng.randint(1, 3)):
            _disturb(rng, tensors)
    return Case(kind, _sealed(rng, fields, tensors), True)


def check(case: Case, place: Path) -> str:
    """As bytes, as a file and through a bank; all three agree."""
    (place / "alice").mkdir(exist_ok=True)
    file = place / "alice" / "cat.safetensors"
    file.write_bytes(case.data)
    outcomes = [
        _loaded(lambda: Concept.load(case.data), "concept file: "),
        _loaded(lambda: Concept.load(file), str(file)),
        _loaded(lambda: ConceptBank(place)["alice/cat"], ""),
    ]
    digests = [one if isinstance(one, str) else one.digest for one in outcomes]
    assert len({*digests}) == 1, f"bytes, file and bank differ: {digests}"
    concept = outcomes[0]
    if isinstance(concept, str):
        return concept
    if concept.digest in {saved.digest for saved in SAVED}:
        return "accepted, same content"
    assert case.sealed, "a damaged file was taken for another concept"
    assert all(tensor.isfinite().all() for tensor in concept.tensors.values()), "not finite"
    assert Concept.load(concept.to_bytes()).digest == concept.digest, "does not come back as it was saved"
    return "accepted, other content"


def _loaded(load: Any, source: str) -> Concept | str:
    try:
        return load()
    except ConceptFileError as error:
        assert str(error).startswith(source), f"names no {source}: {str(error):.200}"
        return told(error)


def _damaged(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        at = rng.randrange(len(changed) + 1) if changed else 0
        some = rng.randrange(1, 65)
        action = rng.randrange(7)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif action == 2:
            del changed[at:]
        elif action == 3:
            del changed[at : at + some]
        elif action == 4:
            changed[at:at] = _bytes(rng, some)
        elif action == 5:
            changed[at : at + some] = bytes(some)
        else:
            changed[at:at] = changed[at : at + some]
    return bytes(changed)


def _with_header(rng: Random, saved: Saved) -> bytes:
    data, begin = saved.data, saved.begin
    if rng.randrange(6) == 0:  # the length alone
        length = rng.choice((0, 1, begin - 9, begin - 7, len(data), 2**20, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + data[8:]
    header = json.loads(data[8:begin])
    for _ in range(rng.randint(1, 3)):
        _edit(rng, header)
    text = _text(rng, header)
    return struct.pack("<Q", len(text)) + text + data[begin:]


def _edit(rng: Random, header: dict[str, Any]) -> None:
    name = rng.choice(sorted(header) or ["values"])
    entry = header.get(name)
    action = rng.randrange(6)
    if action == 0:
        header.pop(name, None)
    elif action == 1:
        header[rng.choice(("evil", "__metadata__", "../x", "values ", name))] = json_value(rng)
    elif action == 2 or not isinstance(entry, dict) or not entry:
        header[name] = json_value(rng)
    elif action == 3:
        entry[rng.choice(sorted(entry))] = json_value(rng)
    elif name != "__metadata__" and isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
        entry["data_offsets"][rng.randrange(len(entry["data_offsets"]))] = rng.choice(
            (-1, 0, 3, 2**40, 2**64, 1.0, True)
        )
    else:
        entry[rng.choice(("dtype", "shape", "keylock_concept", "checksum"))] = rng.choice(
            ("F64", "I8", "BOOL", [0], [1, 5], [2**62], [], "0" * 32, "{}")
        )


def _change(rng: Random, fields: dict[str, Any]) -> None:
    """One of the fields, or of what it holds at any depth."""
    holder: Any = fields
    key: Any = rng.choice([*sorted(fields), "new"])
    while rng.randrange(3) and isinstance(holder, (dict, list)) and key != "new":
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        holder[key] = inner = inner.copy()  # the original is shared by all cases
        holder, key = inner, rng.choice(sorted(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
    if isinstance(holder, dict) and rng.randrange(8) == 0:
        holder.pop(key, None)
    else:
        holder[key] = _alike(rng, holder[key]) if isinstance(holder, list) or key in holder else json_value(rng)


def _alike(rng: Random, value: Any) -> Any:
    """Mostly a value of the same type, as one who knows the format would put there."""
    if rng.randrange(3) == 0:
        return json_value(rng)
    if isinstance(value, str):
        return rng.choice(
            ("<bob-dog>", "dog", "a dog", value.upper(), value[:-1], value * 2, f"{value} ", value.replace("=", "=0"))
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return rng.choice((value + 1, -value, value / 3, value * 1e30, 0.3, 1e-300, int(value)))
    return json_value(rng)


def _disturb(rng: Random, tensors: dict[str, Any]) -> None:
    name = rng.choice(sorted(tensors) or ["values"])
    tensor = tensors.get(name)
    action = rng.randrange(12)
    if action == 0 or tensor is None:
        tensors.pop(name, None)
    elif action == 1:
        tensors[rng.choice(("evil", "word_embedding.2", "word_embedding.01", "../x"))] = tensor
    elif action == 2:
        tensors[name] = tensor.to(rng.choice((torch.float16, torch.float32)))
    elif action == 3:
        tensors[name] = torch.cat([tensor, tensor])[: rng.choice((0, 1, len(tensor) - 1, len(tensor) + 1)) or 0]
    else:
        changed = tensor.clone()
        if len(changed):
            special = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 65504.0, 1e-7, 0.5, -3.0, 3.4e38)
            changed[rng.randrange(len(changed))] = rng.choice(special)
        tensors[name] = changed


def _sealed(rng: Random, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    """A file whose checksum is right, whatever it says; what JSON has no word for goes in as Python writes it."""
    text = _text(rng, fields).decode("utf-8", "surrogatepass")
    names = {torch.float16: "F16", torch.float32: "F32"}
    entries = [(name, names[tensor.dtype], tensor.numpy().tobytes()) for name, tensor in tensors.items()]
    header: dict[str, Any] = {"__metadata__": {"keylock_concept": text, "checksum": _checksum(text, entries)}}
    begin = 0
    for name, dtype, raw in entries:
        size = 8 * len(raw) // int(dtype[1:])
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [begin, begin + len(raw)]}
        begin += len(raw)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(raw for _, _, raw in entries)


def _text(rng: Random, value: Any) -> bytes:
    """JSON, now and then with a name twice or nested deeply."""
    text = json.dumps(value)
    trick = rng.randrange(20)
    if trick == 0 and text.endswith("}") and len(text) > 2:
        text = f"{text[:-1]}, {text[1:-1].split(', ')[0]}}}"
    elif trick == 1:
        text = f'{{"a": {"[" * 3000}{"]" * 3000}, {text[1:]}'
    return text.encode("utf-8", "surrogatepass")


def _bytes(rng: Random, count: int) -> bytes:
    return np.random.default_rng(rng.getrandbits(32)).bytes(count)
