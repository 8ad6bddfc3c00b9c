"""Projections with what rows add to them: W x + sum of c u, whatever wraps the projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from keylock_diffusers.denoisers.neighbours import own_forward
from keylock_diffusers.denoisers.unet import base_layer
from keylock_diffusers.processors.contract import AdapterUpdates, RowUpdates
from keylock_diffusers.processors.routed import adapters_of, bound, is_routed, updated_linear, updated_vectors
from keylock_kernels import rank_one_linear, rank_one_update
from keylock_kernels.ops.precision import exact_products
from keylock_kernels.ops.rows import row_matmul

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def keys_and_values(
    attn: Any,
    layer: str,
    streams: tuple[Tensor, Tensor],  # what keys and what values read, [B, T, D] each
    updates: Callable[[str], RowUpdates | None],
    adapters: Callable[[str], AdapterUpdates | None] = lambda projection: None,
) -> tuple[Tensor, Tensor]:  # [B, T, C] each
    """A layer's keys and values, with the updates and the adapters of ``<layer>.to_k`` and ``<layer>.to_v``.

    Raises:
        ValueError: the layer normalises its text, for which updates are not defined.
    """
    wanted = updates(f"{layer}.to_k"), updates(f"{layer}.to_v")
    key_text, text = streams
    if attn.norm_cross:
        if any(update is not None for update in wanted):
            raise ValueError(f"{layer}: concepts are not defined for a layer that normalises its text")
        key_text, text = (attn.norm_encoder_hidden_states(stream) for stream in streams)
    key = project(attn.to_k, key_text, wanted[0], adapters(f"{layer}.to_k"))
    return key, project(attn.to_v, text, wanted[1], adapters(f"{layer}.to_v"))


def project(
    projection: nn.Module,
    x: Tensor,  # [B, T, D]
    updates: RowUpdates | None,
    adapters: AdapterUpdates | None = None,
) -> Tensor:  # [B, T, O]
    """W x + bias, the rows' updates and their adapters.

    What has no update goes through the same op, so that a row's bits do not depend on whether another has one.
    """
    u, slots, coefficients = _nothing(projection, x) if updates is None else updates
    if adapters is not None:
        return rank_one_update(_with_adapters(projection, x, adapters), u, slots, coefficients)
    if is_plain_linear(projection):
        return rank_one_linear(x, projection.weight, u, None, slots, bias=projection.bias, coefficients=coefficients)
    return rank_one_update(projection(x), u, slots, coefficients)


def _with_adapters(projection: nn.Module, x: Tensor, adapters: AdapterUpdates) -> Tensor:  # [B, T, O]
    """W x + bias and the rows' adapters; a layer that somebody wrapped adds them itself, within what is around it."""
    layer = base_layer(projection)
    if is_plain_linear(projection):
        return updated_linear(layer, x, adapters)
    if not is_routed(layer):
        return updated_linear(layer, x, adapters, projection(x))
    with bound({layer._keylock_route.name: adapters}):  # type: ignore[union-attr]
        return projection(x)  # type: ignore[no-any-return]


def project_vectors(
    projection: nn.Module, vectors: Tensor, dtype: torch.dtype = torch.float32, adapters: AdapterUpdates | None = None
) -> Tensor:
    """W x for vectors [S, D] -> [S, O] in float32, through whatever wraps the projection, without its bias, and with
    each vector's adapters.

    A wrapped projection is called in `dtype`, the one it computes in.

    One product per vector: a concept's outputs must not depend on how many others are in the batch.
    """
    if is_plain_linear(projection):
        rows, weight = vectors.float()[:, None], projection.weight.float().T
        with exact_products(vectors.device), torch.autocast(vectors.device.type, enabled=False):
            if vectors.device.type == "cpu":
                out = row_matmul(rows, weight)[:, 0]
            else:
                out = torch.cat([row @ weight for row in rows])
        return out if adapters is None else updated_vectors(out, vectors, adapters)
    wide = vectors.to(dtype)[:, None, None]
    if adapters is None:
        out = torch.cat([projection(vector)[0] for vector in wide])
    else:
        each = [adapters_of(adapters, slice(n, n + 1)) for n in range(len(wide))]
        out = torch.cat([_with_adapters(projection, v, own)[0] for v, own in zip(wide, each, strict=True)])
    if getattr(base_layer(projection), "bias", None) is not None:
        out = out - projection(torch.zeros_like(vectors[:1], dtype=dtype)[None])[0]
    return out.float()


def _nothing(projection: nn.Module, x: Tensor) -> RowUpdates:
    """Output vectors, slots and coefficients of no update at all."""
    slots = torch.full((len(x), 1), -1, dtype=torch.int32, device=x.device)
    kind: Any = {"dtype": torch.float32, "device": x.device}
    u = torch.zeros(1, base_layer(projection).out_features, **kind)
    return RowUpdates(u, slots, torch.zeros(*x.shape[:2], 1, **kind))


def _file_of(function: Any) -> str | None:
    return getattr(getattr(function, "__code__", None), "co_filename", None)


def is_plain_linear(projection: Any) -> TypeGuard[nn.Linear]:
    """Whether a projection's weight may be used directly: no adapter, quantisation, hook or offloading on it."""
    return (
        type(projection) is nn.Linear
        and _file_of(nn.Linear.forward) == nn.modules.linear.__file__  # nor has the class another
        and own_forward(projection) is None
        and type(projection.weight) in (Tensor, nn.Parameter)  # torchao and DTensor keep nn.Linear
        and projection.weight.device.type != "meta"
        and projection.weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and not hasattr(projection, "_hf_hook")
        and not hasattr(projection, "_diffusers_hook")
        and not any(getattr(projection, f"_{when}_hooks") for when in _HOOKS)
        and not _has_any_global_hook()
    )
