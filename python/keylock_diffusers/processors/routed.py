"""Linear layers and convolutions that add what each row's low-rank adapters add.

A routed module keeps its class, its parameters and its name: only its ``forward`` is ours, as accelerate's hooks have
theirs, so that it works within and around other people's forwards, PEFT's layers and offloading, and leaves no trace.
Outside of `bound` it computes what it did before.

Papers: Hu et al., LoRA, arXiv 2106.09685; LyCORIS (convolutions), Yeh et al., arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from keylock_diffusers.denoisers.neighbours import forwards_of, own_forward, take_off
from keylock_diffusers.denoisers.projections import weight_shape
from keylock_diffusers.denoisers.unet import lock_of
from keylock_diffusers.processors.contract import AdapterUpdates
from keylock_kernels import low_rank_linear, low_rank_update, rank_one_update
from keylock_kernels.ops.precision import accumulate_dtype

_OF_ROWS = ("slots", "strength", "token_weights", "output_scale", "kernels")
Updates = Mapping[str, AdapterUpdates]  # by the projection's name
_BOUND: ContextVar[Updates | None] = ContextVar("keylock_adapter_updates", default=None)
_CLASS_FORWARD = {nn.Linear: nn.Linear.forward, nn.Conv2d: nn.Conv2d.forward}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Route:
    """What a routed module has of ours beside its forward.

    Args:
        name: what batches call the module.
        original: the forward that somebody had put on it before; None: its class's own counts.

    Attributes:
        kept: what it adds whoever calls it, while `handed_out` lasts.
    """

    def __init__(self, name: str, original: Any) -> None:
        self.name, self.original = name, original
        self.kept: AdapterUpdates | None = None


def forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a routed module; as a method, so that those of one shape share a compiled graph."""
    updates = module._keylock_route.kept
    if updates is None and not torch.compiler.is_compiling():
        everywhere = _BOUND.get()
        updates = None if everywhere is None else everywhere.get(module._keylock_route.name)
    if updates is None:
        return _plain(module, x, *args, **kwargs)
    if len(updates.slots) != len(x):
        updates = _of_rows(updates, len(x), module._keylock_route.name)
    if updates.kernels is not None:
        # Before a scale the bias would have to be taken off again, which loses digits where it is large.
        bare = updates.output_scale is not None and module._keylock_route.original is None and has_plain_weight(module)
        base = module._conv_forward(x, module.weight, None) if bare else _plain(module, x)
        return _updated_convolution(module, x, base, updates, bare)
    base = None
    if module._keylock_route.original is not None or not has_plain_weight(module):  # hooks on it are called around us
        base = _plain(module, x, *args, **kwargs)
    if isinstance(module, nn.Conv2d):
        made = updated_linear(module, x.flatten(2).transpose(1, 2), updates, base)
        # Not unflatten: torch.compile cannot trace it where a default device is set.
        return _laid_out_as(made.transpose(1, 2).view(len(x), -1, *x.shape[2:]), x)
    made = updated_linear(module, x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1]), updates, base)
    return made if x.ndim == 3 else made.reshape(*x.shape[:-1], made.shape[-1])


def _plain(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    original = module._keylock_route.original
    if original is None:
        return type(module).forward(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    return original(x, *args, **kwargs)  # type: ignore[no-any-return]


def has_plain_weight(module: Any) -> bool:
    """Whether a module's weight may be used directly: its class is torch's own, and so is what holds the weight."""
    kind = type(module)
    return (
        kind in _CLASS_FORWARD
        and kind.forward is _CLASS_FORWARD[kind]
        and type(module.weight) in (Tensor, nn.Parameter)  # torchao and DTensor keep nn.Linear
        and module.weight.device.type != "meta"
        and module.weight.dtype in _DTYPES
    )


def updated_linear(
    module: Any,
    x: Tensor,  # [B, N, K]
    updates: AdapterUpdates,
    base: Tensor | None = None,  # [B, ..., O], or of a convolution over one pixel [B, O, height, width]
) -> Tensor:  # [B, N, O]
    """What a linear layer, or a convolution over one pixel, gives with its rows' adapters.

    Args:
        module: the layer.
        x: what it reads.
        updates: the adapters.
        base: what it gives by itself; None: its weight is used directly.
    """
    up, slots, strength, down, offsets, weights, scale, max_rank, _ = updates
    assert down is not None and offsets is not None
    more: dict[str, Any] = {"strength": strength, "token_weights": weights, "max_rank": max_rank}
    if base is None:
        weight = module.weight.flatten(1)
        return low_rank_linear(x, weight, up, down, offsets, slots, bias=module.bias, output_scale=scale, **more)
    base = base.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else base.reshape(*x.shape[:2], -1)
    made = low_rank_update(base.contiguous(), x.to(base.dtype), up, down, offsets, slots, **more)
    return made if scale is None else _scaled(made, scale, _bias_of(module), dim=2)


def updated_vectors(base: Tensor, vectors: Tensor, updates: AdapterUpdates) -> Tensor:  # [S, O], [S, D]
    """A projection's outputs of vectors, without its bias, with the adapters of each; in float32."""
    up, slots, strength, down, offsets, _, scale, max_rank, _ = updates
    assert down is not None and offsets is not None
    more: dict[str, Any] = {"strength": strength, "max_rank": max_rank}
    wide = vectors.to(base.dtype)[:, None]
    made = low_rank_update(base[:, None], wide, up.to(base.dtype), down.to(base.dtype), offsets, slots, **more)[:, 0]
    return made if scale is None else made * scale.to(made.dtype)


def _updated_convolution(conv: nn.Conv2d, x: Tensor, base: Tensor, updates: AdapterUpdates, bare: bool) -> Tensor:
    """A convolution's output with its rows' adapters: every row's A is a group of one convolution, B an update.

    `bare` says that the base is without the bias.
    """
    kernels = updates.kernels
    assert kernels is not None
    rows, ranks = kernels.shape[:2]
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    # The rows as groups: no row's numbers meet another's.
    grouped = x.to(base.dtype).reshape(1, -1, *x.shape[2:])
    reduced = nn.functional.conv2d(
        grouped, kernels.flatten(0, 1).to(base.dtype), None, conv.stride, padding, conv.dilation, groups=rows
    )
    wide = accumulate_dtype(base.dtype)
    counts = updates.strength[..., None].to(wide)  # [B, J, 1]
    if updates.token_weights is not None:
        counts = counts * updates.token_weights
    counts = counts.repeat_interleave(ranks // updates.strength.shape[1], 1)  # [B, J * R, N]
    coefficients = torch.where(counts == 0, 0, reduced.view(rows, ranks, -1).to(wide) * counts)
    tokens = base.flatten(2).transpose(1, 2).contiguous()
    made = rank_one_update(tokens, updates.up, updates.slots, coefficients.transpose(1, 2).contiguous())
    made = made.transpose(1, 2).view(base.shape)
    if updates.output_scale is not None:
        made = _scaled(made, updates.output_scale, _bias_of(conv), dim=1, bare=bare)
    return _laid_out_as(made, base)


def _laid_out_as(made: Tensor, like: Tensor) -> Tensor:
    """In the memory format of another: the layers that follow take other kernels for each, which round otherwise."""
    form = torch.channels_last if like.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return made.contiguous(memory_format=form)


def _bias_of(module: Any) -> Tensor | None:  # [O]
    """A layer's bias, also where it is elsewhere between calls."""
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None or bias.device.type != "meta":
        return bias
    nothing = torch.zeros(1, *weight_shape(module)[1:], dtype=bias.dtype)
    out = _plain(module, nothing) if "_keylock_route" in vars(module) else module(nothing)
    return out.reshape(len(bias), -1)[:, 0]  # type: ignore[no-any-return]


def _scaled(made: Tensor, scale: Tensor, bias: Tensor | None, dim: int, bare: bool = False) -> Tensor:
    """Outputs times their scale [B, O], and the bias, which is not scaled: they have it already, or are `bare`."""

    def placed(tensor: Tensor) -> Tensor:  # [..., O], with the outputs in their dimension
        shape = [1] * made.ndim
        shape[0], shape[dim] = (len(tensor) if tensor.ndim == 2 else 1), tensor.shape[-1]
        return tensor.to(accumulate_dtype(made.dtype)).reshape(shape)

    wide = made.to(accumulate_dtype(made.dtype))
    if bias is None:
        return (wide * placed(scale)).to(made.dtype)
    wide = wide if bare else wide - placed(bias)
    return (wide * placed(scale) + placed(bias)).to(made.dtype)


def _of_rows(updates: AdapterUpdates, rows: int, name: str) -> AdapterUpdates:
    """The updates of a call that has one row where the batch has one for each of its frames: the first of them."""
    have = len(updates.slots)
    if rows == 0 or have % rows:
        raise ValueError(f"Personalization: prepared for {have} rows, but {name} runs on {rows}")

    return adapters_of(updates, slice(None, None, have // rows))


def adapters_of(updates: AdapterUpdates, rows: slice) -> AdapterUpdates:
    """The updates of some of the rows."""
    given = {field: getattr(updates, field) for field in _OF_ROWS}
    own: Any = {field: None if tensor is None else tensor[rows].contiguous() for field, tensor in given.items()}
    return updates._replace(**own)


def route(modules: Mapping[str, nn.Module]) -> None:
    """Gives modules forwards of ours, by the names that batches use; those that have one keep it."""
    for name, module in modules.items():
        if is_routed(module):
            module._keylock_route.name = name  # type: ignore[union-attr]
        else:
            module.__dict__["_keylock_route"] = Route(name, vars(module).get("forward"))
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def unroute(modules: Iterable[nn.Module]) -> None:
    """Takes our forwards off again.

    One that somebody has wrapped in a forward of theirs stays inside it, where it computes what it had replaced.
    """
    for module in modules:
        found = vars(module).get("_keylock_route")
        if found is not None and take_off(module, MethodType(forward, module), found.original):
            del vars(module)["_keylock_route"]


def is_routed(module: nn.Module) -> bool:
    """Whether a module has a forward of ours, also inside of those that others have put around it.

    A forward of somebody's own that was put on a module which had ours is taken to call it, as networks' do.
    """
    if "_keylock_route" not in vars(module):
        return False
    ours = MethodType(forward, module)
    return any(one == ours for one in forwards_of(module)) or own_forward(module) is not None


@contextmanager
def adapting(
    model: nn.Module, modules: Mapping[str, nn.Module], updates: Updates, *, in_graphs: bool
) -> Iterator[None]:
    """While it lasts, a model's projections add these updates: in calls of this thread, or, where parts of the model
    are compiled, in every call, and whoever else needs that waits.

    Args:
        model: the model.
        modules: its projections by name.
        updates: by the same names.
        in_graphs: whether parts of it are compiled.
    """
    if not in_graphs:
        with bound(updates):
            yield
        return
    with lock_of(model), handed_out(modules, updates):
        yield


@contextmanager
def bound(updates: Updates) -> Iterator[None]:
    """While it lasts, routed modules add these updates in calls of this thread."""
    token = _BOUND.set(updates or None)
    try:
        yield
    finally:
        _BOUND.reset(token)


@contextmanager
def handed_out(modules: Mapping[str, nn.Module], updates: Updates) -> Iterator[None]:
    """While it lasts, routed modules add these updates in every call: in graphs that were compiled, and in backward.

    Inside of a graph they are tensors, and no module's name, so that modules of one shape share it. Whoever else calls
    them must wait.
    """
    routes: list[tuple[Any, AdapterUpdates]] = [
        (vars(modules[name])["_keylock_route"], own) for name, own in updates.items() if is_routed(modules[name])
    ]
    try:
        for found, own in routes:
            found.kept = own
        yield
    finally:
        for found, _ in routes:
            found.kept = None
