"""``keylock bank``: looking after concepts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli.common import Bank

app = typer.Typer(no_args_is_help=True, help="Look after a folder (or fsspec URL) of concepts.")


@app.command("list")
def bank_list(
    bank: Bank = "concepts",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Print at most so many.")] = None,
    after: Annotated[str, typer.Option(help="Begin after this id: the last one of the page before.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Read whole files and not headers alone, which is slower.")
    ] = False,
) -> None:
    """List the concepts of a bank, a line each; what is damaged is said on standard error, and the exit code is 1."""
    from keylock_diffusers.concepts import ConceptBank, UnknownConceptError

    concepts = ConceptBank(bank)
    if not concepts.exists():
        raise ValueError(f"--bank: there is no bank at {concepts.shown}")
    ids = [name for name in concepts if name > after]
    page = ids[:limit]
    width = max((len(name) for name in page), default=0)
    rows, damaged = [], 0
    for name in page:
        try:
            found = concepts.summary(name)
            if check:
                concepts[name]
        except UnknownConceptError:
            continue  # removed meanwhile
        except (OSError, ValueError) as error:
            damaged += 1
            rows.append({"id": name, "error": str(error)})
            print(f"keylock: {name}: {error}", file=sys.stderr)
            continue
        rows.append({"id": name, **asdict(found)})
        if not as_json:
            print(f"{name:{width}}  {found.placeholder:20}  {found.super_class:20}  {found.nbytes}")
    if as_json:
        print(json.dumps(rows, indent=1))
    if len(ids) > len(page):
        print(f"{len(ids) - len(page)} more: go on with --after {page[-1]}", file=sys.stderr)
    if damaged:
        print(f"keylock: {damaged} of {len(page)} cannot be read", file=sys.stderr)
        raise typer.Exit(1)


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
