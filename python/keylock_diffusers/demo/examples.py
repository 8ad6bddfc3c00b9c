"""A user's pictures as files to learn from, and a file of requests of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from keylock_diffusers.demo import pictures
from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.prompts import PERSONAL_GUIDANCE
from keylock_diffusers.files import write_atomically

USER = pictures.USERS[0]
CONCEPT = "alice/cat"
# A field of each kind; control images and subjects need models of their own, which the package does not ship.
REQUESTS: list[dict[str, Any]] = [
    {
        "id": "a concept",
        "prompt": f"{USER.placeholder} with tears of joy on pink",
        "concepts": [{"concept": CONCEPT, "strength": pictures.STRENGTH}],
        "guidance_scale": PERSONAL_GUIDANCE,
        "seed": 0,
    },
    {
        "id": "a concept in its place, and one in two pictures",
        "prompt": f"{USER.placeholder} next to a house on pink",
        "concepts": [
            {
                "concept": CONCEPT,
                "strength": 0.9,
                "region": "left.png",
                "start": 0.0,
            }
        ],
        "guidance_scale": PERSONAL_GUIDANCE,
        "num_images": 2,
        "seed": 1,
    },
    {
        "id": "an image prompt",
        "prompt": "a house next to a cat on white",
        "image_prompts": [{"image": "blue-cat.png", "scale": 1.5, "region": "right.png", "start": 0.0, "end": 1.0}],
        "guidance_scale": PERSONAL_GUIDANCE,
        "seed": 0,
    },
    {
        "id": "words in their places",
        "prompt": "a (red:1.3) car next to a house on yellow",
        "regions": [{"mask": "left.png", "prompt": "car"}, {"mask": "right.png", "prompt": "house"}],
        "guidance_scale": PERSONAL_GUIDANCE,
        "seed": 2,
    },
    {
        "id": "begun from a picture",
        "prompt": "a dog on blue",
        "image": "alice/0.png",
        "strength": 0.6,
        "guidance_scale": PERSONAL_GUIDANCE,
        "seed": 3,
    },
    {
        "id": "a picture filled in",
        "prompt": "a cat on blue",
        "image": "alice/0.png",
        "mask": "right.png",
        "strength": 1.0,
        "guidance_scale": PERSONAL_GUIDANCE,
        "seed": 4,
    },
    {
        "id": "nothing but words, new each time",
        "prompt": "a rocket on purple",
        "negative_prompt": "a car",
        "guidance_scale": PERSONAL_GUIDANCE,
        "seed": None,
    },
]


def requests_json() -> str:
    """The file of requests, a field a line."""
    orders = [[f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in one.items()] for one in REQUESTS]
    return "[\n" + ",\n".join("  {\n" + ",\n".join(fields) + "\n  }" for fields in orders) + "\n]\n"


def write(folder: Path) -> None:
    """Writes the pictures, their captions and masks, and the requests below a folder.

    Raises:
        FileExistsError: one of the files is there; nothing was written.
        OSError: they cannot be written.
    """
    copies = {folder / "blue-cat.png": pictures.FOLDER / "image-prompt.png"}
    texts = {folder / "requests.json": requests_json()}
    own = folder / USER.name.lower()
    for number, caption in enumerate(pictures.CAPTIONS):
        for end in (".png", "-mask.png"):
            copies[own / f"{number}{end}"] = pictures.FOLDER / f"{USER.name.lower()}-{number}{end}"
        texts[own / f"{number}.txt"] = caption.format(USER.placeholder) + "\n"
    halves = {folder / "left.png": 0, folder / "right.png": render.SIZE // 2}
    there = next((path for path in (*copies, *texts, *halves) if path.exists()), None)
    if there is not None:
        raise FileExistsError(f"{there} exists already; choose a folder without it")
    own.mkdir(parents=True, exist_ok=True)
    for path, source in copies.items():
        shutil.copyfile(source, path)
    for path, text in texts.items():
        write_atomically(path, text.encode())
    for path, left in halves.items():
        mask = Image.new("L", (render.SIZE, render.SIZE))
        mask.paste(255, (left, 0, left + render.SIZE // 2, render.SIZE))
        mask.save(path)
