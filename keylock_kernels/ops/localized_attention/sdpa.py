"""Localized attention composed from torch's scaled_dot_product_attention, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..precision import accumulate_dtype
from ..rows import CACHE_LINE, LANE, round_up, starts_on_lines
from .reference import Stream, columns

# Scores held at once while reading columns out: 16 MiB of float32.
CHUNK_SCORES = 1 << 22


def attention(query: Tensor, stream: Stream, scale: float) -> Tensor:  # [B, N, H, D]
    """One stream as one SDPA call, in SDPA's own output dtype."""
    if query.numel() == 0 or stream.key.numel() == 0:
        return torch.zeros_like(query, dtype=accumulate_dtype(query.dtype))
    q, k, v, mask, some = query, stream.key, stream.value, None, None
    if stream.visible is not None:
        some = stream.visible.any(-1, keepdim=True)  # [B, 1 or N, 1]
        # SDPA's backends differ on a pixel that sees nothing: it sees everything, and is dropped below.
        if stream.bias is None:
            mask = (stream.visible | ~some)[:, None]
        else:
            # A bias wider than the inputs keeps its width: it is part of the scores.
            wide = torch.promote_types(q.dtype, stream.bias.dtype)
            q, k, v, bias = q.to(wide), k.to(wide), v.to(wide), stream.bias.to(wide)
            mask = torch.where(some, torch.where(stream.visible, bias[:, None], -torch.inf), 0)[:, None]
    out = _call(q, k, v, mask, scale)
    if some is not None:
        out = torch.where(some[..., None], out, 0)
    return out if stream.taint is None else out * stream.taint.to(out.dtype)[..., None]


def _call(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, D]
    mask: Tensor | None,  # [B, 1, 1 or N, T]
    scale: float,
) -> Tensor:  # [B, N, H, D]
    pixels, width = q.shape[1], q.shape[3]
    if q.device.type == "cpu":
        q, k, v, mask = _on_lines(q, k, v, mask)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)[:, :pixels, :, :width]


def _on_lines(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, D]
    mask: Tensor | None,  # [B, 1, 1 or N, T]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pad odd sizes so that SDPA's CPU kernel, too, gives a row the same bits anywhere (see rows.py).

    Its scratch buffers lie one per thread, sized by the number of pixels: those must be even lines too.
    """
    pixels = q.shape[1]
    more = round_up(pixels) - pixels
    if any(t[0].numel() * t.element_size() % CACHE_LINE for t in (q, k)):
        wider = round_up(q.shape[3]) - q.shape[3]
        q, k, v = F.pad(q, (0, wider)), F.pad(k, (0, wider)), F.pad(v, (0, wider))
    if more:
        q = F.pad(q, (0, 0, 0, 0, 0, more))
        if mask is not None and mask.shape[2] == pixels > 1:
            mask = F.pad(mask, (0, 0, 0, more), value=mask.dtype == torch.bool)
    q, k, v = (t if starts_on_lines(t) else t.contiguous() for t in (q, k, v))
    return q, k, v, mask


def read_columns(
    query: Tensor,  # [B, N, H, D]
    stream: Stream,
    scale: float,
    tokens: Tensor,  # [B, M]
    weights: Tensor | None,  # [B, N, M]
) -> Tensor:  # [B, H, N, M], or [B, H, M] with weights
    """The reference's columns a block of pixels at a time, computed again in backward: no N x T is kept."""
    rows, pixels, heads, _ = query.shape
    block = max(LANE, CHUNK_SCORES // max(1, rows * heads * stream.key.shape[1]) // LANE * LANE)
    if pixels <= block and not torch.is_grad_enabled():
        return columns(query, stream, scale, tokens, weights)
    pieces = []
    for start in range(0, max(pixels, 1), block):
        here = slice(start, start + block)
        visible = stream.visible
        part = stream._replace(
            visible=visible if visible is None or visible.shape[1] == 1 else visible[:, here],
            taint=None if stream.taint is None else stream.taint[:, here],
        )
        arguments = (query[:, here], part, scale, tokens, None if weights is None else weights[:, here])
        if torch.is_grad_enabled():
            pieces.append(checkpoint(columns, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(columns(*arguments))
    return torch.cat(pieces, 2) if weights is None else torch.stack(pieces).sum(0)
