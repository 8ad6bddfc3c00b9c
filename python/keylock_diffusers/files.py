"""Writing a file whole or not at all, and reading one without trusting it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_atomically(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = True) -> None:
    """Write a file so that readers see the old one or the new one whole, and a failure leaves the old one.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False; also when it appeared meanwhile.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if overwrite or not _link_new(temporary, path):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def strict_json(text: str | bytes) -> Any:
    """Parse JSON without its loopholes: no NaN or infinity, no name twice.

    Raises:
        ValueError: the text is not that.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice in a JSON object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> int:
    """Write a safetensors file, whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        tensors: what it holds; moved to the CPU.
        facts: texts of its header.

    Returns:
        Its bytes.

    Raises:
        OSError: writing failed; what was there before is unchanged.
    """
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, dict(facts) if facts else None)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return len(data)


def read_tensors(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file's tensors and the texts of its header.

    Args:
        path: the file.
        wanted: which tensors to read, by name.

    Raises:
        ValueError: it is damaged or no safetensors file.
        OSError: it cannot be opened.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _link_new(temporary: Path, path: Path) -> bool:
    """Give a finished file its name unless the name is taken; False where the file system has no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "exists already", str(path)) from None
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists already", str(path)) from None
        return False
    return True
