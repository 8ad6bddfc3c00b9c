"""Reading a mask, and the ways of resizing one.

They are several on purpose, each what its paper or its pipeline does:

| function | way | for |
| --- | --- | --- |
| `inside` | share of the area, half or more | regions of words, which are in or out |
| `resize_masks` | bicubic | image prompts' regions, as diffusers' IP-Adapters |
| `antialiased` | bilinear, antialiased | the localization loss, as FastComposer |
| `soft_mask` | mean of the area, over its maximum | the weights of a training picture, as Perfusion |
| `latent_mask` | nearest | inpainting, as diffusers |
| `area_share` | mean of the area | low-rank adapters' regions, of layers with pixels and without |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageOps
from torch import Tensor

from keylock_diffusers.pictures import PictureLimits, decode, turned
from keylock_kernels.ops.precision import accumulate_dtype


def inside(mask: Tensor, size: tuple[int, int]) -> Tensor:  # [N] bool
    """The pixels of a layer that a mask [height, width] covers by half; if none, those that it covers most."""
    share = F.interpolate(mask.float().cpu()[None, None], size, mode="area").flatten()
    return share >= min(0.5, float(share.max()))


def area_share(mask: Tensor, size: tuple[int, int]) -> Tensor:  # [N] float32 in 0..1
    """How much of each of a layer's pixels a mask [height, width] covers; of (1, 1), of the whole picture."""
    return F.interpolate(mask.float().cpu()[None, None], size, mode="area").flatten().clamp(0, 1)


def read_mask(mask: Any, what: str, limits: PictureLimits = PictureLimits()) -> Tensor:  # [height, width] float32
    """A picture or tensor as weights in 0..1, by whichever convention they are written.

    The largest value tells the convention: up to 1 the values are the weights, up to 255 they are of 8 bits, and up to
    65535 of 16. A largest value that would be faint in its convention (from 1 to 16, from 255 to 4096) is an error
    rather than a mask that hardly counts. A picture with transparency is its alpha if that varies, else its luminance.

    Args:
        mask: a PIL image of any mode, or an array or tensor [height, width], ones before or after it allowed.
        what: names it in errors.
        limits: of its size.

    Raises:
        TypeError, ValueError: it is something else, not finite, or outside of every convention.
    """
    if isinstance(mask, np.ndarray) and mask.size > 4 * limits.pixels:
        raise ValueError(f"{what} must have at most {limits.pixels} pixels, got {list(mask.shape)}")
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.shape[2] in (2, 3, 4) and mask.dtype == np.uint8:
        mask = Image.fromarray(np.ascontiguousarray(mask))
    if isinstance(mask, Image.Image):
        decode(mask, what, limits)
        mask = _greys(turned(mask), what)
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise TypeError(f"{what} must hold numbers, got {mask.dtype}")
        mask = torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what} must be a picture or a tensor, got {type(mask).__name__}")
    if mask.layout != torch.strided or mask.is_nested or mask.is_meta or mask.is_complex():
        raise ValueError(f"{what} must be a dense tensor of real numbers, got {mask.layout}, {mask.dtype}")
    shape = list(mask.shape)
    sizes = [size for size in shape if size != 1] if len(shape) > 2 else shape
    if len(sizes) != 2 or not mask.numel():
        raise ValueError(f"{what} must be [height, width], got {shape}")
    if mask.numel() > limits.pixels:
        raise ValueError(f"{what} must have at most {limits.pixels} pixels, got {shape}")
    held = mask.detach().reshape(sizes).float()
    if not bool(held.isfinite().all()):
        raise ValueError(f"{what} must hold finite numbers, got NaN or infinity")
    least, most = float(held.min()), float(held.max())
    scale = next((top for faint, top in _CONVENTIONS if faint <= most <= top), None)
    if least < 0 or scale is None:
        raise ValueError(f"{what} must hold weights in 0..1, 0..255 or 0..65535, got {least:.9g}..{most:.9g}")
    return held / scale


# The largest value that a mask has, from and to; the second is what stands for 1.
_CONVENTIONS = ((-math.inf, 1.0), (16.0, 255.0), (4096.0, 65535.0))


def _greys(picture: Image.Image, what: str) -> np.ndarray:  # [height, width]
    """The values of a picture that is a mask.

    Raises:
        ValueError: its transparency and its luminance both vary, so that either may be meant.
    """
    if picture.mode in ("1", "L", "F") or picture.mode.startswith("I"):
        return np.asarray(picture).astype(np.float32)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L"))
    luminance, alpha = (np.asarray(channel) for channel in picture.convert("RGBA").convert("LA").split())
    seen = luminance[alpha > 0]
    if alpha.min() == alpha.max():
        return luminance
    if seen.min() == seen.max() or np.array_equal(luminance, alpha):
        return alpha
    raise ValueError(
        f"{what} must say which is meant, its transparency or its luminance, since both vary: give "
        'picture.getchannel("A") or picture.convert("L")'
    )


def region_mask(mask: Any, what: str, limits: PictureLimits = PictureLimits()) -> Tensor:
    """`read_mask`, and something must be in it.

    Raises:
        TypeError, ValueError: it is no mask, or empty.
    """
    read = read_mask(mask, what, limits)
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
    greys = Image.fromarray((read_mask(mask, what) * 255).round().to(torch.uint8).numpy())
    square = ImageOps.fit(greys, (8 * width, 8 * height), Image.Resampling.BILINEAR)
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
