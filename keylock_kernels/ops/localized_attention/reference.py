"""Localized attention in plain torch: what every other backend must compute.

``attention`` and ``columns`` hold the mathematics of one stream; the functions below them put
streams together and take another backend's version of those two as an argument. All of it
differentiates under plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import accumulate_dtype
from ..rows import row_matmul


class Stream(NamedTuple):
    """Keys and values under one softmax, with what nobody may see already selected away."""

    key: Tensor  # [B, T, H, D]
    value: Tensor  # [B, T, H, D]
    bias: Tensor | None  # [B, T]
    visible: Tensor | None  # [B, 1 or N, T]; None: everything is
    taint: Tensor | None  # [B, N, H]; 1, or NaN where a pixel sees a key or value that is not finite
    first: int  # the number of its first key among the read-out tokens


def make_stream(
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    bias: Tensor | None,  # [B, T]
    query_regions: Tensor | None = None,  # [B, N]
    key_regions: Tensor | None = None,  # [B, T]
    first: int = 0,
) -> Stream:
    visible = taint = None
    if bias is not None:
        visible = (bias != -torch.inf)[:, None]
    if query_regions is not None and key_regions is not None:
        shared = (query_regions[:, :, None] & key_regions[:, None]) != 0
        visible = shared if visible is None else visible & shared
    if visible is not None:
        # A probability of 0 times NaN is NaN, so a hidden key must go before any product.
        seen = visible.any(1)[:, :, None, None]
        key, value = torch.where(seen, key, 0), torch.where(seen, value, 0)
    if visible is not None and key_regions is not None:
        # Seen from some pixels only: zeros for all, and NaN put back where it is seen.
        broken = ~(key.isfinite() & value.isfinite()).all(-1)  # [B, T, H]
        taint = torch.where(visible.float() @ broken.float() > 0, torch.nan, 1.0)
        key, value = torch.where(broken[..., None], 0, key), torch.where(broken[..., None], 0, value)
    return Stream(key, value, bias, visible, taint, first)


def probabilities(query: Tensor, stream: Stream, scale: float) -> Tensor:  # [B, N, H, D] -> [B, H, N, T]
    """The softmax over the visible keys; zeros for a pixel that sees none."""
    dtype = accumulate_dtype(query.dtype)
    (rows, pixels, heads, _), keys = query.shape, stream.key.shape[1]
    q = query.to(dtype).transpose(1, 2).flatten(0, 1)
    k = stream.key.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    scores = row_matmul(q, k).view(rows, heads, pixels, keys) * scale
    if stream.bias is not None:
        scores = scores + stream.bias.to(dtype)[:, None, None]
    if stream.visible is None:
        return scores.softmax(-1)
    visible = stream.visible[:, None]
    some = visible.any(-1, keepdim=True)
    # A softmax over nothing but -inf is NaN, forward and backward: such pixels take another row.
    scores = torch.where(some, torch.where(visible, scores, -torch.inf), 0)
    return torch.where(some, scores.softmax(-1), 0)


def attention(query: Tensor, stream: Stream, scale: float) -> Tensor:  # [B, N, H, D]
    """sum_t P[n, t] V[t] of one stream, in the accumulation dtype."""
    p = probabilities(query, stream, scale)
    v = stream.value.to(p.dtype).transpose(1, 2).flatten(0, 1)
    out = row_matmul(p.flatten(0, 1), v).view(*p.shape[:3], v.shape[-1]).transpose(1, 2)
    return out if stream.taint is None else out * stream.taint[..., None]


def columns(
    query: Tensor,  # [B, N, H, D]
    stream: Stream,
    scale: float,
    tokens: Tensor,  # [B, M]
    weights: Tensor | None,  # [B, N, M]
) -> Tensor:  # [B, H, N, M], or [B, H, M] with weights
    """The columns of P that ``tokens`` name, or their weighted sums; zeros for other streams' tokens."""
    keys = stream.key.shape[1]
    index = tokens - stream.first
    inside = (index >= 0) & (index < keys)  # [B, M]
    reads = inside.any(1)[:, None, None, None]
    # A row that reads nothing here must not meet this stream's NaN on the way back either.
    stream = stream._replace(key=torch.where(reads, stream.key, 0))
    p = probabilities(torch.where(reads, query, 0), stream, scale)
    one_hot = (torch.arange(keys, device=index.device)[:, None] == index[:, None]).to(p.dtype)  # [B, T, M]
    picked = row_matmul(p.flatten(1, 2), one_hot).view(*p.shape[:3], tokens.shape[1])
    if stream.taint is not None:
        picked = picked * stream.taint.mT[..., None]
    if weights is None:
        return torch.where(inside[:, None, None], picked, 0)
    return torch.where(inside[:, None, None], picked * weights.to(p.dtype)[:, None], 0).sum(2)


Attend = Callable[[Tensor, Stream, float], Tensor]
Read = Callable[[Tensor, Stream, float, Tensor, Tensor | None], Tensor]


def weighted(query: Tensor, stream: Stream, scale: float, weight: Tensor | None, attend: Attend) -> Tensor:
    """w_i P_i V_i; where w_i is 0 exactly 0 in out and in every gradient but that of w_i itself."""
    dtype = accumulate_dtype(query.dtype)
    if weight is None:
        return attend(query, stream, scale).to(dtype)
    w = (weight if weight.dim() == 2 else weight[:, None]).to(dtype)[..., None, None]  # [B, 1 or N, 1, 1]
    off = w == 0
    if not torch.is_grad_enabled():
        return torch.where(off, 0, w * attend(query, stream, scale).to(dtype))
    nowhere = off.all(1, keepdim=True)
    stream = stream._replace(
        key=torch.where(nowhere, stream.key.detach(), stream.key),
        value=torch.where(nowhere, stream.value.detach(), stream.value),
        bias=None if stream.bias is None else torch.where(nowhere[:, 0, 0], stream.bias.detach(), stream.bias),
    )
    out = attend(torch.where(off, query.detach(), query), stream, scale).to(dtype)
    finite = out.detach().nan_to_num(0, 0, 0)  # w_i's gradient at 0 is still the inner product
    return torch.where(off, w * finite, torch.where(off, 1, w) * out)


def image_streams(
    image_key: Tensor | None,  # [B, sum(L), H, D]
    image_value: Tensor | None,  # [B, sum(L), H, D]
    lengths: list[int],
    bias: Tensor | None,  # [B, sum(L)]
    first: int,
) -> list[Stream]:
    if image_key is None or image_value is None:
        return []
    streams, start = [], 0
    for length in lengths:
        here = slice(start, start + length)
        part = None if bias is None else bias[:, here]
        streams.append(make_stream(image_key[:, here], image_value[:, here], part, first=first + start))
        start += length
    return streams


def combine(
    query: Tensor,  # [B, N, H, D]
    text: Stream,
    images: list[Stream],
    image_weights: Tensor | None,  # [B, I] or [B, I, N]
    scale: float,
    attend: Attend = attention,
) -> Tensor:  # [B, N, H, D]
    """out = P V + sum_i w_i P_i V_i, rounded once."""
    out = attend(query, text, scale)
    for i, stream in enumerate(images):
        weight = None if image_weights is None else image_weights[:, i]
        out = out.to(accumulate_dtype(query.dtype)) + weighted(query, stream, scale, weight, attend)
    return out.to(query.dtype)


def read_out(
    query: Tensor,  # [B, N, H, D]
    streams: list[Stream],
    tokens: Tensor,  # [B, M]
    weights: Tensor | None,  # [B, N, M]
    scale: float,
    read: Read = columns,
) -> Tensor:  # [B, H, N, M], or [B, H, M] with weights
    """Each token's column comes from the one stream it lies in; the others give zeros."""
    total = read(query, streams[0], scale, tokens, weights)
    for stream in streams[1:]:
        total = total + read(query, stream, scale, tokens, weights)
    return total
