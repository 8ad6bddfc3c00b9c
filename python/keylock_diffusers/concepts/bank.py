"""Many concepts in one place: a folder, or any file system that fsspec can open."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from keylock_diffusers.concepts.concept import Concept
from keylock_diffusers.concepts.files import MAX_FILE_BYTES, ConceptFileError, read_bounded
from keylock_diffusers.files import write_atomically

_SUFFIX = ".safetensors"
_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MAX_SEGMENTS = 4
_MAX_SEGMENT = 100
_SUGGESTIONS_AMONG = 1000
# What fsspec's file systems call the time or version of a file.
_VERSION_KEYS = (
    "mtime", "modified", "LastModified", "last_modified", "updated", "created", "ino",
    "etag", "ETag", "md5", "md5Hash", "checksum", "generation", "version_id", "VersionId",
)  # fmt: skip


class UnknownConceptError(KeyError):
    """A bank has no concept of that id."""

    def __str__(self) -> str:
        return str(self.args[0])


class ConceptBank(Mapping[str, Concept]):
    """Concepts by id, such as ``alice/cat``, stored as ``<root>/alice/cat.safetensors``.

    An id has 1 to 4 segments of lower-case letters, digits, ``.``, ``_`` and ``-``, each starting with a letter or
    digit; ids come from requests, so nothing else reaches the file system, and a symbolic link cannot lead out of
    the root. Reading keeps the most recently used concepts in memory and reads a file again when it was replaced,
    by this process or another. A bank may be shared by threads.

    Args:
        path_or_url: a folder, which need not exist yet, or an fsspec URL such as ``s3://bucket/concepts``.
        cache_size: how many concepts stay in memory, about 40 KB each on Stable Diffusion 1.5.

    Example:
        >>> bank = ConceptBank("memory://doctest-concepts")
        >>> "alice/cat" in bank, len(bank)
        (False, 0)
    """

    def __init__(self, path_or_url: str | os.PathLike[str], *, cache_size: int = 1024) -> None:
        self._files = _open_files(os.fspath(path_or_url))
        self._cache_size = cache_size
        self._cache: OrderedDict[str, tuple[Hashable, Concept]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, concept_id: str) -> Concept:
        """Read a concept.

        Raises:
            UnknownConceptError: there is none of that id; a KeyError that lists ids like it.
            ConceptFileError: its file is damaged.
            ValueError: the id is not one, or its file lies outside the bank.
        """
        path = _path_of(concept_id)
        try:
            version = self._files.version(path)
            with self._lock:
                cached = self._cache.get(concept_id)
                if cached is not None and version is not None and cached[0] == version:
                    self._cache.move_to_end(concept_id)
                    return cached[1]
            concept = Concept.from_bytes(self._files.read(path), source=self._files.describe(path))
            unchanged = version is not None and self._files.version(path) == version
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownConceptError(self._unknown(concept_id)) from None
        if unchanged:
            self._remember(concept_id, version, concept)
        return concept

    def __contains__(self, concept_id: object) -> bool:
        try:
            self._files.version(_path_of(concept_id))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """All ids, sorted."""
        return iter(sorted(self._ids()))

    def __len__(self) -> int:
        return sum(1 for _ in self._ids())

    def __repr__(self) -> str:
        return f"ConceptBank({self._files.root!r})"

    # A bank is a place, not a value: Mapping's comparison would read every file.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def add(self, concept_id: str, concept: Concept, *, overwrite: bool = False) -> None:
        """Store a concept; readers see the old file or the new one, never a part.

        On a remote file system the file is put as one object; two processes that add the same new id at the same
        time may there both succeed.

        Raises:
            ValueError: the id is not one, or exists and ``overwrite`` is False.
            OSError: writing failed; what was stored before is unchanged.
        """
        path = _path_of(concept_id)
        if not isinstance(concept, Concept):
            raise TypeError(f"ConceptBank.add: concept must be a Concept, got {type(concept).__name__}")
        try:
            self._files.write(path, concept.to_bytes(), overwrite=overwrite)
        except FileExistsError:
            raise ValueError(
                f"ConceptBank.add: {concept_id} exists already; pass overwrite=True to replace it"
            ) from None
        finally:
            self._forget(concept_id)

    def remove(self, concept_id: str) -> None:
        """Delete a concept.

        Raises:
            UnknownConceptError: there is none of that id.
            ValueError: the id is not one, or its file lies outside the bank.
        """
        try:
            self._files.delete(_path_of(concept_id))
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownConceptError(self._unknown(concept_id)) from None
        finally:
            self._forget(concept_id)

    def _ids(self) -> Iterator[str]:
        for path in self._files.paths():
            concept_id = path.removesuffix(_SUFFIX)
            if concept_id != path and _refusal(concept_id) is None:
                yield concept_id

    def _remember(self, concept_id: str, version: Hashable, concept: Concept) -> None:
        with self._lock:
            self._cache[concept_id] = (version, concept)
            self._cache.move_to_end(concept_id)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _forget(self, concept_id: str) -> None:
        with self._lock:
            self._cache.pop(concept_id, None)

    def _unknown(self, concept_id: str) -> str:
        message = f"no concept {concept_id!r} in the bank at {self._files.root}"
        ids = list(itertools.islice(self._ids(), _SUGGESTIONS_AMONG))
        if not ids:
            return f"{message}, which is empty"
        close = difflib.get_close_matches(concept_id, ids, n=3)
        return f"{message}; close to it: {', '.join(close)}" if close else message


class _Files(Protocol):
    """What a bank needs of a file system; paths are relative to ``root``, with forward slashes."""

    root: str

    def version(self, path: str) -> Hashable | None: ...  # changes with the content; None if that cannot be told
    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes, *, overwrite: bool) -> None: ...
    def delete(self, path: str) -> None: ...
    def paths(self) -> Iterator[str]: ...
    def describe(self, path: str) -> str: ...


class _LocalFiles:
    """A folder of this machine. Links may stand for files inside the root; nothing outside it is touched."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise ValueError(f"ConceptBank: path_or_url must be a folder, got the file {self.root}")

    def version(self, path: str) -> Hashable:
        status = self._inside(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(path)
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size

    def read(self, path: str) -> bytes:
        return read_bounded(self._inside(path))

    def write(self, path: str, data: bytes, *, overwrite: bool) -> None:
        target = self._parent_inside(path) / Path(path).name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(error.errno, "a file is in the way of a folder", str(target.parent)) from None
        write_atomically(target, data, overwrite=overwrite)

    def delete(self, path: str) -> None:
        (self._parent_inside(path) / Path(path).name).unlink()

    def paths(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self.root):
            folders.sort()
            depth = Path(folder).relative_to(self.root)
            if len(depth.parts) == _MAX_SEGMENTS - 1:
                folders.clear()
            for name in names:
                path = (depth / name).as_posix()
                if name.endswith(_SUFFIX) and self._readable(path):
                    yield path

    def describe(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _readable(self, path: str) -> bool:
        try:
            return self._inside(path).is_file()
        except ValueError:
            return False

    def _parent_inside(self, path: str) -> Path:
        """The folder of a path, which must be where it seems to be: a linked folder is refused."""
        parent = os.path.join(os.path.realpath(self.root), *path.split("/")[:-1])
        if os.path.realpath(parent) != parent:
            raise ValueError(f"ConceptBank: {path} lies behind a symbolic link, which a bank does not follow")
        return Path(parent)

    def _inside(self, path: str) -> Path:
        """Where a file really is, which must be inside the root."""
        seeming = self._parent_inside(path) / path.split("/")[-1]
        if seeming.is_symlink():
            root, real = os.path.realpath(self.root), os.path.realpath(seeming)
            if os.path.commonpath([root, real]) != root:
                raise ValueError(f"ConceptBank: {path} is a symbolic link that leads out of the bank")
            return Path(real)
        return seeming


class _RemoteFiles:
    """Any other fsspec file system. Files are put whole, which object stores do atomically."""

    def __init__(self, file_system: fsspec.AbstractFileSystem, root: str) -> None:
        self._file_system = file_system
        self.root = root.rstrip("/")

    def version(self, path: str) -> Hashable | None:
        info = self._info(path)
        found = tuple((key, str(info[key])) for key in _VERSION_KEYS if info.get(key) is not None)
        return (info.get("size"), *found) if found else None

    def read(self, path: str) -> bytes:
        size = self._info(path).get("size")
        if size is not None and size > MAX_FILE_BYTES:
            raise ConceptFileError(f"{self.describe(path)}: larger than a concept file may be ({MAX_FILE_BYTES} bytes)")
        return self._file_system.cat_file(self._full(path))

    def write(self, path: str, data: bytes, *, overwrite: bool) -> None:
        full = self._full(path)
        if not overwrite and self._exists(path):
            raise FileExistsError(full)
        self._file_system.makedirs(full.rpartition("/")[0], exist_ok=True)
        self._file_system.pipe_file(full, data)

    def delete(self, path: str) -> None:
        self._info(path)
        self._file_system.rm_file(self._full(path))

    def paths(self) -> Iterator[str]:
        self._file_system.invalidate_cache()
        try:
            found = self._file_system.find(self.root, maxdepth=_MAX_SEGMENTS)
        except FileNotFoundError:
            return
        prefix = f"{self.root}/".lstrip("/")
        for full in found:
            relative = full.lstrip("/").removeprefix(prefix)
            if relative.endswith(_SUFFIX):
                yield relative

    def describe(self, path: str) -> str:
        return self._full(path)

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
            raise FileNotFoundError(full)
        return info

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"


def _open_files(path_or_url: str) -> _Files:
    file_system, root = fsspec.core.url_to_fs(path_or_url)
    if isinstance(file_system, LocalFileSystem):
        return _LocalFiles(root)
    return _RemoteFiles(file_system, root)


def _path_of(concept_id: object) -> str:
    if not isinstance(concept_id, str):
        raise TypeError(f"ConceptBank: a concept's id must be a string, got {type(concept_id).__name__}")
    refusal = _refusal(concept_id)
    if refusal:
        raise ValueError(f"ConceptBank: a concept's id looks like alice/cat; {refusal}, got {concept_id!r:.120}")
    return concept_id + _SUFFIX


def _refusal(concept_id: str) -> str | None:
    """Why a string is no id, or None if it is one."""
    segments = concept_id.split("/")
    if len(segments) > _MAX_SEGMENTS:
        return f"at most {_MAX_SEGMENTS} segments are allowed"
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            return "each segment must be lower-case letters, digits, . _ - and start with a letter or digit"
        if ".." in segment or len(segment) > _MAX_SEGMENT:
            return f"a segment must not hold '..' and has at most {_MAX_SEGMENT} characters"
        if segment.endswith(_SUFFIX):
            return f"{_SUFFIX} is added to it and must be left out"
    return None
