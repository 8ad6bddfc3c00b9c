"""Updates of low rank in plain torch: what every other backend must compute.

Forward functions differentiate under plain autograd, which is how the gradients written out at the end are checked.
Slot -1 is exactly nothing, and so is a coefficient of exactly 0, whatever the tables hold. A slot outside [-1, S) is
NaN for its row: that is what kernels write where raising would cost a device synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import accumulate_dtype
from ..rows import row_matmul, row_sigmoid
from .updates import Updates


def table_rows(updates: Updates) -> tuple[Tensor, Tensor | None]:  # [B, R], [B, R]
    """Which row of the tables each of a batch row's updates is, -1 for none; and which of its slots it comes from.

    A slot that does not exist counts as one update, by a row that does not exist. Without offsets an update is a slot.
    """
    slots, offsets = updates.slots, updates.offsets
    if offsets is None:
        return slots, None
    offsets = offsets.long()
    first, rank = offsets[:-1], offsets.diff()
    index = torch.where(taken_slots(slots, updates.choices), slots, 0).long()
    rank = torch.where(taken_slots(slots, updates.choices), _at(rank, index), 0)
    missing = (slots != -1) & (~taken_slots(slots, updates.choices) | (rank < 0) | (rank > updates.max_rank))
    rank, first = torch.where(missing, 1, rank), torch.where(missing, updates.up.shape[0], _at(first, index))
    ends = rank.cumsum(1)
    place = torch.arange(updates.width, device=slots.device)
    owner = (place[None, :, None] >= ends[:, None]).sum(2)
    owned, owner = owner < slots.shape[1], owner.clamp(max=slots.shape[1] - 1)
    rows = place + (first - ends + rank).gather(1, owner)
    return torch.where(owned, rows, -1), owner


def _at(table: Tensor, index: Tensor) -> Tensor:  # [S], [B, J] -> [B, J]
    return table[index] if table.shape[0] else torch.zeros_like(index)


def taken_slots(slots: Tensor, count: int) -> Tensor:  # [B, R]
    return (slots >= 0) & (slots < count)


def select_rows(table: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:  # [S, ...], [B, R] -> [B, R, ...]
    """The table's rows each batch row takes; zeros where it takes none, whatever the table holds."""
    if table.shape[0] == 0:
        return table.new_zeros(*slots.shape, *table.shape[1:], dtype=dtype)
    taken = taken_slots(slots, table.shape[0])
    index = torch.where(taken, slots, 0).flatten()
    rows = table.index_select(0, index).view(*slots.shape, *table.shape[1:]).to(dtype)
    return torch.where(taken.view(*slots.shape, *[1] * (table.dim() - 1)), rows, 0)


def selected_matmul(c: Tensor, rows: Tensor) -> Tensor:  # [B, M, R], [B, R, C] -> [B, M, C]
    """c @ rows, in which a coefficient of exactly 0 is nothing even beside what is not finite."""
    finite = rows.isfinite()
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and finite.all():  # looking costs nothing there
        return row_matmul(c, rows)
    product = row_matmul(c, torch.where(finite, rows, 0))
    poisoned = row_matmul((c != 0).to(c.dtype), (~finite).to(c.dtype)) > 0
    return torch.where(poisoned, torch.nan, product)


def gates(
    x: Tensor,  # [B, N, K]
    down: Tensor,  # [P, K]
    rows: Tensor,  # [B, R]
    beta: Tensor | None,  # [P] or [B, R]
    tau: Tensor | None,  # [P] or [B, R]
) -> Tensor:  # [B, N, R]
    """s = x . down[row] where tau is 0 or absent, else sigmoid((s - beta) / tau)."""
    dtype = accumulate_dtype(x.dtype)
    taken = taken_slots(rows, down.shape[0])[:, None]
    similarity = row_matmul(x.to(dtype), select_rows(down, rows, dtype).mT)
    similarity = torch.where(taken, similarity, 0)
    if beta is None or tau is None:
        return similarity
    beta, tau = per_row(beta, rows, dtype)[:, None], per_row(tau, rows, dtype)[:, None]
    linear = tau == 0
    # Selecting before dividing keeps the branch not taken finite, so its gradient is 0 and not NaN.
    z = torch.where(linear, 0, similarity - beta) / torch.where(linear, 1, tau)
    return torch.where(linear, similarity, row_sigmoid(z))


def per_row(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:  # [P] or [B, R] -> [B, R]
    return table.to(dtype) if table.dim() == 2 else select_rows(table, rows, dtype)


def strengths(
    updates: Updates, rows: Tensor, owner: Tensor | None, dtype: torch.dtype
) -> Tensor | None:  # [B, R], [B, R] -> [B, 1, R]
    if updates.strength is None:
        return None
    strength = updates.strength.to(dtype)
    strength = strength if owner is None else strength.gather(1, owner)
    return torch.where(taken_slots(rows, updates.up.shape[0]), strength, 0)[:, None]


def weights(
    updates: Updates, rows: Tensor, owner: Tensor | None, dtype: torch.dtype
) -> Tensor | None:  # [B, R], [B, R] -> [B, N, R]
    if updates.token_weights is None:
        return None
    weights = updates.token_weights.to(dtype)
    if owner is not None:
        weights = weights.gather(1, owner[:, :, None].expand(-1, -1, weights.shape[2]))
    return torch.where(taken_slots(rows, updates.up.shape[0])[:, None], weights.mT, 0)


def scaled(values: Tensor, factor: Tensor | None) -> Tensor:  # [B, N, R]
    """values times factor, 0 where that is 0; differentiable there all the same."""
    if factor is None:
        return values
    return torch.where(values.isfinite() | (factor != 0), values, 0) * factor


def coefficients(x: Tensor | None, updates: Updates, rows: Tensor, owner: Tensor | None) -> Tensor:  # [B, N, R]
    if updates.coefficients is not None:
        c = updates.coefficients.to(accumulate_dtype(updates.coefficients.dtype))
    else:
        assert x is not None and updates.down is not None  # what the schema cannot say
        c = gates(x, updates.down, rows, updates.beta, updates.tau)
        c = scaled(scaled(c, strengths(updates, rows, owner, c.dtype)), weights(updates, rows, owner, c.dtype))
    return without_absent(c, rows, updates.up.shape[0])


def without_absent(c: Tensor, rows: Tensor, count: int) -> Tensor:  # [B, N, R]
    """Coefficients with 0 for row -1 and NaN for a row that does not exist."""
    absent = torch.where(rows == -1, 0.0, torch.nan).to(c.dtype)[:, None]
    return torch.where(taken_slots(rows, count)[:, None], c, absent)


def added(x: Tensor | None, updates: Updates, dtype: torch.dtype) -> Tensor:  # [B, N, O]
    """sum_r c[b, n, r] up[rows[b, r]]."""
    rows, owner = table_rows(updates)
    c = coefficients(x, updates, rows, owner).to(dtype)
    return selected_matmul(c, select_rows(updates.up, rows, dtype))


def update(base: Tensor, x: Tensor | None, updates: Updates) -> Tensor:  # [B, N, O]
    dtype = accumulate_dtype(base.dtype)
    return (base.to(dtype) + added(x, updates, dtype)).to(base.dtype)


def linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
) -> Tensor:  # [B, N, O]
    return finished(unscaled(x, weight, updates), bias, output_scale).to(x.dtype)


def unscaled(x: Tensor, weight: Tensor, updates: Updates) -> Tensor:  # [B, N, O], not yet rounded
    dtype = accumulate_dtype(x.dtype)
    return base_product(x, weight) + added(x, updates, dtype)


def base_product(x: Tensor, weight: Tensor) -> Tensor:  # [B, N, O], not yet rounded
    dtype = accumulate_dtype(x.dtype)
    return row_matmul(x.to(dtype), weight.to(dtype).mT)


def finished(y: Tensor, bias: Tensor | None, output_scale: Tensor | None) -> Tensor:  # [B, N, O]
    y = y if output_scale is None else y * output_scale.to(y.dtype)[:, None]
    return y if bias is None else y + bias.to(y.dtype)


def add_to_rows(parts: Tensor, rows: Tensor, count: int) -> Tensor:  # [B, R, ...], [B, R] -> [P, ...]
    """The transpose of select_rows: a part reaches the row it belongs to and no other."""
    index = torch.where(taken_slots(rows, count), rows, count).flatten().long()
    sums = parts.new_zeros(count + 1, *parts.shape[2:])  # the last one collects what took no row
    if parts.device.type == "cpu":
        sums.index_add_(0, index, parts.flatten(0, 1))
    else:  # sorts instead of using atomics, so that repeated runs agree
        sums.index_put_((index,), parts.flatten(0, 1), accumulate=True)
    return sums[:count]


def added_backward(
    grad: Tensor,  # [B, N, O], in the accumulation dtype
    up: Tensor,  # [P, O]
    rows: Tensor,  # [B, R]
    c: Tensor,  # [B, N, R], in the accumulation dtype
    need_up: bool,
    need_c: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dup[p] = sum over b, n and r with rows[b, r] = p of c grad;  dc[b, n, r] = grad . up[rows[b, r]]."""
    taken = taken_slots(rows, up.shape[0])[:, None]
    dup = dc = None
    if need_up:
        dup = add_to_rows(selected_matmul(torch.where(taken, c, 0).mT, grad), rows, up.shape[0])
    if need_c:
        dc = torch.where(taken, row_matmul(grad, select_rows(up, rows, grad.dtype).mT), 0)
    return dup, dc


def coefficients_backward(
    dc: Tensor,  # [B, N, R], in the accumulation dtype
    x: Tensor,  # [B, N, K]
    updates: Updates,
    rows: Tensor,  # [B, R]
    owner: Tensor | None,  # [B, R]
    need_x: bool,
) -> dict[str, Tensor]:
    """Gradients of x, down, beta, tau, strength and token_weights, in the accumulation dtype."""
    down, beta, tau = updates.down, updates.beta, updates.tau
    assert down is not None
    dtype, x, count = dc.dtype, x.to(dc.dtype), down.shape[0]
    found: dict[str, Tensor] = {}
    taken = taken_slots(rows, count)[:, None]
    directions = select_rows(down, rows, dtype)
    dc = torch.where(taken, dc, 0)
    value = gates(x, down, rows, beta, tau)
    found |= factor_gradients(torch.where(taken, dc * value, 0), updates, rows, owner)
    ds = scaled(scaled(dc, strengths(updates, rows, owner, dtype)), weights(updates, rows, owner, dtype))
    if beta is not None and tau is not None:
        beta_row, tau_row = per_row(beta, rows, dtype)[:, None], per_row(tau, rows, dtype)[:, None]
        sloped = taken & (tau_row != 0)
        width = torch.where(sloped, tau_row, 1)
        similarity = torch.where(sloped, row_matmul(x, directions.mT), 0)
        dz = torch.where(sloped, ds * value * (1 - value) / width, 0)
        dbeta = -dz.sum(1)
        dtau = -torch.where(sloped, dz * (similarity - beta_row) / width, 0).sum(1)
        ds = torch.where(sloped, dz, ds)
        found["beta"] = dbeta if beta.dim() == 2 else add_to_rows(dbeta, rows, count)
        found["tau"] = dtau if tau.dim() == 2 else add_to_rows(dtau, rows, count)
    if need_x:
        found["x"] = selected_matmul(ds, directions)
    found["down"] = add_to_rows(selected_matmul(ds.mT, x), rows, count)
    return found


def factor_gradients(
    product: Tensor,  # [B, N, R]
    updates: Updates,
    rows: Tensor,  # [B, R]
    owner: Tensor | None,  # [B, R]
) -> dict[str, Tensor]:
    """Gradients of strength and token_weights; product is dc times what they scale, 0 where nothing is taken."""
    of_slot, of_token = strengths(updates, rows, owner, product.dtype), weights(updates, rows, owner, product.dtype)
    found = {}
    if of_slot is not None:
        found["strength"] = _to_slots(scaled(product, of_token).sum(1, keepdim=True), updates, owner)[:, 0]
    if of_token is not None:
        found["token_weights"] = _to_slots(scaled(product, of_slot), updates, owner).mT
    return found


def _to_slots(parts: Tensor, updates: Updates, owner: Tensor | None) -> Tensor:  # [B, N, R] -> [B, N, J]
    """The sum over what each slot takes, in a fixed order."""
    if owner is None:
        return parts
    slots = torch.arange(updates.slots.shape[1], device=owner.device)
    return selected_matmul(parts, (owner[:, :, None] == slots).to(parts.dtype)) if len(slots) else parts[..., :0]
