"""The machine that runs PTX knows what it is given, or says what it does not know; and it sees what must not be."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx import tensor_core
from tests.ptx.arithmetic import fused
from tests.ptx.faults import Diverged, OutOfBounds, Race, Unknown, Unwaited
from tests.ptx.machine import ORDERS, Kernel, Machine

HEAD = """
.visible .entry small(.param .u64 small_param_0, .param .u64 small_param_1)
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd0, [small_param_0];
	ld.param.b64 %rd1, [small_param_1];
	mov.u32 %r0, %tid.x;
	mul.wide.u32 %rd2, %r0, 4;
	add.s64 %rd3, %rd0, %rd2;
	add.s64 %rd4, %rd1, %rd2;
	shl.b32 %r1, %r0, 2;
	xor.b32 %r2, %r1, 128;
"""  # %r2: where the other warp's thread of the same lane keeps its number in shared memory


def run(body: str, source: torch.Tensor, target: torch.Tensor, blocks: int = 1, order: str = "together"):
    """Two warps a block, and one number of shared memory for each of their threads."""
    Machine(Kernel(HEAD + body + "\tret;\n}\n"), (blocks,), 2, 256, [source, target], order).run()


def numbers(count: int = 64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


def test_an_unknown_instruction_is_named():
    with pytest.raises(Unknown, match="small: the machine does not know the instruction `brev.b32 %r1, %r0`"):
        Kernel(HEAD + "brev.b32 %r1, %r0;\nret;\n}\n")
    with pytest.raises(Unknown, match=r"does not know .rz of `cvt.rz.f16.f32 %rs0, %r0`"):
        Kernel(HEAD + "cvt.rz.f16.f32 %rs0, %r0;\nret;\n}\n")


@pytest.mark.parametrize("order", ORDERS)
def test_numbers_change_warps_through_shared_memory(order):
    target = torch.zeros(64)
    run("ld.global.b32 %r3, [%rd3]; st.shared.b32 [%r1], %r3; bar.sync 0; ld.shared.b32 %r4, [%r2];"
        "st.global.b32 [%rd4], %r4;", numbers(), target, order=order)  # fmt: skip
    assert target.tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_barrier_that_is_a_race_in_any_order(order):
    with pytest.raises(Race, match="small: (reads what another warp wrote|writes what another warp read), with no"):
        run("st.shared.b32 [%r1], %r0; ld.shared.b32 %r4, [%r2];", numbers(), torch.zeros(64), order=order)
    with pytest.raises(Race, match="writes where another warp wrote|different values in one place"):
        run("st.shared.b32 [0], %r0;", numbers(), torch.zeros(64), order=order)


def test_reading_what_others_will_write_is_a_race_too():
    with pytest.raises(Race, match="writes what another warp read, with no barrier"):
        run("ld.shared.b32 %r4, [%r2]; st.shared.b32 [%r1], %r0;", numbers(), torch.zeros(64))


def test_shared_memory_starts_as_nan():
    target = torch.zeros(64)
    run("ld.shared.b32 %r4, [%r1]; st.global.b32 [%rd4], %r4;", numbers(), target)
    assert target.isnan().all()


def test_blocks_that_write_one_place_race_and_equal_values_do_not():
    with pytest.raises(Race):
        run("mov.u32 %r3, %ctaid.x; st.global.b32 [%rd4], %r3;", numbers(), torch.zeros(64), blocks=2)
    run("st.global.b32 [%rd4], %r0;", numbers(), torch.zeros(64), blocks=2)


def test_what_lies_between_the_elements_of_a_view_is_out_of_bounds():
    whole = torch.zeros(2, 96)
    run("ld.global.b32 %r3, [%rd3];", whole[:, :64], torch.zeros(64))
    with pytest.raises(OutOfBounds, match="4 bytes at byte 256 of the memory of tensor 0 of 2"):
        run("ld.global.b32 %r3, [%rd3+4];", whole[:, :64], torch.zeros(64))
    with pytest.raises(OutOfBounds, match="4 bytes at byte -4 of the memory of tensor 0 of 2"):
        run("ld.global.b32 %r3, [%rd3+-4];", whole, torch.zeros(64))
    for far in (768, 1 << 20, 1 << 31):  # where the next tensor is kept, or none
        with pytest.raises(OutOfBounds, match=f"at byte {far} of the memory of tensor 0 of 2"):
            run(f"ld.global.b32 %r3, [%rd0+{far}];", whole, torch.zeros(64))
    with pytest.raises(OutOfBounds, match="shared memory has 256 bytes, not 260"):
        run("st.shared.b32 [%r1+4], %r0;", whole, torch.zeros(64))


def test_a_copy_is_there_when_it_has_been_waited_for():
    copy = "cp.async.ca.shared.global [%r1], [%rd3], 0x4; cp.async.commit_group;"
    read = "ld.shared.b32 %r4, [%r1]; st.global.b32 [%rd4], %r4;"
    target = torch.zeros(64)
    run(f"{copy} cp.async.wait_group 0; {read}", numbers(), target)
    assert torch.equal(target, numbers())
    with pytest.raises(Unwaited, match="reads what an asynchronous copy has not been waited for"):
        run(f"{copy} cp.async.wait_group 1; {read}", numbers(), target)


def test_lanes_part_and_meet_again():
    """Each lane goes round as often as its number's last bits say; a shuffle needs all of them."""
    target = torch.zeros(64)
    run("and.b32 %r3, %r0, 7; mov.b32 %r4, 0; mov.b32 %r5, 0f00000000; setp.eq.b32 %p0, %r3, 0; @%p0 bra $end; $loop: "
        "add.f32 %r5, %r5, 0f3F800000; add.s32 %r4, %r4, 1; setp.lt.s32 %p1, %r4, %r3; @%p1 bra $loop; $end: "
        "shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; st.global.b32 [%rd4], %r6;", numbers(), target)  # fmt: skip
    assert target.tolist() == [(lane ^ 1) & 7 for lane in range(64)]


def test_a_part_of_a_warp_or_of_a_block_does_not_come_to_what_all_must():
    with pytest.raises(Diverged, match="a part of a warp is at an instruction of whole warps"):
        run("setp.lt.u32 %p0, %r0, 5; @%p0 shfl.sync.bfly.b32 %r6, %r0, 1, 31, -1;", numbers(), torch.zeros(64))
    for order in ORDERS:
        with pytest.raises(Diverged, match="a part of a block is at a barrier|some warps of a block are at a barrier"):
            run("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 0;", numbers(), torch.zeros(64), order=order)


def test_a_tensor_core_aligns_its_terms_to_the_largest_and_cuts_off():
    left, right = np.zeros((1, 1, 16)), np.ones((1, 1, 16))
    left[..., 0], left[..., 1:], left[..., 8] = 1.0, 2.0**-25, 0.0
    none = np.zeros((1, 1, 1))
    assert tensor_core.cut_off(left, right, none, 16) == 1 + 3 * 2.0**-23  # 14 of 2 ** -25, toward zero
    assert tensor_core.cut_off(left, right, none, 8) == 1 + 2 * 2.0**-23  # twice 7 of them
    left[..., 1:] = 0.99 * 2.0**-25
    assert tensor_core.cut_off(left, right, none, 16) == 1  # each is below the last bit that is kept
    assert tensor_core.cut_off(left, right, none + 2.0**30, 16) == 2.0**30
    assert tensor_core.cut_off(-left, right, none, 16) == -1
    assert np.isnan(tensor_core.cut_off(left, right, none + np.nan, 16))
    assert np.isposinf(tensor_core.cut_off(left * np.inf, right, none, 16))
    random = np.random.default_rng(0)
    left, right, sums = (random.standard_normal(shape) for shape in ((3, 16, 16), (3, 8, 16), (3, 16, 8)))
    sums = sums.astype(np.float32)
    exact = left @ right.swapaxes(1, 2) + sums
    for terms in (8, 16):
        found = tensor_core.cut_off(left, right, sums, terms)
        assert 0 < np.abs(found - exact).max() < 2 * 2.0**-23 * np.abs(exact).max()
        assert np.mean(np.abs(found) < np.abs(exact)) > 0.8


def test_what_is_approximate_errs_where_the_machine_cuts_off():
    body = "ld.global.b32 %r3, [%rd3]; ex2.approx.ftz.f32 %r4, %r3; st.global.b32 [%rd4], %r4;"
    source = torch.linspace(-3, 3, 64)
    exact, near = torch.zeros(64), torch.zeros(64)
    run(body, source, exact)
    Machine(Kernel(HEAD + body + "\tret;\n}\n"), (1,), 2, 256, [source, near], terms=8).run()
    torch.testing.assert_close(exact, source.double().exp2().float(), rtol=0, atol=0)
    off = (near.double() / exact.double() - 1).abs()
    assert 2.0**-24 < off.max() <= 2.0**-22


def test_multiply_and_add_in_float64_is_rounded_once():
    random, count = np.random.default_rng(0), 4000
    a, b, c = (random.standard_normal(count) * 2.0 ** random.integers(-e, e, count) for e in (40, 40, 80))
    c[: count // 2] = -(a * b)[: count // 2] * (
        1 + random.integers(-3, 4, count // 2) * 2.0**-52
    )  # almost nothing is left
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert fused(a, b, c).tolist() == exact and (a * b + c).tolist() != exact
    ends = fused(np.array([np.inf, 1e300, 0.0]), np.array([1.0, 1e300, -1.0]), np.array([1.0, 1.0, 0.0]))
    assert ends.tolist() == [np.inf, np.inf, 0.0] and np.isnan(fused(np.array([np.nan]), np.ones(1), np.ones(1)))[0]


def test_matrices_of_float64_are_multiplied_as_the_manual_lays_them_out():
    """One warp's 8 x 4 times 4 x 8: lane 4 i + k holds a[i, k] and b[k, i], and two sums beside each other."""
    random = np.random.default_rng(1)
    left, right, sums = random.standard_normal((8, 4)), random.standard_normal((4, 8)), random.standard_normal((8, 8))
    head = HEAD.replace("mul.wide.u32 %rd2, %r0, 4;", "mul.wide.u32 %rd2, %r0, 32;")
    body = (
        "ld.global.b64 %rd5, [%rd3]; ld.global.b64 %rd6, [%rd3+8]; ld.global.b64 %rd7, [%rd3+16];"
        "ld.global.b64 %rd8, [%rd3+24];"
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd7, %rd8}, {%rd5}, {%rd6}, {%rd7, %rd8};"
        "st.global.b64 [%rd4], %rd7; st.global.b64 [%rd4+8], %rd8;"
    )
    lanes = np.stack([left.reshape(32), right.T.reshape(32), *sums.reshape(32, 2).T], 1)
    source, target = torch.tensor(lanes.copy()), torch.zeros(32, 4, dtype=torch.float64)
    Machine(Kernel(head + body + "\tret;\n}\n"), (1,), 1, 256, [source, target], "together").run()
    np.testing.assert_allclose(target[:, :2].reshape(8, 8), left @ right + sums, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_the_compiler_sent_behind_the_barrier_come_back_before_it(order):
    target = torch.zeros(64)
    run("ld.global.b32 %r3, [%rd3]; setp.lt.u32 %p1, %r0, 5; @%p1 bra $L_rare;"
        "$L_back: st.shared.b32 [%r1], %r3; bar.sync 0; ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd4], %r4; ret;"
        "$L_rare: add.f32 %r3, %r3, %r3; bra $L_back;", numbers(), target, order=order)  # fmt: skip
    assert target.tolist() == [*range(32, 64), *range(0, 10, 2), *range(5, 32)]
    run("ld.global.b32 %r3, [%rd3]; setp.lt.u32 %p1, %r0, 5; @%p1 bra $L_rare;"
        "$L_back: shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1; st.global.b32 [%rd4], %r4; ret;"
        "$L_rare: add.f32 %r3, %r3, %r3; bra $L_back;", numbers(), target, order=order)  # fmt: skip
    doubled = [*range(0, 10, 2), *range(5, 64)]
    assert target.tolist() == [doubled[n ^ 1] for n in range(64)]
