"""What a folder of scores says, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_DRAWS = 2000
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


def read(folder: Path) -> list[dict[str, Any]]:
    """All scores of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Methods as rows of a markdown table."""
    heads = ("method", "who", "named", "background", "other", "unchanged", "leak", "two users", "bytes", "rows")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for facts in found:
        m = means(facts)
        changes = ", ".join(f"{name} {value}" for name, value in facts["changes"].items())
        cells = [
            facts["method"] + (f", {changes}" if changes else ""),
            *(f"{m[name]:.2f}" for name in ("who", "named", "background")),
            f"{m['other']:.1f}",
            *(f"{m[name]:.2f}" for name in ("unchanged", "leak", "in place")),
            f"{facts['bytes']:,}",
            f"{facts['rows']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: Path) -> None:
    """The table of a folder, beside its scores."""
    (folder / "table.md").write_text(table(read(folder)) + "\n")
