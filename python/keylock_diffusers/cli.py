"""The command ``keylock``: demo, train, generate, bank and env."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Personalised text-to-image diffusion for many users in one batch.",
)
bank_app = typer.Typer(no_args_is_help=True, help="Look after a folder (or fsspec URL) of concepts.")
app.add_typer(bank_app, name="bank")
_console = Console()

_Model = Annotated[
    str, typer.Option(help='A diffusers pipeline: a folder, a hub id, or "embedded" for the one in the package.')
]
_Bank = Annotated[str, typer.Option(help="Folder or fsspec URL of the concepts.")]


def main() -> None:
    """Runs the command; bad input ends it with one line on standard error and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"keylock: {message}", file=sys.stderr)
        sys.exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the grid, the report and the concepts.")] = Path(
        "outputs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per picture.")] = 25,
    training_steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default the demo's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
) -> None:
    """Teach three people's cats together on the embedded model and draw two mixed batches."""
    from dataclasses import replace

    _quiet()
    from keylock_diffusers.demo import story

    training = story.TRAINING if training_steps is None else replace(story.TRAINING, steps=training_steps)
    _print_report(story.run(output, steps=steps, training=training, seed=seed))
    _console.print(f"{output / 'grid.png'}\n{output / 'regions.png'}\n{output / 'report.json'}")


@app.command()
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
    model: _Model = "embedded",
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
    pipe = _load(model)
    metric = covariance(pipe, lines, progress=True)
    concept = train_concepts(pipe, [subject], config, metric=metric, checkpoint_path=checkpoint)[0]
    if isinstance(concept, Exception):
        raise concept
    print(f"{output}: {concept.save(output)} bytes")


@app.command()
def generate(
    requests: Annotated[
        Path,
        typer.Argument(
            help="JSON file: a list of requests, each with the fields of keylock_diffusers.Request: prompt, concepts "
            "(ids, or objects with concept, beta, tau, strength, lock, region), image_prompts (objects with "
            "image, a file or several, and scale, region, start, end, adapter), regions and negative_regions "
            "(objects with mask and prompt or tokens), endings, subjects (objects with prompt, image, region), "
            "subject_start, image, strength, mask, controls (objects with name, image, scale, start, end), id, seed, "
            "guidance_scale, negative_prompt, num_images ... Pictures and masks are files beside it."
        ),
    ],
    bank: _Bank = "concepts",
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs"),
    model: _Model = "embedded",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    max_batch: Annotated[int, typer.Option(min=1, help="Pictures per call of the U-Net.")] = 8,
    controlnet: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a ControlNet, for controls of that name; once for each."),
    ] = None,
    ip_adapter: Annotated[
        list[Path] | None, typer.Option(help="An IP-Adapter's file, for image_prompts; once for each adapter.")
    ] = None,
    image_encoder: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP image encoder that the adapters were trained with.")
    ] = None,
    fusion: Annotated[Path | None, typer.Option(help="Weights of a subject fusion module, for subjects.")] = None,
    show_attention: Annotated[
        list[str] | None,
        typer.Option(help="Words of the prompts whose attention is drawn beside each picture; once for each."),
    ] = None,
) -> None:
    """Draw a list of requests, of different users, together."""
    import keylock_diffusers as kd

    orders = _orders(requests)
    pipe = _load(model)
    if model == "embedded" and not ip_adapter and any(order.image_prompts for order in orders):
        from keylock_diffusers import embedded

        embedded.load_adapter(pipe)
    _load_ip_adapters(pipe, ip_adapter or [], image_encoder)
    kd.install(pipe).set_progress_bar_config(disable=False)
    options: dict[str, Any] = {
        "bank": kd.ConceptBank(bank),
        "num_inference_steps": steps,
        "max_batch": max_batch,
        "controlnets": _controlnets(controlnet or [], pipe),
        "fusion": None if fusion is None else kd.SubjectFusion.load(fusion).to(pipe.device),
    }
    maps = kd.AttentionMaps(_shown(show_attention, orders, options["bank"])) if show_attention else None
    images = kd.generate(pipe, orders, record=maps, **options)
    output.mkdir(parents=True, exist_ok=True)
    if maps is not None:
        from keylock_diffusers.generation import visualize

        flat = [image for drawn in images for image in (drawn if isinstance(drawn, list) else [drawn])]
        visualize.grid(flat, maps.images).save(output / "attention.png")
        print(output / "attention.png")
    for index, drawn in enumerate(images):
        for number, image in enumerate(drawn if isinstance(drawn, list) else [drawn]):
            if image is None:  # the call was stopped before
                continue
            path = output / (f"{index:03d}.png" if not isinstance(drawn, list) else f"{index:03d}-{number}.png")
            image.save(path)
            print(path)


@bank_app.command("list")
def bank_list(bank: _Bank = "concepts") -> None:
    """List the concepts of a bank."""
    from keylock_diffusers import ConceptBank

    table = Table("id", "placeholder", "super-class", "bytes")
    concepts = ConceptBank(bank)
    for name in concepts:
        concept = concepts[name]
        table.add_row(name, concept.placeholder, concept.super_class, str(concept.nbytes))
    _console.print(table)


@bank_app.command("add")
def bank_add(
    name: Annotated[str, typer.Argument(help="The id, such as alice/cat.")],
    file: Annotated[Path, typer.Argument(help="The concept file.")],
    bank: _Bank = "concepts",
    overwrite: Annotated[bool, typer.Option(help="Replace a concept of that id.")] = False,
) -> None:
    """Put a concept file into a bank."""
    from keylock_diffusers import Concept, ConceptBank

    ConceptBank(bank).add(name, Concept.load(file), overwrite=overwrite)


@bank_app.command("remove")
def bank_remove(name: Annotated[str, typer.Argument(help="The id.")], bank: _Bank = "concepts") -> None:
    """Take a concept out of a bank."""
    from keylock_diffusers import ConceptBank

    ConceptBank(bank).remove(name)


@bank_app.command("show")
def bank_show(name: Annotated[str, typer.Argument(help="The id.")], bank: _Bank = "concepts") -> None:
    """Print what a concept holds."""
    from keylock_diffusers import ConceptBank

    concept = ConceptBank(bank)[name]
    facts: dict[str, Any] = {
        "placeholder": concept.placeholder,
        "super_class": concept.super_class,
        "beta": concept.beta,
        "tau": concept.tau,
        "bytes": concept.nbytes,
        "covariance": dict(concept.covariance),
        "training": dict(concept.training),
        "base": concept.base.to_json(),
    }
    print(json.dumps(facts, indent=1))


@app.command()
def env() -> None:
    """Print what is installed, what was built and which backends run here."""
    from keylock_kernels.__main__ import report

    print(report())


def _quiet() -> None:
    """Only errors from the libraries that load models: their progress bars and notes are not for the user here."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _load(model: str) -> Any:
    _quiet()
    if model == "embedded":
        from keylock_diffusers import embedded

        return embedded.load()
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def _controlnets(given: list[str], pipe: Any) -> dict[str, Any]:
    from diffusers import ControlNetModel

    found = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not name or not equals or not Path(folder).is_dir():
            raise ValueError(f"--controlnet must be NAME=FOLDER of a ControlNet, got {one!r}")
        found[name] = ControlNetModel.from_pretrained(folder, torch_dtype=pipe.unet.dtype).to(pipe.device)
    return found


def _load_ip_adapters(pipe: Any, files: list[Path], image_encoder: Path | None) -> None:
    if image_encoder is not None:
        from transformers import CLIPVisionModelWithProjection

        encoder = CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=pipe.unet.dtype)
        pipe.register_modules(image_encoder=encoder.to(pipe.device))
    if files:
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"--ip-adapter: there is no file {missing[0]}")
        pipe.load_ip_adapter(
            [str(file.parent) for file in files],
            subfolder="",
            weight_name=[file.name for file in files],
            image_encoder_folder=None,
        )


def _shown(words: list[str], orders: list[Any], bank: Any) -> dict[str, tuple[str, ...]]:
    """Words whose attention is shown; a super-class stands for the placeholders of its concepts too."""
    from keylock_diffusers import Use

    of_class: dict[str, list[str]] = {}
    for order in orders:
        for use in order.concepts:
            concept = use.concept if isinstance(use, Use) else use
            if isinstance(concept, str) and concept in bank:
                held = bank[concept]
                of_class.setdefault(held.super_class, []).append(held.placeholder)
    return {word: (word, *dict.fromkeys(of_class.get(word, ()))) for word in words}


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


def _orders(path: Path) -> list[Any]:
    from keylock_diffusers import Request

    try:
        listed = json.loads(path.read_text())
        if not isinstance(listed, list):
            raise ValueError(f"must be a list of requests, got {type(listed).__name__}")
        return [Request.from_json(order, path.parent) for order in listed]
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _print_report(report: dict[str, Any]) -> None:
    table = Table("what", "measured", title="One batch, four people", show_lines=False)
    for name, size in report["concepts"].items():
        table.add_row(f"{name}'s concept file", f"{size:,} bytes")
    table.add_row("training the three together", f"{report['training_seconds']} s")
    table.add_row(
        f"drawing {report['pictures_in_batch']} pictures in one batch / one by one",
        f"{report['batch_seconds']} s / {report['one_by_one_seconds']} s",
    )
    table.add_row(
        "largest difference beside other neighbours", f"{report['largest_difference_beside_others']:g} of 255"
    )
    table.add_row("largest difference drawn alone", f"{report['largest_difference_alone']:g} of 255")
    for scene, found in report["coats"].items():
        without = report["coats_without_learned_values"][scene]
        table.add_row(f"own coat: {scene}", f"{found} (without learned values {without})")
    for scene, found in report["expressions"].items():
        table.add_row(f"named by the classifier: {scene}", found)
    table.add_row(
        f"{report['regions']['pictures_in_batch']} pictures with concepts, image prompts and regions: largest "
        "difference beside other neighbours",
        f"{report['regions']['largest_difference_beside_others']:g} of 255",
    )
    _console.print(table)


if __name__ == "__main__":
    main()
