"""``keylock lora``: looking at LoRA files, converting them, and looking after a bank of them."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import After, AsJson, Limit, print_bank

if TYPE_CHECKING:
    from keylock_diffusers.loras import AdapterFacts

app = typer.Typer(no_args_is_help=True, help="Look at LoRA files, convert them, and look after a bank of them.")

Bank = Annotated[str, typer.Option(help="Folder or fsspec URL of the LoRAs.")]
_LONGEST = 300  # letters of one text of a file's header
_MOST_RANKS = 6


@app.command("list")
def lora_list(bank: Bank = "loras", as_json: AsJson = False, limit: Limit = None, after: After = "") -> None:
    """List the LoRAs of a bank, a line each; what is damaged is said on standard error, and the exit code is 1."""
    from keylock_diffusers.loras import LoraBank

    loras = LoraBank(bank)

    def read(name: str) -> tuple[dict[str, Any], str]:
        found = loras.summary(name)
        words = ", ".join(found.trigger_words[:3])
        line = f"{_plain(found.base or 'unknown'):18.18}  {_kinds(found):14}  {_ranks(found):12}  {_plain(words, 40)}"
        return asdict(found), line.rstrip()

    print_bank(loras, read, as_json=as_json, limit=limit, after=after)


@app.command("add")
def lora_add(
    file: Annotated[Path, typer.Argument(help="The LoRA file, or PEFT's folder.")],
    id: Annotated[str, typer.Option("--id", help="What it is called, such as alice/style.")],
    bank: Bank = "loras",
    overwrite: Annotated[bool, typer.Option(help="Replace a LoRA of that id.")] = False,
) -> None:
    """Put a LoRA file into a bank."""
    from keylock_diffusers.loras import LoraBank, LoraExistsError

    loras = LoraBank(bank)
    try:
        loras.add(id, file, overwrite=overwrite)
    except LoraExistsError:
        raise ValueError(f"{id} exists already; --overwrite replaces it") from None
    facts = loras.summary(id)
    print(f"{id}: {_line(facts)}")
    if facts.unsupported:
        print(f"It cannot be used, since it holds {'; '.join(facts.unsupported)}")


@app.command("remove")
def lora_remove(id: Annotated[str, typer.Argument(help="The id.")], bank: Bank = "loras") -> None:
    """Take a LoRA out of a bank."""
    from keylock_diffusers.loras import LoraBank

    LoraBank(bank).remove(id)


@app.command("inspect")
def lora_inspect(
    file_or_id: Annotated[str, typer.Argument(help="A LoRA file, PEFT's folder, or an id of the bank.")],
    bank: Bank = "loras",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Print what a LoRA file says of itself: it is as its author wrote it, and nobody checked it."""
    from keylock_diffusers.loras import LoraBank, inspect_adapter

    is_file = Path(file_or_id).exists() or file_or_id.endswith(".safetensors")
    facts = inspect_adapter(file_or_id) if is_file else LoraBank(bank).summary(file_or_id)
    if as_json:
        print(json.dumps(asdict(facts), indent=1))
        return
    said = {
        "made for": facts.base or "unknown",
        "kinds": ", ".join(facts.kinds),
        "layers": ", ".join(f"{count} in {component}" for component, count in sorted(facts.layers.items())),
        "ranks": "; ".join(f"{component}: {_counts(counts)}" for component, counts in sorted(facts.ranks.items())),
        "trigger words": ", ".join(facts.trigger_words),
        "learned words": ", ".join(facts.words),
        "unsupported": "; ".join(facts.unsupported),
    }
    for line in _table({name: text for name, text in said.items() if text}):
        print(line)
    if facts.training:
        print("\nfrom its header")
        for line in _table(dict(sorted(facts.training.items())), "  "):
            print(line)


@app.command("convert")
def lora_convert(
    file: Annotated[Path, typer.Argument(help="The LoRA file, or PEFT's folder.")],
    output: Annotated[Path, typer.Argument(help="The file to write, which pipe.load_lora_weights of diffusers loads.")],
    model: common.Model,
    max_error: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Relative error that cutting one layer's update to rank 128 may make."),
    ] = None,
    variant: common.Variant = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output, if it is there.")] = False,
) -> None:
    """Write a LoRA file of any tool as diffusers loads it.

    LoCon, LoHa, LoKr and whole differences become LoRAs of their products' rank.
    DoRA stays one, where it is on all layers of a component.
    Learned words, which diffusers takes from files of their own, are written beside the output.
    """
    from keylock_diffusers.files import require_place
    from keylock_diffusers.loras import ModelShapes, inspect_adapter, read_adapter, write_adapter, write_word

    if output.exists() and not output.is_dir() and not overwrite:
        raise ValueError(f"OUTPUT: {output} exists already; --overwrite replaces it")
    require_place(output, "OUTPUT")
    shapes = ModelShapes.of(common.load(model, device="cpu", variant=variant))
    adapter = read_adapter(file, denoiser=shapes.denoiser, text_encoders=shapes.text_encoders, max_error=max_error)
    words = {_word_path(output, number, word.name): word for number, word in enumerate(adapter.words.values(), 1)}
    for path in words:
        if path.exists() and not overwrite:
            raise ValueError(f"OUTPUT: {path}, for a learned word, exists already; --overwrite replaces it")
    updates = [one for found in (adapter.denoiser, *adapter.text_encoders) for one in found.values()]
    if updates:
        nbytes = write_adapter(output, replace(adapter, words={}), model=shapes)
        print(f"{output}: {nbytes} bytes, {_line(inspect_adapter(output))}")
        cut = [one.residual for one in updates if one.residual]
        if cut:
            print(f"{len(cut)} layers are cut to rank 128, which leaves out up to {max(cut):.2g} of a layer's update")
    for path, word in words.items():
        nbytes = write_word(path, word)
        print(f"{path}: {nbytes} bytes, the learned word {_plain(word.name)}")


def _word_path(output: Path, number: int, word: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9_-]", "", word)[:40] or "word"
    return output.with_name(f"{output.stem}.{number}-{name}.safetensors")


def _line(facts: AdapterFacts) -> str:
    layers = ", ".join(f"{count} layers in {component}" for component, count in sorted(facts.layers.items()))
    return f"{_kinds(facts)} for {_plain(facts.base or 'an unknown model')}" + (f", {layers}" if layers else "")


def _kinds(facts: AdapterFacts) -> str:
    return "+".join(facts.kinds) or ("learned words" if facts.words else "not supported")


def _ranks(facts: AdapterFacts) -> str:
    ranks = sorted({rank for counts in facts.ranks.values() for rank in counts})
    return "" if not ranks else f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")


def _counts(counts: Mapping[int, int]) -> str:
    """The ranks that layers have, the commonest first."""
    if len(counts) == 1:
        return str(*counts)
    common = sorted(counts.items(), key=lambda item: -item[1])
    more = len(common) - _MOST_RANKS
    said = ", ".join(f"{rank} ({count} layers)" for rank, count in common[:_MOST_RANKS])
    return said + (f" and {more} more ranks" if more > 0 else "")


def _table(rows: Mapping[str, str], indent: str = "") -> Iterator[str]:
    """A name and a text a line, aligned; long texts go on below themselves."""
    names = {name: _plain(name, 40) for name in rows}
    width = max(map(len, names.values()))
    columns = max(shutil.get_terminal_size((100, 1)).columns - len(indent) - width - 2, 30)
    for name, text in rows.items():
        lines = textwrap.wrap(_plain(text), columns) or [""]
        for number, line in enumerate(lines):
            yield f"{indent}{'' if number else names[name]:{width}}  {line}".rstrip()


def _plain(text: str, longest: int = _LONGEST) -> str:
    """A text of anybody's on one line, without what would move a terminal's cursor."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * longest])
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
