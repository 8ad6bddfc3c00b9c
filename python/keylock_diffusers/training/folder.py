"""A folder of pictures of one subject: which of its files are pictures, captions and masks, and which are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from keylock_diffusers.concepts.concept import check_placeholder
from keylock_diffusers.files import read_text
from keylock_diffusers.pictures import open_picture
from keylock_diffusers.training.config import Subject, is_word

_PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
_MASK = "-mask"


@dataclass(frozen=True)
class PictureFolder:
    """What a folder holds for training.

    Args:
        pictures: its pictures, sorted.
        captions: a text file for each of them, or none.
        masks: a picture for each of them, or none.
        left_out: everything else, but for hidden files.
    """

    pictures: list[Path]
    captions: list[Path]
    masks: list[Path]
    left_out: list[Path]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> PictureFolder:
        """Sorts the files of a folder: NAME.png (or jpg, jpeg, webp), its caption NAME.txt, its mask NAME-mask.png.

        Raises:
            ValueError: it is no folder or has no pictures; captions or masks are there for some of them only, or a file
                could be the caption or mask of two.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of pictures")
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        seen = [file for file in files if file.suffix.lower() in _PICTURES]
        masks = [file for file in seen if file.stem.lower().endswith(_MASK)]
        pictures = [file for file in seen if file not in masks]
        if not pictures:
            raise ValueError(f"{folder} holds no pictures (png, jpg, webp)")
        texts = [file for file in files if file.suffix.lower() == ".txt"]
        captions = _beside(pictures, [(file.stem, file) for file in texts], "caption")
        covers = _beside(pictures, [(file.stem[: -len(_MASK)], file) for file in masks], "mask")
        taken = {*pictures, *captions, *covers}
        return cls(pictures, captions, covers, [file for file in files if file not in taken])

    def subject(self, placeholder: str, super_class: str, seed: int = 0) -> Subject:
        """The subject of these pictures, which are opened when they are read, one at a time.

        A placeholder that is a word of its own must stand in every caption; plain words need not.

        Raises:
            ValueError: a picture, mask or caption cannot be used; the message names its file.
        """
        if is_word(placeholder):
            check_placeholder(placeholder)  # which captions are then held against
        captions = [self._caption(file, placeholder) for file in self.captions] or None
        masks = _Opened(self.masks) if self.masks else None
        return Subject(placeholder, super_class, _Opened(self.pictures), captions, masks, seed)

    def __str__(self) -> str:
        """What was taken, and what was not."""
        counts = ((len(self.pictures), "picture"), (len(self.captions), "caption"), (len(self.masks), "mask"))
        taken = ", ".join(f"{count or 'no'} {name}{'s' * (count != 1)}" for count, name in counts)
        if not self.left_out:
            return taken
        names = ", ".join(file.name for file in self.left_out[:8]) + ", ..." * (len(self.left_out) > 8)
        return f"{taken}; left out, as no PNG, JPEG or WEBP picture, nor caption or mask of one: {names}"

    @staticmethod
    def _caption(file: Path, placeholder: str) -> str:
        caption = read_text(file).strip()
        if is_word(placeholder) and placeholder not in caption.lower():
            raise ValueError(f"{file} must hold a caption with {placeholder}, got {caption!r:.80}")
        return caption


class _Opened(Sequence[Image.Image]):
    """Pictures of files; each access decodes one, so that no more than one need be held."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: Any) -> Any:
        return _Opened(self._files[place]) if isinstance(place, slice) else open_picture(self._files[place])


def _beside(pictures: list[Path], sidecars: list[tuple[str, Path]], what: str) -> list[Path]:
    """The file for each picture, of those with the name of the picture that they are for; or none at all."""
    by_name = dict(sidecars)
    found = [by_name.get(picture.stem) for picture in pictures]
    beside = [file for file in found if file is not None]
    if not beside:
        return []
    folder = pictures[0].parent
    if len(beside) < len(pictures):
        raise ValueError(f"{pictures[found.index(None)]} has no {what}, but other pictures of {folder} have one")
    for kind, names in (("picture", [picture.stem for picture in pictures]), (what, [name for name, _ in sidecars])):
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{folder} holds {count} {kind}s for the name {name}; rename one, and its {what}")
    return beside
