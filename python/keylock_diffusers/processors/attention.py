"""The processors that stand in for diffusers' own on a U-Net's attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from keylock_kernels import localized_attention

if TYPE_CHECKING:
    from keylock_diffusers.personalization import Personalization


class SelfAttnProcessor(AttnProcessor2_0):
    """diffusers' own self-attention, which also takes, and ignores, what the cross-attention layers are given.

    diffusers hands the same keywords to both kinds of layer and warns, per layer and step, about those that a
    processor does not name. `load_ip_adapter` makes self-attention processors anew with no arguments.
    """

    def __init__(self, original: Any = None) -> None:
        super().__init__()
        self.original = original

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C] or [B, C, height, width]
        encoder_hidden_states: Tensor | None = None,  # [B, T, D]
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        personalization: Personalization | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class CrossAttnProcessor:
    """Text cross-attention through `keylock_kernels.localized_attention`, each row with its own concepts.

    Without a personalization it computes what diffusers' AttnProcessor2_0 does, projecting keys and values in every
    call. With one it reads the keys and values that `Personalization.prepare` projected for this layer.

    Args:
        layer: the attention module's name in the U-Net.
        original: the processor this one replaces, kept for `uninstall`.
    """

    def __init__(self, layer: str = "", original: Any = None) -> None:
        self.layer = layer
        self.original = original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C] or [B, C, height, width]
        encoder_hidden_states: Tensor | None = None,  # [B, T, D]
        attention_mask: Tensor | None = None,  # [B, 1, T], added to the scores
        temb: Tensor | None = None,
        personalization: Personalization | None = None,
    ) -> Tensor:
        if attention_mask is not None and not _masks_keys_only(attention_mask, hidden_states, encoder_hidden_states):
            if personalization is None:
                return (self.original or AttnProcessor2_0())(
                    attn, hidden_states, encoder_hidden_states, attention_mask, temb
                )
            raise ValueError(
                f"{self.layer}: attention_mask must be [B, 1, T] with personalization, got {list(attention_mask.shape)}"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query = attn.to_q(hidden_states)
        if personalization is None:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            if encoder_hidden_states is not None and attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
            key, value = attn.to_k(context), attn.to_v(context)
        else:
            key, value = personalization.keys_and_values(self.layer, query.shape[0], encoder_hidden_states)

        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        bias = None if attention_mask is None else attention_mask.reshape(attention_mask.shape[0], -1)
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device).masked_fill(~bias, float("-inf"))
        elif bias is not None:
            bias = bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        hidden_states = cast(Tensor, localized_attention(query, key, value, scale=attn.scale, key_bias=bias)).flatten(2)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _masks_keys_only(mask: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> bool:
    """Whether a mask is one number per row and key, so that it can be a key bias."""
    keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    return (
        mask.ndim in (2, 3)
        and (mask.ndim == 2 or mask.shape[1] == 1)
        and mask.shape[0] == keys.shape[0]
        and mask.shape[-1] == keys.shape[1]
    )
