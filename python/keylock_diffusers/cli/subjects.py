"""What ``keylock train`` learns from: a folder of pictures, or one of users' folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_SUPER_CLASS = "super-class.txt"  # in a user's folder


@dataclass(frozen=True)
class Order:
    """One user's share of the work: what is learned, and the files it becomes; or why it cannot be.

    Args:
        place: the folder of pictures.
        said: what was taken of it.
        subject: what is learned; None beside a failure.
        files: that are written.
        failure: what is wrong with the folder.
    """

    place: Path
    said: str
    subject: Any
    files: list[Path]
    failure: Exception | None = None

    @classmethod
    def of(
        cls,
        place: Path,
        placeholder: str,
        output: Path,
        super_class: str,
        seed: int,
        is_lora: bool,
        overwrite: bool,
        alone: bool,
    ) -> Order:
        """Reads a folder; what is wrong with its pictures or words is raised if it is the only one.

        Raises:
            ValueError: that, or a file to be written is there already.
        """
        from keylock_diffusers.checks import reason_of
        from keylock_diffusers.concepts.concept import check_placeholder
        from keylock_diffusers.files import read_text, require_place
        from keylock_diffusers.training import PictureFolder
        from keylock_diffusers.training.config import is_word

        if not is_lora:
            check_placeholder(placeholder)
        files = [output, *([_word_file(output)] if is_lora and is_word(placeholder) else [])]
        for file in files:
            if file.exists() and not file.is_dir() and not overwrite:
                raise ValueError(f"--output: {file} exists already; --overwrite replaces it")
            require_place(file, "--output")
        try:
            folder, own = PictureFolder.read(place), place / _SUPER_CLASS
            kind = super_class
            if not alone and own.is_file():
                kind = read_text(own).strip()
                folder = replace(folder, left_out=[file for file in folder.left_out if file != own])
            return cls(place, str(folder), folder.subject(placeholder, kind, seed), files)
        except (ValueError, TypeError, OSError) as error:
            if alone:
                raise
            return cls(place, f"cannot be used: {reason_of(error)}", None, files, error)

    def masked(self, pipe: Any, by: str, alone: bool) -> Order:
        """With masks, made where there are none; what is wrong is raised if it is the only one."""
        from keylock_diffusers.checks import reason_of
        from keylock_diffusers.training import attention_masks, clipseg_masks

        if self.subject is None or self.subject.masks is not None:
            return self
        try:
            made = attention_masks(pipe, self.subject) if by == "attention" else clipseg_masks(by, self.subject)
            return replace(self, subject=replace(self.subject, masks=made))
        except (ValueError, TypeError, OSError) as error:
            if alone:
                raise
            return replace(self, said=f"cannot be used: {reason_of(error)}", subject=None, failure=error)


def places(pictures: Path, placeholder: str, output: Path, users: bool) -> list[tuple[Path, str, Path]]:
    """Each folder of pictures, with its placeholder and the file that it becomes."""
    if not users:
        return [(pictures, placeholder, output)]
    from keylock_diffusers.ids import SUFFIX

    if not pictures.is_dir():
        raise ValueError(f"{pictures} is not a folder of users' folders")
    folders = sorted(place for place in pictures.iterdir() if place.is_dir() and not place.name.startswith("."))
    if not folders:
        raise ValueError(f"{pictures} holds no users' folders")
    if "{}" not in placeholder:
        raise ValueError(f"--placeholder must hold {{}} for a user's name with --users, got {placeholder!r:.80}")
    output.mkdir(parents=True, exist_ok=True)
    return [(place, placeholder.replace("{}", place.name), output / f"{place.name}{SUFFIX}") for place in folders]


def _word_file(output: Path) -> Path:
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.embedding.safetensors")
