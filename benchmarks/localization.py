"""``python -m benchmarks.localization``: measures what docs/localization.md says, prints it and writes it there.

    python -m benchmarks.localization                everything: twelve minutes on two cores
    python -m benchmarks.localization --only maps    one part anew; the others' numbers are kept
    python -m benchmarks.localization --print        what was measured last

Numbers go to docs/localization.json, the table made of them into docs/localization.md. Needs the emoji font (Debian's
fonts-noto-color-emoji), for renders that no model has seen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import localization_cost as cost
from benchmarks import localization_pictures as pictures
from benchmarks.report import environment

DOCS = Path(__file__).resolve().parent.parent / "docs"
NUMBERS, PAGE = DOCS / "localization.json", DOCS / "localization.md"
_START, _END = "<!-- measured -->", "<!-- /measured -->"

PARTS: dict[str, Callable[[], Any]] = {
    "regions": lambda: pictures.measure_regions(pictures.pipeline()),
    "two concepts": lambda: pictures.measure_two_concepts(pictures.pipeline()),
    "localization loss": lambda: pictures.measure_localization(pictures.pipeline()),
    "maps": lambda: pictures.measure_maps(pictures.pipeline()),
    "image prompts": lambda: pictures.measure_adapter(pictures.pipeline(adapter=True)),
    "memory": lambda: {model: cost.measure_memory(model) for model in cost.MEMORY_BATCH},
    "time": lambda: {model: cost.measure_time(model) for model in cost.TURNS},
}


def table(measured: dict[str, Any]) -> str:
    """The numbers as markdown."""
    lines = ["| what | measured | aimed at |", "| --- | --- | --- |"]

    def row(what: str, found: str, aim: str = "") -> None:
        lines.append(f"| {what} | {found} | {aim} |")

    names = {
        "none": "no regions",
        "own": '`endings="own"` (default)',
        "everywhere": '`endings="everywhere"`',
        "outside": '`endings="outside"`',
        "hidden": '`endings="hidden"`',
    }
    for name, found in measured.get("regions", {}).items():
        aim = "80% in their own" if name == "own" else ""
        row(
            f"two subjects, {names[name]}: found in their own half / in the other's / background right",
            f"{found['own']:.0%} / {found['other']:.0%} / {found['background']:.0%} of {pictures.COUNT} pictures",
            aim,
        )
    for name, found in measured.get("two concepts", {}).items():
        aim = "80% cat and coat" if name == "own" else ""
        row(
            f"two users' cats, {names[name]}: own coat in their own half / a cat there / own coat in the other half",
            f"{found['coat']:.0%} / {found['cat']:.0%} / {found['coat elsewhere']:.0%} of {found['subjects']}",
            aim,
        )
    for weight, found in measured.get("localization loss", {}).items():
        row(
            f"concepts from pictures of two subjects, loss weight {weight}: cat / own coat inside its half; cat / the "
            "other subject outside; share of its word's attention inside",
            f"{found['cat inside']:.0%} / {found['coat inside']:.0%}; {found['cat outside']:.0%} / "
            f"{found['other outside']:.0%}; {found['attention inside']:.0%} ({found['pictures']} pictures)",
        )
    if "image prompts" in measured:
        found = measured["image prompts"]
        total = pictures.COUNT
        alone, worded = found["class from the image alone"], found["class with words of the background"]
        row("image prompt with an empty prompt: right class", f"{alone:.0%} of {total}", "70%")
        row(
            'image prompt with "on red", another background than its own: background of the words / right class',
            f"{found['background of the words']:.0%} / {worded:.0%} of {total}",
            "80% background",
        )
        equal = "yes" if found["scale 0 equals none bit for bit"] else "NO"
        row("image prompt of scale 0 equals none, bit for bit", equal, "yes")
    for kind in ("one subject", "two subjects") if "maps" in measured else ():
        row(
            f"mean map of a subject's words against its exact mask, {kind}: intersection over union at the best "
            "threshold / what no map gets",
            f"{measured['maps'][kind]:.2f} / {measured['maps'][f'{kind}, by chance']:.2f}",
        )
    for model, found in measured.get("memory", {}).items():
        row(
            f"{model}, cross-attention of {found['batch']} pictures: MiB beyond the step without the loss, ours / "
            "eager's / ratio",
            f"{found['ours']:.2f} / {found['eager']:.0f} / {found['ratio']:.4f}",
            "1/20",
        )
    for model, found in measured.get("time", {}).items():
        low, high = found["quartiles"]
        row(
            f"{model}, a training step, latents of 64 x 64, one picture: time with the loss over without, median of "
            "turns (quartiles)",
            f"{found['ratio']:.3f} ({low:.3f} to {high:.3f}; {found['without']:.1f} s, {found['turns']} turns)",
            "1.03",
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.localization", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--print", action="store_true", dest="show", help="measure nothing")
    arguments = parser.parse_args()
    measured = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    if not arguments.show:
        for part in arguments.only or PARTS:
            measured[part] = PARTS[part]()
            measured["measured"] = {
                **measured.get("measured", {}),
                part: {"on": environment()["device"], "torch": torch.__version__, "date": f"{datetime.date.today()}"},
            }
            NUMBERS.write_text(json.dumps(measured, indent=1) + "\n")
        if PAGE.exists():
            page = PAGE.read_text()
            PAGE.write_text(re.sub(f"(?s){_START}.*{_END}", lambda _: f"{_START}\n\n{table(measured)}\n\n{_END}", page))
    print(table(measured))


if __name__ == "__main__":
    main()
