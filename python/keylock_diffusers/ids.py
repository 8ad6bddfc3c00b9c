"""The ids of what banks hold: they come from requests, so nothing else than an id reaches a file system."""

from __future__ import annotations

import re
from dataclasses import dataclass

SUFFIX = ".safetensors"
MAX_SEGMENTS = 4
VERSION_DIGITS = 16

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}")
_MAX_SEGMENT = 100


@dataclass(frozen=True)
class Kind:
    """What a bank holds: an id has 1 to 4 segments of lower-case letters, digits, ``.``, ``_`` and ``-``.

    Args:
        bank: the class, in errors.
        thing: what it holds, in errors.
        example: an id.
        most_bytes: of a file.
        most_header: bytes of a file's header.
        error: what is raised where a file is wrong.
        folder_file: where ``alice/cat`` may also be a folder, the file in it, without suffix; no id ends so.
    """

    bank: str
    thing: str
    example: str
    most_bytes: int
    most_header: int
    error: type[ValueError]
    folder_file: str = ""

    @property
    def depth(self) -> int:
        """How many names a file's path has at most."""
        return MAX_SEGMENTS + bool(self.folder_file)

    def split(self, given: object) -> tuple[str, str | None]:
        """An id and the version that it asks for.

        Raises:
            TypeError, ValueError: it is no text, or its version is none.
        """
        plain, at, version = self._text(given).partition("@")
        if at and not _VERSION.fullmatch(version):
            raise ValueError(
                f"{self.bank}: {self.thing}'s id looks like {self.example}; after @ its version has {VERSION_DIGITS} "
                f"digits of 0-9 and a-f, got {given!r:.120}"
            )
        return plain, version if at else None

    def path(self, given: object) -> str:
        """Where the file of an id without version lies in its bank.

        Raises:
            TypeError, ValueError: it is no id.
        """
        name = self._text(given)
        refusal = self.refusal(name)
        if refusal:
            raise ValueError(f"{self.bank}: {self.thing}'s id looks like {self.example}; {refusal}, got {name!r:.120}")
        return name + SUFFIX

    def refusal(self, name: str) -> str | None:
        """Why a string is no id, or None if it is one."""
        segments = name.split("/")
        if len(segments) > MAX_SEGMENTS:
            return f"at most {MAX_SEGMENTS} segments are allowed"
        for segment in segments:
            if not _SEGMENT.fullmatch(segment):
                return "each segment must be lower-case letters, digits, . _ - and start with a letter or digit"
            if ".." in segment or len(segment) > _MAX_SEGMENT:
                return f"a segment must not hold '..' and has at most {_MAX_SEGMENT} characters"
            if segment.endswith(SUFFIX):
                return f"{SUFFIX} is added to it and must be left out"
        if self.folder_file and segments[-1] == self.folder_file:
            return f"{self.folder_file} is a file of a folder, whose id leaves it out"
        return None

    def too_large(self, source: str) -> ValueError:
        """The error of a file that has too many bytes."""
        return self.error(f"{source}: larger than {self.thing} file may be ({self.most_bytes} bytes)")

    def _text(self, given: object) -> str:
        if not isinstance(given, str):
            raise TypeError(f"{self.bank}: {self.thing}'s id must be a string, got {type(given).__name__}")
        return given
