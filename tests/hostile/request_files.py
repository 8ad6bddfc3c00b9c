"""Files for `keylock generate`: text that is no JSON, JSON that is no requests, and what lies beside them."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

import keylock_diffusers as kd
from tests.hostile import commands, concept_files, pictures, world
from tests.hostile.values import json_value

LONG = 500
_GOOD: list[dict[str, Any]] = [
    {"id": "first", "prompt": "a house", "seed": 1, "guidance_scale": 4.0, "negative_prompt": "a cat"},
    {"prompt": "a <alice-cat>", "concepts": ["alice/cat"], "seed": 2, "num_images": 2},
    {
        "prompt": "a <alice-cat>",
        "concepts": [{"concept": "alice/cat", "beta": 0.6, "strength": 0.9, "region": "left.png"}],
        "seed": 3,
    },
    {"prompt": "a cat and a dog", "seed": 4, "regions": [{"mask": "left.png", "prompt": "cat"}], "endings": "outside"},
    {
        "prompt": "a cat",
        "seed": 5,
        "image_prompts": [{"image": "photo.png", "scale": 0.5, "region": "left.png", "end": 0.5}],
    },
    {"prompt": "a cat", "seed": 6, "image": "photo.png", "mask": "left.png", "strength": 0.9},
    {
        "prompt": "a cat",
        "seed": 7,
        "image_prompts": [{"image": ["photo.png", "deep/photo.png"]}],
        "original_size": [16, 16],
    },
    {
        "prompt": "a cat",
        "seed": 8,
        "guidance_scale": 4.0,
        "negative_prompt": "a badhand",
        "embeddings": [{"source": "badhand.safetensors"}],
    },
]
_NAMES = (
    "nothing.png", "/etc/passwd", "../outside.png", "link.png", "pipe.png", "deep", "", ".", "a\x00b.png",
    "http://127.0.0.1:9/a.png", "x" * 300,
    "file:///etc/passwd", "~/a.png", "photo.png/..", "loop.png", "hostile.png", "\ud800.png", "r.json", "/dev/zero",
    "//127.0.0.1/a.png", "bomb.png",
)  # fmt: skip
_TEXTS = (
    b"",
    b"[",
    b"{}",
    b"null",
    b"[1]",
    b"[[]]",
    b"[null]",
    b'"x"',
    b"[{}]",
    b"[NaN]",
    b"\x00",
    b"[" * 100_000,
    b'[{"a":' * 100_000,
    b"[] []",
)


@dataclass(frozen=True)
class Case:
    """A file's bytes, a picture beside it that is no better, and a bank's file."""

    kind: str
    data: bytes
    picture: bytes
    concept: bytes | None
    good: bool

    def __str__(self) -> str:
        return f"{self.kind}: {self.data[:600]!r}"


def make(rng: Random) -> Case:
    orders = copy.deepcopy(rng.sample(_GOOD, rng.choice((1, 2, 3))))
    kind = rng.choice(("good", "text", "bytes", "json", "json", "json", "name", "name", "encoding", "bank", "more"))
    data, concept = b"", None
    if kind == "text":
        data = rng.choice(_TEXTS)
    elif kind == "json":
        for _ in range(rng.choice((1, 1, 2, 4))):
            _change(rng, orders)
    elif kind == "name":
        _name(rng, orders)
    elif kind == "bank":
        concept = concept_files.make(rng).data
    elif kind == "more":
        orders = orders * rng.choice((1, 20)) if rng.randrange(2) else []
        rng.choice(orders or [{}])[rng.choice(("num_images", "seed", "prompt"))] = rng.choice(
            (10**11, 10**400, "cat " * 250_000, 2**63)
        )
    text = data or _json(rng, orders, kind)
    if kind == "bytes":
        text = pictures._damaged(rng, text)
    picture = pictures.make(rng).data
    return Case(kind, text, picture, concept, kind == "good")


def check(case: Case, place: Path) -> str:
    """Pictures, or one line that names the file or the request; nothing beside the folder is opened."""
    folder = place / "requests"
    _write(folder, case, place)
    try:
        options = ("--bank", "bank", "--output", "drawn", "--steps", 2)
        ended = commands.run(world.pipeline(), place, "generate", "requests/r.json", *options)
        drawn = sorted((place / "drawn").glob("*.png")) if (place / "drawn").exists() else []
        if ended.code:
            assert not case.good, f"{case} was refused: {ended.error[-300:]}"
            commands.refusal(ended, "r.json", "request ", "alice/cat")
            assert not drawn or case.kind in ("json", "more", "bytes"), "refused, and wrote pictures"
            assert world.OTHERS not in ended.error
            return "refused"
        for path in drawn:
            Image.open(path).verify()
        orders = json.loads(case.data.decode("utf-8-sig"))
        assert len(drawn) >= len(orders), f"{case}: {len(drawn)} pictures"
        return "accepted"
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(place / "drawn", ignore_errors=True)


def _write(folder: Path, case: Case, place: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(folder / "photo.png")
    Image.new("RGB", (16, 16), "blue").save(folder / "deep" / "photo.png")
    Image.new("RGB", (16, 16), "blue").save(place / "outside.png")
    left = Image.new("L", (16, 16))
    left.paste(255, (0, 0, 8, 16))
    left.save(folder / "left.png")
    (folder / "link.png").symlink_to(place / "outside.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "hostile.png").write_bytes(case.picture)
    save_file({"emb_params": torch.ones(2, 32)}, folder / "badhand.safetensors")
    (folder / "bomb.png").write_bytes(pictures._png(100_000, 100_000, b""))
    (folder / "r.json").write_bytes(case.data)
    bank = kd.ConceptBank(place / "bank")
    for name, concept in world.concepts().items():
        bank.add(name, concept, overwrite=True)
    if case.concept is not None:
        (place / "bank" / "alice" / "cat.safetensors").write_bytes(case.concept)


def _json(rng: Random, orders: Any, kind: str) -> bytes:
    text = json.dumps(orders, ensure_ascii=rng.random() < 0.5)
    if kind != "encoding":
        return text.encode("utf-8", "surrogatepass")
    text = text.replace("a house", "ein Häuschen").replace("a cat", "ein Kätzchen")
    return rng.choice(
        (
            text.encode("latin-1", "replace"),
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(),
            text.encode("utf-32"),
        )
    )


def _change(rng: Random, orders: list[Any]) -> None:
    """One value at any depth, a name, or a whole order."""
    holder: Any = orders
    key: Any = rng.randrange(len(orders)) if orders else None
    if key is None:
        return
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.randrange(5):
        holder = holder[key]
        key = rng.choice(sorted(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    action = rng.randrange(5)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice((key.upper(), key + "s", "prompt_embeds", "latents", "__class__", "", "\x00"))] = holder.pop(
            key
        )
    elif action == 2 and isinstance(holder, dict):
        holder[rng.choice(sorted(kd.Request.__dataclass_fields__))] = json_value(rng)
    else:
        holder[key] = json_value(rng)


def _name(rng: Random, orders: list[Any]) -> None:
    """The name of a file where one is read."""
    order = rng.choice(orders)
    name = rng.choice(_NAMES)
    place = rng.randrange(8)
    if place == 0:
        order["image"] = name
    elif place == 1:
        order["image_prompts"] = [{"image": rng.choice((name, ["photo.png", name]))}]
    elif place == 2:
        order["regions"] = [{"mask": name, "prompt": order["prompt"].split()[1]}]
    elif place == 3:
        order.update(image="photo.png", mask=name)
    elif place == 4:
        order["concepts"] = [name]
    elif place == 5:
        order["embeddings"] = [{"source": name, "name": order["prompt"].split()[1]}]
    else:  # where no file is read
        field = rng.choice(("id", "guidance_scale", "controls", "endings", "image_prompts"))
        held = {"image": rng.choice((name, [name], 7))}
        order[field] = [{"image": "photo.png", "scale": held}] if field == "image_prompts" else held
