"""diffusers' ``callback_on_step_end`` in a loop of our own: what a callback reads, and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    `set_ip_adapter_scale` with the rows' image prompts; each batch begins with the scales that the call began with.
    ``_interrupt`` stops the call.

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
        self._scales: dict[str, list[Any]] | None = None  # of the adapters in each layer, when the call began
        self._begun: dict[int, float] = {}  # of each adapter, where it is one number

    def __call__(self, engine: Engine, batch: Batch) -> None:
        """After a step; see the class."""
        pipe, step = engine.pipe, batch.position - 1
        shown = engine.show_guidance(batch)
        given = {name: _tensor(batch, name) for name in self._tensors}
        row = batch.rows[0]
        time = row.schedule.times[row.own(step)]
        if step == 0:
            self._put_back(engine.denoiser.layers())
            self._begun = adapter_scales(engine.denoiser.unet)
        returned = self._callback(pipe, step, time, dict(given)) or {}
        if pipe._guidance_scale != shown:
            _rescale(engine, batch, shown, float(pipe._guidance_scale))
        scales = adapter_scales(engine.denoiser.unet).items()
        batch.held.personalization.scale_images({a: _factor(self._begun.get(a), scale) for a, scale in scales})
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

    def _put_back(self, layers: Mapping[str, Any]) -> None:
        """The adapters' scales as they were when the call began: what a callback changed in one batch is that one's."""
        scales = {name: attn.processor.scale for name, attn in layers.items() if hasattr(attn.processor, "scale")}
        if self._scales is None:
            self._scales = {name: list(scale) for name, scale in scales.items()}
        for name, scale in scales.items():
            scale[:] = self._scales[name]


def _factor(begun: float | None, scale: float) -> float:
    """How much an adapter counts that had one scale, or several (None), and has another now."""
    if begun is None:
        return 0.0 if scale == 0 else 1.0
    return scale / begun if begun else 1.0


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
        uncond = batch.text.last.uncond
        return None if uncond is None else uncond[:, : batch.text.layout.tokens]
    if name == "image":
        controls = batch.plans[0].controls
        return batch.control(controls[0].name) if controls else None
    fillings = [row.filling for row in batch.rows]
    if name in ("mask", "masked_image_latents") and all(fillings):
        part = "mask" if name == "mask" else "masked"
        return torch.cat([getattr(filling, part) for filling in fillings] * len(batch.layout.parts))
    return added.get({"add_text_embeds": "text_embeds", "add_time_ids": "time_ids"}.get(name, ""))
