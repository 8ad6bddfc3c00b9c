"""Stable Diffusion XL: two text encoders, a pooled encoding, and the picture's sizes as conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.denoisers.base import RowLayout, Schedule, Size
from keylock_diffusers.denoisers.stable_diffusion import StableDiffusion, divisible, finite_rows


class StableDiffusionXL(StableDiffusion):
    """See `StableDiffusion`; base, refiner and turbo models."""

    OPTIONS = {**StableDiffusion.OPTIONS, "denoising_end": None, "denoising_start": None}

    @staticmethod
    def knows(pipe: Any) -> bool:
        """Whether a pipeline is of this family."""
        return hasattr(pipe, "text_encoder_2") and StableDiffusion.knows(pipe)

    @property
    def pooled_width(self) -> int | None:
        """See `StableDiffusion`."""
        config = self.unet.config
        numbers = 5 if getattr(self.pipe.config, "requires_aesthetics_score", False) else 6
        return int(config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim)

    @property
    def begins_without_noise(self) -> bool:  # type: ignore[override]
        """See `StableDiffusion`."""
        return self.options["denoising_start"] is not None

    @property
    def zeros_without_negative(self) -> bool:
        """See `StableDiffusion`."""
        return bool(getattr(self.pipe.config, "force_zeros_for_empty_prompt", False))

    def size(self, height: int | None, width: int | None) -> Size:
        """See `Denoiser`: these pipelines take each by itself."""
        sample = getattr(self.pipe, "default_sample_size", self.unet.config.sample_size)  # not all of them have it
        factor = self.pipe.vae_scale_factor
        default = sample * factor
        return divisible(height or default, "height", factor), divisible(width or default, "width", factor)

    def _scaled(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super()._scaled(latents)
        mean, std = (torch.tensor(given).view(1, -1, 1, 1).to(latents) for given in (mean, std))
        return (latents - mean) * config.scaling_factor / std

    def _unscaled(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super()._unscaled(latents)
        mean, std = (torch.tensor(given).view(1, -1, 1, 1).to(latents) for given in (mean, std))
        return latents * std / config.scaling_factor + mean

    def schedule(self, scheduler: Any, steps: int, share: float | None) -> Schedule:
        """See `Denoiser`: base and refiner may divide the steps among them (denoising_end, denoising_start)."""
        made, times = super().schedule(scheduler, steps, share)
        if share is None and hasattr(made, "set_begin_index"):
            made.set_begin_index(0)
        end = self.options["denoising_end"]
        if isinstance(end, float) and 0 < end < 1:
            total = made.config.num_train_timesteps
            times = times[: int((times >= int(round(total - end * total))).sum())]
        return Schedule(made, times)

    def _times_from(self, scheduler: Any, steps: int, share: float) -> Tensor:
        start = self.options["denoising_start"]
        if not (isinstance(start, float) and 0 < start < 1):
            return super()._times_from(scheduler, steps, share)
        total = scheduler.config.num_train_timesteps
        count = int((scheduler.timesteps < int(round(total - start * total))).sum())
        if scheduler.order == 2 and count % 2 == 0:  # do not begin between the two halves of a step
            count += 1
        first = len(scheduler.timesteps) - count
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler.timesteps[first:]

    def conditions(
        self, requests: Sequence[Any], size: Size, layout: RowLayout, pooled: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """See `Denoiser`: each row's pooled encoding and sizes."""
        found = super().conditions(requests, size, layout, pooled)
        device, dtype = self.pipe._execution_device, self.text_dtype
        pairs = [self._time_ids(request, size, dtype) for request in requests]
        added = found.setdefault("added_cond_kwargs", {})
        added["text_embeds"] = torch.cat(
            [pooled["uncond" if part == "uncond" else "cond"] for part in layout.parts]
        ).to(device, dtype)
        ids = [pair[1 if part == "uncond" else 0] for part in layout.parts for pair in pairs]
        added["time_ids"] = torch.cat(ids).to(device)
        return found

    def _time_ids(self, request: Any, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # [1, 6] each
        """A row's sizes, of the conditional and of the unconditional half, as its task's own pipeline makes them."""
        original, target = (tuple(request.original_size or size), tuple(request.target_size or size))
        crop, other_crop = tuple(request.crops_coords_top_left), tuple(request.negative_crops_coords_top_left)
        negatives = request.negative_original_size, request.negative_target_size
        other_original, other_target = tuple(negatives[0] or original), tuple(negatives[1] or target)
        own = (*original, *crop, *target)
        if request.image is None:
            other = own if None in negatives else (*other_original, *other_crop, *other_target)
        elif getattr(self.pipe.config, "requires_aesthetics_score", False):
            own = (*original, *crop, request.aesthetic_score)
            other = (*other_original, *other_crop, request.negative_aesthetic_score)
        else:
            other = (*other_original, *crop, *other_target)  # the crop of the conditional half, as diffusers has it
        config = self.unet.config
        width = config.addition_time_embed_dim * len(own) + (self.pooled_width or 0)
        if width != config.projection_class_embeddings_input_dim:
            raise ValueError(
                f"the U-Net's added embedding has {config.projection_class_embeddings_input_dim} inputs, got {width}: "
                "requires_aesthetics_score of the pipeline's configuration does not fit the model"
            )
        return torch.tensor([own], dtype=dtype), torch.tensor([other], dtype=dtype)

    def decode(self, latents: Tensor, output_type: str) -> tuple[list[Any], Tensor]:
        """See `Denoiser`: in float32 where the autoencoder overflows in float16."""
        finite = finite_rows(latents)
        if output_type == "latent":
            return list(latents), finite
        vae = self.pipe.vae
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.to(dtype=torch.float32)
        pixels = vae.decode(self._unscaled(latents.to(vae.dtype)), return_dict=False)[0]
        if upcast:
            vae.to(dtype=torch.float16)
        finite &= finite_rows(pixels)
        pixels = pixels.where(finite.view(-1, 1, 1, 1), 0)
        watermark = getattr(self.pipe, "watermark", None)
        if watermark is not None:
            pixels = watermark.apply_watermark(pixels)
        return list(self.pipe.image_processor.postprocess(pixels, output_type=output_type)), finite
