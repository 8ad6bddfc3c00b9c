"""localized_attention: validation, backend, one op call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend as backends
from ..checks import check_like, check_tensor, dtype_name, side_dtypes
from ..precision import autocast_inputs
from . import op

NAME = "localized_attention"
MAX_HEAD_DIM = 256


def localized_attention(
    query: Tensor,  # [B, N, H, D]
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,  # [B, T]
    query_regions: Tensor | None = None,  # [B, N]
    key_regions: Tensor | None = None,  # [B, T]
    image_key: Tensor | None = None,  # [B, sum(L), H, D]
    image_value: Tensor | None = None,  # [B, sum(L), H, D]
    image_lengths: Sequence[int] = (),
    image_key_bias: Tensor | None = None,  # [B, sum(L)]
    image_weights: Tensor | None = None,  # [B, I] or [B, I, N]
    readout_tokens: Tensor | None = None,  # [B, M]
    readout_weights: Tensor | None = None,  # [B, N, M]
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-attention with regions, decoupled image streams and read-out of attention maps.

    ::

        out[n] = sum_t P[n, t] V[t]  +  sum_i w_i[n] sum_t P_i[n, t] V_i[t]
        P      = softmax over the visible t of  scale (query[n] . key[t]) + key_bias[t]
        t is visible from n  iff  query_regions[n] & key_regions[t] != 0  and  key_bias[t] > -inf

    Every stream has a softmax of its own. A pixel that sees no key of a stream gets zeros from it,
    and a hidden key or a weight of exactly 0 contributes exactly nothing, whatever it holds.

    Args:
        query: one query per pixel, float16, bfloat16, float32 or float64 [B, N, H, D], D at most 256.
        key, value: the text stream, query's dtype [B, T, H, D].
        scale: factor on the products; default D ** -0.5.
        key_bias: added to the scores, query's dtype or float32 [B, T]; -inf hides a key.
        query_regions: the regions each pixel lies in, a bit each, int32 [B, N].
        key_regions: the regions each text key may be seen from, int32 [B, T]; with query_regions
            or not at all.
        image_key, image_value: the image streams side by side, query's dtype [B, sum(L), H, D].
        image_lengths: (L_1, ..., L_I), the number of keys of each image stream.
        image_key_bias: query's dtype or float32 [B, sum(L)]; -inf hides a key.
        image_weights: w_i per row [B, I] or per pixel [B, I, N], query's dtype or float32; default 1.
        readout_tokens: keys whose columns are read out, int32 [B, M]: text keys first, then image
            keys; -1 reads zeros.
        readout_weights: r, query's dtype or float32 [B, N, M]; absent: columns instead of sums.
        backend: "auto", "native" (CPU tensors), "triton" or "cuda" (GPU tensors), "sdpa" or "eager".

    The last dimension of query, keys and values is contiguous; other strides are free.

    Returns:
        out [B, N, H, D] in query's dtype, accumulated in float32 (float64 for float64). With
        readout_tokens a pair (out, maps [B, H, N, M]), the columns of P or of P_i before w_i, or
        (out, readout [B, H, M]) with readout = sum_n r[n, m] P[n, m]; float32 (float64 for float64).
        Under autocast query, keys and values are cast as SDPA's are.

    Raises:
        TypeError: an argument is not a tensor, or image_lengths are not ints.
        ValueError: a dtype, shape, device or combination does not fit, the backend cannot run, or
            (CPU only) a read-out token does not exist. On a GPU such a token reads NaN.
        RuntimeError: a CUDA graph is being captured, and Triton has no kernel for such arguments yet: call the op
            once before, with the same arguments and wanted gradients (docs/performance.md, "Captured graphs").

    Papers: Xiao et al., FastComposer, arXiv 2305.10431 (regions, localization loss); Ye et al.,
    IP-Adapter, arXiv 2308.06721 (image streams).

    Example:
        >>> import torch
        >>> from keylock_kernels import localized_attention
        >>> query, key, value = torch.randn(2, 64, 8, 40), torch.randn(2, 77, 8, 40), torch.randn(2, 77, 8, 40)
        >>> tokens = torch.tensor([[5], [-1]], dtype=torch.int32)  # row 1 reads nothing
        >>> out, maps = localized_attention(query, key, value, readout_tokens=tokens)
        >>> out.shape, maps.shape
        (torch.Size([2, 64, 8, 40]), torch.Size([2, 8, 64, 1]))
    """
    query, key, value, image_key, image_value = autocast_inputs(query, key, value, image_key, image_value)
    check_tensor(NAME, "query", query, dims=4, like="[B, N, H, D]")
    rows, pixels, heads, width = query.shape
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"{NAME}: query's head dimension must be 1 to {MAX_HEAD_DIM}, got {width}")
    same, sides, device = (query.dtype,), side_dtypes(query.dtype), query.device
    check_like(NAME, "key", key, same, (rows, "T", heads, width), device)
    keys = key.shape[1]
    check_like(NAME, "value", value, same, (rows, keys, heads, width), device)
    if key_bias is not None:
        check_like(NAME, "key_bias", key_bias, sides, (rows, keys), device)
    if (query_regions is None) != (key_regions is None):
        given = "key_regions" if query_regions is None else "query_regions"
        raise ValueError(f"{NAME}: query_regions and key_regions are given together or not at all, got only {given}")
    if query_regions is not None:
        check_like(NAME, "query_regions", query_regions, (torch.int32,), (rows, pixels), device)
        check_like(NAME, "key_regions", key_regions, (torch.int32,), (rows, keys), device)
    lengths = _check_images(query, image_key, image_value, image_lengths, image_key_bias, image_weights)
    if readout_tokens is not None:
        check_like(NAME, "readout_tokens", readout_tokens, (torch.int32,), (rows, "M"), device)
        if readout_weights is not None:
            shape = (rows, pixels, readout_tokens.shape[1])
            check_like(NAME, "readout_weights", readout_weights, sides, shape, device)
    elif readout_weights is not None:
        raise ValueError(f"{NAME}: readout_weights need readout_tokens, got none")
    dense = {"query": query, "key": key, "value": value, "image_key": image_key, "image_value": image_value}
    for label, tensor in dense.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{NAME}: {label}'s last dimension must be contiguous, got stride {tensor.stride(-1)}")
    chosen = backends.choose(NAME, backend, device, query.dtype)
    out, readout = op.localized_attention(
        query, key, value, width**-0.5 if scale is None else float(scale), key_bias, query_regions, key_regions,
        image_key, image_value, lengths, image_key_bias, image_weights, readout_tokens, readout_weights, chosen,
    )  # fmt: skip
    return out if readout_tokens is None else (out, readout)


def _check_images(
    query: Tensor,  # [B, N, H, D]
    image_key: Tensor | None,  # [B, sum(L), H, D]
    image_value: Tensor | None,  # [B, sum(L), H, D]
    image_lengths: Sequence[int],
    image_key_bias: Tensor | None,  # [B, sum(L)]
    image_weights: Tensor | None,  # [B, I] or [B, I, N]
) -> list[int]:
    rows, pixels, heads, width = query.shape
    sides = side_dtypes(query.dtype)
    if (image_key is None) != (image_value is None):
        given = "image_value" if image_key is None else "image_key"
        raise ValueError(f"{NAME}: image_key and image_value are given together or not at all, got only {given}")
    lengths = list(image_lengths)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"{NAME}: image_lengths must be ints, got {type(length).__name__}")
        if length < 0:
            raise ValueError(f"{NAME}: image_lengths must not be negative, got {length}")
    if image_key is None:
        for label, given_value in (("image_key_bias", image_key_bias), ("image_weights", image_weights)):
            if given_value is not None:
                raise ValueError(f"{NAME}: {label} needs image_key, got none")
        if lengths:
            raise ValueError(f"{NAME}: image_lengths needs image_key, got none")
        return lengths
    total = sum(lengths)
    check_like(NAME, "image_key", image_key, (query.dtype,), (rows, "sum(L)", heads, width), query.device)
    if image_key.shape[1] != total:
        raise ValueError(f"{NAME}: image_lengths must add up to image_key's {image_key.shape[1]} keys, got {total}")
    check_like(NAME, "image_value", image_value, (query.dtype,), (rows, total, heads, width), query.device)
    if image_key_bias is not None:
        check_like(NAME, "image_key_bias", image_key_bias, sides, (rows, total), query.device)
    if image_weights is not None:
        per_pixel = isinstance(image_weights, Tensor) and image_weights.dim() == 3
        shape = (rows, len(lengths), pixels) if per_pixel else (rows, len(lengths))
        if isinstance(image_weights, Tensor) and image_weights.dim() not in (2, 3):
            raise ValueError(
                f"{NAME}: image_weights must be [{rows}, {len(lengths)}] or [{rows}, {len(lengths)}, {pixels}], "
                f"got {dtype_name(image_weights.dtype)} {list(image_weights.shape)}"
            )
        check_like(NAME, "image_weights", image_weights, sides, shape, query.device)
    return lengths
