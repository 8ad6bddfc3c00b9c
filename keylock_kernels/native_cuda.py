"""The forward kernels of csrc/cuda on GPU tensors: what they take is checked, outputs allocated, and they are launched.

Without autograd; the ops of `keylock_kernels` put it around them. They write new memory, which overlaps nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from .ops.checks import check_like
from .ops.low_rank import reference
from .ops.low_rank.updates import Updates

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def missing() -> str | None:
    """Why there are no CUDA kernels in this process, or None."""
    if not native.available():
        return native.unavailable_reason()
    if hasattr(native.extension(), "cuda_sources"):
        return None
    return native.build_info()["cuda"]["reason"]


def sources() -> str | None:
    """What tells the sources that the kernels were compiled from; None where there are none."""
    return None if missing() is not None else native.extension().cuda_sources


def _module() -> Any:
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"CUDA kernels are not available: {reason}")
    return native.extension()


_DEVICE = "cuda"  # a test emulates the kernels on the CPU


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _described(value: Any, types: Any) -> Any:
    """What csrc/descriptions.h takes for a tensor, or for the tensors in a tuple; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_described(one, types) for one in value)
    if not isinstance(value, Tensor):
        return value
    dtype = getattr(types, str(value.dtype).removeprefix("torch."))
    return value.data_ptr(), dtype, tuple(value.shape), value.stride()


def _launch(op: str, name: str, device: torch.device, *arguments: Any) -> None:
    """Calls a kernel of the module on a device's current stream; tensors are described to it."""
    module = _module()
    described = _described(arguments, module.DataType)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            status = getattr(module, name)(*described, _stream(device))
    else:
        status = getattr(module, name)(*described, _stream(device))
    if status == module.Status.too_many_streams:
        raise ValueError(f"{op}: image_lengths must be at most {module.max_image_streams} streams with backend 'cuda'")
    if status != module.Status.ok:
        raise RuntimeError(f"{op}: the CUDA kernel was not launched: {status.name}")


def _check_device(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device.type != _DEVICE:
        raise ValueError(f"{op}: {name} must be on a {_DEVICE} device, got {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must be float16, bfloat16 or float32 with backend 'cuda', got {tensor.dtype}")


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def localized_attention(
    query: Tensor,  # [B, N, H, D]
    key: Tensor,  # [B, T, H, D]
    value: Tensor,  # [B, T, H, D]
    scale: float,
    key_bias: Tensor | None,  # [B, T]
    query_regions: Tensor | None,  # [B, N]
    key_regions: Tensor | None,  # [B, T]
    image_key: Tensor | None,  # [B, sum(L), H, D]
    image_value: Tensor | None,  # [B, sum(L), H, D]
    image_lengths: list[int],
    image_key_bias: Tensor | None,  # [B, sum(L)]
    image_weights: Tensor | None,  # [B, I] or [B, I, N]
    readout_tokens: Tensor | None,  # [B, M]
    readout_weights: Tensor | None,  # [B, N, M]
) -> tuple[Tensor, Tensor]:  # [B, N, H, D], and [B, H, N, M] or [B, H, M]
    """The op's forward; arguments as in ops/localized_attention/op.py.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or layout, or too many streams.
        RuntimeError: there are no CUDA kernels, or the launch failed.
    """
    name = "localized_attention"
    _check_device(name, "query", query)
    rows, pixels, heads, width = query.shape
    keys, total, device = key.shape[1], sum(image_lengths), query.device
    same, sides, ints = (query.dtype,), (query.dtype, torch.float32), (torch.int32,)
    read = 0 if readout_tokens is None else readout_tokens.shape[1]
    per_pixel = image_weights is not None and image_weights.dim() == 3
    weight_shape = (rows, len(image_lengths), *([pixels] if per_pixel else []))
    wanted = {
        "query": (query, same, (rows, pixels, heads, width)),
        "key": (key, same, (rows, keys, heads, width)),
        "value": (value, same, (rows, keys, heads, width)),
        "key_bias": (key_bias, sides, (rows, keys)),
        "query_regions": (query_regions, ints, (rows, pixels)),
        "key_regions": (key_regions, ints, (rows, keys)),
        "image_key": (image_key, same, (rows, total, heads, width)),
        "image_value": (image_value, same, (rows, total, heads, width)),
        "image_key_bias": (image_key_bias, sides, (rows, total)),
        "image_weights": (image_weights, sides, weight_shape),
        "readout_tokens": (readout_tokens, ints, (rows, read)),
        "readout_weights": (readout_weights, sides, (rows, pixels, read)),
    }
    for label, (tensor, dtypes, shape) in wanted.items():
        if tensor is not None:
            check_like(name, label, tensor, dtypes, shape, device)
            if len(shape) == 4 and tensor.stride(-1) != 1 and width > 1:
                raise ValueError(f"{name}: {label}'s last dimension must be contiguous, got stride {tensor.stride(-1)}")
    if not 1 <= width <= 256:
        raise ValueError(f"{name}: query's head dimension must be 1 to 256, got {width}")
    module = _module()
    out = query.new_empty(query.shape)
    if readout_weights is None:
        readout = query.new_empty((rows, heads, pixels, read), dtype=torch.float32)
    else:
        sums = -(-pixels // module.readout_pixels)
        readout = query.new_empty((rows, heads, sums, read), dtype=torch.float32)
    if image_weights is not None:
        image_weights = image_weights if per_pixel else image_weights[..., None].expand(-1, -1, pixels)
    if out.numel() > 0:
        inputs = (
            query, key, value, scale, key_bias, query_regions, key_regions, image_key, image_value,
            list(image_lengths) if image_key is not None else [], image_key_bias, image_weights,
            readout_tokens if read else None, readout_weights if read else None,
        )  # fmt: skip
        _launch(name, "cuda_localized_attention", device, inputs, out, readout if read else None)
    if readout_tokens is None:
        return out, readout.new_empty((rows, heads, 0))
    return out, readout if readout_weights is None else readout.sum(2)


def low_rank_linear(
    x: Tensor,  # [B, N, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    output_scale: Tensor | None,  # [B, O]
    updates: Updates,
) -> Tensor:  # [B, N, O]
    """output_scale * (x weight^T + the updates) + bias; a slot that does not exist makes its row NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
        RuntimeError: there are no CUDA kernels, or the launch failed.
    """
    name = "low_rank_linear"
    _check_device(name, "x", x)
    rows, tokens, inner = x.shape
    sides = (x.dtype, torch.float32)
    check_like(name, "weight", weight, (x.dtype,), ("O", inner), x.device)
    outer = weight.shape[0]
    if bias is not None:
        check_like(name, "bias", bias, sides, (outer,), x.device)
    if output_scale is not None:
        check_like(name, "output_scale", output_scale, sides, (rows, outer), x.device)
    read = _with_coefficients(name, x, updates, (rows, tokens, outer), x)
    x, weight = _rows_contiguous(x), _rows_contiguous(weight)
    y = x.new_empty(rows, tokens, outer)
    if y.numel() > 0:
        _launch(name, "cuda_low_rank_linear", x.device, x, weight, bias, output_scale, read, y)
    return y


def low_rank_update(base: Tensor, x: Tensor | None, updates: Updates) -> Tensor:  # [B, N, O], [B, N, K]
    """base + the updates; a slot that does not exist makes its row NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
        RuntimeError: there are no CUDA kernels, or the launch failed.
    """
    name = "low_rank_update"
    _check_device(name, "base", base)
    read = _with_coefficients(name, x, updates, tuple(base.shape), base)
    base = _rows_contiguous(base)
    y = base.new_empty(base.shape)
    if y.numel() > 0:
        _launch(name, "cuda_low_rank_update", base.device, base, read, y)
    return y


def _with_coefficients(
    name: str,
    x: Tensor | None,  # [B, N, K]
    updates: Updates,
    shape: tuple[int, ...],  # (B, N, O)
    like: Tensor,
) -> tuple[Tensor | None, ...]:
    """The updates as the kernels read them: rows of one table, and what is multiplied with them."""
    rows, tokens, outer = shape
    check_like(name, "up", updates.up, (like.dtype, torch.float32), ("P", outer), like.device)
    check_like(name, "slots", updates.slots, (torch.int32,), (rows, "J"), like.device)
    taken, owner = reference.table_rows(updates)
    if updates.coefficients is None:
        c = reference.coefficients(x, updates, taken, owner)
    else:
        c = updates.coefficients
        check_like(name, "coefficients", c, (like.dtype, torch.float32), (rows, tokens, taken.shape[1]), like.device)
    return _rows_contiguous(updates.up), None, None, taken.int(), None, None, c.float()
