"""Collects bench_*.py, gives benchmarks the fixture `compare`, and prints one table at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness, report, targets

RESULTS = pytest.StashKey[list[dict[str, Any]]]()
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    written = "write results to benchmarks/data/<device>.json, and into the folder that $OUT names, if it does"
    parser.addoption("--write-data", action="store_true", help=written)
    parser.addoption("--targets", action="store_true", help="only the cases that docs/performance.md has targets for")
    parser.addoption("--no-compiled", action="store_true", help="leave out contestants that torch.compile makes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    # Rounds in turn are timed here; the plugin is given the results.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    config.stash[RESULTS] = []
    if config.getoption("no_compiled"):
        harness.COMPILE = False
    # pytest-benchmark's own table, one per case, is still there with --benchmark-verbose.
    config.option.benchmark_quiet = True
    if config.getoption("write_data") and harness.QUICK:
        raise pytest.UsageError("--write-data: numbers of KEYLOCK_BENCH_QUICK=1 are not worth keeping")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """SHARD=2/4 in the environment keeps the second of every four, so that slow cases spread over the shards."""
    part, _, parts = os.environ.get("SHARD", "1/1").partition("/")
    wanted = [item for item in items if targets.has(item)] if config.getoption("targets") else items
    kept = wanted[int(part) - 1 :: int(parts)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _machine(config: pytest.Config) -> dict[str, Any]:
    if MACHINE not in config.stash:
        config.stash[MACHINE] = {"environment": report.environment(), "rates": report.rates()}
    return config.stash[MACHINE]


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """Runs a case; fails where one of the library's own backends does not pass the gate."""

    def run(case: harness.Case) -> None:
        if not benchmark.enabled:
            benchmark(lambda: None)
            refused = harness.gate(case)[1]
            assert not [c.name for c in case.contestants if c.kind == "library" and c.name in refused], refused
            return
        machine = _machine(request.config)
        result = harness.compare(
            case,
            _recorder(benchmark, case),
            min_rounds=int(request.config.getoption("benchmark_min_rounds")),
            max_time=float(request.config.getoption("benchmark_max_time")),
        )
        request.config.stash[RESULTS].append(result)
        if request.config.getoption("write_data"):
            path = report.write(result, machine)
            if os.environ.get("OUT"):
                shutil.copy2(path, os.environ["OUT"])
        broken = harness.broken_backends(result)
        if broken:
            pytest.fail(f"{case.name}: " + "; ".join(broken), pytrace=False)

    yield run
    if harness.COMPILE:  # where nothing was compiled, importing the compiler would take seconds
        # Compiled code of one case must not count towards torch's limit of recompilations in the next.
        torch.compiler.reset()


def _recorder(benchmark: Any, case: harness.Case) -> Callable[[harness.Contestant, float], None]:
    """Gives pytest-benchmark a line per contestant, so that its own JSON and comparisons work too."""
    lines: dict[str, Any] = {}

    def record(contestant: harness.Contestant, seconds: float) -> None:
        if contestant.name not in lines:
            benchmark.group, benchmark.name = case.name, contestant.name
            benchmark.fullname = f"{case.name}::{contestant.name}"
            benchmark.extra_info = {"kind": contestant.kind, "bytes": case.moved_bytes, "flops": case.flops}
            # Its public calls time one function from start to end; rounds in turn need the record alone.
            lines[contestant.name] = benchmark._make_stats(iterations=len(case.sets))
        lines[contestant.name].update(seconds)

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("benchmarks")
    for line in report.table(results, _machine(config)):
        terminalreporter.write_line(line)
