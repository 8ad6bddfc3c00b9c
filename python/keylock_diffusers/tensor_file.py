"""Reading a safetensors file of anybody's without trusting it, and the header of one that is written."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from math import prod

import torch
from torch import Tensor

from keylock_diffusers.files import open_regular, strict_json

_MAX_HEADER_BYTES = 32 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says about one tensor; its bytes lie at `begin` of the payload."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file that is open: its header is checked completely against the file's size, its tensors are read
    one by one when asked for, all from the file that was opened.

    Args:
        path: the file.
        stream: it, or its header at least, where it is open already; closed with this.
        size: of the whole file; default that of the file or the stream.

    Raises:
        ValueError: it is no regular file, or its header is damaged or does not fit its size.
        OSError: it cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], stream: BufferedIOBase | None = None, size: int | None = None
    ) -> None:
        self.source = os.fspath(path)
        self._stream = open_regular(path) if stream is None else stream
        try:
            size = self._stream.seek(0, os.SEEK_END) if size is None else size
            self._stream.seek(0)
            self.tensors, self.texts, self.payload = _read_header(self._stream, size)
        except (ValueError, RecursionError) as error:
            self._stream.close()
            raise ValueError(f"{self.source}: {error or type(error).__name__}") from None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    @property
    def version(self) -> Hashable:
        """Of a file that was opened by its path: another where it was written to."""
        status = os.fstat(self._stream.fileno())
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size

    def read(self, name: str) -> Tensor:
        """One tensor, of the dtype and shape that the header says.

        Raises:
            KeyError: there is none of that name.
            ValueError: the file has become shorter since.
        """
        stored = self.tensors[name]
        data = bytearray(stored.end - stored.begin)
        self._stream.seek(self.payload + stored.begin)
        if self._stream.readinto(data) != len(data):
            raise ValueError(f"{self.source}: ends within {name:.80}")
        flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
        return flat.reshape(stored.shape)

    def content(self, *, pinned: bool = False) -> Tensor:  # [size] uint8
        """The file's bytes without a copy: a map of the file, which must not shrink as long; writing changes no file.

        Args:
            pinned: read them into pinned memory instead, from where a GPU fetches them fastest.
        """
        size = os.fstat(self._stream.fileno()).st_size
        if not pinned:
            return torch.frombuffer(mmap.mmap(self._stream.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        content = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._stream.seek(0)
        if self._stream.readinto(memoryview(content.numpy())) != size:  # type: ignore[arg-type]
            raise ValueError(f"{self.source}: has become shorter")
        return content

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """Every tensor as a view of the file's content.

        Raises:
            ValueError: one does not begin at a multiple of its numbers' size.
        """
        flat: dict[torch.dtype, Tensor] = {}
        found = {}
        for name, stored in self.tensors.items():
            size = stored.dtype.itemsize
            if stored.dtype not in flat:
                whole = (len(content) - self.payload) // size * size
                if self.payload % size:
                    raise ValueError(f"{self.source}: the payload is not aligned")
                flat[stored.dtype] = content[self.payload : self.payload + whole].view(stored.dtype)
            if stored.begin % size:
                raise ValueError(f"{self.source}: {name:.80} is not aligned")
            found[name] = flat[stored.dtype][stored.begin // size : stored.end // size].view(stored.shape)
        return found


def encoded_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], texts: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with; its payload is the tensors' bytes, one after the other.

    Args:
        tensors: names, dtypes and shapes, in their order; wide ones first keeps all aligned.
        texts: of the header.
    """
    # The library writes texts in the order of a hash map; here the same input gives the same bytes.
    header: dict[str, object] = {"__metadata__": dict(texts)} if texts else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _read_header(stream: BufferedIOBase, size: int) -> tuple[dict[str, StoredTensor], dict[str, str], int]:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            f"no safetensors file: a header of {length} bytes does not fit, the file has {size} and a header at most "
            f"{_MAX_HEADER_BYTES}"
        )
    try:
        header = strict_json(stream.read(length))
    except ValueError as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("the header's __metadata__ must hold texts")
    tensors = {name: _stored(name, entry) for name, entry in header.items()}
    position = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != position:
            raise ValueError(f"tensor {name:.80}: overlaps another, or leaves a gap")
        position = stored.end
    if position != size - 8 - length:
        raise ValueError(f"the tensors take {position} bytes, but {size - 8 - length} follow the header")
    return tensors, texts, 8 + length


def _stored(name: str, entry: object) -> StoredTensor:
    def sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name:.80}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name:.80}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.80}")
    if not sizes(shape) or len(shape) > 8:
        raise ValueError(f"tensor {name:.80}: shape must be at most 8 lengths, got {shape!r:.80}")
    if not sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name:.80}: data_offsets {offsets!r:.80} do not hold {shape!r:.80} values of {dtype}")
    return StoredTensor(_DTYPES[dtype], tuple(shape), *offsets)
