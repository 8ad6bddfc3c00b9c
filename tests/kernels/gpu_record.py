"""Remembers which tests passed on a GPU, and puts it on record once all of them have.

`make test-gpu` notes the outcomes in build/, shard by shard; `make gpu-record` writes keylock_kernels/gpu_record.json,
which is committed. It holds for the sources that the kernels were compiled from: `auto` ignores it for others.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ROOT / "build" / "gpu-outcomes.json"
COLLECTED = ROOT / "build" / "collected"
RECORD = ROOT / "keylock_kernels" / "gpu_record.json"


def remember(outcomes: dict[str, str], architecture: str, sources: str, path: Path = OUTCOMES) -> None:
    """Adds outcomes to those of earlier shards, if they were of the same kernels on the same kind of GPU."""
    of = {"architecture": architecture, "sources": sources}
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if {name: kept.get(name) for name in of} != of:
        kept = {**of, "outcomes": {}}
    kept["outcomes"].update(outcomes)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def about_cuda(tests: list[str]) -> list[str]:
    """Of collected test ids those that run the CUDA kernels."""
    return [test for test in tests if "::" in test and "cuda" in test.partition("::")[2]]


def put_on_record(outcomes: dict[str, Any], collected: list[str], path: Path = RECORD) -> str:
    """Writes the record if every test about CUDA kernels passed, or was skipped as not theirs; says what it did."""
    wanted = about_cuda(collected)
    passed = [test for test in wanted if outcomes["outcomes"].get(test) == "passed"]
    missing = [test for test in wanted if outcomes["outcomes"].get(test) not in ("passed", "skipped")]
    if missing or not passed:
        raise ValueError(f"{len(missing)} of {len(wanted)} tests have not passed: {', '.join(missing[:3])}")
    record = json.loads(path.read_text()) if path.exists() else {}
    record[outcomes["architecture"]] = {
        "sources": outcomes["sources"],
        "passed": len(passed),
        "date": date.today().isoformat(),
    }
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return f"{len(passed)} tests on {outcomes['architecture']} are on record in {path.name}"


if __name__ == "__main__":
    try:
        print(put_on_record(json.loads(OUTCOMES.read_text()), COLLECTED.read_text().splitlines()))
    except (OSError, ValueError) as error:
        sys.exit(f"nothing is put on record: {error}")
