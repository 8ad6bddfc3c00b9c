"""A layer's image tokens as streams of `keylock_kernels.localized_attention`, from diffusers' IP-Adapter arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

from keylock_diffusers.masks import resize_masks
from keylock_diffusers.processors.contract import ImageStreams
from keylock_kernels.ops.precision import accumulate_dtype


class PreparedImageProjection(MultiIPAdapterImageProjection):
    """diffusers' image projection, which does no work where a personalization holds the image tokens already.

    A U-Net with an IP-Adapter projects the image embeddings it is given in every step. `keylock_diffusers.generate`
    gives it embeddings of zero images, and those need no projection.

    Args:
        original: the projection this one replaces, kept for `uninstall`; its layers are shared.
    """

    def __init__(self, original: MultiIPAdapterImageProjection) -> None:
        nn.Module.__init__(self)
        self.image_projection_layers = original.image_projection_layers
        # Not as a submodule: its parameters would be listed twice.
        self.__dict__["original"] = original

    def forward(self, image_embeds: Any) -> list[Tensor]:
        if isinstance(image_embeds, list) and all(embeds.shape[1] == 0 for embeds in image_embeds):
            return [embeds.new_empty(len(embeds), 0, 0, 0) for embeds in image_embeds]
        return super().forward(image_embeds)


def adapter_streams(
    states: Sequence[Tensor],  # per adapter [B, n, T, D], or [B, T, D] for one image
    scales: Sequence[Any],  # per adapter a number, or one per image
    to_k_ip: Sequence[nn.Module],
    to_v_ip: Sequence[nn.Module],
    masks: Any,  # None; per adapter None or [1 or B, n, height, width]; or one tensor [A, 1, height, width]
    query: Tensor,  # [B, N, C]
) -> ImageStreams | None:
    """What IPAdapterAttnProcessor2_0 attends to: all images of an adapter together, or with masks each on its own.

    Nothing is kept between calls. Masks are resized where they are; only [N] numbers each travel to the query's device.

    Raises:
        ValueError: masks, scales and images do not match, or the image tokens have another number of rows.
        TypeError: several scales for an adapter without masks.
    """
    rows, pixels, _ = query.shape
    states = [state[:, None] if state.ndim == 3 else state for state in states]
    if rows == 1:
        states = [_halves_together(state) for state in states]
    for index, state in enumerate(states):
        if len(state) != rows:
            raise ValueError(
                f"ip_adapter_image_embeds: adapter {index} has image tokens for {len(state)} rows, but the batch has "
                f"{rows}; different images per row are given as keylock_diffusers.Request(image_prompts=...)"
            )
    per_adapter = _checked_masks(masks, scales, states)
    keys, values, lengths, weights, masked = [], [], [], [], False
    for index, (state, scale, mask) in enumerate(zip(states, scales, per_adapter, strict=False)):
        count, tokens = state.shape[1:3]
        per_image = scale if isinstance(scale, list) else [scale] * (1 if mask is None else count)
        if all(number == 0 for number in per_image):
            continue
        if isinstance(scale, list) and mask is None:
            raise TypeError(f"ip_adapter_scale: adapter {index} has one scale per image, which needs ip_adapter_masks")
        state = state.flatten(1, 2)
        keys.append(to_k_ip[index](state))
        values.append(to_v_ip[index](state))
        lengths += [count * tokens] if mask is None else [tokens] * count
        masked = masked or mask is not None
        weights.append((per_image, mask))
    if not keys:
        return None
    kind: dict[str, Any] = {"dtype": accumulate_dtype(query.dtype), "device": query.device}
    if masked:
        weight = torch.cat([_per_pixel(numbers, mask, rows, pixels, kind) for numbers, mask in weights], 1)
    elif all(numbers == [1] for numbers, _ in weights):
        weight = None
    else:
        weight = torch.cat([torch.full((rows, 1), numbers[0], **kind) for numbers, _ in weights], 1)
    joined = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in (keys, values)]
    return ImageStreams(joined[0], joined[1], tuple(lengths), weight)


def _halves_together(state: Tensor) -> Tensor:  # [2, n, T, D] -> [1, n, 2T, D]
    """Image tokens of both halves of guidance for one row, as where a callback has cut guidance off.

    diffusers' cutoff callbacks leave the image tokens as they are, and its processors then read those of both halves
    under one softmax.
    """
    if len(state) != 2:
        return state
    _, images, _, width = state.shape
    return state.transpose(0, 1).reshape(1, images, -1, width)


def _per_pixel(
    scales: list[Any], mask: Tensor | None, rows: int, pixels: int, kind: dict[str, Any]
) -> Tensor:  # [B, n, N]
    """Scale times mask of one adapter's images."""
    if mask is None:
        return torch.full((rows, 1, pixels), scales[0], **kind)
    resized = resize_masks(mask.flatten(0, 1), pixels).to(**kind).view(mask.shape[0], mask.shape[1], pixels)
    if any(scale != 1 for scale in scales):
        resized = torch.stack([resized[:, image] * scale for image, scale in enumerate(scales)], 1)
    return resized.expand(rows, -1, -1)


def _checked_masks(masks: Any, scales: Sequence[Any], states: Sequence[Tensor]) -> list[Tensor | None]:
    """The masks of each adapter; the conditions and the two accepted forms are diffusers'."""
    if masks is None:
        return [None] * len(states)
    if not isinstance(masks, list):
        masks = list(masks.unsqueeze(1))
    if not len(masks) == len(scales) == len(states):
        raise ValueError(
            f"ip_adapter_masks must be one per adapter ({len(states)} with image tokens, {len(scales)} with a scale), "
            f"got {len(masks)}"
        )
    for index, (mask, scale, state) in enumerate(zip(masks, scales, states, strict=True)):
        if mask is None:
            continue
        rows, images = state.shape[:2]
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"ip_adapter_masks[{index}] must be a tensor [1, images, height, width], as IPAdapterMaskProcessor "
                f"makes it, got {got}"
            )
        if mask.shape[1] != images:
            raise ValueError(
                f"ip_adapter_masks[{index}] must have a mask for each of {images} images, got {mask.shape[1]}"
            )
        if mask.shape[0] not in (1, rows):
            raise ValueError(f"ip_adapter_masks[{index}] must have 1 or {rows} rows, got {mask.shape[0]}")
        if isinstance(scale, list) and len(scale) != images:
            raise ValueError(
                f"ip_adapter_scale of adapter {index} must have {images} numbers, one a mask, got {len(scale)}"
            )
    return list(masks)
