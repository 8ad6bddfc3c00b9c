"""Smaller views of a subject's pictures: it fills those that are given, and beside others it is drawn small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from keylock_diffusers.training import loop

VIEWS = 2  # of each picture
_SMALLEST, _LARGEST = 0.5, 0.65  # of a view's side, as a share of its picture's


def small_views(
    squares: Sequence[Image.Image], weights: Tensor, seed: int
) -> tuple[list[Image.Image], Tensor]:  # and [n VIEWS, 1, h, w]
    """Views of each picture in which it is smaller and lies anywhere, continued by the colours of its edges.

    Of all pictures the first, then the second.

    Args:
        squares: the pictures, all of one side.
        weights: their masks in latents' resolution, in 0..1 [n, 1, h, w]; a view's is 0 outside of its picture.
        seed: of their sizes and places.

    Custom Diffusion shows its pictures smaller, too: Kumari et al. 2023, arXiv 2212.04488.
    """
    across = weights.shape[-1]
    unit = squares[0].width // across  # pixels; sizes and places are whole latents, where picture and mask agree
    random = loop.generator(seed, -2)  # beside the steps' and the start's own draws
    views, masks = [], []
    for _ in range(VIEWS):
        for square, mask in zip(squares, weights, strict=True):
            low, high = (max(1, round(share * across)) for share in (_SMALLEST, _LARGEST))
            size = int(torch.randint(low, high + 1, (), generator=random))
            left, top = torch.randint(across - size + 1, (2,), generator=random).tolist()
            right, bottom = across - size - left, across - size - top
            small = np.asarray(square.resize((size * unit, size * unit), Image.Resampling.LANCZOS))
            borders = ((top * unit, bottom * unit), (left * unit, right * unit))
            views.append(Image.fromarray(np.pad(small, (*borders, *[(0, 0)] * (small.ndim - 2)), mode="edge")))
            shown = F.interpolate(mask[None], (size, size), mode="bilinear", antialias=True)[0]
            masks.append(F.pad(shown / shown.max(), (left, right, top, bottom)))
    return views, torch.stack(masks)
