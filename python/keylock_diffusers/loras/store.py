"""LoRA files where a bank has them: one file each, or PEFT's folder of two."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Hashable, Iterable, Iterator
from io import BytesIO
from typing import NamedTuple

from keylock_diffusers.files import open_regular, read_text, strict_json
from keylock_diffusers.ids import SUFFIX, Kind
from keylock_diffusers.loras.adapter import AdapterFacts, LoraFileError, component_name
from keylock_diffusers.loras.files import PEFT_CONFIG, PEFT_WEIGHTS, inspect_opened
from keylock_diffusers.loras.opening import open_tensors
from keylock_diffusers.loras.peft_config import HEADER_KEY
from keylock_diffusers.places import open_place
from keylock_diffusers.tensor_file import encoded_header

KIND = Kind(
    "LoraBank",
    "a LoRA",
    "alice/style",
    most_bytes=8 << 30,
    most_header=32 << 20,
    error=LoraFileError,
    folder_file=PEFT_WEIGHTS.removesuffix(SUFFIX),
)
_MAX_CONFIG = 1 << 16
_ABSENT = (FileNotFoundError, NotADirectoryError)


class UnknownLoraError(KeyError):
    """A bank has no LoRA of that id."""

    def __str__(self) -> str:
        return str(self.args[0])


class LoraExistsError(ValueError):
    """A bank has a LoRA of that id already."""


class Source(NamedTuple):
    """A LoRA's content."""

    data: bytes
    config: str | None  # PEFT's settings, of a folder
    shown: str
    version: Hashable | None  # changes with the content; None if that cannot be told
    content: str  # its hash


class LoraFiles:
    """The files of a bank, by ids that are known to be ids.

    Args:
        path_or_url: the place.

    Raises:
        ValueError: as `open_place`.
    """

    def __init__(self, path_or_url: str) -> None:
        self._files = open_place(path_or_url, KIND)
        self._hashes: dict[str, tuple[Hashable, str]] = {}  # by id, of the version that was read last
        self._lock = threading.Lock()
        self.exists, self.shown = self._files.exists, self._files.shown

    def ids(self) -> set[str]:
        names = (path.removesuffix(f"/{PEFT_WEIGHTS}").removesuffix(SUFFIX) for path in self._files.paths())
        return {name for name in names if KIND.refusal(name) is None}

    def version(self, plain: str) -> Hashable | None:
        """Of the file, or of both files of the folder; None if that cannot be told.

        Raises:
            UnknownLoraError: there is neither.
        """
        with self._known(plain):
            try:
                return self._files.version(plain + SUFFIX)
            except _ABSENT:
                both = tuple(map(self._files.version, _folder(plain)))
                return None if None in both else both

    def content(self, plain: str, version: Hashable | None) -> str | None:
        """The hash of a version's content, if it was read before."""
        with self._lock:
            noted = self._hashes.get(plain)
        return noted[1] if noted is not None and version is not None and noted[0] == version else None

    def read(self, plain: str) -> Source:
        """Read the file, or the folder.

        Raises:
            UnknownLoraError: there is neither.
            LoraFileError: it is too large.
        """
        with self._known(plain):
            config, path = None, plain + SUFFIX
            try:
                data, version = self._files.read(path)
                content = hashlib.sha256(data).hexdigest()
            except _ABSENT:
                path, beside = _folder(plain)
                config, of_config = self._config(beside)
                data, of_data = self._files.read(path)
                version = None if None in (of_config, of_data) else (of_data, of_config)
                hashes = (hashlib.sha256(one).hexdigest() for one in (data, config.encode()))
                content = hashlib.sha256("".join(hashes).encode()).hexdigest()
        with self._lock:
            self._hashes[plain] = version, content
        return Source(data, config, self._files.describe(path), version, content)

    def summary(self, plain: str) -> AdapterFacts:
        """What the header says; errors as of `read`."""
        with self._known(plain):
            config, path = None, plain + SUFFIX
            try:
                data, size = self._files.header(path)
            except _ABSENT:
                path, beside = _folder(plain)
                config, _ = self._config(beside)
                data, size = self._files.header(path)
        with open_tensors(self._files.describe(path), BytesIO(data), size) as file:
            return inspect_opened(file, config)

    def write(self, plain: str, data: bytes, *, overwrite: bool) -> None:
        """Store a file, whole or not at all, in the place of a folder too.

        Raises:
            FileExistsError: there is one, and `overwrite` is False.
            OSError: writing failed.
        """
        if not overwrite:
            with contextlib.suppress(UnknownLoraError):
                self.version(plain)
                raise FileExistsError(self._files.describe(plain))
        try:
            self._files.write(plain + SUFFIX, data, overwrite=overwrite)
        finally:
            self._forget(plain)
        with contextlib.suppress(ValueError):  # a folder behind a link is not the bank's to delete
            self._delete(_folder(plain))

    def delete(self, plain: str) -> None:
        """Delete the file and the folder.

        Raises:
            UnknownLoraError: there is neither.
        """
        try:
            if not self._delete((plain + SUFFIX, *_folder(plain))):
                raise UnknownLoraError(self._unknown(plain))
        finally:
            self._forget(plain)

    def _delete(self, paths: Iterable[str]) -> bool:
        """Delete those that are there; whether any was."""
        found = False
        for path in paths:
            with contextlib.suppress(*_ABSENT):
                self._files.delete(path)
                found = True
        return found

    def _forget(self, plain: str) -> None:
        with self._lock:
            self._hashes.pop(plain, None)

    def _config(self, path: str) -> tuple[str, Hashable | None]:
        data, version = self._files.read(path)
        try:
            if len(data) > _MAX_CONFIG:
                raise ValueError(f"more than {_MAX_CONFIG} bytes")
            return data.decode("utf-8-sig"), version
        except ValueError as error:
            raise LoraFileError(f"{self._files.describe(path)}: {error}") from None

    @contextlib.contextmanager
    def _known(self, plain: str) -> Iterator[None]:
        try:
            yield
        except _ABSENT:
            raise UnknownLoraError(self._unknown(plain)) from None

    def _unknown(self, plain: str) -> str:
        """Names no other id and reads no listing: ids come from requests, which are not to learn of others'."""
        return f"no LoRA {plain!r} in the bank{'' if self.exists() else ', whose folder does not exist'}"


def _folder(plain: str) -> tuple[str, str]:
    """The weights and the settings in a PEFT folder."""
    return f"{plain}/{PEFT_WEIGHTS}", f"{plain}/{PEFT_CONFIG}"


def whole_file(path: str) -> bytes:
    """A LoRA file's content, looked at; a PEFT folder's as one file.

    Raises:
        LoraFileError: it is a pickle, damaged or too large.
        OSError: it cannot be opened.
    """
    config, weights = None, path
    try:
        if os.path.isdir(path):
            weights = os.path.join(path, PEFT_WEIGHTS)
            config = read_text(os.path.join(path, PEFT_CONFIG))
        with open_regular(weights) as stream:
            data = stream.read(KIND.most_bytes + 1)
    except ValueError as error:
        raise LoraFileError(str(error)) from None
    if len(data) > KIND.most_bytes:
        raise KIND.too_large(weights)
    with open_tensors(weights, BytesIO(data)) as file:
        inspect_opened(file, config)
        if config is None:
            return data
        settings = {
            f"{component}.{name}": value
            for component in ("unet", *map(component_name, range(3)))
            for name, value in strict_json(config).items()
        }
        ordered = sorted(file.tensors.items(), key=lambda item: (item[1].begin, item[1].end))
        header = encoded_header(
            ((name, stored.dtype, stored.shape) for name, stored in ordered),
            file.texts | {HEADER_KEY: json.dumps(settings)},
        )
        return header + data[file.payload :]
