"""Where a bank's files are: a folder of this machine, or any file system that fsspec can open."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from io import BufferedReader
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from keylock_diffusers.files import open_regular, sweep, write_atomically
from keylock_diffusers.ids import SUFFIX, Kind

_FIRST_BYTES = 8 << 10  # of a file, which hold most headers
_SWEEP_SECONDS = 600
_ATTEMPTS = 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What fsspec's file systems call the time or version of a file.
_VERSION_KEYS = (
    "mtime", "modified", "LastModified", "last_modified", "updated", "created", "ino",
    "etag", "ETag", "md5", "md5Hash", "checksum", "generation", "version_id", "VersionId",
)  # fmt: skip
# A URL's user and password; where the password has a slash, all up to the last @.
_CREDENTIALS = re.compile(r"//(?:[^/@]*@|[^/@]*:.*@)")


class Place(Protocol):
    """What a bank needs of a file system; paths are relative to it, with forward slashes."""

    shown: str  # for people, without credentials

    def exists(self) -> bool: ...
    def version(self, path: str) -> Hashable | None: ...  # changes with the content; None if that cannot be told
    def read(self, path: str) -> tuple[bytes, Hashable | None]: ...  # and its version
    def header(self, path: str) -> tuple[bytes, int]: ...  # a safetensors file's, and the file's size
    def write(self, path: str, data: bytes, *, overwrite: bool) -> None: ...
    def delete(self, path: str) -> None: ...
    def paths(self) -> Iterator[str]: ...
    def describe(self, path: str) -> str: ...


class LocalPlace:
    """A folder of this machine. Links may stand for files inside of it; nothing outside is touched.

    Every folder on the way to a file is opened from the one above and never through a link, so that one which is
    exchanged for a link meanwhile leads nowhere.
    """

    def __init__(self, root: str, kind: Kind) -> None:
        self._kind = kind
        self.root = self.shown = os.path.abspath(os.path.expanduser(root))
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise ValueError(f"{self._kind.bank}: path_or_url must be a folder, got the file {self.root}")
        self._swept: dict[str, float] = {}

    def exists(self) -> bool:
        return os.path.isdir(self.root)

    def version(self, path: str) -> Hashable:
        *folders, name = path.split("/")
        with self._named(path), self._folder(folders) as folder:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            with self._open(path) as stream:
                return _version(stream)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(path)
        return _version_of(status)

    def read(self, path: str) -> tuple[bytes, Hashable]:
        with self._named(path), self._open(path) as stream:
            data = stream.read(self._kind.most_bytes + 1)
            if len(data) > self._kind.most_bytes:
                raise self._kind.too_large(self.describe(path))
            return data, _version(stream)

    def header(self, path: str) -> tuple[bytes, int]:
        with self._named(path), self._open(path) as stream:
            data = stream.read(_FIRST_BYTES)
            data += stream.read(max(0, _header_bytes(data, self._kind) - len(data)))
            return data, os.fstat(stream.fileno()).st_size

    def write(self, path: str, data: bytes, *, overwrite: bool) -> None:
        *folders, name = path.split("/")
        os.makedirs(self.root, exist_ok=True)
        for attempt in range(_ATTEMPTS):
            try:
                with self._named(path), self._folder(folders, make=True) as folder:
                    self._sweep(folders, folder)
                    write_atomically(name, data, overwrite=overwrite, folder=folder)
                return
            except FileNotFoundError:  # the folder was empty, and a `delete` took it away
                if attempt + 1 == _ATTEMPTS:
                    raise

    def delete(self, path: str) -> None:
        *folders, name = path.split("/")
        with self._named(path), self._folder(folders) as folder:
            os.unlink(name, dir_fd=folder)
            self._sweep(folders, folder)
        with contextlib.suppress(OSError):  # the first that is not empty
            while folders:
                emptied = folders.pop()
                with self._folder(folders) as folder:
                    os.rmdir(emptied, dir_fd=folder)

    def paths(self) -> Iterator[str]:
        return self._below([])

    def describe(self, path: str) -> str:
        return os.path.join(self.root, path)

    @contextlib.contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """Errors name the whole path: files are opened by their names in open folders."""
        try:
            yield
        except OSError as error:
            error.filename = self.describe(path)
            raise

    def _below(self, folders: list[str]) -> Iterator[str]:
        inner = []
        try:
            with self._folder(folders) as folder, os.scandir(folder) as entries:
                for entry in entries:
                    path = "/".join([*folders, entry.name])
                    if entry.is_dir(follow_symlinks=False):
                        inner.append(entry.name)
                    elif entry.name.endswith(SUFFIX) and (
                        entry.is_file(follow_symlinks=False) or (entry.is_symlink() and self._readable(path))
                    ):
                        yield path
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            if not folders:
                raise
            return  # one folder that cannot be read hides no other
        if len(folders) + 1 < self._kind.depth:
            for name in sorted(inner):
                yield from self._below([*folders, name])

    def _readable(self, path: str) -> bool:
        try:
            self._open(path).close()
        except (OSError, ValueError):
            return False
        return True

    def _sweep(self, folders: Sequence[str], folder: int) -> None:
        """Now and then, since a folder may hold very many files."""
        name, now = "/".join(folders), time.monotonic()
        if now - self._swept.get(name, -_SWEEP_SECONDS) < _SWEEP_SECONDS:
            return
        if len(self._swept) >= 1000:
            self._swept.clear()
        self._swept[name] = now
        sweep(folder)

    def _open(self, path: str) -> BufferedReader:
        try:
            return self._open_unlinked(path)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        root, real = os.path.realpath(self.root), os.path.realpath(os.path.join(self.root, path))
        if os.path.commonpath([root, real]) != root:
            raise ValueError(f"{self._kind.bank}: {path} is a symbolic link that leads out of the bank")
        try:
            return self._open_unlinked(os.path.relpath(real, root))
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise ValueError(f"{self._kind.bank}: {path} is a symbolic link that leads nowhere") from None

    def _open_unlinked(self, path: str) -> BufferedReader:
        *folders, name = path.split("/")
        with self._folder(folders) as folder:
            try:
                return open_regular(name, flags=os.O_NOFOLLOW, folder=folder)
            except ValueError:
                raise FileNotFoundError(path) from None  # a folder, say, which is no file

    @contextlib.contextmanager
    def _folder(self, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """An open folder below the root, which itself may be a link.

        Raises:
            ValueError: one on the way is a link.
            FileNotFoundError, NotADirectoryError: one is not there, or a file is.
        """
        opened = os.open(self.root, _FOLDER)
        try:
            for name in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=opened)
                try:
                    inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=opened)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, opened):
                        raise ValueError(
                            f"{self._kind.bank}: {'/'.join(folders)} is or lies behind a symbolic link, which a bank "
                            "does not follow"
                        ) from None
                    raise
                os.close(opened)
                opened = inner
            yield opened
        finally:
            os.close(opened)


class RemotePlace:
    """Any other fsspec file system. Files are put whole, which object stores do atomically."""

    def __init__(self, file_system: fsspec.AbstractFileSystem, root: str, url: str, kind: Kind) -> None:
        self._kind, self._file_system = kind, file_system
        self._root = root.rstrip("/")
        self.shown = _shown(url)

    def exists(self) -> bool:
        return bool(self._file_system.exists(self._root))

    def version(self, path: str) -> Hashable | None:
        return _version_in(self._info(path))

    def read(self, path: str) -> tuple[bytes, Hashable | None]:
        before, most = self._info(path), self._kind.most_bytes
        size = before.get("size")
        if size is None or size <= most:
            data = self._file_system.cat_file(self._full(path), 0, most + 1)
            size = len(data)
        if size > most:
            raise self._kind.too_large(self.describe(path))
        version = _version_in(before)
        return data, version if version == self.version(path) else None

    def header(self, path: str) -> tuple[bytes, int]:
        size = self._info(path).get("size")
        if size is None:
            data, _ = self.read(path)
            return data, len(data)
        data = self._file_system.cat_file(self._full(path), 0, min(size, _FIRST_BYTES))
        needed = _header_bytes(data, self._kind)
        if needed > len(data) < size:
            data = self._file_system.cat_file(self._full(path), 0, min(size, needed))
        return data, size

    def write(self, path: str, data: bytes, *, overwrite: bool) -> None:
        full = self._full(path)
        if not overwrite and self._exists(path):
            raise FileExistsError(self.describe(path))
        self._file_system.makedirs(full.rpartition("/")[0], exist_ok=True)
        self._file_system.pipe_file(full, data)

    def delete(self, path: str) -> None:
        self._info(path)
        self._file_system.rm_file(self._full(path))

    def paths(self) -> Iterator[str]:
        self._file_system.invalidate_cache()
        try:
            found = self._file_system.find(self._root, maxdepth=self._kind.depth)
        except FileNotFoundError:
            return
        prefix = f"{self._root}/".lstrip("/")
        for full in found:
            relative = full.lstrip("/").removeprefix(prefix)
            if relative.endswith(SUFFIX):
                yield relative

    def describe(self, path: str) -> str:
        return f"{self.shown.rstrip('/')}/{path}"

    def _exists(self, path: str) -> bool:
        try:
            self._info(path)
        except FileNotFoundError:
            return False
        return True

    def _info(self, path: str) -> dict[str, Any]:
        full = self._full(path)
        # Listings are cached by many file systems; another process may have replaced the file since.
        self._file_system.invalidate_cache(full.rpartition("/")[0])
        info = self._file_system.info(full)
        if info.get("type", "file") != "file":
            raise FileNotFoundError(self.describe(path))
        return info

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


def open_place(path_or_url: str, kind: Kind) -> Place:
    """A folder, or what an fsspec URL names.

    Args:
        path_or_url: the place.
        kind: what lies there. A file that is larger than its kind may be raises the kind's error.

    Raises:
        ValueError: it is a file, or nothing here can open such a URL.
    """
    try:
        file_system, root = fsspec.core.url_to_fs(path_or_url)
    except (ImportError, ValueError) as error:
        # fsspec's own message names the package that is missing.
        raise ValueError(f"{kind.bank}: path_or_url {_shown(path_or_url):.120} cannot be opened: {error}") from error
    if isinstance(file_system, LocalFileSystem):
        return LocalPlace(root, kind)
    return RemotePlace(file_system, root, path_or_url, kind)


def _header_bytes(data: bytes, kind: Kind) -> int:
    """How many bytes of a safetensors file its header takes, by the first 8 of them."""
    return 8 + min(int.from_bytes(data[:8], "little"), kind.most_header)


def _shown(url: str) -> str:
    """A URL without its credentials."""
    return _CREDENTIALS.sub("//", url).partition("?")[0]


def _version_in(info: Mapping[str, Any]) -> Hashable | None:
    """What fsspec's description of a file says of its version; None if it says nothing."""
    found = tuple((key, str(info[key])) for key in _VERSION_KEYS if info.get(key) is not None)
    return (info.get("size"), *found) if found else None


def _version(stream: BufferedReader) -> Hashable:
    return _version_of(os.fstat(stream.fileno()))


def _version_of(status: os.stat_result) -> Hashable:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False
