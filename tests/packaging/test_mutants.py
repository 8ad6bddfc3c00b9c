"""The mutants of `make mutants` still fit the library, so that its tests go on being tested."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.run import ROOT, Mutant, read

MUTANTS = read()
# Groups in which every module has at least so many.
FOUR_EACH = ("denoisers", "encoding", "generation", "routing", "training")


@pytest.mark.parametrize("group", sorted({mutant.group for mutant in MUTANTS}))
def test_what_a_mutant_replaces_stands_once_in_its_file(group):
    for mutant in MUTANTS:
        if mutant.group == group:
            compile(mutant.mutated(), mutant.file, "exec")


def test_a_mutant_that_no_longer_fits_is_named():
    gone = Mutant("gone", "python/keylock_diffusers/__init__.py", "no such text", "", ())
    with pytest.raises(ValueError, match=r"mutant 'gone' .*'no such text' must stand once in .*__init__.py, found 0"):
        gone.mutated()


def test_mutants_have_names_of_their_own_and_tests_that_exist():
    assert not [name for name, count in Counter((m.group, m.name) for m in MUTANTS).items() if count > 1]
    absent = {test for m in MUTANTS for test in m.tests if not (ROOT / test.partition("::")[0]).is_file()}
    assert not absent


def test_every_module_with_mutants_has_at_least_four():
    counts = Counter(mutant.file for mutant in MUTANTS if mutant.group in FOUR_EACH)
    assert not {Path(file).name: count for file, count in counts.items() if count < 4}
