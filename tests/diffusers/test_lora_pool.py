"""Pools of adapters: a range is its adapter's while it is held, bounds are kept, and nobody waits in vain."""

import random
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_diffusers.loras import AdapterPool, LowRank, tables
from keylock_diffusers.loras.ranges import FIXED, Range, place
from keylock_kernels import low_rank_linear

WEIGHTS = {"to_q": (6, 4), "conv": (5, 3, 2, 2), "pixel": (3, 4, 1, 1)}
CPU = torch.device("cpu")
ROW_BYTES = 4 * (6 + 4 + 5 + 12 + 3 + 4)


def update(name, rank, fill=None, dtype=torch.float32):
    """Of a module; random unless every number is to be one."""
    outer, *inner = WEIGHTS[name]
    inner = inner[:1] if name == "pixel" else inner
    if fill is None:
        return LowRank(torch.randn(rank, *inner, dtype=dtype), torch.randn(outer, rank, dtype=dtype))
    return LowRank(torch.full((rank, *inner), fill, dtype=dtype), torch.full((outer, rank), fill, dtype=dtype))


def adapter(rank=2, fill=None, **ranks):
    return {name: update(name, ranks.get(name, rank), fill) for name in WEIGHTS if ranks.get(name, rank)}


def pool_of(rows=None, max_bytes=None, dtype=torch.float32):
    return AdapterPool(WEIGHTS, CPU, dtype, rows=rows, max_bytes=max_bytes)


def check(held, adapters):
    """Every adapter's rows are its factors, and zeros beyond."""
    for first, one in zip(held.first, adapters, strict=True):
        rows = max((u.rank for u in one.values()), default=0)
        for name in WEIGHTS:
            found = held.tables(name)
            if found is None:
                assert name not in one
                continue
            rank = one[name].rank if name in one else 0
            for table, factor in zip(found, (one[name].up.T, one[name].down) if rank else (None, None), strict=True):
                assert not rank or torch.equal(table[first : first + rank], factor.to(table.dtype))
                assert not table[first + rank : first + rows].any()


def taken(held, adapters):
    ranges = [
        range(first, first + max(u.rank for u in one.values())) for first, one in zip(held.first, adapters, strict=True)
    ]
    return sorted({row for rows in ranges for row in rows}), sum(map(len, ranges))


@pytest.mark.parametrize("rows", [None, 16])
def test_every_range_is_its_adapters_and_zeros_beyond(rows):
    pool = pool_of(rows)
    adapters = [adapter(2), adapter(4, to_q=1), adapter(3, conv=0), adapter(1, pixel=5)]
    with pool.hold(adapters) as held:
        check(held, adapters)
        found, count = taken(held, adapters)
        assert len(found) == count == 2 + 4 + 3 + 5  # no row is two adapters'
        with pytest.raises(ValueError, match="no room"):
            pool_of(13).hold(adapters)
    assert pool.stats()[:2] == (4, 0)


def test_what_lay_in_the_rows_before_is_gone():
    pool = pool_of(4)
    pool.hold([adapter(4, fill=9.0)]).release()
    less = adapter(4, to_q=1, conv=0, fill=1.0)
    with pool.hold([less]) as held:
        check(held, [less])
        assert not held.tables("conv")[0].any() and not held.tables("conv")[1].any()


def test_the_tables_are_those_that_the_op_reads():
    pool, (one, two) = pool_of(), (adapter(2), adapter(3))
    with pool.hold([one, two]) as held:
        up, down = held.tables("to_q")
        x, weight = torch.randn(2, 5, 4), torch.randn(6, 4)
        # Slots 0 and 2 are the adapters in the order of their rows, and 1 what lies between.
        order = sorted(range(2), key=held.first.__getitem__)
        ends = [bound for n in order for bound in (held.first[n], held.first[n] + (2, 3)[n])]
        offsets, slots = torch.tensor(ends, dtype=torch.int32), torch.tensor([[0], [0]], dtype=torch.int32)
        slots[order[1]] = 2
        y = low_rank_linear(x, weight, up, down, offsets, slots)
    for row, update_ in enumerate((one["to_q"], two["to_q"])):
        expected = x[row].double() @ (weight + update_.up @ update_.down).double().T
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_told_apart_by_identity():
    pool, one = pool_of(), adapter()
    same = dict(one)
    with pool.hold([one, same, one]) as held:
        assert held.first[0] == held.first[2] != held.first[1]
    assert pool.stats()[4:6] == (0, 2)
    pool.hold([one]).release()
    assert pool.stats()[4:6] == (1, 2)


def test_an_adapter_that_is_resident_is_not_freed_and_its_id_not_another_ones():
    pool = pool_of(8)
    for fill in range(50):
        one = adapter(2, fill=float(fill))
        with pool.hold([one]) as held:
            check(held, [one])
        del one  # Python gives the next dict the same id, if this one may go
    assert pool.stats().misses == 50


def test_an_adapter_of_words_alone_takes_no_row():
    pool = pool_of(2)
    full = adapter(2)
    with pool.hold([full, {}]) as held:
        assert held.first == (0, 0)
        check(held, [full, {}])
    with pool_of().hold([{}]) as held:
        assert held.first == (0,) and held.tables("to_q") is None


def test_modules_nobody_changes_have_no_tables_until_one_comes():
    pool = pool_of()
    attention = adapter(2, conv=0, pixel=0)
    held = pool.hold([attention])
    assert held.tables("conv") is None and held.tables("nowhere") is None
    assert pool.stats().bytes == 2 * 4 * (6 + 4)
    with pool.hold([adapter(2)]) as second:
        assert second.tables("conv") is not None
    held.release()
    assert all(t is not None for name in WEIGHTS if (t := pool_of(1).hold([]).tables(name)))


def test_growing_leaves_a_held_batch_its_tables():
    pool, first = pool_of(), adapter(2)
    held = pool.hold([first])
    before = held.tables("to_q")
    pointers = [table.data_ptr() for table in before]
    others = [adapter(3) for _ in range(4)]
    with pool.hold([first, *others]) as more:
        check(more, [first, *others])
        assert more.first[0] == held.first[0]
        check(held, [first])
        assert [table.data_ptr() for table in held.tables("to_q")] == pointers
        assert more.tables("to_q")[0].data_ptr() != pointers[0]
        assert pool.stats().bytes == (2 + pool.stats().rows) * ROW_BYTES
    held.release()
    assert pool.stats().bytes == pool.stats().rows * ROW_BYTES
    assert pool.stats()[4:6] == (1, 5)


def test_tables_of_given_rows_never_move():
    pool = pool_of(8)
    with pool.hold([]) as held:
        before = {name: held.tables(name) for name in WEIGHTS}
    for _ in range(6):
        pool.hold([adapter(3), adapter(4)]).release()
    with pool.hold([adapter(8)]) as held:
        for name, pair in before.items():
            assert all(a is b for a, b in zip(held.tables(name), pair, strict=True))
    assert all(torch.isfinite(t).all() for pair in before.values() for t in pair)


def test_the_least_recently_used_goes_first():
    pool = pool_of(6)
    one, two, three = (adapter(2, fill=float(n)) for n in (1, 2, 3))
    for name in (one, two, three, one):
        pool.hold([name]).release()
    pool.hold([adapter(2)]).release()  # in the place of two
    assert pool.stats()[4:] == (1, 4, 1)
    pool.hold([one, three]).release()
    assert pool.stats().hits == 3
    pool.hold([two]).release()
    assert pool.stats().misses == 5


def test_what_is_held_stays():
    pool, one = pool_of(4), adapter(2)
    held = pool.hold([one])
    for _ in range(5):
        pool.hold([adapter(2)]).release()
        check(held, [one])
    with pytest.raises(ValueError, match=r"no room for 1 adapters of 3 rows in 4 rows: 1 adapters of 2 rows are held"):
        pool.hold([adapter(3)])
    assert pool.stats().held == 1
    held.release()
    held.release()  # a second time is nothing
    assert pool.stats().held == 0
    with pytest.raises(RuntimeError, match="released already"):
        held.tables("to_q")
    pool.hold([adapter(4)]).release()


def test_pieces_are_no_obstacle_unless_others_hold_what_lies_between():
    pool = pool_of(12)
    small = [adapter(2) for _ in range(6)]
    pool.hold(small).release()
    kept = pool.hold([small[3]])  # in the middle: five rows at most on one side
    big = adapter(4)
    with pool.hold([big]) as held:
        check(held, [big])
        check(kept, [small[3]])
    # All rows: what is resident of the batch itself moves out of the way.
    kept.release()
    batch = [small[3], adapter(9)]
    with pool.hold(batch) as held:
        check(held, batch)
    batch = [adapter(6), adapter(3), adapter(3)]
    for one in batch:
        pool.hold([one]).release()
    with pool.hold(batch[::-1]) as held:
        check(held, batch[::-1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=8), st.randoms())
def test_whatever_is_resident_a_batch_that_fits_finds_its_place(batches, chance):
    pool, known = pool_of(max(map(sum, batches))), []
    for ranks in batches:
        batch = [adapter(rank) for rank in ranks]
        for number, rank in enumerate(ranks):
            same = [one for one in known if one["to_q"].rank == rank and all(one is not other for other in batch)]
            if same and chance.random() < 0.5:
                batch[number] = chance.choice(same)
        with pool.hold(batch) as held:
            check(held, batch)
            found, count = taken(held, batch)
            assert len(found) == count
        known += batch


@given(
    st.lists(st.integers(0, 6), max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(0, 3))),
)
def test_ranges_are_placed_over_nothing_that_must_stay(sizes, steps):
    ranges, end = [], 0
    for gap, size, used in steps:
        ranges.append(Range(end + gap, end + gap + size, used or FIXED))
        end += gap + size
    height = end + 3
    found = place(sizes, ranges, height)
    fixed = {row for one in ranges if one.used == FIXED for row in range(one.first, one.end)}
    if found is None:
        assert sum(sizes) > 0
        return
    rows = [row for first, size in zip(found, sizes, strict=True) for row in range(first, first + size)]
    assert len(set(rows)) == len(rows) and not fixed & set(rows) and all(0 <= row < height for row in rows)


def test_the_smallest_gap_is_taken_and_the_most_recently_used_spared():
    gaps = [Range(0, 2, FIXED), Range(6, 8, FIXED), Range(10, 12, FIXED)]
    assert place([2], gaps, 20) == [8]
    assert place([4, 2], gaps, 20) == [2, 8]
    assert place([5], gaps, 16) is None
    assert place([2], [Range(0, 2, 3), Range(2, 4, 1), Range(4, 6, 2)], 6) == [2]
    assert place([4], [Range(0, 2, 9), Range(2, 4, 1), Range(4, 6, 2)], 6) == [2]


def test_growing_keeps_the_bound_and_evicts_instead():
    pool = pool_of(max_bytes=8 * ROW_BYTES)
    for _ in range(20):
        one = adapter(3)
        with pool.hold([one]) as held:
            check(held, [one])
        assert pool.stats().bytes <= 8 * ROW_BYTES
    assert pool.stats().rows == 8 and pool.stats().evictions
    with pytest.raises(ValueError, match=f"no room for 3 adapters of 9 rows in {8 * ROW_BYTES} bytes: 0 adapters"):
        pool.hold([adapter(3), adapter(3), adapter(3)])
    pool.hold([adapter(4), adapter(4)]).release()


def test_tables_that_are_held_count_for_the_bound_until_they_are_released():
    pool, one = pool_of(max_bytes=8 * ROW_BYTES), adapter(4)
    held = pool.hold([one])  # of four rows
    other = adapter(4)
    with pytest.raises(ValueError, match="1 adapters of 4 rows are held"):
        pool.hold([one, other])  # eight beside the four
    assert pool.stats().bytes == 4 * ROW_BYTES
    with pool.hold([other]) as second:
        check(held, [one])
        check(second, [other])
        assert pool.stats().bytes == 8 * ROW_BYTES
        with pytest.raises(ValueError, match=f"and {4 * ROW_BYTES} bytes of older tables"):
            pool.hold([adapter(1)])
    held.release()
    with pool.hold([one, other]) as held:
        check(held, [one, other])
        assert pool.stats().bytes == 8 * ROW_BYTES


def test_a_bound_is_no_less_for_adapters_of_few_modules():
    small = 4 * (6 + 4)
    pool = pool_of(max_bytes=8 * small)
    few = [adapter(4, conv=0, pixel=0) for _ in range(2)]
    with pool.hold(few) as held:
        check(held, few)
    all_of_it = adapter(8 * small // ROW_BYTES)
    with pool.hold([all_of_it]) as held:  # for which other tables are made
        check(held, [all_of_it])
        assert pool.stats().bytes <= 8 * small
    with pool.hold(few) as held:
        check(held, few)


def test_factors_are_cast_and_what_the_dtype_cannot_hold_is_refused():
    pool, one = pool_of(4, dtype=torch.float16), adapter(2)
    with pool.hold([one]) as held:
        check(held, [one])
    large = adapter(2)
    large["conv"] = update("conv", 2, fill=1e6)
    for rows in (4, None):
        pool = pool_of(rows, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"conv holds 1e\+06, which torch.float16 cannot hold"):
            pool.hold([one, large])
        assert pool.stats()[:2] == (1, 0)
        with pool.hold([one]) as held:
            check(held, [one])
            assert all(torch.isfinite(t).all() for t in held.tables("conv"))


WRONG = {
    "another module": ({"to_k": update("to_q", 2)}, "to_k, which is no module of this model"),
    "another height": ({"to_q": update("conv", 2)}, r"to_q must have up \[6, r\] and down \['r', 4\], got \[5, 2\]"),
    "another width": ({"pixel": LowRank(torch.ones(2, 5), torch.ones(3, 2))}, r"pixel must have .* got .*\[2, 5\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_of_another_model_is_refused_before_anything_changes(case):
    wrong, message = WRONG[case]
    for rows in (None, 4):
        pool = pool_of(rows)
        before = pool.stats()
        with pytest.raises(ValueError, match=message):
            pool.hold([adapter(1), wrong])
        assert pool.stats() == before


def test_a_convolution_over_single_pixels_is_a_matrix_however_it_is_given():
    flat = update("pixel", 2)
    with pool_of().hold([{"pixel": LowRank(flat.down[:, :, None, None], flat.up)}]) as held:
        assert torch.equal(held.tables("pixel")[1][:2], flat.down)


def test_wrong_arguments_are_named():
    for shape in ((), (3,), (0, 4)):
        with pytest.raises(ValueError, match="weights of layer must be"):
            AdapterPool({"layer": shape}, CPU, torch.float32)
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype, got torch.int8"):
        pool_of(dtype=torch.int8)
    for name in ("rows", "max_bytes"):
        for wrong in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {wrong}"):
                pool_of(**{name: wrong})
    with pytest.raises(ValueError, match=f"rows = 8 take {8 * ROW_BYTES} bytes, more than max_bytes = 100"):
        pool_of(8, 100)


def test_a_forgotten_adapter_goes_at_once_or_with_its_last_holder():
    pool, one, two = pool_of(8), adapter(2), adapter(2)
    pool.forget(one)
    pool.hold([one]).release()
    pool.forget(one)
    assert pool.stats().resident == 0
    held, again = pool.hold([two]), pool.hold([two])
    pool.forget(two)
    held.release()
    check(again, [two])
    assert pool.stats().resident == 1
    again.release()
    assert pool.stats().resident == 0


def test_a_device_without_memory_for_larger_tables_leaves_a_pool_that_works(monkeypatch):
    pool, one = pool_of(), adapter(2)
    held = pool.hold([one])

    def full(*sizes, **_):
        if len(sizes) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return torch.empty(*sizes).zero_()

    with monkeypatch.context() as patch:
        patch.setattr(tables.torch, "zeros", full)
        with pytest.raises(torch.OutOfMemoryError):
            pool.hold([adapter(4)])
    check(held, [one])
    batch = [one, adapter(4)]
    with pool.hold(batch) as more:
        check(more, batch)
        check(held, [one])
    held.release()
    assert pool.stats().held == 0


def together(count, work):
    """Runs work(0), work(1), .. at once; raises what any of them raised."""
    barrier, wrong = threading.Barrier(count), []

    def run(number):
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


@pytest.fixture
def often(monkeypatch):
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("rows", "rooms"), [(24, None), (None, None), (None, 96)])
def test_eight_threads_never_see_a_row_of_somebody_else(often, rows, rooms):
    pool = pool_of(rows, None if rooms is None else rooms * ROW_BYTES)
    known = [adapter(1 + number % 3, fill=float(number + 1)) for number in range(12)]

    def generate(number):
        chance = random.Random(number)
        for _ in range(40):
            batch = [chance.choice(known)]
            if chance.random() < 0.1:
                pool.forget(chance.choice(known))
            with pool.hold(batch) as held:
                for _ in range(3):
                    check(held, batch)

    together(8, generate)
    stats = pool.stats()
    assert stats.held == 0 and stats.hits + stats.misses == 8 * 40
    assert rows is None or stats.rows == rows
    assert rooms is None or stats.bytes <= rooms * ROW_BYTES


@pytest.mark.parametrize("rows", [None, 32])
def test_an_adapter_is_copied_once_whoever_asks(often, rows, monkeypatch):
    pool, shared, own = pool_of(rows), adapter(2), [adapter(2) for _ in range(8)]
    written, write = [], tables.Tables.write
    monkeypatch.setattr(tables.Tables, "write", lambda self, *given: written.append(given[2]) or write(self, *given))

    def hold(number):
        batch = [shared, own[number]]
        with pool.hold(batch) as held:
            check(held, batch)

    together(8, hold)
    assert sum(one is shared for one in written) == 1 and len(written) == 9


def test_a_copy_that_takes_long_keeps_nobody_else_waiting(monkeypatch):
    pool, slow, ready = pool_of(8), adapter(2, fill=1.0), adapter(2, fill=2.0)
    pool.hold([ready]).release()
    begun, go, write = threading.Event(), threading.Event(), tables.Tables.write

    def wait(self, first, rows, given):
        if given is slow:
            begun.set()
            assert go.wait(30)
        write(self, first, rows, given)

    monkeypatch.setattr(tables.Tables, "write", wait)
    copying = threading.Thread(target=lambda: pool.hold([slow]))
    copying.start()
    assert begun.wait(30)
    for batch in ([ready], [adapter(2)], [ready, adapter(1)]):
        with pool.hold(batch) as held:
            check(held, batch)
    go.set()
    copying.join()
    with pool.hold([slow]) as held:
        check(held, [slow])
    assert pool.stats().held == 1


def test_growing_waits_for_what_is_being_copied(monkeypatch):
    pool, slow, other = pool_of(), adapter(2), adapter(4)
    begun, go, write = threading.Event(), threading.Event(), tables.Tables.write
    waits = []

    def wait(self, first, rows, given):
        if given is slow:
            begun.set()
            assert go.wait(30)
        write(self, first, rows, given)

    monkeypatch.setattr(tables.Tables, "write", wait)
    copying = threading.Thread(target=lambda: waits.append(pool.hold([slow])))
    growing = threading.Thread(target=lambda: waits.append(pool.hold([slow, other])))
    copying.start()
    assert begun.wait(30)
    growing.start()
    growing.join(0.05)
    assert growing.is_alive() and not waits
    go.set()
    copying.join()
    growing.join()
    for held in waits:
        check(held, [slow, other][: len(held.first)])
    assert pool.stats()[:2] == (2, 2) and pool.stats()[4:6] == (1, 2)


def test_who_waits_for_a_copy_that_fails_copies_for_himself(monkeypatch):
    pool, one = pool_of(8), adapter(2)
    begun, go, write = threading.Event(), threading.Event(), tables.Tables.write
    outcomes, turns = [], []

    def fail(self, *given):
        turns.append(1)
        if len(turns) == 1:
            begun.set()
            assert go.wait(30)
            raise OSError("the file is gone")
        write(self, *given)

    def hold():
        try:
            with pool.hold([one]) as held:
                check(held, [one])
            outcomes.append("held")
        except OSError:
            outcomes.append("failed")

    monkeypatch.setattr(tables.Tables, "write", fail)
    threads = [threading.Thread(target=hold) for _ in range(3)]
    threads[0].start()
    assert begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["failed", "held", "held"] and pool.stats()[:2] == (1, 0)
