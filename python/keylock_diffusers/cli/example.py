"""``keylock example``: pictures to learn from and requests to draw, to try everything on."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def example(folder: Annotated[Path, typer.Argument(help="Where to write them; made if need be.")]) -> None:
    """Write pictures of a cat with captions and masks, an image prompt, masks, and a file of requests.

    They are what `keylock train` and `keylock generate` read, and small enough for the embedded model.
    """
    from keylock_diffusers.demo import examples

    examples.write(folder)
    alice, requests = folder / "alice", folder / "requests.json"
    print(f"{alice}: four pictures of a cat, each with its caption (.txt) and mask (-mask.png)")
    print(f"{requests}: requests of every kind, their pictures beside it\nNext:")
    given = '--placeholder "<alice-cat>" --super-class cat --output alice-cat.safetensors'
    print(f"  keylock train {quote(str(alice))} {given}")
    print("  keylock bank add alice/cat alice-cat.safetensors")
    print(f"  keylock generate {quote(str(requests))}")
