"""The processors that stand in for diffusers' own on a U-Net's attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor

from keylock_diffusers.processors.contract import Bound, ImageStreams, Kept, LayerInputs, Readout
from keylock_diffusers.processors.images import adapter_streams
from keylock_diffusers.processors.projection import keys_and_values
from keylock_kernels import localized_attention
from keylock_kernels.ops.precision import accumulate_dtype

# diffusers' own, whatever `keylock_diffusers.testing.patch` puts in their place.
ATTENTION_OF_TEXT = AttnProcessor2_0.__call__
ATTENTION_OF_IMAGES = IPAdapterAttnProcessor2_0.__call__


class Call(NamedTuple):
    """What diffusers calls a layer's processor with."""

    hidden_states: Tensor  # [B, N, C] or [B, C, height, width]
    text: Any = None  # [B, T, D], or with image tokens (text, per adapter [B, n, L, D])
    attention_mask: Tensor | None = None  # [B, 1, T], added to the text's scores
    temb: Tensor | None = None


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
        personalization: LayerInputs | Bound | None = None,
        readout: Readout | None = None,
    ) -> Tensor:
        return ATTENTION_OF_TEXT(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb)


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
        self.kept: Kept | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C] or [B, C, height, width]
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,  # [B, T, D]
        attention_mask: Tensor | None = None,  # [B, 1, T], added to the scores
        temb: Tensor | None = None,
        personalization: LayerInputs | Bound | None = None,
        readout: Readout | None = None,
    ) -> Tensor:
        if isinstance(encoder_hidden_states, tuple):
            if personalization is None:
                raise ValueError(
                    f"{self.layer}: image tokens were given to a layer without an IP-Adapter's processor; "
                    "call keylock_diffusers.install(pipe) after load_ip_adapter"
                )
            encoder_hidden_states = _text_alone(self.layer, encoder_hidden_states)
        if attention_mask is not None and not _masks_keys_only(attention_mask, hidden_states, encoder_hidden_states):
            if personalization is not None or readout is not None:
                raise _unsupported_mask(self.layer, attention_mask)
            original = self.original
            if original is None or type(original) is AttnProcessor2_0:
                return ATTENTION_OF_TEXT(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb)  # type: ignore[arg-type]
            return original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        call = Call(hidden_states, encoder_hidden_states, attention_mask, temb)
        return cross_attention(attn, self.layer, call, personalization, readout=readout, kept=self.kept)


class IPAdapterCrossAttnProcessor(IPAdapterAttnProcessor2_0):
    """Text and image cross-attention of an IP-Adapter in one `keylock_kernels.localized_attention` call.

    It is a view of the processor that `load_ip_adapter` made: the projections ``to_k_ip`` and ``to_v_ip`` and the list
    of scales are that one's own objects, so that state dicts, `set_ip_adapter_scale` and `unload_ip_adapter` work as
    before and nothing is held twice. With a personalization, images and scales are its rows' own.

    Args:
        layer: the attention module's name in the U-Net.
        original: the IP-Adapter processor this one replaces, kept for `uninstall`.

    Paper: Ye et al., IP-Adapter, arXiv 2308.06721.
    """

    def __init__(self, layer: str, original: Any) -> None:
        torch.nn.Module.__init__(self)
        self.layer = layer
        self.kept: Kept | None = None
        self.hidden_size, self.cross_attention_dim = original.hidden_size, original.cross_attention_dim
        self.num_tokens, self.scale = original.num_tokens, original.scale
        self.to_k_ip, self.to_v_ip = original.to_k_ip, original.to_v_ip
        # Not as a submodule: its parameters would be listed twice.
        self.__dict__["original"] = original

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C] or [B, C, height, width]
        encoder_hidden_states: Any = None,  # (text [B, T, D], per adapter image tokens [B, n, L, D])
        attention_mask: Tensor | None = None,  # [B, 1, T], added to the text's scores
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,  # per adapter None or [1, n, height, width]
        personalization: LayerInputs | Bound | None = None,
        readout: Readout | None = None,
    ) -> Tensor:
        call = Call(hidden_states, encoder_hidden_states, attention_mask, temb)
        return ip_adapter_attention(self, attn, call, ip_adapter_masks, personalization, readout)


def ip_adapter_attention(
    processor: Any,
    attn: Attention,
    call: Call,
    ip_adapter_masks: Any,  # per adapter None or [1, n, height, width]
    personalization: LayerInputs | Bound | None,
    readout: Readout | None = None,
) -> Tensor:
    """IPAdapterAttnProcessor2_0's forward pass with the scales and projections of `processor`."""
    layer = getattr(processor, "layer", "attention")
    states: list[Tensor] = []
    if personalization is not None:
        text = _text_alone(layer, call.text, ip_adapter_masks)
    else:
        text, states = _text_and_images(layer, call.text, processor.num_tokens)
    mask = call.attention_mask
    if mask is not None and not _masks_keys_only(mask, call.hidden_states, text):
        if personalization is not None or readout is not None:
            raise _unsupported_mask(layer, mask)
        return ATTENTION_OF_IMAGES(
            processor, attn, call.hidden_states, (text, states), mask, call.temb, ip_adapter_masks=ip_adapter_masks
        )

    def images(query: Tensor) -> ImageStreams | None:  # [B, N, C]
        return adapter_streams(states, processor.scale, processor.to_k_ip, processor.to_v_ip, ip_adapter_masks, query)

    kept = getattr(processor, "kept", None)
    return cross_attention(attn, layer, call._replace(text=text), personalization, images, readout, kept)


def cross_attention(
    attn: Attention,
    layer: str,
    call: Call,
    personalization: LayerInputs | Bound | None,
    images: Callable[[Tensor], ImageStreams | None] | None = None,
    readout: Readout | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """A cross-attention layer's forward pass; `images` makes a layer's image streams from its query [B, N, C].

    Like diffusers' processors for IP-Adapters, layers with images do not normalise queries and keys.
    """
    hidden_states, text, attention_mask, temb = call
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    shape = hidden_states.shape
    if len(shape) == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    query = attn.to_q(hidden_states)
    streams = regions = None
    if isinstance(personalization, Bound):
        assert kept is not None
        key, value, streams, regions = kept
    elif personalization is not None:
        given = hidden_states if text is None else text
        pair = personalization.keys_and_values(layer, query.shape[0], text)
        key, value = keys_and_values(attn, layer, (given, given), personalization.updates) if pair is None else pair
        streams = personalization.image_streams(layer, query.shape[1])
        regions = personalization.visibility(layer, query.shape[1])
    else:
        context = hidden_states if text is None else text
        if text is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        key, value = attn.to_k(context), attn.to_v(context)
        if images is not None:
            streams = images(query)

    query, key, value = (_by_head(t, attn.heads) for t in (query, key, value))
    scale = None
    if images is None:
        scale = attn.scale
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
    options: dict[str, Any] = {}
    if attention_mask is not None:
        options["key_bias"] = _key_bias(attention_mask, accumulate_dtype(query.dtype))
    if regions is not None:
        options.update(query_regions=regions[0], key_regions=regions[1])
    if streams is not None:
        options.update(
            image_key=_by_head(streams.key, attn.heads),
            image_value=_by_head(streams.value, attn.heads),
            image_lengths=streams.lengths,
            image_key_bias=streams.key_bias,
            image_weights=streams.weights,
        )
    wanted = None if readout is None else readout.wanted(layer, query.shape[0], query.shape[1])
    if wanted is not None:
        options.update(readout_tokens=wanted[0], readout_weights=wanted[1])
    attended = localized_attention(query, key, value, scale=scale, **options)
    if readout is not None and wanted is not None:
        attended, read = attended
        readout.receive(layer, read)
    hidden_states = cast(Tensor, attended).flatten(2)

    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    if len(shape) == 4:
        hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    return hidden_states / attn.rescale_output_factor


def _text_and_images(layer: str, given: Any, num_tokens: Any) -> tuple[Tensor, list[Tensor]]:
    """Text and per adapter image tokens; a plain tensor ends with the image tokens, as diffusers once had it."""
    if isinstance(given, tuple):
        return given
    if given is None:
        raise ValueError(f"{layer}: encoder_hidden_states must be (text, [image tokens]) with an IP-Adapter, got None")
    text = given.shape[1] - num_tokens[0]
    return given[:, :text], [given[:, text:]]


def _text_alone(layer: str, given: Any, masks: Any = None) -> Tensor:
    """The text beside a personalization, which has the images: none may come with the call."""
    text, states = given if isinstance(given, tuple) else (given, [])
    if masks is not None or any(state.ndim != 4 or state.shape[1] for state in states):
        raise ValueError(
            f"{layer}: ip_adapter_masks and image embeddings must not be given beside a personalization, which has its "
            f"own; got masks {masks is not None}, image tokens {[list(state.shape) for state in states]}"
        )
    return text


def _by_head(tensor: Tensor, heads: int) -> Tensor:  # [B, T, C] -> [B, T, H, D]
    # Not unflatten: torch.compile cannot trace it where a default device is set.
    return tensor.view(tensor.shape[0], tensor.shape[1], heads, -1)


def _key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:  # [B, 1, T] or [B, T] -> [B, T]
    bias = mask.reshape(mask.shape[0], -1)
    if bias.dtype == torch.bool:
        return torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill(~bias, float("-inf"))
    return bias.to(dtype)


def _unsupported_mask(layer: str, mask: Tensor) -> ValueError:
    return ValueError(
        f"{layer}: attention_mask must be [B, 1, T] with personalization or readout, got {list(mask.shape)}"
    )


def _masks_keys_only(mask: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> bool:
    """Whether a mask is one number per row and key, so that it can be a key bias."""
    keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    return (
        mask.ndim in (2, 3)
        and (mask.ndim == 2 or mask.shape[1] == 1)
        and mask.shape[0] == keys.shape[0]
        and mask.shape[-1] == keys.shape[1]
    )
