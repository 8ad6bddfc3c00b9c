"""The localization loss: a subject's attention is rewarded inside its mask and penalised outside (FastComposer).

It is read out of the attention while that is computed, so that no attention matrix is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.denoisers.unet import cross_attention_layers, localization_layers, resolutions_of
from keylock_diffusers.masks import antialiased

FORMS = ("balanced", "normalised", "mse")


class Localization:
    """Collects what the loss needs during one pass of a U-Net: ``cross_attention_kwargs={"readout": localization}``.

    Args:
        unet: the U-Net.
        tokens: int [B, M], the positions of each row's subjects in its text; -1: none.
        masks: [B, M, height, width] in 0..1, where each subject is, of any aspect ratio; stretched over the picture.
        latent_size: (height, width) of the latents.
        form: "balanced", mean of the map outside the mask less mean inside it, per layer and head; "normalised", the
            same of a map divided by its maximum; "mse", the mean squared difference from the mask of the map that is
            averaged over heads and layers of one resolution and divided by its maximum (Break-A-Scene).
        layers: which; default `localization_layers`.

    Raises:
        ValueError: shapes that do not match, another form, or a layer that is not there.

    Paper: Xiao et al., FastComposer, arXiv 2305.10431; Avrahami et al., Break-A-Scene, arXiv 2305.16311.

    Example:
        >>> localization = Localization(unet, tokens, masks, (64, 64))  # doctest: +SKIP
        >>> predicted = unet(noisy, times, text, cross_attention_kwargs={"readout": localization}).sample
        >>> loss = mse_loss(predicted, noise) + 1e-3 * localization_loss(localization)
    """

    def __init__(
        self,
        unet: Any,
        tokens: Tensor,
        masks: Tensor,
        latent_size: tuple[int, int],
        *,
        form: str = "balanced",
        layers: Sequence[str] | None = None,
    ) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"Localization: tokens must be int [B, M], got {tokens.dtype} {list(tokens.shape)}")
        if masks.ndim != 4 or masks.shape[:2] != tokens.shape:
            raise ValueError(
                f"Localization: masks must be {[*tokens.shape]} + [height, width], got {list(masks.shape)}"
            )
        if form not in FORMS:
            raise ValueError(f"Localization: form must be one of {', '.join(FORMS)}, got {form!r}")
        known = list(cross_attention_layers(unet))
        chosen = localization_layers(unet) if layers is None else list(layers)
        absent = [name for name in chosen if name not in known]
        if absent or not chosen:
            raise ValueError(
                f"Localization: layers must be cross-attention layers of the U-Net, got {absent or chosen}"
            )
        self.form, self.layers = form, chosen
        self.tokens = tokens.to(torch.int32)
        self._sizes = resolutions_of(unet, chosen, latent_size)
        self._given = masks
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._weights: dict[tuple[int, int], Tensor] = {}
        self.read: dict[str, Tensor] = {}

    def wanted(self, layer: str, rows: int, pixels: int) -> tuple[Tensor, Tensor | None] | None:
        """See `keylock_diffusers.processors.Readout`."""
        if layer not in self._sizes:
            return None
        size = self._sizes[layer]
        if rows != len(self.tokens) or pixels != math.prod(size):
            raise ValueError(
                f"Localization: made for {len(self.tokens)} rows and {size} pixels, but {layer} runs on {rows} "
                f"rows and {pixels} pixels"
            )
        return self.tokens, self.mean_weights(size) if self.form == "balanced" else None

    def receive(self, layer: str, read: Tensor) -> None:
        """See `keylock_diffusers.processors.Readout`."""
        self.read[layer] = read

    def masks(self, size: tuple[int, int]) -> Tensor:  # [B, N, M]
        """The masks at a layer's resolution, bilinear with antialiasing as in FastComposer."""
        if size not in self._masks:
            self._masks[size] = antialiased(self._given, size)
        return self._masks[size]

    def mean_weights(self, size: tuple[int, int]) -> Tensor:  # [B, N, M]
        """Weights whose sum with a map is its mean outside the mask less its mean inside."""
        if size not in self._weights:
            inside = self.masks(size)
            self._weights[size] = _mean_weights(1 - inside) - _mean_weights(inside)
        return self._weights[size]

    def size_of(self, layer: str) -> tuple[int, int]:
        """Height and width that a layer runs at."""
        return self._sizes[layer]


def localization_loss(localization: Localization, *, per_row: bool = False) -> Tensor:
    """The loss of one pass, differentiable.

    Args:
        localization: what collected during the pass.
        per_row: whether to return each row's loss [B] rather than their mean.

    Returns:
        The mean over heads, subjects and layers (see `Localization` for the forms); a row without subjects counts 0.

    Raises:
        ValueError: a layer was not run.
    """
    missing = [name for name in localization.layers if name not in localization.read]
    if missing:
        raise ValueError(f"localization_loss: {missing[0]} has not been run with the readout; was the U-Net installed?")
    form, read = localization.form, localization.read
    if form == "balanced":
        terms = [read[name].mean(1) for name in localization.layers]  # [B, M] each
    elif form == "normalised":
        terms = [
            (_scaled(read[name]) * localization.mean_weights(localization.size_of(name))[:, None]).sum(2).mean(1)
            for name in localization.layers
        ]
    else:
        by_size: dict[tuple[int, int], list[Tensor]] = {}
        for name in localization.layers:
            by_size.setdefault(localization.size_of(name), []).append(read[name].mean(1))
        terms = [
            (_scaled(torch.stack(maps).mean(0), 1) - localization.masks(size)).square().mean(1)
            for size, maps in by_size.items()
        ]
    present = (localization.tokens >= 0).to(terms[0])
    rows = (torch.stack(terms).mean(0) * present).sum(1) / present.sum(1).clamp(min=1)
    return rows if per_row else rows.mean()


def _scaled(maps: Tensor, dim: int = 2) -> Tensor:
    """Maps divided by their maximum over the pixels."""
    return maps / maps.amax(dim, keepdim=True).clamp(min=1e-5)


def _mean_weights(mask: Tensor) -> Tensor:  # [B, N, M]
    """The mask over its sum; an empty one counts nothing."""
    total = mask.sum(1, keepdim=True)
    return torch.where(total > 0, mask / total.clamp(min=1e-5), 0)
