"""The long form of the hostile cases: ``python -m tests.hostile.run``, or ``make fuzz``.

    python -m tests.hostile.run                           all kinds, at their full sizes, into docs/security.md
    python -m tests.hostile.run --only pictures --count 500 --first 4000   some of one kind; nothing is written
    python -m tests.hostile.run --print                   what was measured last

A kind runs in a child process of its own, bounded in memory, that no case may leave: no network, no programs, no files
of others. A case that takes too long is killed and counted as a hang, and the next child goes on behind it. Numbers go
to docs/security.json, the table made of them into docs/security.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE = ROOT / "docs" / "security.json", ROOT / "docs" / "security.md"
KINDS = ("pictures", "requests", "request_files", "concept_files", "picture_folders", "calls")
SECONDS = 60  # that a case may take, and the start of a child on a loaded machine
MORE_BYTES = 3 << 30  # of address space beyond what a child has once everything is imported
_START, _END = "<!-- measured -->", "<!-- /measured -->"


def measure(kind: str, first: int, count: int) -> dict[str, Any]:
    """What came of so many cases, child after child."""
    outcomes: Counter[str] = Counter()
    broken: list[dict[str, Any]] = []
    slowest, most, number = 0.0, 0, first
    started = time.monotonic()
    while number < first + count:
        for line in _child(kind, number, first + count - number):
            said = json.loads(line)
            number = said["number"] + 1
            slowest, most = max(slowest, said["seconds"]), max(most, said["bytes"])
            if said["broken"]:
                broken.append({"number": said["number"], "what": said["broken"]})
            outcomes["broken" if said["broken"] else said["outcome"]] += 1
        if number < first + count:  # the child ended before its work did
            outcomes["hung or died"] += 1
            broken.append({"number": number, "what": "hung or died"})
            number += 1
    return {
        "cases": count,
        "outcomes": dict(sorted(outcomes.items())),
        "broken": broken,
        "slowest": round(slowest, 2),
        "most_bytes": most,
        "seconds": round(time.monotonic() - started),
    }


def _child(kind: str, first: int, count: int) -> Any:
    """The lines that a child prints, a case each; killed when it says nothing for too long."""
    command = [sys.executable, "-m", "tests.hostile.run", "--child", kind, "--first", str(first), "--count", str(count)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        heard = time.monotonic()

        def watch() -> None:
            while child.poll() is None:
                if time.monotonic() - heard > SECONDS + 5:  # the child's own alarm comes first
                    child.kill()
                time.sleep(1)

        threading.Thread(target=watch, daemon=True).start()
        for line in child.stdout:
            heard = time.monotonic()
            if line.startswith("{"):
                yield line


def cases(kind: str, first: int, count: int) -> None:
    """In a child: the cases one by one, each a line of JSON as soon as it ended."""
    from tests.hostile import guard

    warnings.simplefilter("ignore")  # Pillow's, of pictures that are odd
    module = importlib.import_module(f"tests.hostile.{kind}")
    said, sys.stdout = sys.stdout, open(os.devnull, "w")
    base, memory = 0, "/dev/shm" if os.path.isdir("/dev/shm") else None
    for number in range(first, first + count):
        started, outcome, broken = time.monotonic(), "", ""
        with tempfile.TemporaryDirectory(dir=memory) as place:
            try:
                case = module.make(Random(f"{kind} {number}"))
                with guard.watched(Path(place)) as escapes, guard.bounded(SECONDS, MORE_BYTES):
                    outcome = module.check(case, Path(place))
                broken = f"left its folder: {escapes[0]}" if escapes else ""
            except guard.Hang:
                broken = f"took longer than {SECONDS} s"
            except Exception as error:
                broken = f"{type(error).__name__}: {error}"[:500]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        base = base or peak  # the first case imports and builds
        line = {"number": number, "outcome": outcome, "broken": broken, "bytes": peak - base}
        seconds = 0.0 if number == first else round(time.monotonic() - started, 3)
        print(json.dumps({**line, "seconds": seconds}), file=said, flush=True)


def table(measured: dict[str, Any]) -> str:
    """The numbers as markdown."""
    lines = [
        "| kind | cases | refused | accepted | promises broken | hangs, deaths | slowest | memory beyond the first |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        found = measured.get(kind)
        if found is None:
            continue
        said = {"refused": "", "accepted": ""}
        for name, count in found["outcomes"].items():
            way, _, how = name.partition(", ")
            if way in said:
                said[way] += f"{', ' if said[way] else ''}{count:,}{f' ({how})' if how else ''}"
        died = found["outcomes"].get("hung or died", 0)
        lines.append(
            f"| {kind.replace('_', ' ')} | {found['cases']:,} | {said['refused']} | {said['accepted']} | "
            f"{len(found['broken']) - died} | {died} | {found['slowest']:.2f} s | "
            f"{found['most_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"kinds, with commas between: {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, help="cases of each kind; default the kind's own size, which is written")
    parser.add_argument("--first", type=int, default=0, help="the first case's number")
    parser.add_argument("--print", action="store_true", dest="show", help="measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return cases(given.child, given.first, given.count)
    measured = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    new = {}
    for kind in () if given.show else filter(None, given.only.split(",")) if given.only else KINDS:
        size = importlib.import_module(f"tests.hostile.{kind}").LONG
        new[kind] = measure(kind, given.first, given.count or size)
        print(f"{kind}: {json.dumps(new[kind]['outcomes'])}, {new[kind]['seconds']} s", flush=True)
        for one in new[kind]["broken"][:40]:
            print(f"  {one['number']}: {one['what']}", flush=True)
        if given.count is None and given.first == 0:
            measured[kind] = {**new[kind], "date": f"{datetime.date.today()}"}
            NUMBERS.write_text(json.dumps(measured, indent=1) + "\n")
    if PAGE.exists():
        page = PAGE.read_text()
        PAGE.write_text(re.sub(f"(?s){_START}.*{_END}", lambda _: f"{_START}\n\n{table(measured)}\n\n{_END}", page))
    print(table({**measured, **new}))
    sys.exit(any(one["broken"] for one in new.values()))


if __name__ == "__main__":
    main()
