"""Pictures of a request as the denoiser takes them: to begin from, to fill in, to follow."""

from __future__ import annotations

from typing import Any

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from keylock_diffusers.denoisers.base import Size


def initial_image(pipe: Any, image: Any, size: Size | None) -> Tensor:  # [1, 3, height, width]
    """The picture to begin from, in -1..1; at its own size, made divisible, where none is given."""
    height, width = size or (None, None)
    processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor)
    return _one("image", processor.preprocess(image, height=height, width=width)).float()


def inpainting_mask(pipe: Any, mask: Any, size: Size) -> Tensor:  # [1, 1, height, width]
    """Where a picture is filled in, 0 or 1."""
    processor = VaeImageProcessor(
        vae_scale_factor=pipe.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    return _one("mask", processor.preprocess(mask, height=size[0], width=size[1]))


def control_image(pipe: Any, image: Any, size: Size | None) -> Tensor:  # [1, 3, height, width]
    """What a ControlNet follows, in 0..1; at its own size, made divisible, where none is given."""
    height, width = size or (None, None)
    processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor, do_convert_rgb=True, do_normalize=False)
    return _one("image of a Control", processor.preprocess(image, height=height, width=width)).float()


def _one(name: str, pictures: Tensor) -> Tensor:
    if len(pictures) != 1:
        raise ValueError(f"{name} must be one picture, got {len(pictures)}")
    return pictures
