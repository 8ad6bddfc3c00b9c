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


@app.command("words")
def bank_words(
    name: Annotated[str, typer.Argument(help="The id.")],
    output: Annotated[Path, typer.Option(help="The file to write, for pipe.load_textual_inversion.")],
    bank: Bank = "concepts",
    overwrite: Annotated[bool, typer.Option(help="Replace the output, if it is there.")] = False,
) -> None:
    """Write a concept's own words as an embedding file; what it changes beside them stays behind."""
    from keylock_diffusers.concepts import ConceptBank
    from keylock_diffusers.files import require_place
    from keylock_diffusers.loras import LearnedWord, write_word

    if output.exists() and not output.is_dir() and not overwrite:
        raise ValueError(f"--output: {output} exists already; --overwrite replaces it")
    require_place(output, "--output")
    concept = ConceptBank(bank)[name]
    if not concept.word_embeddings:
        raise ValueError(f"{name}: the concept has no words of its own: it adds to its super-class's")
    vectors = tuple(vector.float().view(concept.words, -1) for vector in concept.word_embeddings)
    write_word(output, LearnedWord(concept.placeholder, vectors))
    print(f"{output}: {output.stat().st_size} bytes, {concept.placeholder}")


@app.command("show")
def bank_show(name: Annotated[str, typer.Argument(help="The id.")], bank: Bank = "concepts") -> None:
    """Print what a concept holds."""
    from keylock_diffusers.concepts import ConceptBank, KeyLockedConcept

    concept = ConceptBank(bank)[name]
    facts: dict[str, Any] = {
        "placeholder": concept.placeholder,
        "super_class": concept.super_class,
        "version": concept.version,
        "edit": concept.edit,
        **concept.settings,
        "bytes": concept.nbytes,
        **({"covariance": dict(concept.covariance)} if isinstance(concept, KeyLockedConcept) else {}),
        "training": dict(concept.training),
        "base": concept.base.to_json(),
    }
    print(json.dumps(facts, indent=1))
