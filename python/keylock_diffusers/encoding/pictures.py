"""Pictures of a request as the denoiser takes them: to begin from, to fill in, to follow."""

from __future__ import annotations

from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from keylock_diffusers.checks import floats
from keylock_diffusers.denoisers.base import Size
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.masks import read_mask
from keylock_diffusers.pictures import PictureLimits, check_size, given


def initial_image(
    pipe: Any, image: Any, size: Size | None, limits: RequestLimits = RequestLimits()
) -> Tensor:  # [1, 3, height, width]
    """The picture to begin from, in -1..1; at its own size, made divisible, where none is given."""
    processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor)
    return _preprocessed(processor, image, "image", size, limits).float()


def inpainting_mask(
    pipe: Any, mask: Any, size: Size, limits: RequestLimits = RequestLimits()
) -> Tensor:  # [1, 1, height, width]
    """Where a picture is filled in, 0 or 1."""
    processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor, do_normalize=False, do_binarize=True)
    read: Any = read_mask(mask, "mask", limits.picture)
    if isinstance(mask, Image.Image):  # which pipelines resize in another way than tensors
        read = Image.fromarray((read * 255).round().byte().numpy())
    else:
        read = read[None, None]
    return processor.preprocess(read, height=size[0], width=size[1])


def control_image(
    pipe: Any, image: Any, size: Size | None, limits: RequestLimits = RequestLimits()
) -> Tensor:  # [1, 3, height, width]
    """What a ControlNet follows, in 0..1; at its own size, made divisible, where none is given."""
    processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor, do_convert_rgb=True, do_normalize=False)
    return _preprocessed(processor, image, "image of a Control", size, limits).float()


def _preprocessed(
    processor: VaeImageProcessor, image: Any, name: str, size: Size | None, limits: RequestLimits
) -> Tensor:
    if isinstance(image, (list, tuple)):
        if len(image) != 1:
            raise ValueError(f"{name} must be one picture, got {len(image)}")
        image = image[0]
    held = given(image, name, limits.picture)
    factor = processor.config.vae_scale_factor if isinstance(held, Tensor) and held.shape[1] == 4 else 1
    if size is None or factor > 1:  # what is drawn has the picture's own: latents are not resized
        height, width = held.shape[2:] if isinstance(held, Tensor) else (held.height, held.width)
        if height * width * factor**2 > limits.drawn:
            raise ValueError(
                f"{name} must have at most {limits.drawn} pixels where it gives the size of what is drawn, got "
                f"{width * factor} x {height * factor}"
            )
    asked = size or (None, None)
    return processor.preprocess(held, height=asked[0], width=asked[1])


def for_image_encoder(image: Any, name: str, limits: PictureLimits = PictureLimits()) -> Any:
    """A picture, or a list of them, as a pipeline's `encode_image` takes it; pixel values as they are.

    Raises:
        TypeError, ValueError: it is none, or beyond the limits.
    """
    if isinstance(image, Tensor):  # what the image encoder itself reads
        floats(image, name)
        if image.ndim not in (3, 4):
            raise ValueError(f"{name} must be pixel values [n, C, height, width], got {list(image.shape)}")
        check_size(image.shape[-1], image.shape[-2], name, limits)
        return image
    if not isinstance(image, (list, tuple)):
        return _eight_bit(image, name, limits)
    if not image:
        raise ValueError(f"{name} must hold at least one picture, got none")
    return [_eight_bit(one, name, limits) for one in image]


def _eight_bit(image: Any, name: str, limits: PictureLimits) -> Image.Image:
    if isinstance(image, Tensor):
        raise TypeError(f"{name} must be a list of pictures or arrays, or one tensor, got a list of tensors")
    held = given(image, name, limits)
    if isinstance(held, Tensor):  # from an array of numbers in 0..1
        held = Image.fromarray((held[0] * 255).round().byte().permute(1, 2, 0).numpy())
    return held
