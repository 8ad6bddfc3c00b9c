"""What other libraries hang on a model: forwards and hooks of theirs, offloaded weights, merged pixels, warnings."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


def own_forward(module: nn.Module) -> Any:
    """The forward that somebody put on a module itself, as kohya's and LyCORIS' networks do; None: there is none.

    Those that only move or cast weights, accelerate's and diffusers' hooks, do not count, and neither does our own.
    Nor does the class's own, which those leave behind who take theirs off again.
    """
    for forward in forwards_of(module):
        if not _is_ours(forward) and not _moves_weights(forward):
            return None if getattr(forward, "__func__", forward) is type(module).forward else forward
    return None


def forwards_of(module: nn.Module) -> Iterator[Any]:
    """The forwards that were put on a module itself, each around the next, as far as they can be told."""
    forward = vars(module).get("forward")
    while forward is not None:
        yield forward
        if _is_ours(forward):
            forward = forward.__self__._keylock_route.original
        elif _moves_weights(forward):
            forward = vars(forward).get("__wrapped__")
        else:  # kohya's and LyCORIS' networks keep the one before theirs
            forward = getattr(getattr(forward, "__self__", None), "org_forward", None)


def take_off(module: nn.Module, mine: Any, instead: Any) -> bool:
    """Puts a forward in the place of one that was put on a module, also where it lies within hooks that move weights.

    Args:
        module: the module.
        mine: what to take off.
        instead: what it had replaced; None: its class's own.

    Returns:
        Whether it was found; within a forward of somebody's own it is not.
    """
    if vars(module).get("forward") == mine:
        if instead is None:
            del module.forward
        else:
            module.forward = instead
        return True
    instead = type(module).forward.__get__(module) if instead is None else instead
    registry = vars(module).get("_diffusers_hook")
    holders = [(one, "__wrapped__") for one in forwards_of(module) if _moves_weights(one)]
    holders += [(module, "_old_forward")]  # accelerate's
    holders += [(one, name) for one in getattr(registry, "_fn_refs", ()) for name in ("forward", "original_forward")]
    found = [(holder, name) for holder, name in holders if getattr(holder, name, None) == mine]
    for holder, name in found:
        setattr(holder, name, instead)
    return bool(found)


def _is_ours(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "__module__", "") == "keylock_diffusers.processors.routed"


def _moves_weights(forward: Any) -> bool:
    if not isinstance(forward, functools.partial):
        return False
    return str(getattr(forward.func, "__module__", "")).startswith(("accelerate.", "diffusers.hooks"))


def is_opaque(module: nn.Module) -> bool:
    """Whether somebody's own code decides what a call of a module computes, which may change from call to call."""
    return bool(own_forward(module) or module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def loading(root: nn.Module, *, emptied: bool = False) -> Iterator[Callable[[str], None]]:
    """Yields what brings the weights below a module, by its name in `root`, to where a forward pass would have them.

    Offloading may empty weights between calls and fill them when a module around them is called: who uses a module by
    itself calls the hooks of those around it. What is brought stays until something is brought that does not need it.

    Args:
        root: the model.
        emptied: only by hooks that leave what looks like weights and is none, as group offloading to disk does.
    """
    held: dict[int, Callable[[], Any]] = {}

    def bring(name: str) -> None:
        needed = {id(hook): (hook, module) for module in _path(root, name) for hook in _hooks(module, emptied)}
        for key in [key for key in held if key not in needed]:
            held.pop(key)()
        for key, (hook, module) in needed.items():
            if key not in held:
                held[key] = _entered(hook, module)

    try:
        yield bring
    finally:
        for leave in held.values():
            leave()


def _path(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around and including one, from the outermost."""
    yield root
    for part in filter(None, name.split(".")):
        root = getattr(root, part)
        yield root


def _hooks(module: nn.Module, emptied: bool) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")  # accelerate's
    if hook is not None and not emptied:
        yield hook
    registry = vars(module).get("_diffusers_hook")
    for hook in () if registry is None else registry.hooks.values():
        group = getattr(hook, "group", None)
        if group is not None:
            yield group  # of group offloading, the same object in all of a group's modules
        elif hasattr(hook, "storage_dtype") and not emptied:  # layerwise casting
            yield hook


def _entered(hook: Any, module: nn.Module) -> Callable[[], Any]:
    """Calls a hook as before a forward pass; returns what calls it as after one."""
    if hasattr(hook, "onload_"):
        hook.onload_()
        if hook.stream is not None:
            hook.stream.synchronize()
        return hook.offload_  # type: ignore[no-any-return]
    hook.pre_forward(module)
    return functools.partial(hook.post_forward, module, None)


def check_pixels(unet: nn.Module, what: str, *, anywhere: bool = False) -> None:
    """Checks that cross-attention reads all of a layer's pixels, which regions and maps need.

    Args:
        unet: the model.
        what: needs them.
        anywhere: whether all other layers must, too.

    Raises:
        ValueError: tomesd merges some of them before it; its patch stays in the blocks' classes.
    """
    for block in unet.modules():
        if type(block).__name__ != "ToMeBlock":
            continue
        if anywhere:
            raise ValueError(f"{what} need all pixels, but tomesd merges some: take its patch off")
        if block._tome_info["args"]["merge_crossattn"]:  # type: ignore[index]
            raise ValueError(
                f"{what} need all pixels, but tomesd merges some before cross-attention: "
                "apply its patch with merge_crossattn=False"
            )


_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, diffusers does not warn, per layer and step, of our keywords that a processor does not take.

    It gives every layer the same: somebody else's self-attention has no use for a batch, and needs none.
    """
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def _is_wanted(record: logging.LogRecord) -> bool:
    if not _QUIET.get() or not str(record.msg).startswith("cross_attention_kwargs "):
        return True
    return not set(re.findall(r"'(\w+)'", str(record.msg))) <= {"personalization", "readout"}


logging.getLogger("diffusers.models.attention_processor").addFilter(_is_wanted)
