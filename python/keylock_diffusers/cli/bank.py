"""``keylock bank``: looking after concepts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli.common import After, AsJson, Bank, Limit, print_bank

app = typer.Typer(no_args_is_help=True, help="Look after a folder (or fsspec URL) of concepts.")


@app.command("list")
def bank_list(
    bank: Bank = "concepts",
    as_json: AsJson = False,
    limit: Limit = None,
    after: After = "",
    check: Annotated[
        bool, typer.Option("--check", help="Read whole files and not headers alone, which is slower.")
    ] = False,
) -> None:
    """List the concepts of a bank, a line each; what is damaged is said on standard error, and the exit code is 1."""
    from keylock_diffusers.concepts import ConceptBank

    concepts = ConceptBank(bank)

    def read(name: str) -> tuple[dict[str, Any], str]:
        found = concepts.summary(name)
        if check:
            concepts[name]
        return asdict(found), f"{found.placeholder:20}  {found.super_class:20}  {found.nbytes}"

    print_bank(concepts, read, as_json=as_json, limit=limit, after=after)


@app.command("add")
def bank_add(
    name: Annotated[str, typer.Argument(help="The id, such as alice/cat.")],
    file: Annotated[Path, typer.Argument(help="The concept file.")],
    bank: Bank = "concepts",
    overwrite: Annotated[bool, typer.Option(help="Replace a concept of that id.")] = False,
) -> None:
    """Put a concept file into a bank."""
    from keylock_diffusers.concepts import Concept, ConceptBank, ConceptExistsError

    concept = Concept.load(file)
    try:
        ConceptBank(bank).add(name, concept, overwrite=overwrite)
    except ConceptExistsError:
        raise ValueError(f"{name} exists already; --overwrite replaces it") from None
    print(f"{name}@{concept.version}")


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
        "version": concept.version,
        "beta": concept.beta,
        "tau": concept.tau,
        "bytes": concept.nbytes,
        "covariance": dict(concept.covariance),
        "training": dict(concept.training),
        "base": concept.base.to_json(),
    }
    print(json.dumps(facts, indent=1))
