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
_SCORES = ("who", "expression", "background", "other", "unchanged", "leak", "error", "colour", "pattern", "diversity")
_ERRORS = ("colour", "pattern")
PLAIN = "no personalisation"


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


def of_nothing(facts: Mapping[str, Any], plain: Mapping[str, Any] | None) -> dict[str, float]:
    """How much of the errors of no personalisation is left, (error - floor) / (nothing - floor), by error: of all
    pictures' means, where the floor is the plain model's error to its own right answer."""
    known = {_key(p): p for p in plain["pictures"]} if plain is not None else {}
    made = {}
    for name in _ERRORS:
        pairs = [(p, known.get(_key(p), {})) for p in facts["pictures"] if name in p]
        pairs = [(p, base) for p, base in pairs if f"floor {name}" in base]
        left = sum(p[name] - base[f"floor {name}"] for p, base in pairs)
        whole = sum(base[f"nothing {name}"] - base[f"floor {name}"] for _, base in pairs)
        made[name] = left / whole if whole > 0 else float("nan")
    return made


def _key(picture: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(picture.get(name) for name in ("user", "prompt", "seed"))


def line(facts: Mapping[str, Any]) -> str:
    """One method's row."""
    m = means(facts)
    changes = ", ".join(f"{name}={value}" for name, value in facts["changes"].items())
    return (
        f"{facts['method'] + (f' ({changes})' if changes else ''):44} who {m['who']:.2f}  "
        f"expression {m['expression']:.2f}  "
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
    """Methods as rows of a markdown table; `who` also as its difference to one of them, with the interval of it.

    Errors of colour and pattern are shares of those of no personalisation (see `of_nothing`).
    """
    heads = (
        "method",
        "who",
        "to the LoRA",
        "expression",
        "background",
        "other",
        "unchanged",
        "leak",
        "two users",
        *_ERRORS,
        "diversity",
        "bytes",
        "rows",
    )
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    chosen = {facts["method"]: facts for facts in found if not facts["changes"]}
    base, plain = chosen.get(beside), chosen.get(PLAIN)
    for facts in found:
        m, left = means(facts), of_nothing(facts, plain)
        changes = ", ".join(f"{name} {value}" for name, value in facts["changes"].items())
        gap = difference(facts, base, "who") if base is not None and facts is not base else None
        cells = [
            facts["method"] + (f", {changes}" if changes else ""),
            f"{m['who']:.2f}",
            "-" if gap is None else f"{gap[0]:+.2f} ({gap[1]:+.2f} to {gap[2]:+.2f})",
            *(f"{m[name]:.2f}" for name in ("expression", "background")),
            f"{m['other']:.1f}",
            *(f"{m[name]:.2f}" for name in ("unchanged", "leak", "in place")),
            *(f"{left[name]:.2f}" for name in _ERRORS),
            f"{m['diversity']:.1f}",
            f"{facts['bytes']:,}",
            f"{facts['rows']:,}",
        ]
        lines.append(f"| {' | '.join('-' if cell == 'nan' else cell for cell in cells)} |")
    return "\n".join(lines)


def contact_sheet(
    sheets: Mapping[str, Image.Image], users: Sequence[str], chosen: Sequence[int] | None = None, every: int = 1
) -> Image.Image:
    """For each user a block of rows, what each method drew of the same orders.

    Args:
        sheets: by method, its pictures, a row a user.
        users: their names.
        chosen: the places of those that are shown; default all.
        every: of so many of a row's pictures only the first is shown.
    """
    side = next(iter(sheets.values())).height // len(users)
    columns = range(0, max(sheet.width for sheet in sheets.values()) // side, every)
    block = len(sheets) * side + _GAP
    chosen = range(len(users)) if chosen is None else chosen
    made = Image.new("RGB", (_LABEL + len(columns) * side, len(chosen) * block), "white")
    pen = ImageDraw.Draw(made)
    for number, user in enumerate(chosen):
        for row, (method, sheet) in enumerate(sheets.items()):
            top = number * block + row * side
            for place, column in enumerate(columns):
                cell = sheet.crop((column * side, user * side, (column + 1) * side, (user + 1) * side))
                made.paste(cell, (_LABEL + place * side, top))
            pen.text((4, top + side // 2 - 6), f"{users[user]}  {method}", fill="black", font_size=11)
    return made


def plot(found: Sequence[Mapping[str, Any]]) -> str:
    """How often the user is recognised, and the expression, over the bytes that are kept: an SVG."""
    shown = [facts for facts in found if facts["bytes"] and not facts["changes"]]
    if not shown:
        return ""
    low, high = (math.log10(end([facts["bytes"] for facts in shown])) for end in (min, max))
    wide, tall, margin = 640, 300, 40

    def place(facts: Mapping[str, Any], score: str) -> tuple[float, float]:
        across = (math.log10(facts["bytes"]) - low) / max(high - low, 1e-9)
        return margin + across * (wide - 2 * margin), tall - margin - means(facts)[score] * (tall - 2 * margin)

    marks = []
    for score, colour in (("who", "#1f6fb2"), ("expression", "#c0504d")):
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
        f'<text x="{margin}" y="{margin - 8}" font-size="10">who (blue), expression (red), 0 to 1</text>'
        f'<text x="{wide - margin - 60}" y="{tall - margin + 14}" font-size="10">bytes (log)</text>'
    )
    height = tall + 14 * len(shown) + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" font-family="sans-serif">'
        f'<rect width="{wide}" height="{height}" fill="white"/>{axes}{"".join(marks)}{"".join(names)}</svg>\n'
    )


def compact(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a row in the repository: every score's mean over each user's pictures."""
    users: dict[str, dict[str, float]] = {
        user: {} for user in dict.fromkeys(picture["user"] for picture in facts["pictures"])
    }
    for score in _SCORES:
        for user, mean in by_user(facts, score).items():
            users[user][score] = round(mean, 3)
    names = ("method", "settings", "changes", "rows", "bytes", "seconds")
    m = means(facts)
    pairs = {name: round(m[name], 3) for name in ("in place", "swapped") if not math.isnan(m[name])}
    return {**{name: facts[name] for name in names}, "users": users, "two users": pairs}


def write(folder: Path, users: Sequence[str], order: Sequence[str]) -> None:
    """The table, the plot and the contact sheet of a folder, beside its scores; an excerpt has one user of each kind.

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
    (folder / "scores.jsonl").write_text("".join(json.dumps(compact(facts)) + "\n" for facts in ordered))
    (folder / "bytes.svg").write_text(plot(ordered))
    sheets = {
        found[path]["method"]: Image.open(path.with_suffix(".png")) for path in paths if not found[path]["changes"]
    }
    if sheets:
        contact_sheet(sheets, users).save(folder / "contact-sheet.png")
        kinds = {picture["user"]: picture["kind"] for picture in ordered[0]["pictures"]}
        first = {kinds[user]: place for place, user in reversed([*enumerate(users)])}
        seeds = len({picture["seed"] for picture in ordered[0]["pictures"]})
        contact_sheet(sheets, users, sorted(first.values()), seeds).save(folder / "excerpt.jpg", quality=90)
