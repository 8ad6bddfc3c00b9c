"""Writing a file whole or not at all, and reading one without trusting it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_ABANDONED_SECONDS = 60


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | Sequence[bytes | memoryview],
    *,
    overwrite: bool = True,
    folder: int | None = None,
) -> None:
    """Write a file so that readers see the old one or the new one whole, and a failure leaves the old one.

    Args:
        path: the file.
        data: its content, whole or in parts.
        overwrite: whether it may exist.
        folder: an open folder that `path` is relative to; default the working folder.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False; also when it appeared meanwhile.
        OSError: writing failed, naming the file.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with _made(temporary, folder) as stream:
            _lock(stream.fileno())  # a sign of life to `sweep`
            stream.writelines([data] if isinstance(data, bytes) else data)
            stream.flush()
            os.fsync(stream.fileno())
            if overwrite or not _link_new(temporary, path, folder):
                os.replace(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):  # a full disk names no file
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)


def sweep(folder: int) -> None:
    """Delete what killed writers left half written in an open folder.

    A living writer's file is locked from the moment it was made; the minute covers that moment.
    """
    for name in os.listdir(folder):
        if not _TEMPORARY.fullmatch(name):
            continue
        with contextlib.suppress(OSError):
            held = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                if time.time() - os.fstat(held).st_mtime > _ABANDONED_SECONDS and _lock(held):
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(held)


@contextlib.contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold a file for this process, by a hidden lock file beside it; gives False where somebody else holds it.

    The operating system lets go when the process ends, however it ends.

    Raises:
        OSError: the lock file cannot be made, or the file system has no locks.
    """
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        mine = _lock(descriptor, strict=True) and _is_at(descriptor, lock)
        try:
            yield mine
        finally:
            if mine:
                with contextlib.suppress(OSError):
                    lock.unlink()
    finally:
        os.close(descriptor)


def require_place(path: str | os.PathLike[str], what: str) -> None:
    """Make sure, before the work, that a file can be written; its folder is made if need be.

    Args:
        path: the file.
        what: names it in errors, such as ``--output``.

    Raises:
        ValueError: it is a folder, or its folder cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{what} must be a file, got the folder {path}")
    try:
        try_place(path)
    except OSError as error:
        raise ValueError(f"{what}: {path} cannot be written: {error.strerror or error}") from error


def try_place(path: Path) -> None:
    """Does of `write_atomically` what leaves nothing; the file's folder is made if need be.

    Raises:
        OSError: a file of that name cannot be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _made(temporary) as stream:
            stream.write(b"0")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def open_regular(path: str | os.PathLike[str], *, flags: int = 0, folder: int | None = None) -> BufferedReader:
    """Open a regular file, which is looked at once it is open: a look at its path might see another file.

    Args:
        path: the file.
        flags: of `os.open` besides.
        folder: an open folder that `path` is relative to; default the working folder.

    Raises:
        ValueError: it is something else; a pipe is not waited for.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file")
    return open(descriptor, "rb")


def read_text(path: str | os.PathLike[str], most: int = 1 << 16) -> str:
    """A file of text in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        most: the bytes that it may have.

    Raises:
        ValueError: it is no regular file, larger, or not UTF-8, naming the file.
        OSError: it cannot be opened.
    """
    with open_regular(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} must have at most {most} bytes of text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, and byte {error.start} is not") from None


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


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, source: str = "") -> None:
    """That weights have the names and shapes of others, and are finite.

    Args:
        found: the weights.
        wanted: those whose shapes they must have.
        what: they are for, for errors.
        source: where they are from, such as " of FILE".

    Raises:
        ValueError: a name is missing or too many, or has another shape or a number that is not finite.
    """
    for name in sorted(wanted.keys() | found.keys()):
        shape = list(wanted[name].shape) if name in wanted else "absent"
        given = list(found[name].shape) if name in found else "nothing"
        if shape != given:
            raise ValueError(f"{what}: {name}{source} must be {shape}, got {given}")
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{what}: {name}{source} must be finite, got NaN or infinity")


def keep_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, str], what: str
) -> bool:
    """`write_tensors` for what is kept to save time: a disk that is full or read-only costs a warning, not the work.

    Args:
        path: the file.
        tensors: what it holds.
        facts: texts of its header.
        what: names it in the warning.

    Returns:
        Whether it was written.
    """
    try:
        write_tensors(path, tensors, facts)
    except (OSError, SafetensorError) as error:
        logger.warning("%s %s cannot be written (%s); the work goes on without it", what, path, error)
        return False
    return True


def cache_folder(name: str = "") -> Path:
    """Where files are kept that save time: a folder in ``$KEYLOCK_CACHE``, in ``keylock`` of ``$XDG_CACHE_HOME``, or in
    ``~/.cache/keylock``."""
    if own := os.environ.get("KEYLOCK_CACHE"):
        return Path(own).expanduser() / name
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "keylock" / name


def _temporary(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _made(temporary: Path, folder: int | None = None) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return open(os.open(temporary, flags, 0o666, dir_fd=folder), "wb")


def _lock(descriptor: int, *, strict: bool = False) -> bool:
    """Take an open file's lock, without waiting for it; it ends with the last descriptor.

    A file system without locks counts as locked, or raises if `strict`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        if strict:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _link_new(temporary: Path, path: Path, folder: int | None) -> bool:
    """Give a finished file its name unless the name is taken; False where the file system has no hard links."""
    try:
        os.link(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "exists already", str(path)) from None
    except OSError:
        try:
            os.stat(path, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        raise FileExistsError(errno.EEXIST, "exists already", str(path)) from None
    return True
