"""Runs steps one after another, each within its limit; what came of one is written before the next begins."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.first_gpu.steps import GRACE, Step

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOG = "results.jsonl", "steps.log"
TAIL = 30  # lines of its output that a result holds
NO_CUDA = {"KEYLOCK_BUILD_CUDA": "0", "KEYLOCK_BUILD_NATIVE": "0"}  # where the module could not be built


@dataclass(frozen=True)
class Result:
    """What came of a step: "ok", "failed", "out of time" or "skipped"."""

    step: str
    outcome: str
    began: str
    seconds: float
    limit: int
    exit: int | None
    why: str
    command: str
    tail: list[str]


def environment(given: Mapping[str, str], folder: Path, capability: tuple[int, int] | None) -> dict[str, str]:
    """What every step runs in: the checkout's packages, a build that may not skip anything, one architecture."""
    defaults = {"PYTHONUNBUFFERED": "1", "KEYLOCK_BUILD_CUDA": "1", "KEYLOCK_BUILD_NATIVE": "1"}
    if capability is not None:
        defaults["CUDAARCHS"] = "{}{}-real".format(*capability)
    if importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) > 4:
        defaults["PYTEST_ADDOPTS"] = f"-n {(os.cpu_count() or 1) - 2} --dist worksteal"
    paths = [".", "python", *filter(None, [given.get("PYTHONPATH")])]
    return {**defaults, **given, "PYTHONPATH": os.pathsep.join(paths), "OUT": str(folder)}


def run_all(steps: list[Step], folder: Path, environ: Mapping[str, str], stub: bool) -> Iterator[Result]:
    """Runs the steps and yields what came of each, once it is written into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    environ = dict(environ)
    for step in steps:
        if stub and not step.stub:
            result = Result(step.name, "skipped", _now(), 0.0, step.limit, None, "only on a GPU", "", [])
        else:
            command = step.stub if stub else step.command
            with (folder / LOG).open("a") as log:
                result = run(step, command, {**environ, **step.environ}, log)
            for name in step.keep:
                if (ROOT / name).exists():
                    shutil.copy2(ROOT / name, folder)
            if step.name == "build" and result.outcome != "ok":
                environ |= NO_CUDA  # Triton's kernels need no build
        with (folder / RESULTS).open("a") as results:
            results.write(json.dumps(asdict(result)) + "\n")
        yield result


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def run(step: Step, command: tuple[str, ...], environ: Mapping[str, str], log: TextIO) -> Result:
    """Runs one step in a process group of its own, its output shown and written as it comes."""
    shown = " ".join(command)
    for out in (None, log):
        print(f"\n== {step.name}, at most {step.limit} s: {shown}", file=out, flush=True)
    start, began = time.monotonic(), _now()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{error}\n")
        return Result(step.name, "failed", began, 0.0, step.limit, None, f"cannot run: {error}", shown, [])
    late = threading.Event()

    def end(how: int) -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)

    timers = [
        threading.Timer(step.limit, end, (signal.SIGINT,)),  # pytest then writes what it knows
        threading.Timer(step.limit + GRACE, end, (signal.SIGKILL,)),
    ]
    for timer in timers:
        timer.start()
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
            lines = [*lines[1 - TAIL :], line.rstrip("\n")]
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    seconds = round(time.monotonic() - start, 1)
    outcome = "out of time" if late.is_set() else "failed" if code else "ok"
    why = lines[-1][:80] if lines and outcome != "ok" else ""
    return Result(step.name, outcome, began, seconds, step.limit, code, why, shown, lines)
