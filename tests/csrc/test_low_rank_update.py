"""The C++ kernel of low_rank_update, in every instruction set this machine can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keylock_kernels import native
from keylock_kernels.ops.low_rank import native as low_rank
from keylock_kernels.ops.low_rank import reference
from keylock_kernels.ops.low_rank.updates import Updates
from keylock_kernels.testing import cast, low_rank_inputs

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native: {native.unavailable_reason()}")

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INSTRUCTION_SETS = native.instruction_sets()
every_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda dtype: str(dtype).removeprefix("torch."))


def with_coefficients(up: Tensor, slots: Tensor, coefficients: Tensor) -> Updates:  # [P, O], [B, J], [B, N, J]
    return Updates(up, None, None, slots, None, None, None, None, coefficients, 1)


def update(base: Tensor, up: Tensor, slots: Tensor, coefficients: Tensor, **more: str) -> Tensor:
    return low_rank.low_rank_update(base, None, with_coefficients(up, slots, coefficients), **more)


def plain(
    base: Tensor,  # [B, N, O]
    u: Tensor,  # [P, O]
    slots: Tensor,  # [B, J]
    coefficients: Tensor,  # [B, N, J]
    dtype: torch.dtype,
) -> Tensor:  # [B, N, O]
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
    y = update(*inputs, instruction_set=instruction_set)
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
    assert_as_good_as_eager(update(*inputs, instruction_set=instruction_set), *inputs)


@every_instruction_set
def test_every_float16_is_read_as_torch_reads_it(instruction_set):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    ones = torch.ones(1, 1, 1)
    slots = torch.zeros(1, 1, dtype=torch.int32)
    y = update(torch.zeros(1, 1, values.numel()), values[None], slots, ones, instruction_set=instruction_set)
    torch.testing.assert_close(y[0, 0], values.float(), rtol=0, atol=0, equal_nan=True)
    y = update(values[None, None], torch.zeros(1, values.numel()), slots, ones, instruction_set=instruction_set)
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
    y = update(
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
    y = update(base, u, slots, coefficients, instruction_set=instruction_set)
    assert torch.equal(bits(y), bits(base))


@every_instruction_set
def test_slots_not_taken_are_never_touched(instruction_set):
    base, u, _, coefficients = make(2, 5, 37, 3)
    slots = torch.tensor([[-1, 2, -1], [2, -1, 2]], dtype=torch.int32)
    clean = update(base, u, slots, coefficients, instruction_set=instruction_set)
    u[[0, 1, 3, 4]] = float("nan")
    coefficients[0, :, [0, 2]] = float("nan")
    coefficients[1, :, 1] = float("nan")
    y = update(base, u, slots, coefficients, instruction_set=instruction_set)
    assert torch.equal(bits(y), bits(clean)) and torch.isfinite(y).all()


def test_duplicate_slots_add():
    base, u, _, _ = make(1, 4, 33, 2)
    slots = torch.tensor([[1, 1]], dtype=torch.int32)
    twice = update(base, u, slots, torch.ones(1, 4, 2))
    torch.testing.assert_close(twice, base + 2 * u[1], rtol=1e-6, atol=1e-6)


@every_instruction_set
@every_dtype
def test_a_row_is_the_same_bits_whatever_its_neighbours_hold(instruction_set, dtype):
    base, u, slots, coefficients = make(4, 37, 333, 18, count=8, dtype=dtype)
    slots.clamp_(max=6)
    clean = update(base, u, slots, coefficients, instruction_set=instruction_set)
    base[1], coefficients[1], slots[1] = float("nan"), 1e30, 7
    u[7] = float("inf")
    poisoned = update(base, u, slots, coefficients, instruction_set=instruction_set)
    others = [0, 2, 3]
    assert torch.equal(bits(poisoned[others]), bits(clean[others]))

    order = torch.tensor([2, 1, 3, 0])
    moved = update(base[order], u, slots[order], coefficients[order], instruction_set=instruction_set)
    assert torch.equal(bits(moved), bits(poisoned[order]))
    alone = update(base[:1], u, slots[:1], coefficients[:1], instruction_set=instruction_set)
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
    shared = update(*inputs)
    torch.set_num_threads(1)
    assert native.threads()[0] == 1
    assert torch.equal(bits(update(*inputs)), bits(shared))


def test_several_openmp_runtimes_mean_one_thread(two_threads, monkeypatch):
    monkeypatch.setattr(native, "openmp_runtimes", lambda: ("/a/libgomp.so.1", "/b/libiomp5.so"))
    count, reason = native.threads()
    assert count == 1
    if native.build_info()["openmp"]["built"]:
        assert "/a/libgomp.so.1" in reason and "/b/libiomp5.so" in reason


def adapters(
    rows: int,
    tokens: int,
    inner: int,
    outer: int,
    ranks: tuple[int, ...],
    taken: int,
    *,
    seed: int = 0,
    **options: bool,
) -> tuple[Tensor, Tensor, Updates]:
    """Arguments of low_rank_update in float32: base, x, and adapters of these ranks."""
    inputs = low_rank_inputs(
        rows, tokens, inner, outer, ranks, taken, bias=False, scale=False, seed=seed, dtype=torch.float32, **options
    )
    base = torch.randn(rows, tokens, outer, generator=torch.Generator().manual_seed(seed))
    strength, weights = inputs.get("strength"), inputs.get("token_weights")
    up, down, offsets, slots = (inputs[name] for name in ("up", "down", "offsets", "slots"))
    return base, inputs["x"], Updates(up, down, offsets, slots, None, None, strength, weights, None, sum(ranks))


def wide(updates: Updates) -> Updates:
    return Updates(**cast(updates._asdict(), torch.float64))


def sizes(updates: Updates) -> Updates:
    """The same with everything positive: what the terms of a sum add up to."""
    found = {k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in updates._asdict().items()}
    return Updates(**found)


@st.composite
def adapter_cases(draw) -> tuple[Tensor, Tensor, Updates, str]:
    ranks = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 15, 16, 17, 33, 130]), max_size=4)))
    inner = draw(st.sampled_from([0, 1, 2, 7, 16, 30, 33, 64, 130]))
    outer = draw(st.sampled_from([0, 1, 7, 16, 31, 65, 96, 97, 200, 320]))
    tokens = draw(st.sampled_from([0, 1, 3, 8, 9, 63, 64, 65, 130]))
    options = {name: draw(st.booleans()) for name in ("strength", "weights")}
    base, x, updates = adapters(
        draw(st.integers(0, 3)), tokens, inner, outer, ranks, draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 2**31 - 1)), **options,
    )  # fmt: skip
    dtype = draw(st.sampled_from(FLOATING))
    base, x = base.to(dtype), x.to(dtype)
    tables = {name: getattr(updates, name).to(draw(st.sampled_from(FLOATING))) for name in ("up", "down")}
    updates = updates._replace(**tables)
    if draw(st.booleans()):  # slices of something larger, and what is small transposed
        x, up, down = (
            torch.nn.functional.pad(tensor, (1, 2), value=torch.nan)[..., 1:-2]
            for tensor in (x, updates.up, updates.down)
        )
        weights = None if updates.token_weights is None else updates.token_weights.mT.contiguous().mT
        updates = updates._replace(up=up, down=down, slots=updates.slots.T.contiguous().T, token_weights=weights)
    if draw(st.booleans()):
        x, base = x.transpose(0, 1).contiguous().transpose(0, 1), base[:1].expand(base.shape)
    return base, x, updates, draw(st.sampled_from(INSTRUCTION_SETS))


@settings(max_examples=300, deadline=None)
@given(adapter_cases())
def test_adapters_match_float64_for_any_rank_shape_stride_and_dtype(case):
    base, x, updates, instruction_set = case
    y = low_rank.low_rank_update(base, x, updates, instruction_set=instruction_set)
    assert y.shape == base.shape and y.dtype == base.dtype and y.is_contiguous()
    exact = reference.update(base.double(), x.double(), wide(updates))
    terms = reference.update(base.double().abs(), x.double().abs(), sizes(wide(updates)))
    accumulated = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32)
    result = torch.finfo(y.dtype)
    additions = x.shape[2] + updates.width + 4
    # bfloat16's own product takes what is subnormal for 0.
    allowed = additions * accumulated.eps * terms + result.eps / 2 * exact.abs() + result.tiny
    excess = (y.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"exceeds the bound by {excess.max().item()}"


@every_instruction_set
@every_dtype
def test_a_row_with_adapters_is_the_same_bits_whatever_its_neighbours_hold(instruction_set, dtype):
    base, x, updates = adapters(4, 37, 70, 333, (3, 130, 0, 17, 8), 2)
    base, x = base.to(dtype), x.to(dtype)
    slots = torch.tensor([[0, 3], [1, 4], [2, -1], [4, 4]], dtype=torch.int32)
    updates = updates._replace(slots=slots)

    def run(order: list[int], base: Tensor, x: Tensor, updates: Updates) -> Tensor:
        rows = {name: getattr(updates, name)[order] for name in ("slots", "strength", "token_weights")}
        return low_rank.low_rank_update(
            base[order], x[order], updates._replace(**rows), instruction_set=instruction_set
        )

    clean = run([0, 1, 2, 3], base, x, updates)
    dirty = base.clone(), x.clone(), updates._replace(up=updates.up.clone(), down=updates.down.clone())
    dirty[0][1] = dirty[1][1] = torch.nan
    dirty[2].up[3:133], dirty[2].down[3:133] = torch.inf, torch.nan  # of the adapter that row 1 alone takes
    poisoned = run([0, 1, 2, 3], *dirty)
    assert torch.equal(bits(poisoned[[0, 2, 3]]), bits(clean[[0, 2, 3]])) and poisoned[1].isnan().all()
    assert torch.equal(bits(run([2, 1, 3, 0], base, x, updates)), bits(clean[[2, 1, 3, 0]]))
    assert torch.equal(bits(run([0], base, x, updates)), bits(clean[:1]))  # beside a row of far more updates and alone
    assert torch.equal(bits(clean[2]), bits(base[2]))


@every_instruction_set
@every_dtype
def test_a_factor_of_zero_is_nothing_whatever_it_meets(instruction_set, dtype):
    base, x, updates = adapters(2, 9, 24, 40, (3, 5), 2, strength=True, weights=True)
    base, x = base.to(dtype), x.to(dtype)
    slots = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    strength, weights = torch.tensor([[0.0, 1.0], [1.0, 2.0]]), torch.ones(2, 2, 9)
    weights[1, 1, ::2] = 0
    updates = updates._replace(slots=slots, strength=strength, token_weights=weights)
    clean = low_rank.low_rank_update(base, x, updates, instruction_set=instruction_set)
    for name in ("up", "down"):
        table = getattr(updates, name).clone()
        table[:3] = torch.nan
        y = low_rank.low_rank_update(base, x, updates._replace(**{name: table}), instruction_set=instruction_set)
        assert torch.equal(y[0], clean[0]) and y[1, 1::2].isnan().all()
        torch.testing.assert_close(y[1, ::2], clean[1, ::2])
    x[1, ::2] = torch.inf
    strength[1, 0] = 0
    y = low_rank.low_rank_update(base, x, updates, instruction_set=instruction_set)
    assert torch.equal(bits(y[1, ::2]), bits(base[1, ::2])) and y[1, 1::2].isfinite().all()


def test_bits_of_adapters_do_not_depend_on_threads(two_threads):
    base, x, updates = adapters(3, 140, 320, 640, (8, 30, 4), 2)
    shared = low_rank.low_rank_update(base, x, updates)
    torch.set_num_threads(1)
    assert torch.equal(bits(low_rank.low_rank_update(base, x, updates)), bits(shared))


WRONG = {
    "base must be float32 or float64 or float16 or bfloat16 [B, N, O], got int64 [2, 4, 8]": {
        "base": torch.zeros(2, 4, 8, dtype=torch.int64)
    },
    "base must be float32 or float64 or float16 or bfloat16 [B, N, O], got float32 [4, 8]": {"base": torch.zeros(4, 8)},
    "base must be on cpu, got meta": {"base": torch.zeros(2, 4, 8, device="meta")},
    "x must be float32 [2, 4, K], got float64 [2, 4, 6]": {"x": torch.zeros(2, 4, 6, dtype=torch.float64)},
    "x must be float32 [2, 4, K], got float32 [2, 3, 6]": {"x": torch.zeros(2, 3, 6)},
    "slots must lie in [-1, 2), got 2": {"slots": torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)},
    "slots must lie in [-1, 2), got -2": {"slots": torch.tensor([[0, -2], [0, 1]], dtype=torch.int32)},
    "offsets must not decrease and lie in [0, 5], got [0, 4, 3]": {
        "offsets": torch.tensor([0, 4, 3], dtype=torch.int32)
    },
    "offsets must not decrease and lie in [0, 5], got [0, 3, 6]": {
        "offsets": torch.tensor([0, 3, 6], dtype=torch.int32)
    },
    "instruction_set must be one of": {"instruction_set": "mmx"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    base, x, updates = adapters(2, 4, 6, 8, (3, 2), 2)
    wrong = dict(WRONG[message])
    updates = updates._replace(**{name: wrong.pop(name) for name in ("slots", "offsets") if name in wrong})
    with pytest.raises(ValueError) as error:
        low_rank.low_rank_update(**{"base": base, "x": x, "updates": updates, **wrong})
    assert str(error.value).startswith(f"low_rank_update: {message}")


def test_not_a_tensor_is_a_type_error_and_a_tensor_elsewhere_a_value_error():
    base, x, updates = adapters(2, 4, 6, 8, (3, 2), 2)
    with pytest.raises(TypeError, match=r"low_rank_update: base must be .* \[B, N, O\], got list"):
        low_rank.low_rank_update(base.tolist(), x, updates)
    with pytest.raises(ValueError, match="low_rank_update: the native kernels read CPU tensors, got one on meta"):
        low_rank.low_rank_update(base, x, updates._replace(up=updates.up.to("meta")))


def test_the_kernel_itself_refuses_shapes_that_do_not_fit():
    base, x, updates = adapters(2, 4, 6, 8, (3, 2), 2, strength=True, weights=True)
    for wrong in (
        {"up": updates.up[:, :7]},
        {"up": updates.up[:4]},
        {"down": updates.down[:, :5]},
        {"slots": updates.slots[:1]},
        {"strength": updates.strength[:, :1]},
        {"token_weights": updates.token_weights[:, :, :3]},
    ):
        with pytest.raises(RuntimeError, match="low_rank_update: the kernel refused its arguments: shape_mismatch"):
            low_rank.low_rank_update(base, x, updates._replace(**wrong))
    up, slots, c = updates.up, updates.slots, torch.zeros(2, 4, 3)
    with pytest.raises(RuntimeError, match="shape_mismatch"):
        update(base, up, slots, c)
