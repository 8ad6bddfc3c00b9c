"""How far a result may lie from the one in float64: no number of it is chosen by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

# Two computations that are both in float64 have nothing more exact beside them: of the largest element, some thousand
# roundings, and far less than any mistake.
FLOAT64 = 1e-12


def widened(value: Any) -> Any:
    """Copies of modules, and tensors of real numbers, in float64, however deep they lie."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: widened(item) for key, item in value.items()}
    return type(value)(widened(item) for item in value) if isinstance(value, (list, tuple)) else value


def solved_exactly(matrix: Tensor, right: Tensor) -> Tensor:  # [N, N], [N, M] -> [N, M]
    """matrix^-1 right in float64, by elimination in fractions: every element is the nearest there is."""
    rows = [
        [*map(Fraction, row), *map(Fraction, more)] for row, more in zip(matrix.tolist(), right.tolist(), strict=True)
    ]
    for column in range(len(rows)):
        pivot = next(n for n in range(column, len(rows)) if rows[n][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [item / rows[column][column] for item in rows[column]]
        for n, row in enumerate(rows):
            if n != column and row[column]:
                rows[n] = [a - row[column] * b for a, b in zip(row, rows[column], strict=True)]
    return torch.tensor([[float(item) for item in row[len(rows) :]] for row in rows], dtype=torch.float64)


def assert_as_accurate(
    ours: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    *,
    largest: bool = True,
) -> None:
    """Ours err against float64 at most twice what plain torch errs in its dtype, plus a rounding of every element.

    Errors are in units of a tensor's largest element; over all tensors, the largest and their root mean square count.

    Args:
        ours: what is judged.
        eager: plain torch's, or diffusers'.
        exact: in float64.
        largest: whether the largest error counts; after a whole model, which element is the worst is chance.
    """
    ours, eager, exact = ([side] if isinstance(side, Tensor) else list(side) for side in (ours, eager, exact))
    assert [t.shape for t in ours] == [t.shape for t in eager] == [t.shape for t in exact]
    exact = [right.detach().double() for right in exact]
    scales = [right.abs().max().clamp(min=1e-30) for right in exact]

    def flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([(part / scale).flatten() for part, scale in zip(parts, scales, strict=True)])

    def error(found: Sequence[Tensor]) -> Tensor:
        return flat([tensor.detach().double() - right for tensor, right in zip(found, exact, strict=True)])

    norms = (lambda tensor: tensor.square().mean().sqrt(), lambda tensor: tensor.abs().max())
    for norm in norms if largest else norms[:1]:
        mistake, allowed = float(norm(error(ours))), float(norm(error(eager)))
        rounding = torch.finfo(eager[0].dtype).eps * float(norm(flat(exact)))
        assert mistake <= 2 * allowed + rounding, (mistake, allowed, rounding)  # False for NaN
