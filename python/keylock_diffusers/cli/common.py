"""What commands share: options, the console, loading a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()

Model = Annotated[
    str, typer.Option(help='A diffusers pipeline: a folder, a hub id, or "embedded" for the one in the package.')
]
Bank = Annotated[str, typer.Option(help="Folder or fsspec URL of the concepts.")]


def quiet() -> None:
    """Only errors from the libraries that load models: their progress bars and notes are not for the user here."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def load(model: str) -> Any:
    """A pipeline by what `Model` says, on a GPU if there is one."""
    quiet()
    if model == "embedded":
        from keylock_diffusers import embedded

        return embedded.load()
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")
