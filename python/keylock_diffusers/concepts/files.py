"""The concept file: one safetensors file whose header is checked completely before its tensors are read.

    8 bytes      header length, little endian
    header       JSON: every tensor's dtype, shape and place; `__metadata__` holds the fields of the concept (one
                 JSON object) and a checksum over them and the tensors
    payload      the tensors, one-dimensional, float16 or float32, without gaps

The checksum finds damage, such as a flipped bit on a disk. It is not a signature: whoever can write a file can
compute it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from keylock_diffusers.files import strict_json
from keylock_diffusers.ids import Kind
from keylock_diffusers.tensor_file import encoded_header

_FIELDS_KEY = "keylock_concept"
_CHECKSUM_KEY = "checksum"
_ITEM_BYTES = {"F16": 2, "F32": 4}
_DTYPE_NAMES = {torch.float16: "F16", torch.float32: "F32"}


class ConceptFileError(ValueError):
    """A concept file is damaged, is no concept file, or is of a version this release does not know."""


KIND = Kind("ConceptBank", "a concept", "alice/cat", most_bytes=16 << 20, most_header=1 << 20, error=ConceptFileError)
MAX_FILE_BYTES, MAX_HEADER_BYTES = KIND.most_bytes, KIND.most_header


@dataclass(frozen=True)
class TensorEntry:
    """What a header says about one tensor."""

    dtype: str
    length: int
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header; ``fields`` is JSON and its content is still to be judged by the caller."""

    fields: dict[str, Any]
    fields_text: str
    checksum: str
    tensors: dict[str, TensorEntry]
    payload_begin: int


def pack(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise JSON fields and one-dimensional tensors; the same input always gives the same bytes."""
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False)
    entries = [(name, _DTYPE_NAMES[tensor.dtype], tensor.numpy().tobytes()) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (-_ITEM_BYTES[entry[1]], entry[0]))
    header = encoded_header(
        ((name, tensors[name].dtype, tuple(tensors[name].shape)) for name, _, _ in entries),
        {_FIELDS_KEY: text, _CHECKSUM_KEY: _checksum(text, entries)},
    )
    return header + b"".join(raw for _, _, raw in entries)


def read_header(data: bytes, source: str, size: int | None = None) -> Header:
    """Check a file's header against its size, allocating nothing that the header asks for.

    Args:
        data: the file's content, or its beginning as `header_bytes` counts it.
        source: names it in errors.
        size: of the whole file; default that of ``data``.

    Raises:
        ConceptFileError: naming ``source`` and what is wrong.
    """
    size = len(data) if size is None else size
    if size > MAX_FILE_BYTES:
        raise KIND.too_large(source)
    try:
        return _read_header(data, size)
    except (ValueError, RecursionError) as error:
        raise ConceptFileError(f"{source}: {error or type(error).__name__}") from None


def read_tensors(data: bytes, header: Header, source: str) -> dict[str, Tensor]:
    """Read the tensors of a checked header.

    Raises:
        ConceptFileError: the checksum does not match, or safetensors refuses the file.
    """
    entries = [
        (name, entry.dtype, data[header.payload_begin + entry.begin : header.payload_begin + entry.end])
        for name, entry in header.tensors.items()
    ]
    if header.checksum != _checksum(header.fields_text, entries):
        raise ConceptFileError(f"{source}: the checksum does not match, so the file is damaged")
    try:
        return safetensors.torch.load(bytes(data))
    except safetensors.SafetensorError as error:
        raise ConceptFileError(f"{source}: {error}") from None


def _read_header(data: bytes, size: int) -> Header:
    if len(data) < 8:
        raise ValueError(f"too short for a safetensors file: {size} bytes")
    (length,) = struct.unpack_from("<Q", data)
    begin = 8 + length
    if length > MAX_HEADER_BYTES or begin > len(data):
        raise ValueError(
            f"the header's length of {length} bytes does not fit: the file has {size} bytes and a header at "
            f"most {MAX_HEADER_BYTES}"
        )
    try:
        header = strict_json(data[8:begin])
    except ValueError as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("not a concept file: its metadata is missing")
    if _FIELDS_KEY not in metadata or _CHECKSUM_KEY not in metadata:
        raise ValueError(f"not a concept file: its metadata has no {_FIELDS_KEY} or no {_CHECKSUM_KEY}")
    tensors = {name: _read_entry(name, entry) for name, entry in header.items()}
    _require_no_gaps(tensors, size - begin)
    try:
        fields = strict_json(metadata[_FIELDS_KEY])
    except ValueError as error:
        raise ValueError(f"the concept's fields are not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("the concept's fields are not a JSON object")
    return Header(fields, metadata[_FIELDS_KEY], metadata[_CHECKSUM_KEY], tensors, begin)


def _read_entry(name: str, entry: object) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name:.80}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"tensor {name:.80}: dtype must be one of {sorted(_ITEM_BYTES)}, got {dtype!r:.80}")
    if not _is_sizes(shape, 1):
        raise ValueError(f"tensor {name:.80}: shape must be one length, got {shape!r:.80}")
    if not _is_sizes(offsets, 2) or offsets[1] - offsets[0] != shape[0] * _ITEM_BYTES[dtype]:
        raise ValueError(
            f"tensor {name:.80}: data_offsets {offsets!r:.80} do not hold {str(shape[0])[:24]} values of {dtype}"
        )
    return TensorEntry(dtype, shape[0], offsets[0], offsets[1])


def _require_no_gaps(tensors: Mapping[str, TensorEntry], payload_bytes: int) -> None:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position or entry.end > payload_bytes:
            raise ValueError(
                f"tensor {name:.80}: data_offsets {[entry.begin, entry.end]!r:.80} overlap, leave a gap, or pass the "
                f"end of the {payload_bytes} bytes that follow the header"
            )
        position = entry.end
    if position != payload_bytes:
        raise ValueError(f"the tensors take {position} bytes, but {payload_bytes} follow the header")


def _is_sizes(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63 for size in value)
    )


def _checksum(fields_text: str, entries: list[tuple[str, str, bytes]]) -> str:
    digest = hashlib.sha256(fields_text.encode("utf-8", "surrogatepass"))
    for name, dtype, raw in sorted(entries):
        digest.update(f"\n{name} {dtype} {len(raw)}\n".encode("utf-8", "surrogatepass"))
        digest.update(raw)
    return digest.hexdigest()[:32]
