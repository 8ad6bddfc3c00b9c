"""``keylock bank``: looking after concepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from keylock_diffusers.cli.common import Bank, console

app = typer.Typer(no_args_is_help=True, help="Look after a folder (or fsspec URL) of concepts.")


@app.command("list")
def bank_list(bank: Bank = "concepts") -> None:
    """List the concepts of a bank."""
    from keylock_diffusers import ConceptBank

    table = Table("id", "placeholder", "super-class", "bytes")
    concepts = ConceptBank(bank)
    for name in concepts:
        concept = concepts[name]
        table.add_row(name, concept.placeholder, concept.super_class, str(concept.nbytes))
    console.print(table)


@app.command("add")
def bank_add(
    name: Annotated[str, typer.Argument(help="The id, such as alice/cat.")],
    file: Annotated[Path, typer.Argument(help="The concept file.")],
    bank: Bank = "concepts",
    overwrite: Annotated[bool, typer.Option(help="Replace a concept of that id.")] = False,
) -> None:
    """Put a concept file into a bank."""
    from keylock_diffusers import Concept, ConceptBank

    ConceptBank(bank).add(name, Concept.load(file), overwrite=overwrite)


@app.command("remove")
def bank_remove(name: Annotated[str, typer.Argument(help="The id.")], bank: Bank = "concepts") -> None:
    """Take a concept out of a bank."""
    from keylock_diffusers import ConceptBank

    ConceptBank(bank).remove(name)


@app.command("show")
def bank_show(name: Annotated[str, typer.Argument(help="The id.")], bank: Bank = "concepts") -> None:
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
