"""An adapter as one file laid out as the tables of a pool want it, so that it is mapped and copied, never parsed again.

A safetensors file with one tensor for each dtype, in which tensors of one shape lie one after the other, in the model's
order: B transposed [r, O], A [r, ...], magnitudes [O], words' vectors [n, width]. So thousands of tensors are made in a
few calls. One text of its header says what lies where as JSON, with the rest that makes an adapter; another is the
SHA-256 of the whole file with zeros in its own place. That hash finds damage; who can write into the cache folder can
compute it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.files import strict_json, write_atomically
from keylock_diffusers.loras.adapter import Adapter, AdapterFacts, LearnedWord, LowRank
from keylock_diffusers.loras.model import ModelShapes
from keylock_diffusers.tensor_file import TensorFile, encoded_header

logger = logging.getLogger(__name__)
FORMAT = 1
_FIELDS, _HASH = "keylock_adapter", "sha256"
_NO_HASH = "0" * 64
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# The hash of a file that did not change is checked once in a process.
_checked: dict[str, Hashable] = {}
_lock = threading.Lock()


def packed_key(content: str, model: ModelShapes, max_error: float | None) -> str:
    """What a packed adapter is called: by what it was made of.

    Args:
        content: hash of the LoRA file.
        model: that it was read for.
        max_error: the truncation that was allowed.
    """
    made_of = f"{FORMAT}\n{content}\n{model.fingerprint}\n{max_error!r}"
    return hashlib.sha256(made_of.encode()).hexdigest()


def write_packed(path: str | os.PathLike[str], adapter: Adapter, key: str) -> None:
    """Write an adapter, whole or not at all; its folder, which is the user's own, is made if need be.

    Raises:
        OSError: writing failed.
    """
    groups: dict[tuple[Any, ...], list[Tensor]] = {}

    def put(tensor: Tensor, *, turned: bool = False) -> int:
        """The number of the tensor's group, in which they keep their order."""
        tensor = (tensor.t() if turned else tensor).detach().cpu()
        key = _NAMES[tensor.dtype], tuple(tensor.shape), turned
        groups.setdefault(key, []).append(tensor)
        return list(groups).index(key)

    fields: dict[str, Any] = {
        "key": key,
        "updates": [
            [
                [
                    name,
                    put(one.up, turned=True),
                    put(one.down),
                    None if one.magnitude is None else put(one.magnitude),
                    one.scale,
                    one.residual,
                ]
                for name, one in updates.items()
            ]
            for updates in (adapter.denoiser, *adapter.text_encoders)
        ],
        "words": [[key, word.name, [put(one) for one in word.vectors]] for key, word in adapter.words.items()],
        "facts": asdict(adapter.facts),
    }
    fields["groups"] = [[*key, len(tensors)] for key, tensors in groups.items()]
    flat = {
        dtype: torch.cat([one.reshape(-1) for tensors in groups.values() for one in tensors if one.dtype == dtype])
        for dtype in sorted({tensors[0].dtype for tensors in groups.values()}, key=lambda dtype: -dtype.itemsize)
    }
    texts = {_FIELDS: json.dumps(fields, separators=(",", ":")), _HASH: _NO_HASH}
    header = encoded_header(((_NAMES[dtype], dtype, (len(one),)) for dtype, one in flat.items()), texts)
    payload = [memoryview(one.view(torch.uint8).numpy()) for one in flat.values()]  # type: ignore[arg-type]
    digest = hashlib.sha256(header)
    for part in payload:
        digest.update(part)
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, [header.replace(_NO_HASH.encode(), digest.hexdigest().encode(), 1), *payload])


def read_packed(path: str | os.PathLike[str], key: str, *, pinned: bool = False) -> Adapter | None:
    """Read a packed adapter: its tensors are views of the file, whose numbers are not looked at.

    Args:
        path: the file.
        key: what `packed_key` said.
        pinned: read it into pinned memory instead, for a GPU.

    Returns:
        The adapter; None where there is no file, or it is damaged, or not what the key says.
    """
    try:
        with TensorFile(path) as file:
            return _read(file, key, pinned)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a file that somebody else wrote may lead to
        logger.info("the packed LoRA %s is made again: %s", path, error)
        return None


def _read(file: TensorFile, key: str, pinned: bool) -> Adapter:
    fields = strict_json(file.texts[_FIELDS])
    if fields["key"] != key:
        raise ValueError("it was made of something else")
    content = file.content(pinned=pinned)
    _check_hash(file, content)
    views, used = file.views(content), dict.fromkeys(file.tensors, 0)
    groups = []
    for dtype, shape, turned, count in fields["groups"]:
        part = views[dtype].narrow(0, used[dtype], count * prod(shape)).view(count, *shape)
        used[dtype] += part.numel()
        groups.append(iter((part.mT if turned else part).unbind()))
    if any(used[dtype] != len(view) for dtype, view in views.items()):
        raise ValueError("it holds more than it says")
    components = [
        {
            name: LowRank._checked(
                up=next(groups[up]),
                down=next(groups[down]),
                magnitude=None if magnitude is None else next(groups[magnitude]),
                scale=scale,
                residual=residual,
            )
            for name, up, down, magnitude, scale, residual in updates
        }
        for updates in fields["updates"]
    ]
    words = {
        key: LearnedWord(name, tuple(next(groups[one]) for one in vectors)) for key, name, vectors in fields["words"]
    }
    return Adapter(components[0], tuple(components[1:]), words, _facts(fields["facts"]))


def _check_hash(file: TensorFile, content: Tensor) -> None:
    """Once per process and file.

    Raises:
        ValueError: it does not match.
    """
    path, version = file.source, file.version
    with _lock:
        if _checked.get(path) == version:
            return
    data = memoryview(content.numpy())  # type: ignore[arg-type]
    said = file.texts[_HASH]
    digest = hashlib.sha256(bytes(data[: file.payload]).replace(said.encode(), _NO_HASH.encode(), 1))
    digest.update(data[file.payload :])
    if digest.hexdigest() != said:
        raise ValueError("its hash does not match")
    with _lock:
        _checked[path] = version


def _facts(fields: Mapping[str, Any]) -> AdapterFacts:
    """With tuples for JSON's lists, and numbers for its names."""
    found: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    found["ranks"] = {part: {int(rank): n for rank, n in counts.items()} for part, counts in fields["ranks"].items()}
    return AdapterFacts(**found)
