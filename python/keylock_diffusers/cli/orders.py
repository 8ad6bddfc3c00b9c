"""Files of requests: reading one, and what identifies each of its pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from keylock_diffusers.checks import reason_of, shown, whole
from keylock_diffusers.concepts import Concept
from keylock_diffusers.files import open_regular, strict_json
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.loras import LoraBank
from keylock_diffusers.requests import FILES, LISTS, PICTURES, Lora, Request

# What an order may change without any of its pictures changing.
_NAMES = ("id", "num_images")


@dataclass(frozen=True)
class Order:
    """One request of a file: its place, what the file says, and what that means."""

    index: int
    said: Mapping[str, Any]
    request: Request


def read(path: Path, *, outside: bool = False) -> list[Order]:
    """The requests of a JSON file; its pictures and embeddings are files beside it.

    Args:
        path: the file.
        outside: whether they may be elsewhere.

    Raises:
        ValueError: naming the file, and the request where one of them is wrong.
        OSError: the file cannot be read.
    """
    try:
        listed = strict_json(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be a list of requests in JSON: {error}") from None
    if not isinstance(listed, list):
        raise ValueError(f"{path}: must be a list of requests, got {type(listed).__name__}")
    orders = []
    for index, said in enumerate(listed):
        try:
            orders.append(Order(index, said, _checked(Request.from_json(said, path.parent, outside=outside))))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{path}: request {index} ({_name(said)}): {reason_of(error)}") from error
    return orders


class Versions(NamedTuple):
    """The versions of what an order names by ids; None for one that cannot be read."""

    concepts: Mapping[str, str | None]
    loras: Mapping[str, str | None]


class Identity:
    """What a picture of an order is drawn from, as one text: two of the same are the same picture.

    Args:
        settings: what all orders share, as JSON.
        bank: of the orders' concepts.
        loras: of their LoRAs.
    """

    def __init__(self, settings: Mapping[str, Any], bank: Mapping[str, Concept], loras: LoraBank) -> None:
        self.settings, self.bank, self.loras = settings, bank, loras
        self._files: dict[int, list[str]] = {}

    def versions(self, order: Order) -> Versions:
        """Of the concepts and LoRAs that an order names by their ids."""

        def found(names: Iterable[str], version: Callable[[str], str]) -> dict[str, str | None]:
            known: dict[str, str | None] = {}
            for name in names:
                try:
                    known[name] = version(name)
                except Exception:  # planning the request says what is wrong with it
                    known[name] = None
            return known

        return Versions(
            found((str(use.concept) for use in order.request.concepts), lambda name: self.bank[name].version),
            found((lora.lora for lora in order.request.loras if isinstance(lora.lora, str)), self.loras.version),
        )

    def of(self, order: Order, number: int) -> str:
        """Of an order's image of that number."""
        said = {name: value for name, value in order.said.items() if name not in _NAMES}
        if said.get("seed") is not None:  # image k is the first one of seed + k
            said["seed"], number = said["seed"] + number, 0
        if order.index not in self._files:
            self._files[order.index] = [_digest(file) for file in _files(order.request)]
        files = self._files[order.index]
        facts = [said, number, files, self.versions(order), self.settings]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(file: str) -> str:
    """Of a file's content; no link that has taken the file's place meanwhile is followed."""
    with open_regular(file, flags=os.O_NOFOLLOW) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked(request: Request) -> Request:
    """A request that files can be named after: its pictures have numbers, and seeds of their own."""
    if request.id is not None and not isinstance(request.id, str):
        raise TypeError(f"id must be text, got {type(request.id).__name__}")
    if any("\ud800" <= letter <= "\udfff" for letter in request.id or ""):
        raise ValueError(f"id must be text, got half of a surrogate pair: {shown(request.id)}")
    count = whole(request.num_images, "num_images", 1, RequestLimits().num_images)
    if request.seed is not None:
        whole(request.seed, "seed", 0, 2**63 - 1 - count)
    return request


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # Windows' editors put a byte order mark first
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"its text must be UTF-8, got the byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from None


def _name(said: Any) -> str:
    """What an error calls a request that could not be read."""
    if not isinstance(said, Mapping):
        return shown(said)
    name, prompt = said.get("id"), shown(said.get("prompt"))
    return prompt if name is None else f"{shown(name)}: {prompt}"


def _files(request: Request) -> Iterator[str]:
    """The files of a request, as they were opened: inside of the folder, if they had to be."""
    for one in (request, *(item for name in LISTS for item in getattr(request, name))):
        for name in PICTURES:
            held = getattr(one, name, None)
            for picture in held if isinstance(held, list) else [held]:
                if isinstance(picture, Image.Image):
                    yield picture.filename  # type: ignore[attr-defined]  # of `open_picture`
        yield from (str(getattr(one, name)) for name in FILES if hasattr(one, name))
        if isinstance(one, Lora) and isinstance(one.lora, Path):
            yield str(one.lora)
