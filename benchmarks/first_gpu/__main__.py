"""``python -m benchmarks.first_gpu [--stub] [STEP ...]``: the first run on a GPU, or a rehearsal without one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.first_gpu import runner, steps


def main() -> int:
    listed = "; ".join(f"{part}: {', '.join(step.name for step in of)}" for part, of in steps.PARTS.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu", description=f"{__doc__} {listed}")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="steps or parts; without any, all of them")
    parser.add_argument("--stub", action="store_true", help="without a GPU, over a driver that launches nothing")
    default = Path(os.environ.get("OUT") or runner.ROOT / "build" / "first-gpu")
    parser.add_argument("--results", type=Path, default=default, help="folder of what comes of it; default %(default)s")
    arguments = parser.parse_args()
    try:
        wanted = steps.chosen(arguments.steps)
    except ValueError as error:
        parser.error(str(error))
    if not arguments.stub and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; make first-gpu STUB=1 rehearses what can be done without one")
    built = any((runner.ROOT / "keylock_kernels").glob("_native*.so"))
    if not (built or arguments.stub or steps.STEPS["build"] in wanted or os.environ.get("KEYLOCK_BUILD_CUDA") == "0"):
        wanted.insert(0, steps.STEPS["build"])
    capability = None if arguments.stub else torch.cuda.get_device_capability()
    environ = runner.environment(os.environ, arguments.results.resolve(), capability)
    results = list(runner.run_all(wanted, arguments.results, environ, arguments.stub))
    print(f"\n{table(results)}\n{arguments.results}: {runner.RESULTS}, {runner.LOG}")
    return 1 if any(result.outcome not in ("ok", "skipped") for result in results) else 0


def table(results: list[runner.Result]) -> str:
    rows = [f"{'step':10} {'outcome':12} {'s':>6} {'limit':>6}"]
    rows += [f"{r.step:10} {r.outcome:12} {r.seconds:6.1f} {r.limit:6}  {r.why}".rstrip() for r in results]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
