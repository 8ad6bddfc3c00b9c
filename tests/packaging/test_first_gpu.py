"""The first run on a GPU: its steps fit into calls of ten minutes, and one that fails stops no other."""

from __future__ import annotations

import json
import os
import sys

import pytest

pytest.importorskip("torch")

from benchmarks.first_gpu import __main__ as command  # noqa: E402
from benchmarks.first_gpu import runner, steps  # noqa: E402


def python(name, code, **more):
    return steps.Step(name, "", more.pop("limit", 60), (sys.executable, "-c", code), **more)


def outcomes(wanted, folder, stub=False):
    return [r.outcome for r in runner.run_all(wanted, folder, dict(os.environ), stub)]


@pytest.mark.parametrize("part", steps.PARTS)
def test_a_part_fits_into_one_call(part):
    assert sum(step.limit + steps.GRACE for step in steps.PARTS[part]) <= steps.CALL


def test_steps_and_parts_are_chosen_by_name():
    assert [step.name for step in steps.chosen(["host", "safe"])] == ["memcheck", "racecheck", "synccheck", "host"]
    assert steps.chosen([]) == list(steps.STEPS.values())
    with pytest.raises(ValueError, match="STEP must be of right, safe, fast, probe, .* got smok"):
        steps.chosen(["smok"])


def test_a_step_that_fails_or_takes_too_long_stops_no_other(tmp_path):
    wanted = [
        python("wrong", "print('no good'); raise SystemExit(3)"),
        python("slow", "import time; print('begun', flush=True); time.sleep(60)", limit=2),
        steps.Step("absent", "", 60, ("no-such-tool",)),
        python("right", "print('fine')"),
    ]
    assert outcomes(wanted, tmp_path) == ["failed", "out of time", "failed", "ok"]
    rows = [json.loads(line) for line in (tmp_path / runner.RESULTS).read_text().splitlines()]
    assert [row["step"] for row in rows] == ["wrong", "slow", "absent", "right"]
    assert rows[0]["exit"] == 3 and rows[0]["why"] == "no good" and rows[1]["tail"][0] == "begun"
    assert "no-such-tool" in rows[2]["why"] and rows[1]["seconds"] < 60
    log = (tmp_path / runner.LOG).read_text()
    assert all(text in log for text in ("no good", "begun", "fine", "== slow, at most 2 s"))


def test_what_came_of_a_step_is_written_before_the_next_begins(tmp_path):
    look = f"print(len(open({str(tmp_path / runner.RESULTS)!r}).readlines()))"
    assert outcomes([python("first", ""), python("second", look)], tmp_path) == ["ok", "ok"]
    assert json.loads((tmp_path / runner.RESULTS).read_text().splitlines()[1])["tail"] == ["1"]


def test_without_a_gpu_steps_that_need_one_are_skipped(tmp_path):
    assert outcomes([python("gpu", "raise SystemExit(1)")], tmp_path, stub=True) == ["skipped"]


def test_a_failed_build_leaves_the_cuda_kernels_out_of_the_rest(tmp_path):
    look = "import os; print(os.environ['KEYLOCK_BUILD_CUDA'], os.environ['KEYLOCK_BUILD_NATIVE'])"
    assert outcomes([python("build", "raise SystemExit(1)"), python("after", look)], tmp_path) == ["failed", "ok"]
    assert json.loads((tmp_path / runner.RESULTS).read_text().splitlines()[1])["tail"] == ["0 0"]


def test_the_environment_builds_for_the_gpu_that_is_there(tmp_path):
    found = runner.environment({"PYTHONPATH": "more"}, tmp_path, (9, 0))
    assert found["CUDAARCHS"] == "90-real" and found["KEYLOCK_BUILD_CUDA"] == "1" and found["OUT"] == str(tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep) == [".", "python", "more"]
    assert runner.environment({"CUDAARCHS": "80-real"}, tmp_path, (9, 0))["CUDAARCHS"] == "80-real"


def test_without_a_gpu_or_its_stand_in_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first_gpu"])
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="STUB=1"):
        command.main()
