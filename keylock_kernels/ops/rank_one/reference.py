"""The gated rank-one update in plain torch: what every other backend must compute.

Forward functions differentiate under plain autograd, which is how the gradients written out at
the end are checked. Slot -1 is exactly nothing, by selection. A slot outside [-1, S) is NaN for
its row: that is what kernels write where raising would cost a device synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import accumulate_dtype
from ..rows import row_matmul, row_sigmoid


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


def gates(
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
) -> Tensor:  # [B, T, R]
    """s = x . v[slot] where tau is 0 or absent, else sigmoid((s - beta) / tau)."""
    dtype = accumulate_dtype(x.dtype)
    taken = taken_slots(slots, v.shape[0])[:, None]
    similarity = row_matmul(x.to(dtype), select_rows(v, slots, dtype).mT)
    similarity = torch.where(taken, similarity, 0)
    if beta is None or tau is None:
        return similarity
    beta, tau = per_row(beta, slots, dtype)[:, None], per_row(tau, slots, dtype)[:, None]
    linear = tau == 0
    # Selecting before dividing keeps the branch not taken finite, so its gradient is 0 and not NaN.
    z = torch.where(linear, 0, similarity - beta) / torch.where(linear, 1, tau)
    return torch.where(linear, similarity, row_sigmoid(z))


def per_row(table: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:  # [S] or [B, R] -> [B, R]
    return table.to(dtype) if table.dim() == 2 else select_rows(table, slots, dtype)


def coefficients(
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
) -> Tensor:  # [B, T, R]
    values = gates(x, v, slots, beta, tau)
    if strength is not None:
        values = values * strength.to(values.dtype)[:, None]
    return without_absent(values, slots, v.shape[0])


def without_absent(c: Tensor, slots: Tensor, count: int) -> Tensor:  # [B, T, R]
    """Coefficients with 0 for slot -1 and NaN for a slot that does not exist."""
    absent = torch.where(slots == -1, 0.0, torch.nan).to(c.dtype)[:, None]
    return torch.where(taken_slots(slots, count)[:, None], c, absent)


def added(u: Tensor, slots: Tensor, c: Tensor) -> Tensor:  # [S, O], [B, R], [B, T, R] -> [B, T, O]
    """sum_r c[b, t, r] u[slots[b, r]] in c's dtype."""
    return row_matmul(without_absent(c, slots, u.shape[0]), select_rows(u, slots, c.dtype))


def update(base: Tensor, u: Tensor, slots: Tensor, c: Tensor) -> Tensor:  # [B, T, O]
    dtype = accumulate_dtype(base.dtype)
    return (base.to(dtype) + added(u, slots, c.to(dtype))).to(base.dtype)


def linear(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    bias: Tensor | None,  # [O]
    c: Tensor,  # [B, T, R]
) -> Tensor:  # [B, T, O]
    return (base_product(x, weight, bias) + added(u, slots, c.to(accumulate_dtype(x.dtype)))).to(x.dtype)


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [B, T, O], not yet rounded
    dtype = accumulate_dtype(x.dtype)
    base = row_matmul(x.to(dtype), weight.to(dtype).mT)
    return base if bias is None else base + bias.to(dtype)


def add_to_slots(rows: Tensor, slots: Tensor, count: int) -> Tensor:  # [B, R, ...], [B, R] -> [S, ...]
    """The transpose of select_rows: a row reaches the slot it took and no other."""
    index = torch.where(taken_slots(slots, count), slots, count).flatten().long()
    sums = rows.new_zeros(count + 1, *rows.shape[2:])  # the last one collects what took no slot
    if rows.device.type == "cpu":
        sums.index_add_(0, index, rows.flatten(0, 1))
    else:  # sorts instead of using atomics, so that repeated runs agree
        sums.index_put_((index,), rows.flatten(0, 1), accumulate=True)
    return sums[:count]


def added_backward(
    grad: Tensor,  # [B, T, O], in the accumulation dtype
    u: Tensor,  # [S, O]
    slots: Tensor,  # [B, R]
    c: Tensor,  # [B, T, R], in the accumulation dtype
    need_u: bool,
    need_c: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """du[s] = sum over b, t and r with slots[b, r] = s of c grad;  dc[b, t, r] = grad . u[slots[b, r]]."""
    taken = taken_slots(slots, u.shape[0])[:, None]
    du = dc = None
    if need_u:
        du = add_to_slots(row_matmul(torch.where(taken, c, 0).mT, grad), slots, u.shape[0])
    if need_c:
        dc = torch.where(taken, row_matmul(grad, select_rows(u, slots, grad.dtype).mT), 0)
    return du, dc


def coefficients_backward(
    dc: Tensor,  # [B, T, R], in the accumulation dtype
    x: Tensor,  # [B, T, K]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    beta: Tensor | None,  # [S] or [B, R]
    tau: Tensor | None,  # [S] or [B, R]
    strength: Tensor | None,  # [B, R]
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, v, beta, tau and strength, in the accumulation dtype."""
    dtype = dc.dtype
    x = x.to(dtype)
    taken = taken_slots(slots, v.shape[0])[:, None]
    rows = select_rows(v, slots, dtype)
    dc = torch.where(taken, dc, 0)
    value = gates(x, v, slots, beta, tau)
    dstrength = dbeta = dtau = None
    if strength is not None:
        dstrength = torch.where(taken, dc * value, 0).sum(1)
        dc = torch.where(taken, dc * strength.to(dtype)[:, None], 0)
    ds = dc
    if beta is not None and tau is not None:
        beta_row, tau_row = per_row(beta, slots, dtype)[:, None], per_row(tau, slots, dtype)[:, None]
        sloped = taken & (tau_row != 0)
        width = torch.where(sloped, tau_row, 1)
        similarity = torch.where(sloped, row_matmul(x, rows.mT), 0)
        dz = torch.where(sloped, dc * value * (1 - value) / width, 0)
        dbeta = -dz.sum(1)
        dtau = -torch.where(sloped, dz * (similarity - beta_row) / width, 0).sum(1)
        ds = torch.where(sloped, dz, dc)
        dbeta = dbeta if beta.dim() == 2 else add_to_slots(dbeta, slots, v.shape[0])
        dtau = dtau if tau.dim() == 2 else add_to_slots(dtau, slots, v.shape[0])
    dx = row_matmul(ds, rows) if need_x else None
    dv = add_to_slots(row_matmul(ds.mT, x), slots, v.shape[0])
    return dx, dv, dbeta, dtau, dstrength
