"""The folder of what was drawn: whole pictures that say what they were drawn from."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from keylock_diffusers import __version__
from keylock_diffusers.files import open_regular, try_place, write_atomically

_KEY = "keylock"  # of the PNG text that holds the facts


def prepare(folder: Path, name: str = "000.png") -> None:
    """Makes a folder for pictures, and makes sure before the work that one of that name can be written there.

    Raises:
        ValueError: they cannot; the message says why.
    """
    try:
        try_place(folder / name)
    except OSError as error:
        raise ValueError(
            f"--output must be a place that pictures can be written to, got {folder}: {error.strerror or error}"
        ) from error


def write(path: Path, image: Image.Image, prompt: str, facts: Mapping[str, Any]) -> None:
    """Writes a picture as PNG, whole or not at all, with what it was drawn from.

    Args:
        path: the file.
        image: the picture.
        prompt: what picture viewers show.
        facts: what `facts_of` gives back, as JSON.

    Raises:
        OSError: naming the file and why.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Description", prompt)
    text.add_itxt("Software", f"keylock-kernels {__version__}")
    text.add_itxt(_KEY, json.dumps({**facts, "version": __version__}))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=text)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def facts_of(path: Path) -> dict[str, Any] | None:
    """What a picture was drawn from; None if it is none of ours."""
    try:
        with open_regular(path) as stream, Image.open(stream, formats=["PNG"]) as image:
            facts = json.loads(image.info[_KEY])
            image.verify()  # a picture that was cut is none
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None
    return facts if isinstance(facts, dict) else None


def found(folder: Path) -> dict[Path, str]:
    """The identities of the folder's pictures that say theirs."""
    pictures = ((path, facts_of(path)) for path in sorted(folder.glob("*.png")))
    return {path: str(facts["identity"]) for path, facts in pictures if facts and "identity" in facts}


def rename(moves: Mapping[Path, Path]) -> None:
    """Gives files new names, which may be each other's, and sets aside what else has such a name.

    What is interrupted between two names, `found` finds.
    """
    between = {old: new.with_name(f".{secrets.token_hex(8)}.png") for old, new in moves.items()}
    for old, middle in between.items():
        old.replace(middle)
    for old, new in moves.items():
        set_aside(new)
        between[old].replace(new)


def free(path: Path) -> Path:
    """A name that no file has: this one, or this one with the first number that makes it one."""
    number, name = 0, path
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return name


def set_aside(path: Path) -> None:
    """Gives a file, if there is one, another name, so that nothing is replaced by what gets this one."""
    if os.path.lexists(path):
        path.rename(free(path))


def strangers(folder: Path, named: Iterable[Path]) -> list[str]:
    """The names of the folder's pictures that are none of those named, nor show attention."""
    there = {path.name for path in folder.glob("*.png") if not path.name.startswith("attention")}
    return sorted(there - {path.name for path in named})
