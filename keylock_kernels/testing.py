"""What tests and benchmarks of the ops share: real shapes, inputs, oracles and the tolerance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One cross-attention level of a published model."""

    model: str
    pixels: int  # N
    tokens: int  # T
    heads: int  # H
    head_dim: int  # D
    text_width: int  # K of to_k and to_v

    @property
    def name(self) -> str:
        return f"{self.model}-{self.pixels}x{self.heads}x{self.head_dim}"

    @property
    def width(self) -> int:  # O of to_k and to_v
        return self.heads * self.head_dim


SHAPES = (
    Shape("sd1.5", 4096, 77, 8, 40, 768),
    Shape("sd1.5", 1024, 77, 8, 80, 768),
    Shape("sd1.5", 256, 77, 8, 160, 768),
    Shape("sd1.5", 64, 77, 8, 160, 768),
    Shape("sd2.1", 9216, 77, 5, 64, 1024),
    Shape("sd2.1", 2304, 77, 10, 64, 1024),
    Shape("sd2.1", 576, 77, 20, 64, 1024),
    Shape("sd2.1", 144, 77, 20, 64, 1024),
    Shape("sdxl", 4096, 77, 10, 64, 2048),
    Shape("sdxl", 1024, 77, 20, 64, 2048),
    Shape("pixart-alpha", 4096, 120, 16, 72, 1152),
    Shape("sana-1.6b", 1024, 300, 20, 112, 2240),
)


@dataclass(frozen=True)
class Projection:
    """One linear layer of a published model's attention blocks, and how many tokens a row has there."""

    model: str
    layer: str
    tokens: int  # N
    inner: int  # K
    outer: int  # O

    @property
    def name(self) -> str:
        return f"{self.model}-{self.layer}-{self.tokens}x{self.inner}x{self.outer}"


# to_out, proj_in and proj_out have to_q's shape, and to_v to_k's; ff_in is a GEGLU's.
PROJECTIONS = tuple(
    projection
    for s in SHAPES
    if s.model in ("sd1.5", "sdxl") and s.pixels >= 256
    for projection in (
        Projection(s.model, "to_q", s.pixels, s.width, s.width),
        Projection(s.model, "to_k", s.tokens, s.text_width, s.width),
        Projection(s.model, "ff_in", s.pixels, s.width, 8 * s.width),
        Projection(s.model, "ff_out", s.pixels, 4 * s.width, s.width),
    )
)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs with every floating-point tensor in ``dtype``."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _moved(inputs: dict[str, Any], device: torch.device | str | None) -> dict[str, Any]:
    target = torch.get_default_device() if device is None else device
    return {k: v.to(target) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def rank_one_inputs(
    rows: int,  # B
    tokens: int,  # T
    inner: int,  # K
    outer: int,  # O
    updates: int,  # S
    taken: int,  # R
    *,
    gate: str | None = "table",  # None, "table" [S] or "row" [B, R]
    bias: bool = True,
    strength: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,  # default: torch's
) -> dict[str, Any]:
    """Arguments of rank_one_linear, similarities of order one; some slots -1 and some repeated."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    inputs: dict[str, Any] = {
        "x": normal(rows, tokens, inner),
        "weight": normal(outer, inner) / math.sqrt(max(inner, 1)),
        "u": normal(updates, outer),
        "v": normal(updates, inner) / math.sqrt(max(inner, 1)),
        "slots": torch.randint(-1, updates, (rows, taken), generator=generator, dtype=torch.int32, device="cpu"),
    }
    if bias:
        inputs["bias"] = normal(outer)
    if gate is not None:
        size = (updates,) if gate == "table" else (rows, taken)
        inputs["beta"] = 0.3 * normal(*size)
        inputs["tau"] = 0.3 + 0.4 * torch.rand(*size, generator=generator, dtype=torch.float64, device="cpu")
    if strength:
        inputs["strength"] = normal(rows, taken)
    return _moved(cast(inputs, dtype), device)


def low_rank_inputs(
    rows: int,  # B
    tokens: int,  # N
    inner: int,  # K
    outer: int,  # O
    ranks: Sequence[int],  # of S adapters
    taken: int,  # J
    *,
    bias: bool = True,
    strength: bool = True,
    weights: bool = True,
    scale: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,  # default: torch's
) -> dict[str, Any]:
    """Arguments of low_rank_linear, updates of order one; some slots -1 and some repeated, some factors 0."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def some(values: Tensor) -> Tensor:
        return values.masked_fill(torch.rand(values.shape, generator=generator, device="cpu") < 0.2, 0)

    every = sum(ranks)
    inputs: dict[str, Any] = {
        "x": normal(rows, tokens, inner),
        "weight": normal(outer, inner) / math.sqrt(max(inner, 1)),
        "up": normal(every, outer) / math.sqrt(max(ranks, default=1) or 1),
        "down": normal(every, inner) / math.sqrt(max(inner, 1)),
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32, device="cpu"),
        "slots": torch.randint(-1, len(ranks), (rows, taken), generator=generator, dtype=torch.int32, device="cpu"),
    }
    if bias:
        inputs["bias"] = normal(outer)
    if strength:
        inputs["strength"] = some(normal(rows, taken))
    if weights:
        inputs["token_weights"] = some(normal(rows, taken, tokens))
    if scale:
        inputs["output_scale"] = 1 + 0.3 * normal(rows, outer)
    return _moved(cast(inputs, dtype), device)


def attention_inputs(
    rows: int,  # B
    pixels: int,  # N
    tokens: int,  # T
    heads: int,  # H
    head_dim: int,  # D
    *,
    images: tuple[int, ...] = (),
    bias: bool = False,
    regions: bool = False,
    weights: str | None = None,  # None, "row" [B, I] or "pixel" [B, I, N]
    read: int = 0,  # M
    sums: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,  # default: torch's
) -> dict[str, Any]:
    """Arguments of localized_attention; some keys hidden, some weights 0, some read-outs -1."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def chance(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu") < 0.2

    def bits(*shape: int) -> Tensor:  # two of the 32 regions, the sign bit among them
        drawn = torch.randint(0, 4, shape, generator=generator, device="cpu")
        return torch.where(drawn >= 2, drawn - 2 - 2**31, drawn).to(torch.int32)

    keys = sum(images)
    inputs: dict[str, Any] = {
        "query": normal(rows, pixels, heads, head_dim),
        "key": normal(rows, tokens, heads, head_dim),
        "value": normal(rows, tokens, heads, head_dim),
    }
    if bias:
        inputs["key_bias"] = normal(rows, tokens).masked_fill(chance(rows, tokens), -torch.inf)
    if regions:
        inputs["query_regions"], inputs["key_regions"] = bits(rows, pixels), bits(rows, tokens)
    if images:
        inputs["image_key"], inputs["image_value"] = (normal(rows, keys, heads, head_dim) for _ in range(2))
        inputs["image_lengths"] = images
        if bias:
            inputs["image_key_bias"] = normal(rows, keys).masked_fill(chance(rows, keys), -torch.inf)
        if weights is not None:
            size = (rows, len(images)) if weights == "row" else (rows, len(images), pixels)
            inputs["image_weights"] = normal(*size).masked_fill(chance(*size), 0)
    if read:
        drawn = torch.randint(-1, tokens + keys, (rows, read), generator=generator, device="cpu")
        inputs["readout_tokens"] = drawn.to(torch.int32)
        if sums:
            inputs["readout_weights"] = normal(rows, pixels, read)
    return _moved(cast(inputs, dtype), device)


def assert_as_accurate_as_eager(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    what: str = "result",
    *,
    roundings: int = 1,
    mean_roundings: int = 1,
) -> None:
    """``actual`` may err at most twice what eager in the same dtype errs, plus one rounding.

    Args:
        actual: what is judged.
        eager: the eager backend's result on the same inputs, in the same dtype.
        exact: the reference's float64 result on the same inputs.
        what: named in the message.
        roundings: how many, of the largest element, its error may add to eager's.
        mean_roundings: the same of the root mean square.
    """
    if actual.dtype != eager.dtype or actual.shape != eager.shape or actual.shape != exact.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {list(actual.shape)} beside eager's {eager.dtype} {list(eager.shape)} "
            f"and {list(exact.shape)}"
        )
    if exact.numel() == 0:
        return
    exact = exact.double()
    rounding = torch.finfo(actual.dtype).eps
    for name, norm, extra in (
        ("largest", _largest, roundings),
        ("root mean square", _root_mean_square, mean_roundings),
    ):
        error = norm(actual.double() - exact)
        allowed = 2 * norm(eager.double() - exact) + extra * rounding * norm(exact)
        if not error <= allowed:  # also true for NaN
            raise AssertionError(f"{what}: {name} error {error:.3e}, allowed {allowed:.3e}")


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _root_mean_square(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def rank_one_by_loops(
    x: Tensor,  # [B, T, K]
    weight: Tensor,  # [O, K]
    u: Tensor,  # [S, O]
    v: Tensor,  # [S, K]
    slots: Tensor,  # [B, R]
    bias: Tensor | None = None,  # [O]
    beta: Tensor | None = None,  # [S] or [B, R]
    tau: Tensor | None = None,  # [S] or [B, R]
    strength: Tensor | None = None,  # [B, R]
) -> Tensor:  # [B, T, O]
    """rank_one_linear one token and one update at a time."""
    y = torch.stack([row @ weight.T for row in x])
    if bias is not None:
        y = y + bias
    for b, t, r in torch.cartesian_prod(*(torch.arange(n) for n in (*x.shape[:2], slots.shape[1]))).tolist():
        slot = int(slots[b, r])
        if slot == -1:
            continue
        c = (x[b, t] * v[slot]).sum()
        if beta is not None and tau is not None:
            middle, width = (p[slot] if p.dim() == 1 else p[b, r] for p in (beta, tau))
            c = c if width == 0 else 1 / (1 + torch.exp(-(c - middle) / width))
        y[b, t] = y[b, t] + c * (1 if strength is None else strength[b, r]) * u[slot]
    return y


def low_rank_by_loops(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    up: Tensor,  # [P, O]
    down: Tensor,  # [P, K]
    offsets: Tensor,  # [S + 1]
    slots: Tensor,  # [B, J]
    bias: Tensor | None = None,  # [O]
    strength: Tensor | None = None,  # [B, J]
    token_weights: Tensor | None = None,  # [B, J, N]
    output_scale: Tensor | None = None,  # [B, O]
) -> Tensor:  # [B, N, O]
    """low_rank_linear with each token's own weight matrix, made and multiplied."""
    y = []
    for b, n in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:2])).tolist():
        whole = weight
        for j, slot in enumerate(slots[b].tolist()):
            factor = 1.0 if strength is None else strength[b, j]
            factor = factor if token_weights is None else factor * token_weights[b, j, n]
            if slot >= 0 and factor != 0:
                adapter = slice(*offsets[slot : slot + 2].tolist())
                whole = whole + factor * up[adapter].T @ down[adapter]
        out = whole @ x[b, n]
        out = out if output_scale is None else out * output_scale[b]
        y.append(out if bias is None else out + bias)
    return torch.stack(y).view(*x.shape[:2], -1) if y else x.new_zeros(*x.shape[:2], weight.shape[0])


def attention_by_loops(
    query: Tensor,  # [B, N, H, D]
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    scale: float | None = None,
    key_bias: Tensor | None = None,  # [B, T]
    query_regions: Tensor | None = None,  # [B, N]
    key_regions: Tensor | None = None,  # [B, T]
    image_key: Tensor | None = None,  # [B, sum(L), H, D]
    image_value: Tensor | None = None,  # [B, sum(L), H, D]
    image_lengths: tuple[int, ...] = (),
    image_key_bias: Tensor | None = None,  # [B, sum(L)]
    image_weights: Tensor | None = None,  # [B, I] or [B, I, N]
) -> tuple[Tensor, Tensor]:  # out [B, N, H, D], every column [B, H, N, T + sum(L)]
    """localized_attention one pixel, head and stream at a time, over visible keys only."""
    (rows, pixels, heads, width), tokens = query.shape, key.shape[1]
    scale = width**-0.5 if scale is None else scale
    out = torch.zeros_like(query)
    maps = query.new_zeros(rows, heads, pixels, tokens + sum(image_lengths))

    def stream(
        b: int, n: int, h: int, k: Tensor, v: Tensor, bias: Tensor | None, hidden: set[int], first: int
    ) -> Tensor:
        seen = [t for t in range(k.shape[1]) if t not in hidden and (bias is None or bias[b, t] != -torch.inf)]
        if not seen:
            return torch.zeros_like(out[b, n, h])
        scores = torch.stack([scale * (query[b, n, h] * k[b, t, h]).sum() for t in seen])
        if bias is not None:
            scores = scores + bias[b, seen]
        p = torch.exp(scores - scores.max())
        p = p / p.sum()
        maps[b, h, n, [first + t for t in seen]] = p
        return (p[:, None] * v[b, seen, h]).sum(0)

    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in (rows, pixels, heads))).tolist():
        hidden: set[int] = set()
        if query_regions is not None and key_regions is not None:
            here, there = int(query_regions[b, n]), key_regions[b].tolist()
            hidden = {t for t in range(tokens) if here & there[t] == 0}
        out[b, n, h] = stream(b, n, h, key, value, key_bias, hidden, 0)
        start = 0
        for i, length in enumerate(image_lengths):
            assert image_key is not None and image_value is not None
            part = slice(start, start + length)
            bias = None if image_key_bias is None else image_key_bias[:, part]
            shown = stream(b, n, h, image_key[:, part], image_value[:, part], bias, set(), tokens + start)
            w = (
                1.0
                if image_weights is None
                else float(image_weights[b, i] if image_weights.dim() == 2 else image_weights[b, i, n])
            )
            out[b, n, h] += w * shown
            start += length
    return out, maps


def rome_weight(
    weight: Tensor,  # [O, K]
    target_input: Tensor,  # [K]
    target_output: Tensor,  # [O]
    second_moment: Tensor,  # [K, K]
) -> Tensor:  # [O, K]
    """W + (o* - W i*) (C^-1 i*)^T / (i*^T C^-1 i*): rank-one model editing, Meng et al., arXiv 2202.05262."""
    direction = torch.linalg.solve(second_moment, target_input)
    return weight + torch.outer(target_output - weight @ target_input, direction) / (target_input @ direction)


def perfusion_output(
    encodings: Tensor,  # [T, K]
    weight: Tensor,  # [O, K]
    target_inputs: Tensor,  # [J, K]
    target_outputs: Tensor,  # [J, O]
    second_moment: Tensor,  # [K, K]
    beta: Tensor,  # [J]
    tau: Tensor,  # [J]
) -> Tensor:  # [T, O]
    """Key-locked editing by the paper's route, Cholesky and QR, all strengths 1 (arXiv 2305.01644)."""
    # In coordinates where C^-1 is the identity, the targets' span is projected out orthogonally.
    factor = torch.linalg.cholesky(torch.linalg.inv(second_moment))  # C^-1 = factor factor^T
    targets, tokens = target_inputs @ factor, encodings @ factor
    basis = torch.linalg.qr(targets.T).Q
    inside = torch.linalg.solve(factor.T, (tokens @ basis @ basis.T).T).T
    similarity = tokens @ targets.T / targets.square().sum(1)
    return (encodings - inside) @ weight.T + torch.sigmoid((similarity - beta) / tau) @ target_outputs


def combined_coefficients(
    encodings: Tensor,  # [T, K]
    target_inputs: Tensor,  # [J, K]
    second_moment: Tensor,  # [K, K]
    strength: Tensor,  # [J]
) -> Tensor:  # [T, J]
    """a(e) of (Lambda G + (I - Lambda) diag(G)) a(e) = Lambda [i*_j^T C^-1 e]_j."""
    directions = torch.linalg.solve(second_moment, target_inputs.T).T
    gram = directions @ target_inputs.T
    on = torch.diag(strength)
    system = on @ gram + (torch.eye(len(strength), dtype=gram.dtype) - on) @ torch.diag(gram.diag())
    return torch.linalg.solve(system, on @ (directions @ encodings.T)).T


def localization_weights(masks: Tensor) -> Tensor:  # [B, N, M], values 0 or 1 -> [B, N, M]
    """r of FastComposer's loss: attention outside the mask costs, inside it pays (arXiv 2305.10431)."""
    outside = 1 - masks
    return outside / outside.sum(1, keepdim=True) - masks / masks.sum(1, keepdim=True)
