"""Folders for `keylock train`: pictures, captions and masks of every sort, and what else lies in folders."""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers.pictures import turned
from tests.hostile import commands, pictures, world

LONG = 300
_SPECIAL = ("pipe", "folder", "link out", "link loop", "link to nothing", "empty")
_OUT = "outside.png"  # beside the folder
_CAPTIONS = (
    "a photo of <alice-cat>", "<alice-cat>", "", " \n", "a cat", "<bob-dog>", "<alice-cat> " * 200, "x" * 100_000,
    "<alice-cat>\n<alice-cat>",
    "\ufeffa <alice-cat>", "a <alice-cat>\x00", "(<alice-cat>:1.5)", "Ein Bild von <alice-cat> \u202e",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Names and what they are: bytes, or one of the special kinds; `good` where it must be taken."""

    kind: str
    files: tuple[tuple[str, Any], ...]
    pictures: int
    good: bool

    def __str__(self) -> str:
        said = [
            f"{name} ({content if isinstance(content, str) else f'{len(content)} bytes'})"
            for name, content in self.files
        ]
        return f"{self.kind}: {', '.join(said)}"


def make(rng: Random) -> Case:
    files: dict[str, Any] = {}
    count = rng.choice((1, 1, 2, 3))
    captions, masks = rng.randrange(2), rng.randrange(2)
    for number in range(count):
        suffix, format = rng.choice(
            ((".png", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP"), (".PNG", "PNG"))
        )
        picture = files[f"{number}{suffix}"] = _picture(rng, format)
        if captions:
            files[f"{number}.txt"] = b"a photo of <alice-cat>"
        if masks:
            files[f"{number}-mask.png"] = _mask(rng, turned(Image.open(io.BytesIO(picture))).size)
    good = rng.randrange(8) == 0
    kind = "good" if good else rng.choice(sorted(_WRONGS))
    if not good:
        _WRONGS[kind](rng, files)
    return Case(kind, tuple(sorted(files.items())), count, good)


def check(case: Case, place: Path) -> str:
    """One step of training: what was taken is said, or one line says what is wrong with which file."""
    folder = place / "pictures"
    (place / "captions.txt").write_text("a cat\na dog\na house on blue\n")
    Image.new("RGB", (8, 8)).save(place / _OUT)
    _write(folder, case)
    options = (
        "--placeholder",
        "<alice-cat>",
        "--super-class",
        "cat",
        "--output",
        "cat.safetensors",
        "--steps",
        1,
        "--batch-size",
        1,
    )
    try:
        ended = commands.run(
            _bare(), place, "train", "pictures", *options, "--edit", "perfusion", "--captions", "captions.txt"
        )
        if ended.code:
            assert not case.good, f"{case} was refused: {ended.error[-300:]}"
            commands.refusal(ended, "pictures", *(name for name, _ in case.files))
            assert not (place / "cat.safetensors").exists(), "refused, and wrote a concept"
            return "refused"
        taken = kd.Concept.load(place / "cat.safetensors").training["pictures"]
        said = re.search(r"(\d+) pictures?", ended.out + ended.error)
        assert said and int(said[1]) == taken, f"{case}: took {taken} pictures and said {ended.out!r:.300}"
        assert not case.good or taken == case.pictures, f"{case}: took {taken}"
        return "accepted"
    finally:
        shutil.rmtree(folder)
        (place / "cat.safetensors").unlink(missing_ok=True)


@functools.cache
def _bare() -> Any:
    return world.build_tiny()


def _write(folder: Path, case: Case) -> None:
    folder.mkdir()
    for name, content in case.files:
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content == "empty":
            path.touch()
        else:
            path.symlink_to(
                {"link out": folder.parent / _OUT, "link loop": name, "link to nothing": "nothing.png"}[content]
            )


def _picture(rng: Random, format: str) -> bytes:
    image, _ = pictures._image(rng, format)
    return pictures._saved(image, format, **pictures._options(rng, format))


def _mask(rng: Random, size: tuple[int, int]) -> bytes:
    """White in the middle, of its picture's size."""
    greys = np.zeros((16, 16), np.uint8)
    greys[4:12, 4:12] = 255
    mask = Image.fromarray(greys).resize(size, Image.Resampling.NEAREST)
    greys = np.asarray(mask)
    kind = rng.randrange(5)
    if kind == 0:
        mask = mask.convert("1")
    elif kind == 1:
        mask = Image.merge("RGBA", [Image.new("L", size, 255)] * 3 + [mask])
    elif kind == 2:
        mask = Image.fromarray(greys.astype(np.uint16) * 257)
    elif kind == 3:
        mask = mask.convert("RGB")
    return pictures._saved(mask, "PNG")


def _any_file(rng: Random, files: dict[str, Any], *endings: str) -> str:
    return rng.choice([name for name in sorted(files) if name.endswith(endings)] or sorted(files))


def _special(rng: Random, files: dict[str, Any]) -> None:
    name = rng.choice((_any_file(rng, files), "9.png", "0-mask.png", "0.txt", "9-mask.png"))
    files[name] = rng.choice(_SPECIAL)


def _damaged(rng: Random, files: dict[str, Any]) -> None:
    name = _any_file(rng, files, ".png", ".jpg", ".jpeg", ".webp", ".PNG")
    files[name] = pictures._damaged(rng, files[name])


def _hostile(rng: Random, files: dict[str, Any]) -> None:
    case = pictures.make(rng)
    files[rng.choice((_any_file(rng, files, ".png", ".jpg", ".jpeg", ".webp", ".PNG"), "9.png"))] = case.data


def _caption(rng: Random, files: dict[str, Any]) -> None:
    text = rng.choice(_CAPTIONS)
    encoding = rng.choice(("utf-8", "utf-8", "utf-16", "latin-1"))
    files[rng.choice(("0.txt", "1.txt", "9.txt"))] = rng.choice(
        (text.encode(encoding, "replace"), bytes(range(256)), b"caf\xe9 <alice-cat>")
    )


def _missing(rng: Random, files: dict[str, Any]) -> None:
    for _ in range(rng.randint(1, 3)):
        if files:
            del files[_any_file(rng, files)]


def _renamed(rng: Random, files: dict[str, Any]) -> None:
    name = _any_file(rng, files)
    new = rng.choice(
        (
            "a.gif",
            "0-mask.jpg",
            "0-mask.png",
            "-mask.png",
            ".png",
            "0.heic",
            "Thumbs.db",
            "[red].png",
            "x" * 240 + ".png",
            "\u202e.png",
            "0.PNG",
        )
    )
    files[new] = files.pop(name)


def _more(rng: Random, files: dict[str, Any]) -> None:
    """A picture of a format that is not taken, or a mask where none is looked for."""
    name, format = rng.choice(
        (
            ("9.gif", "GIF"),
            ("9.bmp", "BMP"),
            ("9.tiff", "TIFF"),
            ("9.avif", "AVIF"),
            ("0-mask.jpg", "JPEG"),
            ("0_mask.png", "PNG"),
        )
    )
    files[name] = pictures._saved(Image.new("L", (16, 16), 255), format)


def _mask_of_nothing(rng: Random, files: dict[str, Any]) -> None:
    value = rng.choice((0, 0, 1))
    image = rng.choice(
        (
            Image.new("L", (16, 16), value),
            Image.new("RGBA", (16, 16)),
            Image.new("I;16", (16, 16), value),
            Image.new("L", (1, 400), 255),
        )
    )
    files[_any_file(rng, files, "-mask.png")] = pictures._saved(image, "PNG")


_WRONGS = {
    "special": _special,
    "damaged": _damaged,
    "hostile": _hostile,
    "caption": _caption,
    "missing": _missing,
    "renamed": _renamed,
    "more": _more,
    "mask": _mask_of_nothing,
}
