"""``keylock train``: pictures of a folder become a concept."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import Device, Dtype, Model, Scheduler, Variant


def train(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures of one subject; NAME.txt beside NAME.png is its caption, NAME-mask.png its mask. "
            "Captions and masks make a concept better: what they tell apart is not learned as the subject's."
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
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File to resume from and to write; default a hidden one beside the output, gone at the end."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    scheduler: Scheduler = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output, if it is there.")] = False,
    samples_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps after which pictures are drawn, into OUTPUT.samples.png beside the output."),
    ] = None,
) -> None:
    """Learn a concept from a few pictures."""
    from dataclasses import replace

    from keylock_diffusers.cli import drawn
    from keylock_diffusers.demo.story import TRAINING
    from keylock_diffusers.files import require_place, write_atomically
    from keylock_diffusers.training import PictureFolder, Samples, TrainingConfig, advice, covariance, train_concepts
    from keylock_diffusers.training.frozen import check_pipeline

    if output.exists() and not output.is_dir() and not overwrite:
        raise ValueError(f"--output: {output} exists already; --overwrite replaces it")
    require_place(output, "--output")
    folder = PictureFolder.read(pictures)
    subject = folder.subject(placeholder, super_class, seed)
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
    if localize and not folder.masks:
        raise ValueError(f"--localize needs masks, and {pictures} has none")
    lines = _captions(model, captions)
    _check_model(model, dtype)
    print(f"{pictures}: {folder}")
    pipe = common.load(model, dtype=dtype, device=device, variant=variant, scheduler=scheduler)
    check_pipeline(pipe, "keylock train")
    pipe.set_progress_bar_config(disable=True)  # of samples: it would tear training's own
    own = checkpoint or output.with_name(f".{output.name}.checkpoint")
    samples = None
    if samples_every:
        strip = drawn.free(output.with_name(f"{output.name}.samples.png"))
        samples = Samples(pipe, subject, strip, samples_every)
    with _stoppable():
        metric = covariance(pipe, lines, progress=True)
        (concept,) = train_concepts(
            pipe,
            [subject],
            config,
            metric=metric,
            checkpoint_path=own,
            on_step=samples,
        )
    if isinstance(concept, Exception):
        if checkpoint is None:
            own.unlink(missing_ok=True)
        raise ValueError(str(concept)) from concept
    try:
        write_atomically(output, concept.to_bytes(), overwrite=overwrite)
    except OSError as error:
        kept = f"what was learned is in {own}: the same command goes on from there" if own.exists() else "it is lost"
        raise OSError(f"{error}; {kept}") from error
    if checkpoint is None:
        own.unlink(missing_ok=True)
    if samples is not None and samples.path.exists():
        print(f"{samples.path}: samples, beside the super-class {super_class}")
    print(advice(concept.training))
    print(f"{output}: {output.stat().st_size} bytes, version {concept.version}")


def _check_model(model: str, dtype: str | None) -> None:
    """What can be told of a model before it is loaded; `check_pipeline` looks at all of it."""
    if dtype == "float16":
        raise ValueError("--dtype must be float32 or bfloat16 for training, since gradients vanish in float16")
    if model == "embedded":
        return
    from diffusers import DiffusionPipeline

    try:
        parts = DiffusionPipeline.load_config(model)
    except (OSError, ValueError):
        return  # loading it says what is wrong
    if (parts.get("text_encoder_2") or [None])[0] is not None:
        raise ValueError("--model must have one text encoder, got two: Stable Diffusion XL cannot be trained")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C says where it goes on; the system's SIGTERM is taken for one, in the background too, which has none."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as stopped:
        print(f"keylock: {stopped}" if stopped.args else "keylock: stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _captions(model: str, file: Path | None) -> list[str]:
    if file is not None:
        from keylock_diffusers.files import read_text

        return [line for line in read_text(file, 1 << 26).splitlines() if line.strip()]
    if model != "embedded":
        raise ValueError(
            "--captions must name a text file, a caption a line, for a model of your own: a few thousand captions of "
            "the kind it was trained on"
        )
    from keylock_diffusers.embedded.captions import default_captions

    return default_captions()
