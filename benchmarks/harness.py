"""Times contestants side by side, each only after it has shown that it computes the right thing."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from keylock_kernels.backend import IMPLEMENTATIONS
from keylock_kernels.testing import assert_as_accurate_as_eager, cast

QUICK = os.environ.get("KEYLOCK_BENCH_QUICK") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_SETS = 32
MAX_ROUNDS = 1000
HOST_ROUNDS = 20  # of the same, for how long a call keeps Python busy
COMPILE = not QUICK  # whether compiled contestants take part; compiling takes seconds. conftest.py has an option

Judge = Callable[[Any], Callable[[Any], None]]  # of an input set: raises AssertionError for a wrong result


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Args:
        name: what the table calls it.
        kind: "library", "again" (a library's backend a second time), "peer", or "floor", which does less than is asked.
        run: what is timed, on what ``prepare`` returned.
        prepare: makes its arguments of an input set, untimed; default the input set itself.
    """

    name: str
    kind: Literal["library", "again", "peer", "floor"]
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda inputs: inputs


@dataclass(frozen=True)
class Addition:
    """What a feature adds to the time of a call, ours beside a peer's; differences within each round, then medians.

    Args:
        name: what the table calls the feature.
        ours: the names of the contestants with and without it.
        theirs: the same of the peer.
    """

    name: str
    ours: tuple[str, str]
    theirs: tuple[str, str]


@dataclass(frozen=True)
class Case:
    """One line-up on one problem.

    Args:
        name: unique, parts divided by slashes.
        sets: input sets of the same shapes, taken in turn so that caches are cold.
        contestants: who is compared.
        judge: see Judge; not asked about floors.
        moved_bytes: the least that has to be moved, counted.
        flops: what has to be computed, counted.
        graph: on a GPU, time the replay of a captured graph.
        additions: what features add, where contestants differ by one.
        facts: numbers that are counted rather than timed.
        rounds: of each contestant, where one takes minutes: the calls that are judged are then the first of them, and
            nothing is run to warm up; default as many as fit into the time.
    """

    name: str
    sets: Sequence[Any]
    contestants: Sequence[Contestant]
    judge: Judge
    moved_bytes: int | None = None
    flops: int | None = None
    graph: bool = True
    additions: Sequence[Addition] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    rounds: int | None = None


def dtypes() -> list[torch.dtype]:
    """float32, and bfloat16 where the processor computes in it rather than emulating it."""
    native = DEVICE.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return [torch.float32, torch.bfloat16] if native and not QUICK else [torch.float32]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_sets(make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:  # of a seed
    """As many input sets as fill the last cache twice, at least 2."""
    sets = [make(0)]
    size = sum(t.numel() * t.element_size() for t in sets[0].values() if isinstance(t, Tensor))
    count = 2 if QUICK else min(MAX_SETS, max(2, math.ceil(2 * _cache_bytes() / size)))
    return sets + [make(seed) for seed in range(1, count)]


def _cache_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(DEVICE).L2_cache_size
    try:
        found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else 32 << 20


def library(op: str, call: Callable[..., Any]) -> list[Contestant]:
    """Every backend of an op that runs here, and the one that "auto" would take a second time."""

    def contestant(backend: str) -> Contestant:
        return Contestant(backend, "library", lambda inputs: call(**inputs, backend=backend))

    able = [i.backend for i in IMPLEMENTATIONS if i.op == op and i.refusal(DEVICE.type) is None]
    found = [contestant(backend) for backend in able]
    return [*found, replace(found[0], name=f"{found[0].name}, again", kind="again")]


def compiled(name: str, function: Callable[[Any], Any], **more: Any) -> list[Contestant]:
    """``torch.compile`` of a function, if compiled contestants take part.

    With fullgraph, so that what torch cannot compile says so instead of running as it is.
    """
    if not COMPILE:
        return []
    return [Contestant(name, "peer", torch.compile(function, dynamic=False, fullgraph=True), **more)]


def _listed(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def judge_of(call: Callable[..., Any]) -> Judge:
    """At most twice the error that eager makes in the same dtype against float64, plus one rounding."""

    def judge(inputs: dict[str, Any]) -> Callable[[Tensor], None]:
        exact = _listed(call(**cast(inputs, torch.float64), backend="eager"))
        eager = _listed(call(**inputs, backend="eager"))

        def accept(actual: Any) -> None:
            for found, near, true in zip(_listed(actual), eager, exact, strict=True):
                assert_as_accurate_as_eager(found, near, true)

        return accept

    return judge


def gate(case: Case, seconds: dict[str, float] | None = None) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Prepared arguments of the contestants that pass on every input set, and why the others do not.

    Into `seconds` go those of each contestant's calls.
    """
    prepared: dict[str, list[Any]] = {c.name: [] for c in case.contestants}
    refused: dict[str, str] = {}
    for inputs in case.sets:
        accept = case.judge(inputs)
        for c in case.contestants:
            if c.name in refused:
                continue
            try:
                arguments = c.prepare(inputs)
                start = time.perf_counter()
                result = c.run(arguments)
                if seconds is not None:
                    if DEVICE.type == "cuda":
                        torch.cuda.synchronize()
                    seconds[c.name] = seconds.get(c.name, 0.0) + time.perf_counter() - start
            except Exception as error:  # a peer that does not run here says so in the table
                refused[c.name] = f"does not run: {_first_line(error)}"
                continue
            prepared[c.name].append(arguments)
            try:
                if c.kind != "floor":
                    accept(result)
            except AssertionError as error:
                refused[c.name] = f"wrong: {_first_line(error)}"
    return {name: arguments for name, arguments in prepared.items() if name not in refused}, refused


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


class Clock:
    """Times one contestant, a call on each of its input sets per round."""

    def __init__(self, run: Callable[[Any], Any], arguments: Sequence[Any], graph: bool) -> None:
        self._run, self._arguments, self._graph = run, arguments, None
        self.captured = False
        if DEVICE.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if graph:
                self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first use may allocate or tune, which a capture forbids
            self._calls()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._calls()
        except Exception:  # what cannot be captured is timed call by call, and the table says so
            torch.cuda.synchronize()
            return
        self._graph, self.captured = graph, True

    def _calls(self) -> None:
        for arguments in self._arguments:
            self._run(arguments)

    def round(self) -> float:
        """Seconds of one round: of the device on a GPU, else of the process."""
        if DEVICE.type != "cuda":
            return self.host_round()
        torch.cuda.synchronize()
        self._events[0].record()
        if self._graph is None:
            self._calls()
        else:
            self._graph.replay()
        self._events[1].record()
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3

    def host_round(self) -> float:
        """Seconds until the calls of one round have returned, whatever the device still does."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._calls()
        return time.perf_counter() - start


@torch.no_grad()
def compare(
    case: Case, record: Callable[[Contestant, float], None], *, min_rounds: int, max_time: float
) -> dict[str, Any]:
    """Times the contestants that pass the gate, a round of each in turn, every other time in reverse.

    Args:
        case: what to compare.
        record: told the seconds of each round.
        min_rounds: of each contestant.
        max_time: seconds to spend on each contestant, on average.

    Returns:
        What the table and the data file hold of the case; seconds are medians per call.
    """
    judged: dict[str, float] = {}
    prepared, refused = gate(case, judged if case.rounds else None)
    timed = [c for c in case.contestants if c.name not in refused]
    clocks = {c.name: Clock(c.run, prepared[c.name], case.graph) for c in timed}
    rounds = case.rounds or _rounds(list(clocks.values()), min_rounds, max_time)
    seconds: dict[str, list[float]] = {c.name: [] for c in timed}
    host: dict[str, list[float]] = {c.name: [] for c in timed}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for c in reversed(timed) if number % 2 else timed:
                taken = judged[c.name] if case.rounds and number == 0 else clocks[c.name].round()
                record(c, taken)
                seconds[c.name].append(taken / len(case.sets))
                if DEVICE.type == "cuda" and number < HOST_ROUNDS:
                    host[c.name].append(clocks[c.name].host_round() / len(case.sets))
    finally:
        gc.enable()
    rows = [
        {
            "contestant": c.name,
            "kind": c.kind,
            "refused": refused.get(c.name),
            "seconds": statistics.median(seconds[c.name]) if c.name in seconds else None,
            "quartiles": _quartiles(seconds.get(c.name, [])),
            "host_seconds": statistics.median(host[c.name]) if host.get(c.name) else None,
            "graph": c.name in clocks and clocks[c.name].captured,
        }
        for c in case.contestants
    ]
    return {
        "case": case.name,
        "bytes": case.moved_bytes,
        "flops": case.flops,
        "input_sets": len(case.sets),
        "rounds": rounds,
        "rows": rows,
        "additions": [_added(addition, seconds) for addition in case.additions],
        "facts": dict(case.facts),
    }


def _rounds(clocks: Sequence[Clock], least: int, max_time: float) -> int:
    """How many of each fit into seconds for each, on average."""
    for clock in clocks:
        clock.round()  # a first one may be slower
    once = sum(clock.round() for clock in clocks)
    return min(MAX_ROUNDS, max(least, math.ceil(max_time * len(clocks) / max(once, 1e-9))))


def _added(addition: Addition, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Seconds that a feature adds to ours and to the peer's call, and our time with it over that without."""

    def difference(names: tuple[str, str]) -> float | None:
        if not set(names) <= set(seconds):
            return None
        return statistics.median(a - b for a, b in zip(*(seconds[name] for name in names), strict=True))

    with_it, without = addition.ours
    timed = {with_it, without} <= set(seconds)
    ratio = statistics.median(seconds[with_it]) / statistics.median(seconds[without]) if timed else None
    return {
        "name": addition.name,
        "seconds": difference(addition.ours),
        "peer_seconds": difference(addition.theirs),
        "ratio": ratio,
    }


def _quartiles(values: list[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def broken_backends(result: dict[str, Any]) -> list[str]:
    """The library's own backends that did not pass the gate, with the reason."""
    own = [row for row in result["rows"] if row["kind"] == "library" and row["refused"]]
    return [f"{row['contestant']}: {row['refused']}" for row in own]
