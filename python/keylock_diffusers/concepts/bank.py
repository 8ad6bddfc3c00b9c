"""Many concepts in one place: a folder, or any file system that fsspec can open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping

from keylock_diffusers.checks import path_text, whole
from keylock_diffusers.concepts.concept import Concept, ConceptSummary
from keylock_diffusers.concepts.files import KIND, read_header
from keylock_diffusers.ids import SUFFIX
from keylock_diffusers.places import open_place


class UnknownConceptError(KeyError):
    """A bank has no concept of that id."""

    def __str__(self) -> str:
        return str(self.args[0])


class ConceptExistsError(ValueError):
    """A bank has a concept of that id already."""


class ConceptBank(Mapping[str, Concept]):
    """Concepts by id, such as ``alice/cat``, stored as ``<root>/alice/cat.safetensors``.

    An id has 1 to 4 segments of lower-case letters, digits, ``.``, ``_`` and ``-``, each starting with a letter or
    digit; ids come from requests, so nothing else reaches the file system, and a symbolic link cannot lead out of
    the root. Reading keeps the most recently used concepts in memory and reads a file again when it was replaced,
    by this process or another. A bank may be shared by threads and processes; what killed writers left half written is
    swept by later ones, and folders that `remove` empties go.

    ``alice/cat@0123456789abcdef`` is ``alice/cat`` if its `Concept.version` is that one: who has noted it can ask for
    exactly what was used before.

    Args:
        path_or_url: a folder, which need not exist yet, or an fsspec URL such as ``s3://bucket/concepts``.
        cache_size: how many concepts stay in memory, about 40 KB each on Stable Diffusion 1.5.

    Raises:
        TypeError, ValueError: an argument is not what this says; for a URL, also a package that is missing.

    Example:
        >>> bank = ConceptBank("memory://doctest-concepts")
        >>> "alice/cat" in bank, len(bank)
        (False, 0)
    """

    def __init__(self, path_or_url: str | os.PathLike[str], *, cache_size: int = 1024) -> None:
        place = path_text(path_or_url, "ConceptBank: path_or_url")
        self._cache_size = whole(cache_size, "ConceptBank: cache_size", 0)
        self._files = open_place(place, KIND)
        self._cache: OrderedDict[str, tuple[Hashable, Concept]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, concept_id: str) -> Concept:
        """Read a concept.

        Raises:
            UnknownConceptError: there is none of that id and version; a KeyError.
            ConceptFileError: its file is damaged.
            ValueError: the id is not one, or its file lies outside the bank.
        """
        concept_id, version = KIND.split(concept_id)
        concept = self._read(concept_id)
        if version is not None and concept.version != version:
            raise UnknownConceptError(f"no version {version} of {concept_id} in the bank, which has {concept.version}")
        return concept

    def summary(self, concept_id: str) -> ConceptSummary:
        """What the header of a concept's file says, without reading the rest.

        Raises:
            UnknownConceptError, ConceptFileError, ValueError: as for reading the concept.
        """
        path = KIND.path(concept_id)
        try:
            data, size = self._files.header(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownConceptError(self._unknown(concept_id)) from None
        source = self._files.describe(path)
        return ConceptSummary.of(read_header(data, source, size), size, source)

    def exists(self) -> bool:
        """Whether the bank's folder is there, which `add` makes."""
        return self._files.exists()

    def __contains__(self, concept_id: object) -> bool:
        try:
            concept_id, version = KIND.split(concept_id)
            if version is not None:
                return self._read(concept_id).version == version
            self._files.version(KIND.path(concept_id))
        except (FileNotFoundError, NotADirectoryError, UnknownConceptError, ValueError, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """All ids, sorted."""
        return iter(sorted(self._ids()))

    def __len__(self) -> int:
        return sum(1 for _ in self._ids())

    def __repr__(self) -> str:
        return f"ConceptBank({self.shown!r})"

    @property
    def shown(self) -> str:
        """The bank's place for people: a folder, or a URL without credentials."""
        return self._files.shown

    # A bank is a place, not a value: Mapping's comparison would read every file.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def add(self, concept_id: str, concept: Concept, *, overwrite: bool = False) -> None:
        """Store a concept; readers see the old file or the new one, never a part.

        On a remote file system the file is put as one object; two processes that add the same new id at the same
        time may there both succeed.

        Raises:
            ValueError: the id is not one; a ConceptExistsError, it exists and ``overwrite`` is False.
            OSError: writing failed; what was stored before is unchanged.
        """
        path = KIND.path(concept_id)
        if not isinstance(concept, Concept):
            raise TypeError(f"ConceptBank.add: concept must be a Concept, got {type(concept).__name__}")
        try:
            self._files.write(path, concept.to_bytes(), overwrite=overwrite)
        except FileExistsError:
            raise ConceptExistsError(
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
            self._files.delete(KIND.path(concept_id))
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownConceptError(self._unknown(concept_id)) from None
        finally:
            self._forget(concept_id)

    def _ids(self) -> Iterator[str]:
        for path in self._files.paths():
            concept_id = path.removesuffix(SUFFIX)
            if concept_id != path and KIND.refusal(concept_id) is None:
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

    def _read(self, concept_id: str) -> Concept:
        path = KIND.path(concept_id)
        try:
            version = self._files.version(path)
            with self._lock:
                cached = self._cache.get(concept_id)
                if cached is not None and version is not None and cached[0] == version:
                    self._cache.move_to_end(concept_id)
                    return cached[1]
            data, version = self._files.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownConceptError(self._unknown(concept_id)) from None
        concept = Concept.from_bytes(data, source=self._files.describe(path))
        if version is not None:
            self._remember(concept_id, version, concept)
        return concept

    def _unknown(self, concept_id: str) -> str:
        """Names no other id and reads no listing: ids come from requests, which are not to learn of others'."""
        return f"no concept {concept_id!r} in the bank{'' if self.exists() else ', whose folder does not exist'}"
