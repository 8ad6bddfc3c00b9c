"""``python -m benchmarks.quality FOLDER``: learn, draw and judge; what is in the folder already is not done again."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import keylock_diffusers as kd
from benchmarks.quality import report
from benchmarks.quality.judges import decoded
from benchmarks.quality.methods import METHODS, ROWS, Learned, Method
from benchmarks.quality.scores import Scores, right_answer
from benchmarks.quality.users import SEEDS, TEST, TUNE, Order, User
from keylock_diffusers import embedded
from keylock_diffusers.embedded import autoencoder
from keylock_diffusers.embedded.prompts import PERSONAL_GUIDANCE

_TOGETHER = 8  # users who learn in one run
_BATCH = 24  # pictures that are drawn at a time
STEPS = 25
_QUICK = (
    "no personalisation",
    "key-locked (Perfusion)",
    "textual inversion, one vector",
    "LoRA rank 4, with a word",
    "added, small",
    "added",
)
# Prompts in which two users' subjects stand beside each other.
_BOTH = ("a {} and a {} on white", "kissing {} next to a {} on teal", "a {} and a pouting {} on pink")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", choices=("tune", "test"), default="tune")
    parser.add_argument("--quick", action="store_true", help="five of the users, and twelve pictures of each")
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), help="default all; of the quick ones, six")
    parser.add_argument("--seconds", type=int, choices=tuple(ROWS), help="of training, in rows: default 30, quick 10")
    parser.add_argument("--tuning", action="store_true", help="every setting that is tried, instead of those chosen")
    given = parser.parse_args()
    users = TEST if given.users == "test" else TUNE
    if given.quick:
        users = users[:5]
    seconds = given.seconds or (10 if given.quick else 30)
    run = Run(given.folder / f"{given.users}-{seconds}{'-quick' if given.quick else ''}", users, given.quick)
    for name in given.methods or (_QUICK if given.quick else METHODS):
        method = METHODS[name]
        tried: Sequence[dict[str, Any]] = ({}, *method.tried) if given.tuning else ({},)
        for changes in tried:
            run.measure(method, {**method.settings, **changes}, ROWS[seconds], changes)
    report.write(run.folder, users, list(METHODS), len(run.seeds))


class Run:
    """Scores of some users' pictures, a line for each method and its settings.

    Args:
        folder: where they are.
        users: whose.
        quick: whether there is one seed only.
    """

    def __init__(self, folder: Path, users: Sequence[User], quick: bool) -> None:
        self.folder, self.users, self.seeds = folder, users, SEEDS[:1] if quick else SEEDS
        self.pipe = kd.install(embedded.load())
        self.scores = Scores(self.pipe.vae, users)
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, method: Method, settings: dict[str, Any], rows: int, changes: dict[str, Any]) -> None:
        """Learns, draws and judges, unless that was done already."""
        key = hashlib.sha256(json.dumps([method.name, settings, rows], sort_keys=True).encode()).hexdigest()[:10]
        if any(facts["key"] == key for facts in report.read(self.folder)):
            return
        start = time.perf_counter()
        learned: list[Learned] = []
        for first in range(0, len(self.users), _TOGETHER):
            learned += method.learn(self.pipe, self.users[first : first + _TOGETHER], settings, rows)
        trained = time.perf_counter() - start
        cells = [
            (user, one, order, seed)
            for user, one in zip(self.users, learned, strict=True)
            for order in user.orders
            for seed in self.seeds
        ]
        pipe = kd.install(embedded.load_adapter(embedded.load())) if method.adapter else self.pipe
        options = method.options()
        if method.draws:
            images = _drawn_by_each(pipe, [(one, one.request(order, seed)) for _, one, order, seed in cells], options)
        elif method.name == "right answers":
            images = self._through_the_autoencoder([right_answer(user, order) for user, _, order, _ in cells])
        else:
            images = [np.asarray(user.subject().images[seed]) for user, _, _, seed in cells]
        found = []
        for (user, _, order, seed), image in zip(cells, images, strict=True):
            scored = self.scores.of(image, user, order)
            if method.name == report.PLAIN:
                scored |= self.scores.nothing(image, user, order)
            found.append({"user": user.name, "prompt": order.prompt, "seed": seed, **scored})
        if len(self.seeds) > 1:
            for place in range(0, len(cells), len(self.seeds)):  # how far a prompt's pictures are from each other
                found[place]["diversity"] = _apart(images[place : place + len(self.seeds)])
        both = self._both(pipe, learned) if method.draws and not learned[0].weights else []
        facts = {
            "key": key,
            "method": method.name,
            "settings": settings,
            "changes": changes,
            "rows": rows if method.trains else 0,
            "bytes": max(one.nbytes for one in learned),
            "seconds": round(trained / len(self.users), 2),
            **report.summary(found, both),
        }
        self._sheet(images, len(cells) // len(self.users)).save(self.folder / f"{key}.jpg", quality=90)
        with (self.folder / report.SCORES).open("a") as kept:
            kept.write(json.dumps(facts) + "\n")
        print(report.line(facts), flush=True)

    @torch.no_grad()
    def _through_the_autoencoder(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        seen = decoded(self.pipe.vae, autoencoder.pixels(list(images))).permute(0, 2, 3, 1)
        return list(((seen / 2 + 0.5) * 255).round().byte().numpy())

    def _both(self, pipe: Any, learned: Sequence[Learned]) -> list[dict[str, float]]:
        """Two users' cats in one picture, each with its own word; nothing where no word tells them apart."""
        cats = [(user, one) for user, one in zip(self.users, learned, strict=True) if user.kind == "cat"]
        cells, requests = [], []
        for (user, one), (other, another) in zip(cats[::2], cats[1::2], strict=False):
            for prompt in _BOTH:
                if one.placeholder == another.placeholder:
                    return []
                order = Order.of(prompt.format("{}", "cat"), "cat")
                merged = {
                    name: [*one.use.get(name, ()), *another.use.get(name, ())] for name in {*one.use, *another.use}
                }
                for seed in self.seeds:
                    words = prompt.format(one.placeholder, another.placeholder)
                    requests.append(kd.Request(words, seed=seed, guidance_scale=PERSONAL_GUIDANCE, **merged))
                    cells.append((order, (user.coat, other.coat)))
        images = _drawn(pipe, requests)
        return [self.scores.both(image, *cell) for image, cell in zip(images, cells, strict=True)]

    @staticmethod
    def _sheet(images: Sequence[np.ndarray], columns: int) -> Image.Image:
        side = images[0].shape[0] + 2
        made = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
        for number, image in enumerate(images):
            made.paste(Image.fromarray(image), (number % columns * side, number // columns * side))
        return made


def _apart(images: Sequence[np.ndarray]) -> float:
    """The mean root mean square difference, 0 to 255, of pictures to each other."""
    pairs = [(one, other) for n, one in enumerate(images) for other in images[n + 1 :]]
    gaps = [float(np.square(a.astype(np.float32) - b).mean()) ** 0.5 for a, b in pairs]
    return sum(gaps) / len(gaps)


def _drawn_by_each(pipe: Any, asked: Sequence[tuple[Learned, kd.Request]], options: dict[str, Any]) -> list[np.ndarray]:
    """Pictures in the order of the requests; whoever has a model of its own draws with that alone."""
    if asked[0][0].weights is None:
        return _drawn(pipe, [request for _, request in asked], **options)
    drawn: list[np.ndarray] = []
    for _, group in itertools.groupby(asked, lambda pair: id(pair[0])):
        own = list(group)
        assert own[0][0].weights is not None
        with own[0][0].weights.within(pipe):
            drawn += _drawn(pipe, [request for _, request in own], **options)
    return drawn


def _drawn(pipe: Any, requests: list[kd.Request], **options: Any) -> list[np.ndarray]:
    drawn: list[np.ndarray] = []
    for first in range(0, len(requests), _BATCH):
        part = requests[first : first + _BATCH]
        made = kd.generate(pipe, part, num_inference_steps=STEPS, output_type="np", max_batch=_BATCH, **options)
        drawn += [(image * 255).round().astype(np.uint8) for image in made]
    return drawn


if __name__ == "__main__":
    main()
