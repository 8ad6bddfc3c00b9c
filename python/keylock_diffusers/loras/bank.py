"""Many LoRA files in one place: a folder, or any file system that fsspec can open."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch

from keylock_diffusers.checks import number, path_text, whole
from keylock_diffusers.files import cache_folder
from keylock_diffusers.ids import SUFFIX, VERSION_DIGITS
from keylock_diffusers.loras.adapter import Adapter, AdapterFacts
from keylock_diffusers.loras.files import read_opened
from keylock_diffusers.loras.model import ModelShapes
from keylock_diffusers.loras.opening import open_tensors
from keylock_diffusers.loras.packed import packed_key, read_packed, write_packed
from keylock_diffusers.loras.pool import AdapterPool, PoolStats
from keylock_diffusers.loras.store import KIND, LoraExistsError, LoraFiles, Source, UnknownLoraError, whole_file
from keylock_diffusers.loras.tables import Weights

logger = logging.getLogger(__name__)


class BankStats(NamedTuple):
    """What a `LoraBank` keeps in memory and did: adapters, their bytes, how often one that was asked for was there, was
    read, or had to go, how many were packed, and the same of its pools."""

    adapters: int
    bytes: int
    hits: int
    misses: int
    evictions: int
    packed: int
    pools: tuple[PoolStats, ...]


class _Kept(NamedTuple):
    version: Hashable | None
    content: str
    adapter: Adapter
    nbytes: int


class LoraBank:
    """LoRA files by id, such as ``alice/style``, stored as ``<root>/alice/style.safetensors`` or as PEFT's folder
    ``<root>/alice/style/`` with ``adapter_config.json``; where both are there, the file counts.

    Ids are as of a `ConceptBank`: whatever comes in a request, nothing outside the root is touched.
    ``alice/style@0123456789abcdef`` is ``alice/style`` if these are the first digits of its content's SHA-256.

    What was read is kept packed in a cache folder, under a name that its content and the model give it: from there it
    is mapped, not read. Files in it may be deleted at any time, but not cut short. Adapters that were used most
    recently stay in memory; a file that was replaced, by this process or another, is read again, and whoever holds the
    former adapter may go on using it. Threads may share a bank: an adapter that several ask for is read once, and
    nobody waits for the reading of another.

    Args:
        path_or_url: a folder, which need not exist yet, or an fsspec URL such as ``s3://bucket/loras``.
        cache: the folder of packed adapters; default ``loras`` in the library's own (``$KEYLOCK_CACHE``,
            ``$XDG_CACHE_HOME/keylock`` or ``~/.cache/keylock``). Where it cannot be written the bank works without it
            and says so once.
        host_bytes: bound of the adapters that are kept in memory; 0 keeps none.
        device_bytes: bound of each `pool`; None sets none.
        max_error: as of `read_adapter`.

    Raises:
        TypeError, ValueError: an argument is not what this says; for a URL, also a package that is missing.

    Example:
        >>> bank = LoraBank("memory://doctest-loras")
        >>> "alice/style" in bank, len(bank)
        (False, 0)
    """

    def __init__(
        self,
        path_or_url: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        host_bytes: int = 4 << 30,
        device_bytes: int | None = None,
        max_error: float | None = None,
    ) -> None:
        self._files = LoraFiles(path_text(path_or_url, "LoraBank: path_or_url"))
        self._cache = cache_folder("loras") if cache is None else Path(path_text(cache, "LoraBank: cache"))
        self._host_bytes = whole(host_bytes, "LoraBank: host_bytes", 0)
        self._device_bytes = None if device_bytes is None else whole(device_bytes, "LoraBank: device_bytes", 1)
        self._max_error = None if max_error is None else number(max_error, "LoraBank: max_error", 0, 1)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()  # by id and the model's fingerprint
        self._turns: dict[tuple[str, str], tuple[threading.Lock, list[None]]] = {}
        self._pools: dict[Hashable, AdapterPool] = {}
        self._pinned = False
        self._warned = False
        self._hits = self._misses = self._evictions = self._packed = 0

    def load(self, lora_id: str, model: ModelShapes) -> Adapter:
        """Read a LoRA for a model.

        Args:
            lora_id: the id, perhaps with a version.
            model: its shapes; keep the object, which remembers what it works out.

        Raises:
            UnknownLoraError: there is none of that id and version; a KeyError.
            LoraFileError: as of `read_adapter`.
            ValueError: the id is not one, or its file lies outside the bank.
        """
        plain, wanted = KIND.split(lora_id)
        KIND.path(plain)
        key = plain, model.fingerprint
        version = self._files.version(plain)
        found = self._recent(key, version, wanted)
        if found is None:
            with self._turn(key):
                found = self._recent(key, version, wanted) or self._read(key, model, wanted)
        return found.adapter

    def version(self, lora_id: str) -> str:
        """The version of a LoRA, as it follows an id after ``@``: the first digits of its content's SHA-256.

        Raises:
            UnknownLoraError, ValueError: as of `load`.
        """
        plain, wanted = KIND.split(lora_id)
        KIND.path(plain)
        content = self._files.content(plain, self._files.version(plain)) or self._files.read(plain).content
        self._require(plain, content, wanted)
        return content[:VERSION_DIGITS]

    def pool(
        self, weights: Weights, device: torch.device | str, dtype: torch.dtype, rows: int | None = None
    ) -> AdapterPool:
        """The pool of adapters for these modules on this device: the same one for the same arguments.

        Args:
            weights, device, dtype, rows: as of `AdapterPool`, whose bound is the bank's `device_bytes`.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        key = tuple((name, tuple(shape)) for name, shape in weights.items()), device, dtype, rows
        with self._lock:
            if key not in self._pools:
                self._pools[key] = AdapterPool(weights, device, dtype, rows=rows, max_bytes=self._device_bytes)
                self._pinned |= device.type == "cuda"
            return self._pools[key]

    def summary(self, lora_id: str) -> AdapterFacts:
        """What the header of a LoRA's file says, without reading the rest.

        Raises:
            UnknownLoraError, LoraFileError, ValueError: as of `load`.
        """
        KIND.path(lora_id)
        return self._files.summary(lora_id)

    def add(self, lora_id: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Copy a LoRA file into the bank, once its header reads; readers see the old file or the new one, never a part.

        PEFT's folder becomes one file, its settings in the header, as diffusers puts them there.

        Raises:
            LoraFileError: it is a pickle or damaged.
            LoraExistsError: there is one of that id and `overwrite` is False; a ValueError.
            ValueError: the id is not one.
            OSError: reading or writing failed; what was stored before is unchanged.
        """
        KIND.path(lora_id)
        data = whole_file(path_text(path, "LoraBank.add: path"))
        try:
            self._files.write(lora_id, data, overwrite=overwrite)
        except FileExistsError:
            raise LoraExistsError(
                f"LoraBank.add: {lora_id} exists already; pass overwrite=True to replace it"
            ) from None
        finally:
            self._forget(lora_id)

    def remove(self, lora_id: str) -> None:
        """Delete a LoRA; whoever holds its adapter may go on using it.

        Raises:
            UnknownLoraError: there is none of that id.
            ValueError: the id is not one, or its file lies outside the bank.
        """
        KIND.path(lora_id)
        try:
            self._files.delete(lora_id)
        finally:
            self._forget(lora_id)

    def exists(self) -> bool:
        """Whether the bank's folder is there, which `add` makes."""
        return self._files.exists()

    @property
    def shown(self) -> str:
        """The bank's place for people: a folder, or a URL without credentials."""
        return self._files.shown

    def __contains__(self, lora_id: object) -> bool:
        try:
            plain, wanted = KIND.split(lora_id)
            KIND.path(plain)
            self._files.version(plain)
            return wanted is None or bool(self.version(lora_id))  # type: ignore[arg-type]
        except (UnknownLoraError, ValueError, TypeError):
            return False

    def __iter__(self) -> Iterator[str]:
        """All ids, sorted."""
        return iter(sorted(self._files.ids()))

    def __len__(self) -> int:
        return len(self._files.ids())

    def __repr__(self) -> str:
        return f"LoraBank({self.shown!r})"

    def stats(self) -> BankStats:
        with self._lock:
            pools = tuple(self._pools.values())
            nbytes = sum(one.nbytes for one in self._kept.values())
            counts = self._hits, self._misses, self._evictions, self._packed
            return BankStats(len(self._kept), nbytes, *counts, tuple(pool.stats() for pool in pools))

    def _recent(self, key: tuple[str, str], version: Hashable | None, wanted: str | None) -> _Kept | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None or version is None or found.version != version:
                return None
            self._require(key[0], found.content, wanted)
            self._kept.move_to_end(key)
            self._hits += 1
            return found

    def _read(self, key: tuple[str, str], model: ModelShapes, wanted: str | None) -> _Kept:
        plain, version = key[0], self._files.version(key[0])
        content, source = self._files.content(plain, version), None
        if content is None:
            source = self._files.read(plain)
            version, content = source.version, source.content
        self._require(plain, content, wanted)
        with self._lock:
            self._misses += 1
            former = self._kept.get(key)
        if former is not None and former.content == content:  # touched, or copied anew
            return self._keep(key, former._replace(version=version))
        name = packed_key(content, model, self._max_error)
        adapter = read_packed(self._path(name), name, pinned=self._pinned)
        if adapter is None:
            if source is None:
                source = self._files.read(plain)  # which may be another by now
                version, content = source.version, source.content
                self._require(plain, content, wanted)
            adapter = self._packed_of(source, model)
        return self._keep(key, _Kept(version, content, adapter, _size(adapter)))

    def _packed_of(self, source: Source, model: ModelShapes) -> Adapter:
        """The adapter in a LoRA file, from the cache folder if it can be put there."""
        with open_tensors(source.shown, BytesIO(source.data)) as file:
            adapter = read_opened(file, source.config, model, self._max_error)
        name = packed_key(source.content, model, self._max_error)
        try:
            write_packed(self._path(name), adapter, name)
        except OSError as error:
            with self._lock:
                warned, self._warned = self._warned, True
            if not warned:
                logger.warning(
                    "LoraBank: the cache %s cannot be written (%s), so files are read anew", self._cache, error
                )
            return adapter
        with self._lock:
            self._packed += 1
        return read_packed(self._path(name), name, pinned=self._pinned) or adapter

    def _path(self, name: str) -> Path:
        return self._cache / f"{name}{SUFFIX}"

    def _keep(self, key: tuple[str, str], new: _Kept) -> _Kept:
        """Remember an adapter, and give up whichever it replaces or leaves no room for."""
        gone = []
        with self._lock:
            former = self._kept.pop(key, None)
            if former is not None and former.adapter is not new.adapter:
                gone.append(former)
            if new.version is not None and new.nbytes <= self._host_bytes:
                self._kept[key] = new
            total = sum(one.nbytes for one in self._kept.values())
            while total > self._host_bytes:
                _, oldest = self._kept.popitem(last=False)
                total -= oldest.nbytes
                self._evictions += 1
                gone.append(oldest)
        self._give_up(gone)
        return new

    def _give_up(self, gone: Iterable[_Kept]) -> None:
        """Tell the pools of adapters that nobody will ask for again: the next time they are other objects."""
        with self._lock:
            pools = list(self._pools.values())
        for one in gone:
            for updates in (one.adapter.denoiser, *one.adapter.text_encoders):
                for pool in pools:
                    pool.forget(updates)

    def _forget(self, plain: str) -> None:
        with self._lock:
            keys = [key for key in self._kept if key[0] == plain]
            gone = [self._kept.pop(key) for key in keys]
        self._give_up(gone)

    @contextlib.contextmanager
    def _turn(self, key: tuple[str, str]) -> Iterator[None]:
        """One thread at a time for one adapter."""
        with self._lock:
            turn, waiting = self._turns.setdefault(key, (threading.Lock(), []))
            waiting.append(None)
        try:
            with turn:
                yield
        finally:
            with self._lock:
                waiting.pop()
                if not waiting:
                    del self._turns[key]

    def _require(self, plain: str, content: str, wanted: str | None) -> None:
        if wanted is not None and not content.startswith(wanted):
            raise UnknownLoraError(f"no version {wanted} of {plain} in the bank, which has {content[:VERSION_DIGITS]}")


def _size(adapter: Adapter) -> int:
    updates = [one for found in (adapter.denoiser, *adapter.text_encoders) for one in found.values()]
    tensors = [tensor for one in updates for tensor in (one.up, one.down, one.magnitude) if tensor is not None]
    tensors += [vectors for word in adapter.words.values() for vectors in word.vectors]
    return sum(tensor.nbytes for tensor in tensors)
