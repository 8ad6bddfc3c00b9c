"""A short form of the hostile cases, the same every time; `make fuzz` is the long one (tests/hostile/run.py)."""

import importlib
import json
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hostile import guard, run

# Cases of each kind: at least as many folders, files and calls as a person tried by hand.
SHORT = {
    "concept_files": 400,
    "pictures": 400,
    "requests": 100,
    "request_files": 110,
    "picture_folders": 50,
    "calls": 150,
}
SECONDS, MORE_BYTES = 120, 4 << 30  # a case that needs either has run away


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", SHORT)
def test_hostile_cases_are_right_or_refused_by_name(kind, tmp_path_factory):
    module = importlib.import_module(f"tests.hostile.{kind}")

    @settings(
        max_examples=SHORT[kind],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )
    @given(st.randoms(use_true_random=False))
    def hold(rng):
        case, place = module.make(rng), tmp_path_factory.mktemp(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of pictures that are odd
            with guard.watched(place) as escapes, guard.bounded(SECONDS, MORE_BYTES):
                module.check(case, place)
        assert not escapes, f"{case}: left its folder: {escapes}"

    hold()


def test_the_guard_hears_of_what_leaves_the_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("")
    inside = tmp_path / "inside"
    inside.mkdir()
    with guard.watched(inside) as escapes:
        (inside / "file").write_text("")
        assert not escapes
        outside.read_text()
        (inside / "link").symlink_to(outside)
        (inside / "link").read_text()
    assert [one.split()[0] for one in escapes] == ["open", "open"]


def test_the_guard_bounds_time_and_memory():
    with pytest.raises(guard.Hang), guard.bounded(0.05, 1 << 30):
        while True:
            pass
    with pytest.raises(MemoryError), guard.bounded(60, 1 << 28):
        bytearray(1 << 30)
    bytearray(1 << 30)


def test_the_pages_table_is_of_the_committed_figures():
    page = run.PAGE.read_text().partition(run._START)[2].partition(run._END)[0]
    measured = json.loads(run.NUMBERS.read_text())
    assert page.strip() == run.table(measured)
    assert {kind: found["cases"] for kind, found in measured.items()} == {
        kind: importlib.import_module(f"tests.hostile.{kind}").LONG for kind in run.KINDS
    }


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", run.PAGE.read_text()))
    texts = {path.name: path.read_text() for path in (run.ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 30
    assert not [name for file, name in sorted(named) if f"def {name}(" not in texts.get(file, "")]
