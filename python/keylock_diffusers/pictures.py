"""Pictures that others give: bounded before they are decoded, told by content and not by name, and upright."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from keylock_diffusers.checks import reason_of
from keylock_diffusers.files import open_regular

_LARGEST_GREY = 65535  # of a 16-bit picture


@dataclass(frozen=True)
class PictureLimits:
    """What is decoded at all.

    Args:
        pixels: the most that a picture may have.
        aspect: how many times as long as wide it may be, or as wide as long.
        formats: which it may be stored in, by Pillow's names; the content tells, not the file's name.
    """

    pixels: int = 64_000_000
    aspect: float = 16.0
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")


def open_picture(path: str | os.PathLike[str], limits: PictureLimits = PictureLimits()) -> Image.Image:
    """A picture of a file, decoded.

    Args:
        path: a regular file; a pipe or a device is not waited for.
        limits: what it may be.

    Raises:
        ValueError: it is no such picture, or damaged; the message names the file.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as stream:
        try:
            picture = Image.open(stream, formats=limits.formats)
        except UnidentifiedImageError:
            raise ValueError(f"{path} must be a picture in {_one_of(limits.formats)}, and its content is not") from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers of damaged headers raise whatever they meet
            raise ValueError(f"{path} cannot be read as a picture: {reason_of(error)}") from error
        decode(picture, str(path), limits)
        picture.filename = str(path)  # what is found wrong with it later can name it, too
        return picture


def decode(picture: Image.Image, what: str, limits: PictureLimits = PictureLimits()) -> None:
    """Decodes a picture that is open, where it is within the limits.

    Args:
        picture: the picture.
        what: names it in errors.
        limits: what it may be; one that was decoded before may have been stored in any format.

    Raises:
        ValueError: it is too large, too long, of another format, or damaged.
    """
    check_size(picture.width, picture.height, what, limits)
    waiting = isinstance(picture, ImageFile.ImageFile) and bool(picture.tile)
    kind = {"MPO": "JPEG"}.get(picture.format or "", picture.format)  # a phone's JPEG with more than one picture
    if waiting and kind not in limits.formats:
        raise ValueError(f"{what} must be a picture in {_one_of(limits.formats)}, got {picture.format}")
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # whatever the decoder meets in damaged pixels
        raise ValueError(f"{what} cannot be decoded: {reason_of(error)}") from error


def check_size(width: int, height: int, what: str, limits: PictureLimits = PictureLimits()) -> None:
    """Whether a picture's size is within the limits.

    Raises:
        ValueError: it is not.
    """
    if min(width, height) < 1:
        raise ValueError(f"{what} must have pixels, got {width} x {height}")
    if width * height > limits.pixels:
        raise ValueError(f"{what} must have at most {limits.pixels} pixels, got {width} x {height}")
    if max(width, height) > limits.aspect * min(width, height):
        raise ValueError(f"{what} must be at most {limits.aspect:g} times as long as wide, got {width} x {height}")


def upright(picture: Image.Image) -> Image.Image:
    """A picture in RGB, turned as the camera noted, transparency on white, 16-bit greys in 8 bits."""
    picture = turned(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return eight_bit(picture).convert("RGB")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def turned(picture: Image.Image) -> Image.Image:
    """A picture turned as the camera noted; as it is where the note is damaged."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow's reader of damaged notes raises whatever it meets, SyntaxError among it
        return picture


def eight_bit(picture: Image.Image) -> Image.Image:
    """A picture of wide greys (modes I;16, I, F) in 8 bits: of 16 bits as its mode or its largest value says.

    Raises:
        ValueError: its values lie outside of 0..65535, or are not finite.
    """
    greys = np.asarray(picture).astype(np.float64)
    least, most = float(greys.min()), float(greys.max())
    if not (np.isfinite(greys).all() and least >= 0 and most <= _LARGEST_GREY):
        raise ValueError(f"a picture in mode {picture.mode} must have values in 0..{_LARGEST_GREY}")
    if picture.mode.startswith("I;16") or most > 255:
        greys /= 257
    elif picture.mode == "F" and most <= 1:
        greys *= 255
    return Image.fromarray(np.rint(greys).astype(np.uint8))


def given(value: Any, what: str, limits: PictureLimits = PictureLimits()) -> Image.Image | Tensor:
    """One picture as an object: a text is never opened or fetched.

    Args:
        value: a PIL image; an array [height, width] or [height, width, 1, 3 or 4], of uint8 or of floating-point
            numbers in 0..1; or a tensor [C, height, width], or [1, C, height, width].
        what: names it in errors.
        limits: what it may be.

    Returns:
        An upright image in RGB; a float tensor [1, C, height, width] from a tensor or an array of floating-point
        numbers.

    Raises:
        TypeError, ValueError: it is no picture, or beyond the limits.
    """
    if isinstance(value, Image.Image):
        decode(value, what, limits)
        try:
            return upright(value)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    if isinstance(value, np.ndarray):
        if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (1, 3, 4)):
            raise ValueError(f"{what} must be an array [height, width, 3], got {list(value.shape)}")
        check_size(value.shape[1], value.shape[0], what, limits)
        value = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
        if value.dtype == np.uint8:
            return upright(Image.fromarray(np.ascontiguousarray(value)))
        if not np.issubdtype(value.dtype, np.floating):
            raise TypeError(f"{what} must be an array of uint8 or floating-point numbers, got {value.dtype}")
        if not bool(((value >= 0) & (value <= 1)).all()):  # NaN is neither
            raise ValueError(f"{what} must be an array of numbers in 0..1, got others among them")
        value = np.repeat(value[..., None], 3, 2) if value.ndim == 2 else value
        if value.shape[2] == 4:  # on white
            value = 1 - (1 - value[..., :3]) * value[..., 3:]
        return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)).permute(2, 0, 1)[None]
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise ValueError(f"{what} must be a dense tensor, got {value.layout} on {value.device}")
        held = value[None] if value.ndim == 3 else value
        if held.ndim != 4 or held.shape[0] != 1 or not held.is_floating_point():
            raise ValueError(f"{what} must be one picture [C, height, width] of floating-point numbers, got "
                             f"{list(value.shape)} of {value.dtype}")  # fmt: skip
        check_size(held.shape[3], held.shape[2], what, limits)
        return held
    hint = "; open it first" if isinstance(value, (str, os.PathLike)) else ""
    raise TypeError(f"{what} must be a picture, an array or a tensor, got {type(value).__name__}{hint}")


def _one_of(formats: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(formats[:-1]), formats[-1]]))
