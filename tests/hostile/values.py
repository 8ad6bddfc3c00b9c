"""Values that stand where others are expected, in JSON and in Python; and how a case tells what came of it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

LONGEST = 500  # characters of a message

TEXTS = (
    "", " ", "\0", "\n", "x" * 100_000, "<a>", "<a-b> " * 400, "[/]", "[bold red]", "%s%n{0}{", "../../etc/passwd",
    "/etc/passwd",
    "http://127.0.0.1:9/x.png", "file:///etc/passwd", "C:\\x.png", "\ud800", "\u202e\u0000\ufeff", "NaN", "1e999",
    "true", "null",
    "(" * 3000, "a:1.5)" * 50, "((a:1e9):-1e9)", "é" * 300, "a/b/c/d/e/f", ".", "..", "-mask", "'; drop --",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**400), 0.5, -0.5, 1e-320, 1e30, 1e300,
    -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def json_value(rng: Random, depth: int = 0) -> Any:
    """What a JSON file can hold, of any type; numbers as Python's json reads them, the three that JSON lacks too."""
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(TEXTS): json_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.choice((0, "a", None, {}, []))] * rng.choice((1, 33, 1000))


class Spiteful:
    """Raises whatever is asked of it."""

    def _raise(self, *_: Any) -> Any:
        raise LookupError("spite")

    __str__ = __repr__ = __len__ = __iter__ = __eq__ = __bool__ = __float__ = __int__ = __index__ = __getitem__ = _raise
    __hash__ = object.__hash__


class SpitefulText(str):
    """Text whose methods raise."""

    def _raise(self, *_: Any) -> Any:
        raise LookupError("spite")

    __str__ = __repr__ = __len__ = __iter__ = _raise


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _huge() -> Any:
    """A picture that a lie of a few bytes makes: 100,000 x 100,000 pixels, not yet decoded."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try:
        return Image.open(io.BytesIO(bytes(data)))
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _truncated() -> Any:
    stream = io.BytesIO()
    Image.effect_noise((99, 99), 50).save(stream, "JPEG")
    return Image.open(io.BytesIO(stream.getvalue()[:-900]))


def _closed() -> Any:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    image = Image.open(io.BytesIO(stream.getvalue()))
    image.close()
    return image


OBJECTS: dict[str, Callable[[], Any]] = {
    "object": object,
    "type": lambda: int,
    "function": lambda: len,
    "generator": lambda: (n for n in range(3)),
    "spiteful": Spiteful,
    "spiteful text": lambda: SpitefulText("a cat"),
    "bytes": lambda: b"\x89PNG",
    "set": lambda: {1},
    "dict": dict,
    "complex": lambda: 1j,
    "path": lambda: Path("/etc/passwd"),
    "file": lambda: io.BytesIO(b"x"),
    "tensor of nothing": lambda: torch.zeros(0),
    "tensor of no tokens": lambda: torch.zeros(0, 32),
    "tensor, wrong width": lambda: _noise(77, 31),
    "tensor of NaN": lambda: torch.full((77, 32), float("nan")),
    "tensor, infinite": lambda: torch.full((77, 32), float("inf")),
    "tensor, sparse": lambda: _noise(77, 32).to_sparse(),
    "tensor, meta": lambda: torch.empty(77, 32, device="meta"),
    "tensor, complex": lambda: torch.zeros(77, 32, dtype=torch.complex64),
    "tensor, bool": lambda: torch.ones(77, 32, dtype=torch.bool),
    "tensor, int": lambda: torch.ones(77, 32, dtype=torch.int64),
    "tensor, 5 dims": lambda: torch.zeros(1, 1, 1, 1, 1),
    "tensor, huge view": lambda: torch.zeros(1).expand(10**6, 10**6),
    "scalar tensor": lambda: torch.tensor(1.0),
    "array of objects": lambda: np.array([object()]),
    "array of text": lambda: np.array(["a"]),
    "array, huge view": lambda: np.broadcast_to(np.float32(0), (10**6, 10**6)),
    "array of NaN": lambda: np.full((8, 8), np.nan),
    "numpy NaN": lambda: np.float64("nan"),
    "picture of no pixels": lambda: Image.new("RGB", (0, 8)),
    "picture, thin": lambda: Image.new("RGB", (1, 100_000)),
    "picture, long": lambda: Image.new("L", (20_000, 1)),
    "picture, bomb": _huge,
    "picture, truncated": _truncated,
    "picture, closed": _closed,
    "picture in CMYK": lambda: Image.new("CMYK", (8, 8)),
}


def python_value(rng: Random) -> tuple[str, Callable[[], Any]]:
    """A value of any type, and what to call it. It is made when it is used, since some can be used once."""
    kind = rng.randrange(4)
    if kind == 0:
        number = rng.choice(NUMBERS)
        return f"{number!r:.24}", lambda: number
    if kind == 1:
        text = rng.choice(TEXTS)
        return f"text {text[:16]!a}", lambda: text
    if kind == 2:
        plain = rng.choice((None, True, False, [], (), [None], [[]], [1, "a"], {"a": 1}, {1: {}}, [{}] * 40, [0.5] * 3))
        return f"{plain!r:.24}", lambda: plain
    name = rng.choice(sorted(OBJECTS))
    return name, OBJECTS[name]


def told(error: BaseException, *names: str) -> str:
    """What came of a case that was refused; the message names one of `names`, in one line of bearable length.

    Raises:
        AssertionError: it does not.
    """
    message = str(error)
    found = f"{type(error).__name__}: {message[:300]!r}"
    assert len(message) <= LONGEST, f"a message of {len(message)} characters: {found}"
    assert not names or any(name in message for name in names), f"names none of {', '.join(names)}: {found}"
    return f"refused, {type(error).__name__}"
