"""Reading a mask, and the ways of resizing one.

They are several on purpose, each what its paper or its pipeline does:

| function | way | for |
| --- | --- | --- |
| `inside` | share of the area, half or more | regions of words, which are in or out |
| `resize_masks` | bicubic | image prompts' regions, as diffusers' IP-Adapters |
| `antialiased` | bilinear, antialiased | the localization loss, as FastComposer |
| `soft_mask` | mean of the area, over its maximum | the weights of a training picture, as Perfusion |
| `latent_mask` | nearest | inpainting, as diffusers |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageOps
from torch import Tensor

from keylock_kernels.ops.precision import accumulate_dtype


def inside(mask: Tensor, size: tuple[int, int]) -> Tensor:  # [N] bool
    """The pixels of a layer that a mask [height, width] covers by half; if none, those that it covers most."""
    share = F.interpolate(mask.float().cpu()[None, None], size, mode="area").flatten()
    return share >= min(0.5, float(share.max()))


def read_mask(mask: Any, what: str) -> Tensor:  # [height, width] float32
    """A picture or tensor as weights.

    Args:
        mask: a PIL image (in greys, 255 is 1), an array or tensor [height, width]; uint8 counts 255 as 1.
        what: names it in errors.

    Raises:
        TypeError, ValueError: it is something else, or not finite.
    """
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what} must be a picture or a tensor, got {type(mask).__name__}")
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"{what} must be [height, width], got {list(mask.shape)}")
    if not mask.is_floating_point():
        mask = mask.float() / (255 if mask.dtype == torch.uint8 else 1)
    if not mask.isfinite().all():
        raise ValueError(f"{what} must hold finite numbers, got NaN or infinity")
    return mask.float()


def region_mask(mask: Any, what: str) -> Tensor:
    """`read_mask`, and something must be in it.

    Raises:
        TypeError, ValueError: it is no mask, or empty.
    """
    read = read_mask(mask, what)
    if read.max() <= 0:
        raise ValueError(f"{what} must not be empty, got no value above 0")
    return read


def resize_masks(
    masks: Tensor,  # [M, height, width]
    pixels: int,
    size: tuple[int, int] | None = None,
) -> Tensor:  # [M, N]
    """Masks at a layer's resolution, as diffusers resizes them: bicubic, so that values may leave [0, 1].

    Args:
        masks: the masks.
        pixels: of the layer, N.
        size: its height and width, to which masks of any aspect ratio are stretched. None: they are guessed from the
            masks' own aspect ratio as diffusers does it; a mask of another ratio than the layer's is then filled up
            with zeros or cut off, with a warning.

    Raises:
        ValueError: no guess is possible, since a mask is too long and thin.
    """
    if not masks.is_floating_point():
        masks = masks.float()
    masks = masks.to(accumulate_dtype(masks.dtype))
    if size is not None:
        return F.interpolate(masks[None], size, mode="bicubic")[0].flatten(1)
    try:
        return IPAdapterMaskProcessor.downsample(masks, len(masks), pixels, 1)[..., 0]
    except (ZeroDivisionError, RuntimeError) as error:
        raise ValueError(
            f"a mask must have about the aspect ratio of the picture, got {list(masks.shape[1:])} for {pixels} pixels"
        ) from error


def soft_mask(mask: Image.Image, size: Sequence[int], what: str = "a mask") -> Tensor:
    """A picture's weights [1, h, w] in latents' resolution, 1 where the subject is surest."""
    height, width = size
    square = ImageOps.fit(
        ImageOps.exif_transpose(mask).convert("L"), (8 * width, 8 * height), Image.Resampling.BILINEAR
    )
    soft = F.adaptive_avg_pool2d(torch.from_numpy(np.array(square, np.float32))[None], (height, width))
    if soft.max() <= 0:
        raise ValueError(f"{what} is empty")
    return soft / soft.max()


def antialiased(masks: Tensor, size: tuple[int, int]) -> Tensor:  # [B, M, height, width] -> [B, N, M]
    """Masks in 0..1 at a layer's (height, width), bilinear with antialiasing."""
    resized = F.interpolate(masks.float(), size, mode="bilinear", antialias=True)
    return resized.clamp(0, 1).flatten(2).transpose(1, 2).contiguous()


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:  # [1, 1, height, width] -> [1, 1, h, w]
    """An inpainting mask at the latents' (height, width): the nearest pixel's."""
    return F.interpolate(mask, size=size)
