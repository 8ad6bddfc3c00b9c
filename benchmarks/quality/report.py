"""What a folder of scores says: a table, a plot and a contact sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.quality.users import User

_DRAWS = 2000
_LABEL, _GAP = 260, 8  # pixels
_SCORES = ("who", "expression", "background", "other", "unchanged", "leak", "error", "colour", "pattern", "diversity")
_ERRORS = ("colour", "pattern")
_TWO = ("in place", "swapped")
SCORES = "scores.jsonl"
PLAIN = "no personalisation"


def summary(pictures: Sequence[Mapping[str, Any]], both: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What is kept of scores: every score's mean over each user's pictures, and over those of two users."""
    users: dict[str, dict[str, list[float]]] = {}
    for picture in pictures:
        own = users.setdefault(picture["user"], {})
        for score in picture.keys() - {"user", "prompt", "seed"}:
            own.setdefault(score, []).append(picture[score])
    means = {user: {score: round(float(np.mean(v)), 4) for score, v in own.items()} for user, own in users.items()}
    two = {name: round(float(np.mean([one[name] for one in both])), 4) for name in _TWO if both}
    return {"users": means, "two users": two}


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that a folder has, in the order in which they were made."""
    path = folder / SCORES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def means(facts: Mapping[str, Any]) -> dict[str, float]:
    """The mean over users of every score."""
    made = {}
    for name in _SCORES:
        values = by_user(facts, name).values()
        made[name] = float(np.mean(list(values))) if values else float("nan")
    return made | {name: facts["two users"].get(name, float("nan")) for name in _TWO}


def of_nothing(facts: Mapping[str, Any], plain: Mapping[str, Any] | None) -> dict[str, float]:
    """How much of the errors of no personalisation is left, (error - floor) / (nothing - floor), by error: of all
    users' means, where the floor is the plain model's error to its own right answer."""
    made = {}
    for name in _ERRORS:
        own, base = by_user(facts, name), {} if plain is None else plain["users"]
        known = [user for user in own if f"floor {name}" in base.get(user, {})]
        left = sum(own[user] - base[user][f"floor {name}"] for user in known)
        whole = sum(base[user][f"nothing {name}"] - base[user][f"floor {name}"] for user in known)
        made[name] = left / whole if whole > 0 else float("nan")
    return made


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
    """Each user's mean of a score."""
    return {user: scores[score] for user, scores in facts["users"].items() if score in scores}


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


def write(folder: Path, users: Sequence[User], order: Sequence[str], seeds: int) -> None:
    """The table, the plot and the contact sheet of a folder, beside its scores; an excerpt has one user of each kind.

    Args:
        folder: where they are.
        users: whose.
        order: of the methods.
        seeds: of each prompt; the excerpt shows the first.
    """
    found = sorted(read(folder), key=lambda facts: (order.index(facts["method"]), str(facts["changes"])))
    (folder / "table.md").write_text(table(found) + "\n")
    (folder / "bytes.svg").write_text(plot(found))
    paths = {facts["method"]: folder / f"{facts['key']}.jpg" for facts in found if not facts["changes"]}
    sheets = {method: Image.open(path) for method, path in paths.items() if path.exists()}
    if sheets:
        names = [user.name for user in users]
        contact_sheet(sheets, names).save(folder / "contact-sheet.jpg", quality=90)
        first = {user.kind: place for place, user in reversed([*enumerate(users)])}
        contact_sheet(sheets, names, sorted(first.values()), seeds).save(folder / "excerpt.jpg", quality=90)
