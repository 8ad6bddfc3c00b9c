"""The families that are known: a new one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keylock_diffusers.denoisers.animate_diff import AnimateDiff
from keylock_diffusers.denoisers.stable_diffusion import StableDiffusion
from keylock_diffusers.denoisers.stable_diffusion_xl import StableDiffusionXL

FAMILIES: tuple[type[StableDiffusion], ...] = (AnimateDiff, StableDiffusionXL, StableDiffusion)  # first match wins


def denoiser_of(pipe: Any, options: Mapping[str, Any]) -> StableDiffusion:
    """The description of a pipeline's model.

    Args:
        pipe: the pipeline; it may be a copy of the caller's, whose state is the call's own.
        options: keywords of the pipeline's call that a batch shares.

    Raises:
        TypeError: none of the families knows it, or an option is none of its own.
    """
    for family in FAMILIES:
        if family.knows(pipe):
            return family(pipe, options)
    raise TypeError(
        "generate: pipe must be a pipeline with CLIP text encoders (Stable Diffusion 1.x, 2.x, XL), "
        f"got {type(pipe).__name__}"
    )
