"""What commands share: options, the console, loading a model."""

from __future__ import annotations

import difflib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()

Model = Annotated[
    str, typer.Option(help='A diffusers pipeline: a folder, a hub id, or "embedded" for the one in the package.')
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Print at most so many.")]
After = Annotated[str, typer.Option(help="Begin after this id: the last one of the page before.")]
Bank = Annotated[str, typer.Option(help="Folder or fsspec URL of the concepts.")]
Loras = Annotated[str, typer.Option(help="Folder or fsspec URL of the LoRAs.")]
Dtype = Annotated[str | None, typer.Option(help="Of the model's weights: float32 (the default), float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; default a GPU of CUDA's if there is one.")]
Variant = Annotated[str | None, typer.Option(help="Which of the model's weight files, such as fp16.")]
Scheduler = Annotated[
    str | None, typer.Option(help="A scheduler of diffusers by its class, such as DDIMScheduler; default the model's.")
]
Height = Annotated[int | None, typer.Option(min=8, help="Of the pictures, in pixels; default the model's own.")]
Width = Annotated[int | None, typer.Option(min=8, help="Of the pictures, in pixels; default the model's own.")]


def quiet() -> None:
    """Only errors from the libraries that load models and pictures: what else they note is not for the user here.

    Comes before the former's imports; a verbosity that the environment asks for stays.
    """
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of pictures that are large or damaged, which we refuse or mend


def without_loading_bars() -> None:
    """No bars of what is read from the disk in a moment; those of downloads stay."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()


def load(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
) -> Any:
    """A pipeline by what `Model` and the options beside it say.

    Raises:
        ValueError: an option is not what its help says, or there is no such model; the message names the option.
    """
    options = {"dtype": _dtype(dtype), "variant": variant}
    place, kind = _device(device), _scheduler(scheduler)
    without_loading_bars()
    pipe = _loaded(model, {name: value for name, value in options.items() if value is not None})
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe.to(place)


def print_bank(
    bank: Any, read: Callable[[str], tuple[dict[str, Any], str]], *, as_json: bool, limit: int | None, after: str
) -> None:
    """Print what a bank holds, a line each; what is damaged is said on standard error, and the exit code is 1.

    Args:
        bank: its ids, and where it is.
        read: of an id, its facts for JSON and the rest of its line.
        as_json, limit, after: the options of that name.

    Raises:
        ValueError: there is no bank.
    """
    if not bank.exists():
        raise ValueError(f"--bank: there is no bank at {bank.shown}")
    ids = [name for name in bank if name > after]
    page = ids[:limit]
    width = max((len(name) for name in page), default=0)
    rows, damaged = [], 0
    for name in page:
        try:
            facts, line = read(name)
        except KeyError:
            continue  # removed meanwhile
        except (OSError, ValueError) as error:
            damaged += 1
            rows.append({"id": name, "error": str(error)})
            print(f"keylock: {name}: {error}", file=sys.stderr)
            continue
        rows.append({"id": name, **facts})
        if not as_json:
            print(f"{name:{width}}  {line}")
    if as_json:
        print(json.dumps(rows, indent=1))
    if len(ids) > len(page):
        print(f"{len(ids) - len(page)} more: go on with --after {page[-1]}", file=sys.stderr)
    if damaged:
        print(f"keylock: {damaged} of {len(page)} cannot be read", file=sys.stderr)
        raise typer.Exit(1)


def _loaded(model: str, options: dict[str, Any]) -> Any:
    if model == "embedded":
        from keylock_diffusers import embedded

        return embedded.load(**options)
    from diffusers import DiffusionPipeline

    is_folder = (Path(model) / "model_index.json").is_file()
    if not is_folder and (Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise ValueError(
            "--model must be a folder with a diffusers pipeline (model_index.json), a hub id such as owner/name, or "
            f"embedded, got {model!r:.80}"
        )
    try:
        return DiffusionPipeline.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: {model!r:.80} cannot be loaded: {error}") from error


def _dtype(name: str | None) -> Any:
    import torch

    if name not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {name!r:.80}")
    return None if name is None else getattr(torch, name)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without it
        raise ValueError(f"--device: torch cannot use {name!r:.80} here: {error}") from None
    return device


def _scheduler(name: str | None) -> Any:
    if name is None:
        return None
    import diffusers

    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        close = difflib.get_close_matches(name, [n for n in dir(diffusers) if n.endswith("Scheduler")], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"--scheduler must be the name of a scheduler of diffusers, got {name!r:.80}{hint}")
    return getattr(diffusers, name)
