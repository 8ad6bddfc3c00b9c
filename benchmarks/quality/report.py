"""What a folder of scores says: a table, a plot and a contact sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_DRAWS = 2000
_LABEL, _GAP = 260, 8  # pixels
_SCORES = ("who", "named", "background", "other", "unchanged", "leak", "error", "colour", "pattern")


def means(facts: Mapping[str, Any]) -> dict[str, float]:
    """The mean of every score."""
    made = {}
    for name in _SCORES:
        values = [picture[name] for picture in facts["pictures"] if name in picture]
        made[name] = float(np.mean(values)) if values else float("nan")
    both = facts["both"]
    for name in ("in place", "swapped"):
        made[name] = float(np.mean([one[name] for one in both])) if both else float("nan")
    return made


def line(facts: Mapping[str, Any]) -> str:
    """One method's row."""
    m = means(facts)
    changes = ", ".join(f"{name}={value}" for name, value in facts["changes"].items())
    return (
        f"{facts['method'] + (f' ({changes})' if changes else ''):44} who {m['who']:.2f}  named {m['named']:.2f}  "
        f"background {m['background']:.2f}  other {m['other']:5.1f}  unchanged {m['unchanged']:.2f}  "
        f"leak {m['leak']:.2f}  error {m['error']:5.1f}  both {m['in place']:.2f}/{m['swapped']:.2f}  "
        f"{facts['bytes']:7,} bytes  {facts['seconds']:5.1f} s"
    )


def by_user(facts: Mapping[str, Any], score: str) -> dict[str, float]:
    """A score's mean over each user's pictures."""
    found: dict[str, list[float]] = {}
    for picture in facts["pictures"]:
        if score in picture:
            found.setdefault(picture["user"], []).append(picture[score])
    return {user: float(np.mean(values)) for user, values in found.items()}


def difference(one: Mapping[str, Any], other: Mapping[str, Any], score: str) -> tuple[float, float, float]:
    """How much larger a score is than another method's, and the 95% interval of it: a paired bootstrap over users."""
    mine, theirs = by_user(one, score), by_user(other, score)
    users = sorted(mine.keys() & theirs.keys())
    gaps = np.array([mine[user] - theirs[user] for user in users])
    drawn = np.random.default_rng(0).integers(len(gaps), size=(_DRAWS, len(gaps)))
    low, high = np.quantile(gaps[drawn].mean(1), (0.025, 0.975))
    return float(gaps.mean()), float(low), float(high)


def table(found: Sequence[Mapping[str, Any]], beside: str = "LoRA rank 4, with a word") -> str:
    """Methods as rows of a markdown table; `who` also as its difference to one of them, with the interval of it."""
    heads = (
        "method",
        "who",
        "to the LoRA",
        "named",
        "background",
        "other",
        "unchanged",
        "leak",
        "two users",
        "bytes",
        "rows",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    base = next((facts for facts in found if facts["method"] == beside and not facts["changes"]), None)
    for facts in found:
        m = means(facts)
        changes = ", ".join(f"{name} {value}" for name, value in facts["changes"].items())
        gap = difference(facts, base, "who") if base is not None and facts is not base else None
        cells = [
            facts["method"] + (f", {changes}" if changes else ""),
            f"{m['who']:.2f}",
            "-" if gap is None else f"{gap[0]:+.2f} ({gap[1]:+.2f} to {gap[2]:+.2f})",
            *(f"{m[name]:.2f}" for name in ("named", "background")),
            f"{m['other']:.1f}",
            *(f"{m[name]:.2f}" for name in ("unchanged", "leak", "in place")),
            f"{facts['bytes']:,}",
            f"{facts['rows']:,}",
        ]
        lines.append(f"| {' | '.join('-' if cell == 'nan' else cell for cell in cells)} |")
    return "\n".join(lines)


def contact_sheet(sheets: Mapping[str, Image.Image], users: Sequence[str]) -> Image.Image:
    """For each user a block of rows, what each method drew of the same orders.

    Args:
        sheets: by method, its pictures, a row a user.
        users: their names.
    """
    width = max(sheet.width for sheet in sheets.values())
    side = next(iter(sheets.values())).height // len(users)
    block = len(sheets) * side + _GAP
    made = Image.new("RGB", (_LABEL + width, len(users) * block), "white")
    pen = ImageDraw.Draw(made)
    for number, user in enumerate(users):
        for row, (method, sheet) in enumerate(sheets.items()):
            top = number * block + row * side
            made.paste(sheet.crop((0, number * side, sheet.width, (number + 1) * side)), (_LABEL, top))
            pen.text((4, top + side // 2 - 6), f"{user}  {method}", fill="black", font_size=11)
    return made


def plot(found: Sequence[Mapping[str, Any]]) -> str:
    """How often the user is recognised, and the expression named, over the bytes that are kept: an SVG."""
    shown = [facts for facts in found if facts["bytes"] and not facts["changes"]]
    if not shown:
        return ""
    low, high = (math.log10(end([facts["bytes"] for facts in shown])) for end in (min, max))
    wide, tall, margin = 640, 300, 40

    def place(facts: Mapping[str, Any], score: str) -> tuple[float, float]:
        across = (math.log10(facts["bytes"]) - low) / max(high - low, 1e-9)
        return margin + across * (wide - 2 * margin), tall - margin - means(facts)[score] * (tall - 2 * margin)

    marks = []
    for score, colour in (("who", "#1f6fb2"), ("named", "#c0504d")):
        for number, facts in enumerate(shown):
            x, y = place(facts, score)
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{facts["method"]}</title></circle>'
            )
            marks.append(f'<text x="{x + 5:.1f}" y="{y - 5:.1f}" font-size="9" fill="{colour}">{number + 1}</text>')
    names = [
        f'<text x="{margin}" y="{tall + 14 * n}" font-size="10">{n + 1}  {facts["method"]}</text>'
        for n, facts in enumerate(shown)
    ]
    axes = (
        f'<path d="M{margin} {margin}V{tall - margin}H{wide - margin}" fill="none" stroke="#888"/>'
        f'<text x="{margin}" y="{margin - 8}" font-size="10">who (blue), named (red), 0 to 1</text>'
        f'<text x="{wide - margin - 60}" y="{tall - margin + 14}" font-size="10">bytes (log)</text>'
    )
    height = tall + 14 * len(shown) + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" font-family="sans-serif">'
        f'<rect width="{wide}" height="{height}" fill="white"/>{axes}{"".join(marks)}{"".join(names)}</svg>\n'
    )


def write(folder: Path, users: Sequence[str], order: Sequence[str]) -> None:
    """The table, the plot and the contact sheet of a folder, beside its scores.

    Args:
        folder: where they are.
        users: the names of its users.
        order: of the methods.
    """
    paths = sorted(folder.glob("*.json"))
    found = {path: json.loads(path.read_text()) for path in paths}
    paths.sort(key=lambda path: (order.index(found[path]["method"]), str(found[path]["changes"])))
    ordered = [found[path] for path in paths]
    (folder / "table.md").write_text(table(ordered) + "\n")
    (folder / "bytes.svg").write_text(plot(ordered))
    sheets = {
        found[path]["method"]: Image.open(path.with_suffix(".png")) for path in paths if not found[path]["changes"]
    }
    if sheets:
        contact_sheet(sheets, users).save(folder / "contact-sheet.png")
