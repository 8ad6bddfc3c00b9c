"""``keylock train``: pictures of a folder become a concept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import Model


def train(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures of one subject; NAME.txt beside NAME.png is its caption, NAME-mask.png its mask."
        ),
    ],
    placeholder: Annotated[str, typer.Option(help="The word for it in prompts, such as <alice-cat>.")],
    super_class: Annotated[str, typer.Option(help="What it is, such as cat.")],
    output: Annotated[Path, typer.Option(help="The concept file to write.")],
    model: Model = "embedded",
    steps: Annotated[int | None, typer.Option(min=1, help="Default 400; 100 for the embedded model.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default 16; 6 for the embedded model.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Text file, a caption a line, for the metric C; needed for models of your own.")
    ] = None,
    values_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the values, in units of their size.")
    ] = None,
    embedding_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the word, in units of its size.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    localize: Annotated[
        float, typer.Option(min=0, help="Weight of the localization loss, such as 1e-3; needs masks.")
    ] = 0.0,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16")] = "no",
    target_gradient: Annotated[str, typer.Option(help="none, straight-through or exact")] = "none",
    checkpoint: Annotated[Path | None, typer.Option(help="File to resume from and to write.")] = None,
) -> None:
    """Learn a concept from a few pictures."""
    from dataclasses import replace

    from keylock_diffusers.demo.story import TRAINING
    from keylock_diffusers.training import TrainingConfig, covariance, train_concepts

    subject = _subject(pictures, placeholder, super_class, seed)
    given: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "values_rate": values_rate,
        "embedding_rate": embedding_rate,
        "localize": localize,
        "mixed_precision": mixed_precision,
        "target_gradient": target_gradient,
    }
    config = replace(
        TRAINING if model == "embedded" else TrainingConfig(),
        **{name: value for name, value in given.items() if value is not None},
    )
    lines = _captions(model, captions)
    output.parent.mkdir(parents=True, exist_ok=True)
    pipe = common.load(model)
    metric = covariance(pipe, lines, progress=True)
    concept = train_concepts(pipe, [subject], config, metric=metric, checkpoint_path=checkpoint)[0]
    if isinstance(concept, Exception):
        raise concept
    print(f"{output}: {concept.save(output)} bytes")


def _captions(model: str, file: Path | None) -> list[str]:
    if file is not None:
        return [line for line in file.read_text().splitlines() if line.strip()]
    if model != "embedded":
        raise ValueError(
            "--captions must name a text file, a caption a line, for a model of your own: a few thousand captions of "
            "the kind it was trained on"
        )
    from keylock_diffusers.embedded.captions import default_captions

    return default_captions()


def _subject(folder: Path, placeholder: str, super_class: str, seed: int) -> Any:
    from PIL import Image

    from keylock_diffusers.training import Subject

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pictures")
    kinds = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in kinds and not f.stem.endswith("-mask"))
    if not files:
        raise ValueError(f"{folder} holds no pictures (png, jpg, webp)")
    texts = [f.with_suffix(".txt") for f in files]
    masks = [f.with_name(f"{f.stem}-mask.png") for f in files]
    for what, sidecars in (("caption", texts), ("mask", masks)):
        present = [s.exists() for s in sidecars]
        if any(present) and not all(present):
            raise ValueError(f"{files[present.index(False)]} has no {what}, but other pictures of {folder} have one")
    return Subject(
        placeholder,
        super_class,
        [Image.open(f) for f in files],
        [t.read_text().strip() for t in texts] if texts[0].exists() else None,
        [Image.open(m) for m in masks] if masks[0].exists() else None,
        seed,
    )
