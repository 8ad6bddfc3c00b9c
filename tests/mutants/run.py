"""Changes one line of the library at a time and runs the tests that should notice: `make mutants`.

Mutants are data, in the ``*.toml`` files beside this one. Each is applied to a copy of the checkout, never to the
checkout itself. A mutant that its tests let pass has survived: something that the library promises is not tested.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutants"
NEEDED = 0.95  # of the mutants must be noticed
CLEAN_SECONDS = 600  # what tests may take without a mutant, and how much longer with one
MUTANT_FACTOR, MUTANT_SECONDS = 5, 60


@dataclass(frozen=True)
class Mutant:
    """One change that some test must notice.

    Args:
        name: what then goes wrong.
        file: of the library, relative to the checkout.
        old: text that stands in it exactly once.
        new: what is put in its place.
        tests: files (or items) of tests that should notice.
        select: which of their items, as pytest's ``-k``; default all.
        group: the file it is written in.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str = ""
    group: str = ""

    def mutated(self, root: Path = ROOT) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the old text does not stand in the file exactly once, or nothing would change.
        """
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise ValueError(
                f"mutant {self.name!r} ({self.group}): {self.old!r} must stand once in {self.file}, found {found}"
            )
        return text.replace(self.old, self.new)


@dataclass
class Result:
    """How a mutant fared: "killed", "survived" or "broken", and what noticed it."""

    group: str
    name: str
    file: str
    outcome: str
    seconds: float
    noticed: str


def read(only: Sequence[str] = ()) -> list[Mutant]:
    """All mutants, or those of some files."""
    mutants = []
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        if only and path.stem not in only:
            continue
        for entry in tomllib.loads(path.read_text())["mutant"]:
            mutants.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}, group=path.stem))
    return mutants


def copy_checkout(to: Path) -> Path:
    """What tests read."""
    shutil.rmtree(to, ignore_errors=True)
    for name in ("keylock_kernels", "python", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, to / path.name)
    for name in ("csrc", "docs", "benchmarks"):
        (to / name).symlink_to(ROOT / name)
    return to


def preload() -> None:
    """Imports what is slow to import and not the library's, once: every run is a fork of this process."""
    import accelerate  # noqa: F401
    import diffusers
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    # diffusers and transformers import their classes when they are first asked for.
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "AnimateDiffPipeline", "AutoencoderTiny"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPVisionModelWithProjection", "CLIPTokenizer", "CLIPImageProcessor"):
        getattr(transformers, name)
    ours = [name for name in sys.modules if name.split(".")[0] in ("keylock_kernels", "keylock_diffusers", "tests")]
    assert not ours, f"the library is imported from the copy, not from here: {ours}"


def run_tests(tree: Path, tests: Sequence[str], select: str, log: Path) -> None:
    """In a process of its own: pytest in a copy; its exit code is the process's."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(tree)
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    sys.path = [str(tree), str(tree / "python"), *elsewhere]
    sys.dont_write_bytecode = True  # a mutant may be as old and as long as what it replaces
    import pytest

    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), "-m", "not gpu", *tests]
    code = pytest.main([*arguments, *(["-k", select] if select else [])])
    ours = [sys.modules[name].__file__ for name in ("keylock_kernels", "keylock_diffusers") if name in sys.modules]
    sys.stdout.flush()
    os._exit(int(code) if all(Path(file or "").is_relative_to(tree) for file in ours) else 9)


@dataclass
class Job:
    """One run of tests: without a mutant, or with one."""

    tests: tuple[str, ...]
    select: str
    limit: float
    mutant: Mutant | None
    log: Path


def finished(jobs: Sequence[Job], trees: Sequence[Path]) -> Iterator[tuple[Job, int | None, float]]:
    """Runs every job, one at a time in each copy; yields it with its exit code (None: out of time) and seconds."""
    context = multiprocessing.get_context("fork")
    waiting, free = list(jobs)[::-1], list(trees)
    running: dict[Any, tuple[Job, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            job, tree = waiting.pop(), free.pop()
            if job.mutant is not None:
                (tree / job.mutant.file).write_text(job.mutant.mutated())
            process = context.Process(target=run_tests, args=(tree, job.tests, job.select, job.log))
            process.start()
            running[process] = job, tree, time.monotonic()
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
        for process, (job, tree, started) in list(running.items()):
            seconds = time.monotonic() - started
            if process.is_alive() and seconds < job.limit:
                continue
            code = None if process.is_alive() else process.exitcode
            process.kill()
            process.join()
            if job.mutant is not None:
                shutil.copy2(ROOT / job.mutant.file, tree / job.mutant.file)
            del running[process]
            free.append(tree)
            yield job, code, seconds


def noticed(log: Path) -> str:
    """The test that failed, from pytest's summary."""
    failed = [line.split()[1] for line in log.read_text().splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].removeprefix("tests/") if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="files of mutants, such as training,routing; default all")
    parser.add_argument("--shard", default="1/1", help="2/4: the second quarter")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--match", default="", help="only mutants with this in their name or file")
    options = parser.parse_args()
    part, parts = (int(number) for number in options.shard.split("/"))
    mutants = [m for m in read(options.only.replace(",", " ").split()) if options.match in f"{m.name} {m.file}"]
    mutants = mutants[part - 1 :: parts]
    for mutant in mutants:
        mutant.mutated()  # raises before anything runs
    os.environ["OMP_NUM_THREADS"] = "1"
    begun = time.monotonic()
    BUILD.mkdir(parents=True, exist_ok=True)
    trees = [copy_checkout(BUILD / f"checkout-{number}") for number in range(options.jobs)]
    preload()

    targets = list(dict.fromkeys((test, m.select) for m in mutants for test in m.tests))
    clean = [Job((t,), select, CLEAN_SECONDS, None, BUILD / f"clean-{n}.log") for n, (t, select) in enumerate(targets)]
    took = {}
    for job, code, seconds in finished(clean, trees):
        took[job.tests[0], job.select] = seconds
        print(f"{seconds:6.1f} s  without a mutant  {' '.join(job.tests)} {job.select}", flush=True)
        if code != 0:
            print(f"these tests fail without any mutant (exit code {code}): see {job.log}")
            return 2

    jobs = []
    for number, m in enumerate(mutants):
        limit = MUTANT_SECONDS + MUTANT_FACTOR * sum(took[test, m.select] for test in m.tests)
        jobs.append(Job(m.tests, m.select, limit, m, BUILD / f"{number}.log"))
    results = []
    for job, code, seconds in finished(jobs, trees):
        assert (mutant := job.mutant) is not None
        # 1: a test failed; below 0: it crashed. 2 and above: pytest could not run the tests at all.
        outcome = "survived" if code == 0 else "killed" if code is None or code == 1 or code < 0 else "broken"
        by = "out of time" if code is None else noticed(job.log)
        results.append(Result(mutant.group, mutant.name, mutant.file, outcome, round(seconds, 1), by))
        print(f"{seconds:6.1f} s  {outcome:8}  {mutant.group}: {mutant.name}  {by}", flush=True)
    return report(results, time.monotonic() - begun)


def report(results: list[Result], seconds: float) -> int:
    """Writes the table and the numbers; 0 where enough were noticed."""
    results.sort(key=lambda result: (result.group, result.file))
    rows = ["| group | mutant | outcome | noticed by |", "| --- | --- | --- | --- |"]
    rows += [f"| {r.group} | {r.name} | {r.outcome} | {r.noticed} |" for r in results]
    (BUILD / "results.md").write_text("\n".join(rows) + "\n")
    (BUILD / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print()
    for group in [*sorted({result.group for result in results}), "all"]:
        count = Counter(result.outcome for result in results if group in (result.group, "all"))
        print(f"{group:12} {count['killed']} of {count.total()} killed, {count['broken']} broken")
    for result in results:
        if result.outcome != "killed":
            print(f"{result.outcome}: {result.group}: {result.name} ({result.file})")
    total = Counter(result.outcome for result in results)
    print(f"{seconds / 60:.1f} minutes; {BUILD / 'results.md'}")
    return 0 if total["killed"] >= NEEDED * total.total() and not total["broken"] else 1


if __name__ == "__main__":
    sys.exit(main())
