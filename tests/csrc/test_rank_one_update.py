"""The C++ kernel of rank_one_update, in every instruction set this machine can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keylock_kernels import native
from keylock_kernels.ops.rank_one import native as rank_one

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INSTRUCTION_SETS = native.instruction_sets()
every_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda dtype: str(dtype).removeprefix("torch."))


def plain(
    base: Tensor,  # [B, T, O]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    coefficients: Tensor,  # [B, T, R]
    dtype: torch.dtype,
) -> Tensor:  # [B, T, O]
    """The op in plain torch, computed and returned in `dtype`; -1 is selected away."""
    rows = []
    for row in range(base.shape[0]):
        taken = slots[row] >= 0
        updates = u[slots[row][taken].long()].to(dtype)
        rows.append(base[row].to(dtype) + coefficients[row][:, taken].to(dtype) @ updates)
    return torch.stack(rows) if rows else base.to(dtype)


def assert_within_roundings(y: Tensor, *inputs: Tensor) -> None:
    """Element by element: a rounding of the result, and one or two of the sum per term."""
    base, u, slots, coefficients = inputs
    exact = plain(*inputs, torch.float64)
    terms = plain(base.abs(), u.abs(), slots, coefficients.abs(), torch.float64)
    accumulated = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32)
    result = torch.finfo(y.dtype)
    allowed = (slots.shape[1] + 2) * accumulated.eps * terms + result.eps / 2 * exact.abs() + result.tiny
    excess = (y.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"exceeds the bound by {excess.max().item()}"


def assert_as_good_as_eager(y: Tensor, *inputs: Tensor) -> None:
    """At most twice the error of eager torch that accumulates in float32 as well, plus a rounding."""
    exact = plain(*inputs, torch.float64)
    eager = plain(*inputs, torch.float32).to(y.dtype)
    rounding = torch.finfo(y.dtype).eps / 2 * exact.abs().max()
    error = (y.double() - exact).abs().max()
    allowed = 2 * (eager.double() - exact).abs().max() + rounding
    assert error <= allowed, f"{error.item()} > {allowed.item()}"


def make(
    batch: int, tokens: int, outputs: int, rank: int, *, count: int = 5, dtype=torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, tokens, outputs, generator=g).to(dtype),
        torch.randn(count, outputs, generator=g).to(dtype),
        torch.randint(-1, count, (batch, rank), generator=g, dtype=torch.int32),
        torch.randn(batch, tokens, rank, generator=g),
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@st.composite
def cases(draw) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], str]:
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    # Around vector widths, and beyond one tile; ranks around one and two groups of 16.
    outputs = draw(st.sampled_from([0, 1, 3, 7, 8, 15, 17, 31, 64, 65, 129, 260, 320, 1025]))
    rank = draw(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 32, 33, 40]))
    count = draw(st.integers(1, 6))
    base, u, slots, coefficients = make(batch, tokens, outputs, rank, count=count, seed=draw(st.integers(0, 2**31 - 1)))
    base, u = base.to(draw(st.sampled_from(FLOATING))), u.to(draw(st.sampled_from(FLOATING)))
    coefficients = coefficients.to(draw(st.sampled_from(FLOATING)))
    if draw(st.booleans()):  # slices of something larger, with a hole after every row
        base = torch.nn.functional.pad(base, (2, 3))[..., 2 : 2 + outputs]
        u = torch.nn.functional.pad(u, (1, 4))[..., 1 : 1 + outputs]
    if draw(st.booleans()):
        base = base.transpose(0, 1).contiguous().transpose(0, 1)
        slots = slots.T.contiguous().T
        coefficients = coefficients.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if draw(st.booleans()):  # one row for everybody
        base = base[:, :1].expand(-1, tokens if base.shape[1] else 0, -1)
        coefficients = coefficients[:1].expand(batch if coefficients.shape[0] else 0, -1, -1)
    return (base, u, slots, coefficients), draw(st.sampled_from(INSTRUCTION_SETS))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_matches_float64_for_any_shape_stride_and_dtype(case):
    inputs, instruction_set = case
    before = [bits(tensor).clone() for tensor in inputs]
    y = rank_one.rank_one_update(*inputs, instruction_set=instruction_set)
    assert y.shape == inputs[0].shape and y.dtype == inputs[0].dtype and y.is_contiguous()
    assert_within_roundings(y, *inputs)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(inputs, before, strict=True))


@every_instruction_set
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("rank", [2, 16, 40])
@pytest.mark.parametrize("base_scale", [1, 1000])  # a large base loses nothing to many small updates
def test_is_as_accurate_as_eager(instruction_set, dtype, rank, base_scale):
    base, u, slots, coefficients = make(2, 77, 320, rank, dtype=dtype)
    inputs = (base * base_scale, u, slots, coefficients)
    assert_as_good_as_eager(rank_one.rank_one_update(*inputs, instruction_set=instruction_set), *inputs)


@every_instruction_set
def test_every_float16_is_read_as_torch_reads_it(instruction_set):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ones = torch.ones(1, 1, 1)
    slots = torch.zeros(1, 1, dtype=torch.int32)
    y = rank_one.rank_one_update(
        torch.zeros(1, 1, values.numel()), values[None], slots, ones, instruction_set=instruction_set
    )
    torch.testing.assert_close(y[0, 0], values.float(), rtol=0, atol=0, equal_nan=True)
    y = rank_one.rank_one_update(
        values[None, None], torch.zeros(1, values.numel()), slots, ones, instruction_set=instruction_set
    )
    torch.testing.assert_close(y[0, 0], values, rtol=0, atol=0, equal_nan=True)


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_rounds_every_kind_of_float32_as_torch_does(instruction_set, dtype):
    g = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (100_000,), generator=g, dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001])).flatten()
    subnormal = torch.linspace(-7e-5, 7e-5, 20_001).view(torch.int32)
    ends = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 1e9, 3.4e38, float("inf"), float("nan"), -0.0])
    values = torch.cat([anything, ties.to(torch.int32), subnormal, ends.view(torch.int32)]).view(torch.float32)
    y = rank_one.rank_one_update(
        torch.zeros(1, 1, values.numel(), dtype=dtype),
        values[None],
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, 1, 1),
        instruction_set=instruction_set,
    )
    torch.testing.assert_close(y[0, 0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_instruction_set
@every_dtype
@pytest.mark.parametrize("rank", [0, 3, 20])
def test_slot_minus_one_is_exactly_nothing(instruction_set, dtype, rank):
    base, u, _, coefficients = make(2, 5, 37, rank, dtype=dtype)
    base[0, 0, 0] = -0.0
    u.fill_(float("nan"))
    coefficients.fill_(float("inf"))
    slots = torch.full((2, rank), -1, dtype=torch.int32)
    y = rank_one.rank_one_update(base, u, slots, coefficients, instruction_set=instruction_set)
    assert torch.equal(bits(y), bits(base))


@every_instruction_set
def test_slots_not_taken_are_never_touched(instruction_set):
    base, u, _, coefficients = make(2, 5, 37, 3)
    slots = torch.tensor([[-1, 2, -1], [2, -1, 2]], dtype=torch.int32)
    clean = rank_one.rank_one_update(base, u, slots, coefficients, instruction_set=instruction_set)
    u[[0, 1, 3, 4]] = float("nan")
    coefficients[0, :, [0, 2]] = float("nan")
    coefficients[1, :, 1] = float("nan")
    y = rank_one.rank_one_update(base, u, slots, coefficients, instruction_set=instruction_set)
    assert torch.equal(bits(y), bits(clean)) and torch.isfinite(y).all()


def test_duplicate_slots_add():
    base, u, _, _ = make(1, 4, 33, 2)
    slots = torch.tensor([[1, 1]], dtype=torch.int32)
    twice = rank_one.rank_one_update(base, u, slots, torch.ones(1, 4, 2))
    torch.testing.assert_close(twice, base + 2 * u[1], rtol=1e-6, atol=1e-6)


@every_instruction_set
@every_dtype
def test_a_row_is_the_same_bits_whatever_its_neighbours_hold(instruction_set, dtype):
    base, u, slots, coefficients = make(4, 37, 333, 18, count=8, dtype=dtype)
    slots.clamp_(max=6)
    clean = rank_one.rank_one_update(base, u, slots, coefficients, instruction_set=instruction_set)
    base[1], coefficients[1], slots[1] = float("nan"), 1e30, 7
    u[7] = float("inf")
    poisoned = rank_one.rank_one_update(base, u, slots, coefficients, instruction_set=instruction_set)
    others = [0, 2, 3]
    assert torch.equal(bits(poisoned[others]), bits(clean[others]))

    order = torch.tensor([2, 1, 3, 0])
    moved = rank_one.rank_one_update(base[order], u, slots[order], coefficients[order], instruction_set=instruction_set)
    assert torch.equal(bits(moved), bits(poisoned[order]))
    alone = rank_one.rank_one_update(base[:1], u, slots[:1], coefficients[:1], instruction_set=instruction_set)
    assert torch.equal(bits(alone), bits(clean[:1]))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@every_dtype
def test_bits_do_not_depend_on_threads(two_threads, dtype):
    inputs = make(3, 77, 640, 5, dtype=dtype)  # large enough to be shared between threads
    if native.build_info()["openmp"]["built"] and len(native.openmp_runtimes()) == 1:
        assert native.threads()[0] == 2
    shared = rank_one.rank_one_update(*inputs)
    torch.set_num_threads(1)
    assert native.threads()[0] == 1
    assert torch.equal(bits(rank_one.rank_one_update(*inputs)), bits(shared))


def test_several_openmp_runtimes_mean_one_thread(two_threads, monkeypatch):
    monkeypatch.setattr(native, "openmp_runtimes", lambda: ("/a/libgomp.so.1", "/b/libiomp5.so"))
    count, reason = native.threads()
    assert count == 1
    if native.build_info()["openmp"]["built"]:
        assert "/a/libgomp.so.1" in reason and "/b/libiomp5.so" in reason


WRONG = {
    "base must be float32 or float64 or float16 or bfloat16 [B, T, O], got int64 [2, 4, 8]": {
        "base": torch.zeros(2, 4, 8, dtype=torch.int64)
    },
    "base must be float32 or float64 or float16 or bfloat16 [B, T, O], got float32 [4, 8]": {"base": torch.zeros(4, 8)},
    "u must be float32 or float64 or float16 or bfloat16 [S, 8], got float32 [5, 9]": {"u": torch.zeros(5, 9)},
    "slots must be int32 [2, R], got int64 [2, 3]": {"slots": torch.zeros(2, 3, dtype=torch.int64)},
    "slots must be int32 [2, R], got int32 [3, 3]": {"slots": torch.zeros(3, 3, dtype=torch.int32)},
    "coefficients must be float32 or float64 or float16 or bfloat16 [2, 4, 3], got float32 [2, 4, 2]": {
        "coefficients": torch.zeros(2, 4, 2)
    },
    "base must be on cpu, got meta": {"base": torch.zeros(2, 4, 8, device="meta")},
    "base must have a contiguous last dimension, got strides [32, 1, 4]": {
        "base": torch.zeros(2, 8, 4).transpose(1, 2)
    },
    "u must have a contiguous last dimension, got strides [1, 5]": {"u": torch.zeros(8, 5).T},
    "slots must lie in [-1, 5), got 5": {"slots": torch.tensor([[0, 1, 2], [0, 5, 1]], dtype=torch.int32)},
    "slots must lie in [-1, 5), got -2": {"slots": torch.tensor([[0, -2, 2], [0, 1, 1]], dtype=torch.int32)},
    "instruction_set must be one of": {"instruction_set": "mmx"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    arguments = dict(zip(("base", "u", "slots", "coefficients"), make(2, 4, 8, 3), strict=True))
    with pytest.raises(ValueError) as error:
        rank_one.rank_one_update(**{**arguments, **WRONG[message]})
    assert str(error.value).startswith(f"rank_one_update: {message}")


def test_not_a_tensor_is_a_type_error():
    base, u, slots, coefficients = make(2, 4, 8, 3)
    with pytest.raises(TypeError, match=r"rank_one_update: slots must be int32 \[2, R\], got list"):
        rank_one.rank_one_update(base, u, slots.tolist(), coefficients)


@pytest.mark.parametrize("slot", [5, -2, 2**31 - 1, -(2**31)])
def test_the_kernel_itself_refuses_a_foreign_slot_and_writes_nothing(slot):
    extension = native.extension()
    base, u, slots, coefficients = make(2, 4, 8, 3)
    slots[1, 2] = slot
    y = torch.full_like(base, 7.0)
    status = extension.rank_one_update(
        *(native.describe(tensor) for tensor in (base, u, slots, coefficients, y)),
        instruction_set=extension.InstructionSet.portable,
        threads=1,
    )
    assert status == extension.Status.slot_out_of_range
    assert (y == 7.0).all()


def test_the_kernel_itself_refuses_shapes_that_do_not_fit():
    extension = native.extension()
    base, u, slots, coefficients = make(2, 4, 8, 3)
    for wrong in (
        (base, u[:, :7], slots, coefficients, base.clone()),
        (base, u, slots[:1], coefficients, base.clone()),
        (base, u, slots, coefficients[:, :3], base.clone()),
        (base, u, slots, coefficients, base[:, :3].clone()),
        (base, torch.zeros(8, 5).T, slots, coefficients, base.clone()),
    ):
        status = extension.rank_one_update(
            *(native.describe(tensor) for tensor in wrong),
            instruction_set=extension.InstructionSet.portable,
            threads=1,
        )
        assert status == extension.Status.shape_mismatch
