"""Perturbed-attention guidance in one call of each projection, so that adapters find every row where the batch has it.

Paper: Ahn et al. 2024, arXiv 2403.17377.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import Tensor, nn

# Of how many parts of a batch the last is perturbed.
_PARTS = {PAGCFGIdentitySelfAttnProcessor2_0: 3, PAGIdentitySelfAttnProcessor2_0: 2}


class PerturbedSelfAttnProcessor:
    """diffusers' self-attention with perturbed rows: those attend to themselves alone.

    Args:
        parts: of how many parts of the batch the last is perturbed.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C] or [B, C, height, width]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        whole = shape[0] - shape[0] // self._parts  # rows that are not perturbed
        value = attn.to_v(hidden_states)

        def by_head(tensor: Tensor) -> Tensor:  # [B, N, C] -> [B, H, N, D]
            return tensor[:whole].unflatten(2, (attn.heads, -1)).transpose(1, 2)

        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask[:whole], hidden_states.shape[1], whole)
            attention_mask = attention_mask.view(whole, attn.heads, -1, attention_mask.shape[-1])
        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        attended = F.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value), attention_mask)
        hidden_states = torch.cat([attended.transpose(1, 2).flatten(2), value[whole:]])
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


@contextmanager
def in_one_call(model: nn.Module) -> Iterator[None]:
    """While it lasts, ours stand in for the processors that diffusers has put on perturbed layers."""
    swapped: list[tuple[Any, Any]] = [
        (module, module.processor)
        for module in model.modules()
        if isinstance(module, Attention) and type(module.processor) in _PARTS
    ]
    try:
        for module, processor in swapped:
            module.processor = PerturbedSelfAttnProcessor(_PARTS[type(processor)])
        yield
    finally:
        for module, processor in swapped:
            module.processor = processor
