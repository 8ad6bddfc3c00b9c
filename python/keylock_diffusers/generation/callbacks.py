"""diffusers' ``callback_on_step_end`` in a loop of our own: what a callback reads, and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.denoisers.unet import adapter_scales
from keylock_diffusers.generation.batch import Batch
from keylock_diffusers.generation.engine import Engine


class Callbacks:
    """Calls the user's callback after each step, as pipelines do.

    The pipeline it is given is the call's own copy: its ``guidance_scale`` is a number, the largest of the batch's
    rows; setting it scales every row's in proportion, and 1 or less goes on without guidance. So does
    `set_ip_adapter_scale` with the rows' image prompts. ``_interrupt`` stops the call.

    Args:
        callback: the function, or one of diffusers' callback objects.
        tensors: which tensors it is given, by name.

    Raises:
        ValueError: a name that there is no tensor of.
    """

    NAMES = (
        "latents", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "add_time_ids", "image",
        "mask", "masked_image_latents",
    )  # fmt: skip

    def __init__(self, callback: Callable[..., Any], tensors: Sequence[str] | None = None) -> None:
        self._callback = callback
        self._tensors = list(getattr(callback, "tensor_inputs", None) or tensors or ("latents",))
        wrong = [name for name in self._tensors if name not in self.NAMES]
        if wrong:
            raise ValueError(
                f"generate: callback_on_step_end_tensor_inputs must be of {', '.join(self.NAMES)}, got {wrong[0]!r}"
            )

    def __call__(self, engine: Engine, batch: Batch) -> None:
        """After a step; see the class."""
        pipe, step = engine.pipe, batch.position - 1
        shown = engine.show_guidance(batch)
        given = {name: _tensor(batch, name) for name in self._tensors}
        row = batch.rows[0]
        time = row.schedule.times[row.own(step)]
        adapters = adapter_scales(engine.denoiser.unet)
        returned = self._callback(pipe, step, time, dict(given)) or {}
        changed = adapter_scales(engine.denoiser.unet)
        factors = {
            adapter: changed[adapter] / scale if scale else 1.0
            for adapter, scale in adapters.items()
            if changed.get(adapter, scale) != scale
        }
        if factors:
            batch.held.personalization.scale_images(factors)
        if pipe._guidance_scale != shown:
            _rescale(engine, batch, shown, float(pipe._guidance_scale))
        latents = returned.get("latents")
        if latents is not None and latents is not given.get("latents"):
            if not isinstance(latents, Tensor) or latents.shape != batch.latents.shape:
                raise ValueError(
                    f"callback_on_step_end: latents must be {list(batch.latents.shape)}, got "
                    f"{list(getattr(latents, 'shape', []))}"
                )
            batch.latents = latents
        for name, tensor in returned.items():
            before = given.get(name)
            if name == "latents" or tensor is before or not batch.layout.guided or not isinstance(before, Tensor):
                continue
            if tensor.shape == before.shape and bool((tensor == before).all()):
                continue
            raise ValueError(
                f"callback_on_step_end: {name} is what rows were prepared with and cannot be changed between steps; "
                "latents and guidance_scale can"
            )


def _rescale(engine: Engine, batch: Batch, shown: float, asked: float) -> None:
    """Every row's guidance in the proportion in which the largest was changed."""
    if asked <= 1 and batch.layout.guided:
        engine.without_guidance(batch)
    elif len(set(batch.scales)) == 1:
        batch.scales = [asked] * len(batch.scales)
    else:
        batch.scales = [scale * asked / shown for scale in batch.scales]


def _tensor(batch: Batch, name: str) -> Any:
    """A tensor by the name that it has in the pipelines' calls; None where the batch has none."""
    added = batch.conditions.get("added_cond_kwargs") or {}
    if name == "latents":
        return batch.latents
    if name == "prompt_embeds":
        return batch.prompts
    if name == "negative_prompt_embeds":
        uncond = batch.text.uncond
        return None if uncond is None else uncond[:, : batch.text.layout.tokens]
    if name == "image":
        controls = batch.plans[0].controls
        return batch.control(controls[0].name) if controls else None
    fillings = [row.filling for row in batch.rows]
    if name in ("mask", "masked_image_latents") and all(fillings):
        part = "mask" if name == "mask" else "masked"
        return torch.cat([getattr(filling, part) for filling in fillings] * len(batch.layout.parts))
    return added.get({"add_text_embeds": "text_embeds", "add_time_ids": "time_ids"}.get(name, ""))
