"""From what a tool trained to a low-rank update: LoRA, LoCon, LoHa, LoKr, or a whole difference.

    LoRA   scale * up @ down                                       rank r
    LoCon  scale * up @ (mid * down)                               rank r; mid is a convolution between r channels
    LoHa   scale * (w1_a @ w1_b) o (w2_a @ w2_b)                   rank r1 r2: the row-wise Khatri-Rao product
    LoKr   scale * w1 (x) w2, each whole or a product              rank rank(w1) rank(w2): factors' Kronecker products
    full   diff                                                    whatever it is

A convolution's weight [O, C, kh, kw] is the matrix [O, C kh kw] throughout. What has a rank of at most `MAX_RANK` is
taken exactly; anything else only with the error that the caller allows.

Papers: LyCORIS, Yeh et al. 2023, arXiv 2309.14859; FedPara (LoHa), Hyeon-Woo et al. 2021, arXiv 2108.06098; KronA
(LoKr), Edalati et al. 2022, arXiv 2212.10650.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from keylock_diffusers.loras.adapter import LowRank
from keylock_diffusers.loras.spellings import LOHA, LOHA_TUCKER, LOKR, PAIR

MAX_RANK = 128
Shape = tuple[int, ...]
Matrices = tuple[Tensor, Tensor, float]  # up [O, r], down [r, C kh kw], the error of a truncation

# What rounding the result to float32 leaves out anyway.
_ROUNDING = torch.finfo(torch.float32).eps
_EXTRAS = {"alpha", "dora_scale", "magnitude"}


class WrongShape(ValueError):
    """A tensor does not fit the weight of the module that it names."""


def kind_of(parts: Mapping[str, object]) -> str:
    """Which of the kinds above a module's tensors make.

    Raises:
        ValueError: some are missing, too many, or of another kind.
    """
    given = parts.keys() - _EXTRAS
    for kind, (needed, optional) in _KINDS.items():
        if given in (needed, needed | optional):
            return kind
    if given and given <= set(LOKR):
        for w in ("lokr_w1", "lokr_w2"):
            if (w in given, len(given & {f"{w}_a", f"{w}_b"})) not in ((True, 0), (False, 2)):
                raise ValueError(f"half of LoKr: needs {w}, or {w}_a and {w}_b, got {_listed(given)}")
        if {"lokr_t2", "lokr_w2"} <= given:
            raise ValueError(f"LoKr takes lokr_t2 beside lokr_w2_a and lokr_w2_b only, got {_listed(given)}")
        return "LoKr"
    if not given:
        raise ValueError(f"{_listed(parts.keys())} without the weights that it belongs to")
    for kind, (needed, optional) in _KINDS.items():
        if given <= needed | optional:
            raise ValueError(f"half of {kind}: needs {_listed(needed)}, got {_listed(given)}")
    raise ValueError(f"tensors of several kinds for one module: {_listed(given)}")


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by; None where nothing is.

    LoKr of two whole matrices has none: its scale is 1 whatever alpha says, in LyCORIS as in ComfyUI.

    Raises:
        ValueError: LoKr's factors have two ranks, which its readers disagree about.
    """
    names = {"LoRA": ("down",), "LoCon": ("down",), "LoHa": ("hada_w1_b",), "LoKr": ("lokr_w1_b", "lokr_w2_b")}
    ranks = {(*shapes[name], 0)[0] for name in names.get(kind, ()) if name in shapes}
    if len(ranks) > 1 and "alpha" in shapes:
        raise ValueError(f"LoKr with factors of ranks {sorted(ranks)}: what alpha is divided by is not known")
    return max(ranks, default=None)


def check_shapes(kind: str, shapes: Mapping[str, Shape], weight: Shape) -> None:
    """Make sure, by shapes alone, that a module's tensors make a weight of its shape.

    Raises:
        WrongShape: naming what does not fit.
    """
    _CHECKS[kind](shapes, weight)
    if "alpha" in shapes and prod(shapes["alpha"]) != 1:
        raise WrongShape(f"alpha must be one number, got {list(shapes['alpha'])}")
    for name in ("dora_scale", "magnitude"):
        if name in shapes:
            _check_magnitude(name, shapes[name], weight)


def low_rank(
    kind: str, parts: Mapping[str, Tensor], weight: Shape, scale: float, max_error: float | None = None
) -> LowRank:
    """One module's update.

    Args:
        kind: what `kind_of` said.
        parts: the tensors, floating point, of the shapes that `check_shapes` passed.
        weight: shape of the module's weight.
        scale: what multiplies the product.
        max_error: relative Frobenius error that a truncation to rank `MAX_RANK` may make; None allows none.

    Returns:
        The update; its factors have the dtype of the file's where they are the file's, and float32 otherwise.

    Raises:
        ValueError: the rank is above `MAX_RANK` and the error not allowed.
    """
    up, down, residual = _FACTORS[kind](parts, weight, max_error)
    kernel = weight[2:]
    if kernel:
        down = down.reshape(len(down), weight[1], *kernel)
    magnitude = parts.get("dora_scale", parts.get("magnitude"))
    return LowRank(
        down.contiguous(), up.contiguous(), scale, None if magnitude is None else magnitude.flatten().float(), residual
    )


def _lora(parts: Mapping[str, Tensor], weight: Shape, max_error: float | None) -> Matrices:
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    if up.dtype != down.dtype:
        up, down = up.float(), down.float()
    return up, down, 0.0


def _locon(parts: Mapping[str, Tensor], weight: Shape, max_error: float | None) -> Matrices:
    down = torch.einsum("ij...,jc->ic...", parts["mid"].double(), parts["down"].flatten(1).double())
    return parts["up"].flatten(1).float(), down.flatten(1).float(), 0.0


def _loha(parts: Mapping[str, Tensor], weight: Shape, max_error: float | None) -> Matrices:
    halves = []
    for half in ("1", "2"):
        up, down = parts[f"hada_w{half}_a"].double(), parts[f"hada_w{half}_b"].double()
        core = parts.get(f"hada_t{half}")
        halves.append((up, down) if core is None else _tucker(core, up, down))
    (up1, down1), (up2, down2) = halves
    if len(down1) * len(down2) > MAX_RANK:
        return _truncated(*_svd((up1 @ down1) * (up2 @ down2)), max_error)
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return up.float(), down.float(), 0.0


def _lokr(parts: Mapping[str, Tensor], weight: Shape, max_error: float | None) -> Matrices:
    factors = []
    for w in ("lokr_w1", "lokr_w2"):
        if w in parts:
            whole = parts[w].flatten(1).double()
            one = torch.eye(min(whole.shape), dtype=torch.float64)
            factors.append((one, whole) if len(whole) <= whole.shape[1] else (whole, one))
        elif w == "lokr_w2" and "lokr_t2" in parts:
            factors.append(_tucker(parts["lokr_t2"], parts["lokr_w2_a"].double(), parts["lokr_w2_b"].double()))
        else:
            factors.append((parts[f"{w}_a"].double(), parts[f"{w}_b"].flatten(1).double()))
    (up1, down1), (up2, down2) = factors
    if len(down1) * len(down2) <= MAX_RANK:
        return _kron(up1, up2).float(), _kron(down1, down2).float(), 0.0
    # The singular values of a Kronecker product are the products of the factors', and so are the vectors.
    (u1, s1, v1), (u2, s2, v2) = _svd(up1 @ down1), _svd(up2 @ down2)
    s, order = torch.outer(s1, s2).flatten().sort(descending=True)
    first, second = order[:MAX_RANK] // len(s2), order[:MAX_RANK] % len(s2)
    up = (u1[:, None, first] * u2[None, :, second]).flatten(0, 1)
    down = (v1[first, :, None] * v2[second, None, :]).flatten(1)
    return _truncated(up, s, down, max_error)


def _full(parts: Mapping[str, Tensor], weight: Shape, max_error: float | None) -> Matrices:
    return _truncated(*_svd(parts["diff"].flatten(1).double()), max_error)


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of sum_ij core[i, j, ...] up[i, o] down[j, c]: as LyCORIS stores them, `up` stands on its side."""
    return up.T, torch.einsum("ij...,jc->ic...", core.double(), down).flatten(1)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """torch.kron of matrices, which fails where one has a row only and strides of a transposition."""
    return (first[:, None, :, None] * second[None, :, None, :]).flatten(2).flatten(0, 1)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _truncated(u: Tensor, s: Tensor, v: Tensor, max_error: float | None) -> Matrices:
    """Factors of the smallest rank that errs as allowed, of which u and v may hold the first columns and rows only."""
    energy = s.square()
    total = float(energy.sum())
    # left_out[r]: the relative error of keeping r; summed from the small end, where rounding would drown it otherwise.
    left_out = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).div(total or 1).sqrt()
    rank = max(1, int((left_out > max(max_error or 0.0, _ROUNDING)).sum()))
    if rank > MAX_RANK:
        raise ValueError(
            f"of a rank above {MAX_RANK}; the best of rank {MAX_RANK} errs by {float(left_out[MAX_RANK]):.2g} of its "
            f"Frobenius norm, which max_error={max_error} does not allow"
        )
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float(), float(left_out[rank])


def _check_pair(shapes: Mapping[str, Shape], weight: Shape) -> None:
    rank = (shapes["down"] or (0,))[0]
    down = [(rank, *weight[1:]), (rank, prod(weight[1:]))]
    if prod(weight[2:]) == 1:  # a Linear, or a convolution over single pixels that other tools write as one
        down.append((rank, weight[1], 1, 1))
    _require("down", shapes, *down)
    _require("up", shapes, (weight[0], rank), (weight[0], rank, *(1,) * max(2, len(weight) - 2)))


def _check_locon(shapes: Mapping[str, Shape], weight: Shape) -> None:
    rank = (shapes["down"] or (0,))[0]
    ones = (1,) * len(weight[2:])
    _require("down", shapes, (rank, weight[1]), (rank, weight[1], *ones))
    _require("mid", shapes, (rank, rank, *weight[2:]))
    _require("up", shapes, (weight[0], rank), (weight[0], rank, *ones))


def _check_loha(shapes: Mapping[str, Shape], weight: Shape) -> None:
    for half in ("1", "2"):
        up, down, core = f"hada_w{half}_a", f"hada_w{half}_b", f"hada_t{half}"
        rank = (shapes[down] or (0,))[0]
        if core in shapes:
            _check_tucker(core, up, down, shapes, (weight[0], weight[1], *weight[2:]))
        else:
            _require(up, shapes, (weight[0], rank))
            _require(down, shapes, (rank, prod(weight[1:])))


def _check_lokr(shapes: Mapping[str, Shape], weight: Shape) -> None:
    first = _whole_shape("lokr_w1", shapes)
    if not first[0] or not first[1] or weight[0] % first[0] or prod(weight[1:]) % first[1]:
        raise WrongShape(f"lokr_w1 {list(first)} does not divide the module's weight {list(weight)}")
    second = (weight[0] // first[0], prod(weight[1:]) // first[1])
    if "lokr_t2" in shapes:
        kernel = weight[2:]
        _check_tucker("lokr_t2", "lokr_w2_a", "lokr_w2_b", shapes, (second[0], second[1] // prod(kernel), *kernel))
    elif _whole_shape("lokr_w2", shapes) != second:
        raise WrongShape(
            f"lokr_w2 must be {list(second)} beside lokr_w1 {list(first)} for the module's weight {list(weight)}, "
            f"got {list(_whole_shape('lokr_w2', shapes))}"
        )


def _whole_shape(w: str, shapes: Mapping[str, Shape]) -> Shape:
    """The matrix that a factor of LoKr, whole or a product, makes."""
    if w in shapes:
        if len(shapes[w]) < 2:
            raise WrongShape(f"{w} must be a matrix or a convolution's weight, got {list(shapes[w])}")
        return shapes[w][0], prod(shapes[w][1:])
    a, b = shapes[f"{w}_a"], shapes[f"{w}_b"]
    if len(a) != 2 or len(b) < 2 or a[1] != b[0] or not b[0]:
        raise WrongShape(f"{w}_a and {w}_b must be [o, r] and [r, i], got {list(a)} and {list(b)}")
    return a[0], prod(b[1:])


def _check_tucker(core: str, up: str, down: str, shapes: Mapping[str, Shape], weight: Shape) -> None:
    rank = (shapes[down] or (0,))[0]
    _require(up, shapes, (rank, weight[0]))
    _require(down, shapes, (rank, weight[1]))
    _require(core, shapes, (rank, rank, *weight[2:]))


def _check_full(shapes: Mapping[str, Shape], weight: Shape) -> None:
    _require("diff", shapes, weight)


def _check_magnitude(name: str, shape: Shape, weight: Shape) -> None:
    rows = weight[0]
    right = [(rows,), (rows, *(1,) * (len(weight) - 1))]
    if name == "magnitude":
        right.append((1, rows, *(1,) * (len(weight) - 2)))  # PEFT's of a convolution
    elif shape in ((1, weight[1]), (1, weight[1], *(1,) * len(weight[2:]))) and shape not in right:
        raise ValueError("DoRA over the inputs (LyCORIS with wd_on_output=False), which is not supported")
    if shape not in right:
        raise WrongShape(f"{name} must be {list(right[1])} for the module's weight {list(weight)}, got {list(shape)}")


def _require(name: str, shapes: Mapping[str, Shape], *right: Shape) -> None:
    if shapes[name] not in right or not all(shapes[name]):
        raise WrongShape(f"{name} must be {list(right[0])}, got {list(shapes[name])}")


def _listed(names: object) -> str:
    return ", ".join(sorted(names))  # type: ignore[call-overload]


_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "LoRA": ({*PAIR}, set()),
    "LoCon": ({*PAIR, "mid"}, set()),
    "LoHa": ({*LOHA}, {*LOHA_TUCKER}),
    "full": ({"diff"}, set()),
}
_CHECKS: dict[str, Callable[[Mapping[str, Shape], Shape], None]] = {
    "LoRA": _check_pair,
    "LoCon": _check_locon,
    "LoHa": _check_loha,
    "LoKr": _check_lokr,
    "full": _check_full,
}
_FACTORS: dict[str, Callable[[Mapping[str, Tensor], Shape, float | None], Matrices]] = {
    "LoRA": _lora,
    "LoCon": _locon,
    "LoHa": _loha,
    "LoKr": _lokr,
    "full": _full,
}
