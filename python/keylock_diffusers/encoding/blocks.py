"""Factors per block of a U-Net, in the form that diffusers takes them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from keylock_diffusers.checks import is_number, reason_of, shown


def factors(scale: Any, unet: Any, name: str, default: float) -> float | dict[str, float]:
    """A number, or a number per block by the beginning of its modules' names.

    Args:
        scale: what `set_ip_adapter_scale` and `set_adapters` take for a U-Net.
        unet: whose blocks they are.
        name: of the argument, for errors.
        default: of blocks that are not named.

    Raises:
        ValueError: it is neither, or names blocks that there are none of.
    """
    if is_number(scale):
        return float(scale)
    if not isinstance(scale, Mapping):
        raise ValueError(f"{name} must be a finite number or a dict per block, got {shown(scale)}")
    for side in ("down", "up"):
        blocks = [f"block_{n}" for n in range(len(getattr(unet, f"{side}_blocks")))]
        given = scale.get(side)
        unknown = [block for block in given if block not in blocks] if isinstance(given, Mapping) else []
        if unknown:
            raise ValueError(f"{name} must name this U-Net's blocks, got {side}: {shown(unknown[0])}")
    try:
        (expanded,) = _maybe_expand_lora_scales(unet, [dict(scale)], default_scale=default)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} must name this U-Net's blocks, got {shown(scale)}: {reason_of(error)}") from error
    wrong = [number for number in expanded.values() if not is_number(number)]
    if wrong:
        raise ValueError(f"{name} must hold finite numbers, got {shown(wrong[0])}")
    return {block: float(number) for block, number in expanded.items()}


def of_modules(factors: Mapping[str, float], modules: Iterable[str]) -> dict[str, float]:
    """The factors of modules, by diffusers' rule: a block's resnets count as the attention beside them; else 1."""
    found = {}
    for module in modules:
        inside = next((number for block, number in factors.items() if block in module), None)
        parts = module.split(".")
        if inside is None and len(parts) > 3:
            inside = factors.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}")
        if inside is not None and inside != 1:
            found[module] = inside
    return found
