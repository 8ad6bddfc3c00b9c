"""Benchmarks run by their one command, and give no number to what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# pytest-benchmark measures nothing in a worker of pytest-xdist, which this may be itself.
QUICK = {**{name: value for name, value in os.environ.items() if "XDIST" not in name}, "KEYLOCK_BENCH_QUICK": "1"}

torch = pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

from benchmarks import harness, report, targets  # noqa: E402
from benchmarks.memory import peak_bytes  # noqa: E402

SETS = [torch.arange(4.0) + seed for seed in range(2)]
MACHINE = {"environment": {"device": "Some CPU @ 2 GHz", "threads": 1}, "rates": {"copy_bytes_per_second": 1e9}}


def judge(inputs):
    expected = 2 * inputs

    def accept(actual):
        if not torch.equal(actual, expected):
            raise AssertionError("not twice its input")

    return accept


def raises(inputs):
    raise RuntimeError("no such device\nand more")


def line_up(*contestants):
    right = harness.Contestant("right", "library", lambda inputs: inputs + inputs)
    floor = harness.Contestant("floor", "floor", lambda inputs: inputs)
    return harness.Case("double/4", SETS, [right, *contestants, floor], judge, moved_bytes=32, flops=4)


def run(case):
    recorded = []
    result = harness.compare(case, lambda c, seconds: recorded.append(c.name), min_rounds=2, max_time=0)
    return result, recorded


def test_what_is_wrong_gets_no_number():
    # Right on the first input set and wrong on the second.
    wrong = harness.Contestant("wrong", "peer", lambda inputs: inputs + inputs * (inputs[0] == 0))
    result, recorded = run(line_up(wrong, harness.Contestant("broken", "peer", raises)))
    rows = {row["contestant"]: row for row in result["rows"]}
    assert rows["wrong"]["seconds"] is None and rows["wrong"]["refused"] == "wrong: AssertionError: not twice its input"
    assert rows["broken"]["seconds"] is None
    assert rows["broken"]["refused"] == "does not run: RuntimeError: no such device"
    assert set(recorded) == {"right", "floor"}
    text = "\n".join(report.table([result], MACHINE))
    assert "wrong (peer)   no number: wrong: AssertionError" in text
    assert not harness.broken_backends(result)


def test_a_wrong_backend_of_the_library_is_named():
    wrong = harness.Contestant("native", "library", lambda inputs: inputs)
    result, _ = run(line_up(wrong))
    assert harness.broken_backends(result) == ["native: wrong: AssertionError: not twice its input"]


def test_what_a_feature_adds_is_the_median_difference_within_rounds():
    seconds = {"with": [5.0, 9.0, 3.0], "without": [4.0, 5.0, 1.0], "their with": [8.0, 8.0, 8.0], "theirs": [4.0] * 3}
    addition = harness.Addition("a thing", ("with", "without"), ("their with", "theirs"))
    added = harness._added(addition, seconds)
    assert added == {"name": "a thing", "seconds": 2.0, "peer_seconds": 4.0, "ratio": 1.25}
    absent = harness._added(harness.Addition("b", ("with", "none"), ("their with", "theirs")), seconds)
    assert absent["seconds"] is None and absent["ratio"] is None
    case = harness.Case("double/4", SETS, line_up().contestants, judge, facts={"MB": 1.5})
    result = {**run(case)[0], "additions": [added, absent]}
    lines = report.table([result], MACHINE)
    assert "double/4: a thing add 2.00 s (1.250x), 0.500 of the 4.00 s they add to the peer" in lines
    assert "double/4: MB 1.5" in lines and not any(" b add " in line for line in lines)


def test_rounds_alternate():
    _, recorded = run(line_up())
    assert recorded == ["right", "floor", "floor", "right"]


def test_where_rounds_are_counted_the_judged_call_is_the_first_and_none_warms_up():
    calls = []

    def twice(inputs):
        calls.append(inputs)
        return inputs + inputs

    contestant = harness.Contestant("counted", "peer", twice)
    for rounds in (1, 3):
        calls.clear()
        result, recorded = run(dataclasses.replace(line_up(contestant), rounds=rounds))
        assert len(calls) == rounds * len(SETS) and result["rounds"] == recorded.count("counted") == rounds
        assert all(row["seconds"] > 0 for row in result["rows"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_the_peak_of_a_call_is_what_it_took_and_gave_back():
    size = 64 << 20

    def call(size=size):
        for _ in range(2):
            touched = torch.ones(size, dtype=torch.uint8).numel()
        return touched

    peak_bytes(lambda: call(4 * size))  # what was there before does not count
    result, peak = peak_bytes(call)
    assert result == size and 0.9 * size <= peak <= 1.5 * size


def test_on_a_gpu_few_rounds_time_the_host(monkeypatch):
    class Clock:
        captured, hosted = True, 0

        def __init__(self, run, arguments, graph):
            pass

        def round(self):
            return 1e-3

        def host_round(self):
            Clock.hosted += 1
            return 1e-4

    monkeypatch.setattr(harness, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(harness, "Clock", Clock)
    case = line_up()
    result = harness.compare(case, lambda c, seconds: None, min_rounds=50, max_time=0)
    assert result["rounds"] == 50 and Clock.hosted == len(case.contestants) * harness.HOST_ROUNDS
    assert all(row["host_seconds"] == 1e-4 / len(SETS) for row in result["rows"])


def test_every_target_is_a_case_there_is():
    """On a GPU; a CPU has fewer."""
    code = (
        "import sys, torch, pytest; torch.cuda.is_available = lambda: True\n"
        "sys.exit(pytest.main(['benchmarks', '-q', '--collect-only', '--targets', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) == sum(map(len, targets.TARGETS.values())), done.stdout + done.stderr


def test_compiled_contestants_can_be_left_out(monkeypatch):
    monkeypatch.setattr(harness, "COMPILE", False)
    assert harness.compiled("x", lambda inputs: inputs) == []


def test_the_tables_ratios_are_to_the_strongest_peer_and_the_floor():
    def row(name, kind, seconds):
        return {"contestant": name, "kind": kind, "seconds": seconds, "host_seconds": None, "refused": None}

    rows = [
        row("native", "library", 2e-3),
        row("native, again", "again", 2.2e-3),
        row("slow", "peer", 8e-3),
        row("strong", "peer", 4e-3),
        row("least", "floor", 1e-3),
    ]
    result = {"case": "op", "bytes": 2_000_000, "flops": None, "input_sets": 2, "rounds": 3, "rows": rows}
    lines = report.table([result], MACHINE)
    found = {line.split("  ")[1]: line.split() for line in lines if line.startswith("  ")}
    assert found["native"] == ["native", "2.00", "ms", "0.50", "2.00", "1.0"]
    assert found["strong (peer)"][-2:] == ["strongest", "peer"]
    assert any(line == "op, 2.0 MB, counted floor 2.00 ms, 2 input sets, 3 rounds, noise 10%" for line in lines)


def test_data_of_one_environment_is_kept_together(tmp_path):
    result, _ = run(line_up())
    path = report.write(result, MACHINE, tmp_path)
    assert path.name == "cpu-some-cpu-2-ghz.json"
    report.write({**result, "case": "double/8"}, MACHINE, tmp_path)
    written = json.loads(path.read_text())
    assert list(written["cases"]) == ["double/4", "double/8"] and written["environment"] == MACHINE["environment"]
    more_threads = {**MACHINE, "environment": {**MACHINE["environment"], "threads": 2}}
    report.write(result, more_threads, tmp_path)
    assert list(json.loads(path.read_text())["cases"]) == ["double/4"]


def test_the_command_prints_one_table_and_writes_nothing():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    before = sorted((ROOT / "benchmarks").rglob("*.json"))
    done = subprocess.run(
        [*command, "-k", "test_rank_one_update", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"],
        cwd=ROOT,
        env=QUICK,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank_one_update/sd1.5-320/B2/float32" in done.stdout and "strongest peer" in done.stdout
    assert "no number" not in done.stdout
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == before


def test_they_run_on_a_machine_without_diffusers():
    blocked = ("diffusers", "transformers", "accelerate", "peft", "importlib_metadata")
    options = ["benchmarks", "-q", "-rs", "-p", "no:cacheprovider", "--benchmark-disable"]
    code = f"import sys, pytest; sys.modules.update(dict.fromkeys({blocked})); sys.exit(pytest.main({options}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=QUICK,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "could not import 'diffusers'" in done.stdout


@pytest.mark.long
def test_they_run_with_diffusers():
    """Each contestant once, a small shape each, of those that need a pipeline or a U-Net."""
    pytest.importorskip("diffusers")
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "generation or layer or lora or training"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, env=QUICK, text=True, capture_output=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_localization_table_holds_every_number_that_was_kept():
    pytest.importorskip("diffusers")
    from benchmarks import localization

    measured = json.loads(localization.NUMBERS.read_text())
    assert set(localization.PARTS) <= set(measured) and set(localization.PARTS) == set(measured["measured"])
    page = localization.PAGE.read_text()
    assert localization.table(measured) in page, "run python -m benchmarks.localization"


def test_peak_memory_counts_what_lives_at_once():
    pytest.importorskip("diffusers")
    from benchmarks.localization_cost import peak_bytes

    def step():
        first = torch.ones(1 << 18)  # 1 MiB each
        second = first + 1
        del first
        assert (second + 1).sum() > 0

    assert 2 << 20 <= peak_bytes(step) < 3 << 20


def test_a_maps_best_overlap_is_found():
    pytest.importorskip("diffusers")
    from benchmarks.localization_pictures import best_overlap

    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    assert best_overlap(mask * 0.3 + 0.1, mask) == (1.0, 0.5)
    assert best_overlap(torch.rand(8, 8).masked_fill(mask, 0.0), mask)[0] == 0.5


def test_concepts_of_the_localization_are_taught_and_judged(monkeypatch):
    """With one step of everything; what it shows is for the page."""
    pytest.importorskip("diffusers")
    from benchmarks import localization
    from benchmarks import localization_pictures as pictures
    from keylock_diffusers.embedded import render

    if not render.FONT.exists():
        pytest.skip("the package fonts-noto-color-emoji is not installed")
    short = dataclasses.replace(pictures.story.PERFUSION_TRAINING, steps=1, batch_size=1)
    monkeypatch.setattr(pictures.story, "PERFUSION_TRAINING", short)
    monkeypatch.setattr(pictures, "STEPS", 1)
    captions = pictures.default_captions
    monkeypatch.setattr(pictures, "default_captions", lambda count: captions(40))
    measured = localization.PARTS["localization loss"]()
    rows = localization.table({"localization loss": measured}).splitlines()
    assert len(rows) == 2 + len(measured) == 5 and all("%" in line for line in rows[2:])
