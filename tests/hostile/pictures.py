"""Picture files of every sort under any name: decoded right, or one line that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from keylock_diffusers import pictures
from keylock_diffusers.masks import read_mask
from tests.hostile.values import told

LONG = 12_000
TAKEN = ("PNG", "JPEG", "WEBP")
OTHERS = (
    "AVIF", "BMP", "DDS", "DIB", "EPS", "GIF", "ICNS", "ICO", "IM", "JPEG2000", "MSP", "PALM", "PCX", "PDF", "PPM",
    "QOI", "SGI",
    "SPIDER", "TGA", "TIFF", "XBM",
)  # fmt: skip
NAMES = ("a.png", "a.jpg", "a.webp", "a", "a.txt", "a.eps", "A.PNG", "a.png.zip", "-a.png", "a b.png", "ä.png")
_MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA")}
_TEXTS = (
    b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"push graphic-context", b"PK\x03\x04", b"\x80\x04.",
    b"MZ", bytes(4096),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file; `exact` is what the eye sees in it, in RGB, where it is undamaged and without loss."""

    kind: str
    name: str
    data: bytes
    whole: bool  # must be taken
    foreign: bool  # must be refused
    exact: Any = None


def make(rng: Random) -> Case:
    kind = rng.choice(("whole", "damaged", "damaged", "damaged", "chunks", "chunks", "size", "foreign", "text"))
    name = rng.choice(NAMES)
    if kind == "foreign":
        return Case(kind, name, _foreign(rng), False, True)
    if kind == "text":
        tail = _bytes(rng, rng.choice((0, 7, 300)))
        return Case(kind, name, rng.choice(_TEXTS) + tail, False, True)
    if kind == "size":
        return _sized(rng, name)
    if kind == "chunks":
        return Case(kind, name, _chunked(rng), False, False)
    format = rng.choice(TAKEN)
    image, exact = _image(rng, format)
    data = _saved(image, format, **_options(rng, format))
    if kind == "whole":
        return Case(kind, name, data, True, False, exact if format != "JPEG" else None)
    return Case(kind, name, _damaged(rng, data), False, False)


def check(case: Case, place: Path) -> str:
    """The file as a picture and as a mask."""
    file = place / case.name
    file.write_bytes(case.data)
    try:
        image = pictures.open_picture(file)
    except (ValueError, OSError) as error:
        assert not case.whole, f"a whole picture was refused: {error}"
        outcome = told(error, case.name)
        assert len(str(error).splitlines()) == 1, f"more than one line: {error}"
        return outcome
    finally:
        file.unlink()
    assert not case.foreign, "a file of another format was taken"
    limits = pictures.PictureLimits()
    assert image.width * image.height <= limits.pixels, "too many pixels"
    upright = pictures.upright(image)
    assert upright.mode == "RGB" and sorted(upright.size) == sorted(image.size)
    if case.exact is not None:
        seen = np.asarray(upright, int)
        assert seen.shape == case.exact.shape and abs(seen - case.exact).max() <= 1, "decoded to another picture"
    try:
        mask = read_mask(image, "mask")
    except (ValueError, TypeError) as error:
        told(error, "mask")
    else:
        assert mask.min() >= 0 and mask.max() <= 1, f"a mask from {mask.min()} to {mask.max()}"
    return f"accepted, {case.kind}"


def _image(rng: Random, format: str) -> tuple[Any, Any]:
    """Noise in one of the format's modes, and what it is in RGB."""
    mode = rng.choice(_MODES[format])
    height, width = rng.randint(1, 40), rng.randint(1, 40)
    height, width = max(height, width // 8 + 1), max(width, height // 8 + 1)
    noise = np.random.default_rng(rng.getrandbits(32))
    if mode == "I;16":
        deep = noise.integers(0, 2**16, (height, width), dtype=np.uint16)
        return Image.fromarray(deep), np.repeat(np.rint(deep / 257).astype(int)[..., None], 3, 2)
    if mode == "CMYK":
        return Image.fromarray(noise.integers(0, 256, (height, width, 4), dtype=np.uint8), "CMYK"), None
    image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    exact = np.asarray(image.convert("RGB"), int)
    if mode in ("LA", "RGBA"):
        alpha = noise.integers(0, 256, (height, width), dtype=np.uint8)
        image.putalpha(Image.fromarray(alpha))
        share = alpha[..., None] / 255
        exact = np.rint(exact * share + 255 * (1 - share)).astype(int)
    return image, exact


def _options(rng: Random, format: str) -> dict[str, Any]:
    options: dict[str, Any] = {"lossless": True, "exact": True} if format == "WEBP" else {}
    if format == "JPEG":
        options = {"quality": rng.choice((1, 50, 95)), "progressive": rng.random() < 0.5}
    return options


def _saved(image: Any, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _foreign(rng: Random) -> bytes:
    format = rng.choice(OTHERS)
    mode = {"MSP": "1", "PALM": "1", "XBM": "1"}.get(format, "RGB")
    return _saved(Image.new(mode, (16, 16), 1), format)


def _sized(rng: Random, name: str) -> Case:
    """A PNG of a few bytes that says it is large or thin; some of them are."""
    limits = pictures.PictureLimits()
    width, height = rng.choice(
        (
            (1, 17),
            (17, 1),
            (1, 100_000),
            (100_000, 1),
            (20_000, 4_000),
            (8_001, 8_001),
            (65_535, 4_096),
            (2**31 - 1,) * 2,
        )
    )
    data = _png(width, height, zlib.compress(bytes(64), 9))
    assert width * height > limits.pixels or max(width, height) > 16 * min(width, height)
    return Case("size", name, data, False, True)


def _png(width: int, height: int, pixels: bytes, *more: tuple[bytes, bytes]) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        *more,
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunked(rng: Random) -> bytes:
    """A PNG, JPEG or WEBP whose parts are right each and wrong together; checksums fit."""
    action = rng.randrange(6)
    if action == 0:  # texts and profiles that inflate a thousandfold
        bomb = zlib.compress(bytes(rng.choice((10**4, 10**6, 3 * 10**7))), 9)
        kind, head = rng.choice(((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")))
        return _png(8, 8, zlib.compress(bytes(16)), (kind, head + bomb))
    if action == 1:  # pixels too few, too many, or none
        return _png(64, 64, zlib.compress(bytes(rng.choice((0, 1, 575, 577, 10**6)))))
    if action == 2:  # parts twice, in another order, unknown ones that are critical
        more = rng.choice(
            (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"ABCD", b"acTL", b"fcTL", b"eXIf", b"pHYs", b"sRGB", b"cHRM")
        )
        return _png(8, 8, zlib.compress(bytes(16)), (more, _bytes(rng, rng.choice((0, 1, 4, 13, 300)))))
    image, _ = _image(rng, "PNG")
    if action == 3:  # fields of IHDR
        data = bytearray(_saved(image, "PNG"))
        data[rng.randrange(16, 29)] = rng.choice((0, 1, 2, 3, 8, 16, 255))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    if action == 4:  # EXIF that says anything
        format = rng.choice(("JPEG", "WEBP", "PNG"))
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))
        body = exif.tobytes()
        return _saved(
            image.convert("RGB"),
            format,
            exif=rng.choice((body, _damaged(rng, body) or b"Exif\0\0", b"Exif\0\0" + _bytes(rng, 60))),
        )
    frames = [Image.new("RGB", (16, 16), n) for n in range(rng.choice((2, 60)))]
    return _saved(frames[0], rng.choice(("PNG", "WEBP")), save_all=True, append_images=frames[1:])


def _damaged(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(6)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(changed):
            changed[at] = rng.choice((0, 1, 127, 128, 255))
        elif action == 2:
            del changed[at:]
        elif action == 3:
            del changed[at : at + rng.randrange(1, 33)]
        elif action == 4:
            changed[at:at] = _bytes(rng, rng.randrange(1, 33))
        else:
            changed += _bytes(rng, rng.randrange(1, 65))
    return bytes(changed)


def _bytes(rng: Random, count: int) -> bytes:
    return np.random.default_rng(rng.getrandbits(32)).bytes(count)
