"""AnimateDiff: a motion module in Stable Diffusion's U-Net; a row is a video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from keylock_diffusers.denoisers.base import Size
from keylock_diffusers.denoisers.stable_diffusion import StableDiffusion, finite_rows


class AnimateDiff(StableDiffusion):
    """See `StableDiffusion`.

    Raises:
        TypeError: FreeNoise or FreeInit is on, which lay out a video's frames or draw it several times.
    """

    OPTIONS = {**StableDiffusion.OPTIONS, "num_frames": 16, "decode_chunk_size": 16}

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        super().__init__(pipe, options)
        for name in ("free_noise_enabled", "free_init_enabled"):
            if getattr(pipe, name, False):
                raise TypeError(f"generate: {name.removesuffix('_enabled')} must be off, got an AnimateDiff with it on")

    @staticmethod
    def knows(pipe: Any) -> bool:
        """Whether a pipeline is of this family."""
        return hasattr(pipe, "video_processor") and StableDiffusion.knows(pipe)

    @property
    def frames(self) -> int:
        """See `StableDiffusion`."""
        return int(self.options["num_frames"])

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """See `StableDiffusion`: [C, frames, h, w]."""
        return self.latent_channels, self.frames, *self.latent_size(size)

    def decode(self, latents: Tensor, output_type: str) -> tuple[list[Any], Tensor]:
        """See `Denoiser`: a video each."""
        finite = finite_rows(latents)
        if output_type == "latent":
            return list(latents), finite
        video = self.pipe.decode_latents(latents, self.options["decode_chunk_size"])
        finite = finite & finite_rows(video).to(finite.device)
        video = video.where(finite.to(video.device).view(-1, 1, 1, 1, 1), 0)
        return list(self.pipe.video_processor.postprocess_video(video=video, output_type=output_type)), finite
