"""Teach three cats together, draw them and a visitor's pictures in one batch, and measure what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from keylock_diffusers import embedded
from keylock_diffusers.concepts import Concept, ConceptBank
from keylock_diffusers.demo import grid, loras, pictures, regions
from keylock_diffusers.demo.pictures import STRENGTH, USERS, User
from keylock_diffusers.embedded import classifier, render
from keylock_diffusers.embedded.evaluate import background_name
from keylock_diffusers.embedded.prompts import PERSONAL_GUIDANCE
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.processors import install
from keylock_diffusers.requests import Request, Use
from keylock_diffusers.training import AddedConfig, LoraTrainingConfig, PerfusionConfig, Subject, train_concepts

TRAINING = AddedConfig(steps=180, batch_size=6)
PERFUSION_TRAINING = PerfusionConfig(
    steps=100, batch_size=6, values_rate=0.03, embedding_rate=0.004, inference_beta=0.65, inference_tau=0.15
)
_COAT_SEEDS = 4


@dataclass(frozen=True)
class Scene:
    """One row of the grid."""

    label: str
    prompt: str  # {} is where the cat stands
    expression: str  # what the classifier should name it
    left_half: bool = False  # the cat shares the picture


SCENES = (
    Scene("a cat on blue", "{} on blue", "cat"),
    Scene("with tears of joy on pink", "{} with tears of joy on pink", "cat with tears of joy"),
    Scene("next to a house on white", "a {} next to a house on white", "cat", left_half=True),
)
_TOGETHER = "a {} and a {} on teal"
_PLAIN = "a dog on green"
_VISITOR = "Visitor"


def run(
    output: Path,
    *,
    steps: int = 25,
    training: AddedConfig = TRAINING,
    lora_training: LoraTrainingConfig = loras.TRAINING,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """The whole demo; writes ``grid.png``, ``regions.png``, ``loras.png``, ``report.json`` and the files of concepts
    and LoRAs below `output`.

    Args:
        output: a folder, made if need be.
        steps: denoising steps of every picture.
        training: how the concepts are trained.
        lora_training: how the LoRAs are.
        seed: of the first picture of every cell.
        progress: whether to show progress bars.

    Returns:
        The report: sizes in bytes, times in seconds, differences in units of 1/255, coats and expressions as counts.
    """
    output.mkdir(parents=True, exist_ok=True)
    pipe = install(embedded.load())
    bank, trained = _teach(pipe, training, output / "concepts", progress)

    requests = _mixed_batch(seed)
    # One step of one batch at a time: four batches, every request alone, and one to warm up.
    bar = tqdm(total=(4 + len(requests) + 1) * steps, desc="drawing", disable=not progress)

    def count(_pipe: Any, _step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return {}

    def draw(orders: Sequence[Request]) -> list[np.ndarray]:  # each [128, 128, 3] in 0..1
        return generate(
            pipe,
            orders,
            bank=bank,
            num_inference_steps=steps,
            output_type="np",
            max_batch=len(orders),
            callback_on_step_end=count,
        )

    draw(requests[:1])  # what the first call sets up is not the batch's time
    batch, batch_seconds = _timed(draw, requests)
    alone, alone_seconds = _timed(lambda orders: [draw([order])[0] for order in orders], requests)
    strangers = [
        order if n % 2 == 0 else Request(_PLAIN, seed=900 + n, guidance_scale=2.0) for n, order in enumerate(requests)
    ]
    beside = draw(strangers)
    cells = [(scene, user, seed + 100 * n) for n in range(_COAT_SEEDS) for scene in SCENES for user in USERS]
    drawn = draw([_order(scene, user, number) for scene, user, number in cells])
    without = draw([_order(scene, user, number, strength=0.0) for scene, user, number in cells])
    bar.close()

    report = {
        "concepts": {user.name: (output / "concepts" / f"{_id(user)}.safetensors").stat().st_size for user in USERS},
        "training_seconds": round(trained, 1),
        "pictures_in_batch": len(requests),
        "batch_seconds": round(batch_seconds, 2),
        "one_by_one_seconds": round(alone_seconds, 2),
        "largest_difference_beside_others": _difference(batch[::2], beside[::2]),
        "largest_difference_alone": round(_difference(batch, alone), 4),
        "coats": _coats(cells, drawn),
        "coats_without_concepts": _coats(cells, without),
        "expressions": _expressions(cells, drawn),
        "torch_threads": torch.get_num_threads(),
    }
    columns = [user.name for user in USERS] + [_VISITOR]
    rows = [*(scene.label for scene in SCENES), "beside the next one's on teal"]
    grid.draw(columns, rows, batch, {user.name: pictures.load(user)[0] for user in USERS}).save(output / "grid.png")
    report["regions"] = regions.run(install(embedded.load_adapter(pipe)), bank, output, steps=steps, seed=seed)
    report["loras"] = loras.run(
        install(embedded.load()), bank, output, steps=steps, seed=seed, training=lora_training, progress=progress
    )
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _teach(pipe: Any, config: AddedConfig, folder: Path, progress: bool) -> tuple[ConceptBank, float]:
    concepts, seconds = _timed(lambda s: train_concepts(pipe, s, config, progress=progress), subjects())
    bank = ConceptBank(folder)
    for user, concept in zip(USERS, concepts, strict=True):
        if not isinstance(concept, Concept):
            raise concept
        bank.add(_id(user), concept, overwrite=True)
    return bank, seconds


def subjects() -> list[Subject]:
    """What the users give to learn from."""
    made = []
    for number, user in enumerate(USERS):
        images, masks = pictures.load(user)
        captions = [words.format(user.placeholder) for words in pictures.CAPTIONS]
        made.append(Subject(user.placeholder, "cat", images, captions, masks, seed=number))
    return made


def _mixed_batch(seed: int) -> list[Request]:
    """Rows of scenes, columns of users and a visitor without a concept; in the last row two users' cats together."""
    orders = []
    for scene in SCENES:
        orders += [_order(scene, user, seed) for user in USERS]
        orders.append(Request(scene.prompt.format("cat"), seed=seed, guidance_scale=PERSONAL_GUIDANCE))
    for one, other in zip(USERS, (*USERS[1:], USERS[0]), strict=True):
        words = _TOGETHER.format(one.placeholder, other.placeholder)
        held = [Use(_id(user), strength=STRENGTH) for user in (one, other)]
        orders.append(Request(words, concepts=held, seed=seed, guidance_scale=PERSONAL_GUIDANCE))
    return [*orders, Request(_PLAIN, seed=seed, guidance_scale=PERSONAL_GUIDANCE)]


def _order(scene: Scene, user: User, seed: int, strength: float = STRENGTH) -> Request:
    return Request(
        scene.prompt.format(user.placeholder),
        concepts=[Use(_id(user), strength=strength)],
        seed=seed,
        guidance_scale=PERSONAL_GUIDANCE,
    )


def _id(user: User) -> str:
    return f"{user.name.lower()}/cat"


def _timed(function: Any, argument: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(argument), time.perf_counter() - start


def _difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference of two lists of pictures, in units of 1/255."""
    return float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) * 255)


def _coats(cells: Sequence[tuple[Scene, User, int]], images: Sequence[np.ndarray]) -> dict[str, str]:
    """Per scene, how many pictures' cats are nearest in their colours to their own user's coat."""
    left = np.arange(render.SIZE) < render.SIZE // 2
    right = {scene.label: [0, 0] for scene in SCENES}
    for (scene, user, _), image in zip(cells, images, strict=True):
        where = np.broadcast_to(left, image.shape[:2]) if scene.left_half else None
        right[scene.label][0] += pictures.wearer(image, where) == user.name
        right[scene.label][1] += 1
    return {label: f"{found} of {total}" for label, (found, total) in right.items()}


def _expressions(cells: Sequence[tuple[Scene, User, int]], images: Sequence[np.ndarray]) -> dict[str, str]:
    """Per scene, how many pictures the classifier names as the expression that was asked for, and the background."""
    judge = classifier.load()
    right = {scene.label: [0, 0, 0] for scene in SCENES}
    for (scene, _, _), image in zip(cells, images, strict=True):
        picture = (image * 255).round().astype(np.uint8)
        names = judge.names([picture], 2 if scene.left_half else 1)[0]
        counts = right[scene.label]
        counts[0] += scene.expression in names
        counts[1] += background_name(picture) == scene.prompt.rsplit(" ", 1)[1]
        counts[2] += 1
    return {label: f"{named} of {total}, background {ground}" for label, (named, ground, total) in right.items()}
