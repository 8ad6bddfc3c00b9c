"""Opening files that hold LoRAs or embeddings: safetensors only, since reading a pickle runs what is in it."""

from __future__ import annotations

import os
from io import BufferedIOBase

import torch
from torch import Tensor

from keylock_diffusers.checks import path_text
from keylock_diffusers.files import open_regular
from keylock_diffusers.loras.adapter import LoraFileError
from keylock_diffusers.tensor_file import TensorFile

_PICKLED_NAMES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def open_tensors(
    path: str | os.PathLike[str], stream: BufferedIOBase | None = None, size: int | None = None
) -> TensorFile:
    """Open a safetensors file, to be closed by the caller.

    Args:
        path, stream, size: as of `TensorFile`.

    Raises:
        LoraFileError: it is a pickle, by its name or its content, or no whole safetensors file.
        OSError: it cannot be opened.
    """
    source = path_text(path, "path")
    try:
        stream = open_regular(source) if stream is None else stream
        if source.lower().endswith(_PICKLED_NAMES) or _is_pickle(stream.read(9)):
            stream.close()
            raise ValueError(
                f"{source}: a pickle, and reading one runs whatever code is in it; only safetensors files are read, "
                f"which safetensors.torch.save_file makes of it where its author is trusted"
            )
        return TensorFile(source, stream, size)
    except ValueError as error:
        raise LoraFileError(str(error)) from None


def read_finite(file: TensorFile, key: str) -> Tensor:
    """A tensor of an open file: float8 becomes float16, which holds every value of it, and float64 float32.

    Raises:
        LoraFileError: it is no floating-point tensor, or holds a NaN or an infinity.
    """
    tensor = file.read(key)
    if not tensor.is_floating_point():
        raise LoraFileError(f"{file.source}: {key:.200} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.itemsize == 1:
        tensor = tensor.half()
    elif tensor.itemsize == 8:
        tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise LoraFileError(f"{file.source}: {key:.200} holds a NaN or an infinity")
    return tensor


def _is_pickle(begin: bytes) -> bool:
    """Whether a file begins as a pickle, or as the zip archive in which torch.save puts one."""
    safetensors = begin[8:] == b"{"
    return not safetensors and (begin[:2] == b"PK" or (begin[:1] == b"\x80" and begin[1:2] in b"\x02\x03\x04\x05"))
