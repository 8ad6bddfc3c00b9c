"""Where things are in diffusers' U-Nets: layers, resolutions, projections, image prompt adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn

_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


def unet_of(pipe: Any) -> nn.Module:
    """The U-Net of a pipeline, or the U-Net itself."""
    unet = uncompiled(getattr(pipe, "unet", pipe))
    if not isinstance(unet, nn.Module) or not hasattr(unet, "attn_processors"):
        raise TypeError(f"pipe must be a pipeline with a U-Net or a U-Net, got {type(pipe).__name__}")
    return unet


def uncompiled(module: Any) -> Any:
    """What torch.compile wraps."""
    return getattr(module, "_orig_mod", module)


def attention_modules(unet: nn.Module) -> dict[str, Attention]:
    """A U-Net's attention layers by name; an IP-Adapter's image projection may have some of its own."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and not name.startswith("encoder_hid_proj.")
    }


def cross_attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """List a U-Net's text cross-attention modules by name, in U-Net order: down blocks, middle, up blocks.

    Self-attention is left out, and so is attention with added key and value projections, which personalisation
    does not support. The order does not depend on how the model registers its blocks (diffusers registers the
    middle last). Names are those of ``unet.named_modules()``, without torch.compile's prefix.
    """
    model = uncompiled(unet)
    dim = getattr(getattr(model, "config", None), "cross_attention_dim", None)
    dims = set(dim) if isinstance(dim, (list, tuple)) else {dim}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Attention)
        and module.is_cross_attention
        and module.added_kv_proj_dim is None
        and (dims == {None} or base_layer(module.to_k).in_features in dims)
    ]
    found.sort(key=lambda layer: _ORDER.get(layer[0].split(".")[0], len(_ORDER)))
    return dict(found)


def localization_layers(unet: Any) -> list[str]:
    """The layers that are localized: of the blocks with cross-attention, down, middle, up, all but the first and last.

    On Stable Diffusion 1.5 these are the eleven of FastComposer.
    """
    names = list(cross_attention_layers(unet))
    blocks = list(dict.fromkeys(_block(name) for name in names))
    return [name for name in names if _block(name) in blocks[1:-1]]


def resolutions_of(unet: Any, layers: Iterable[str], latent_size: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
    """Height and width that each layer runs at: every level of a U-Net is half as high and wide as the one above."""
    if latent_size is None:
        return {}
    last = len(unet.config.block_out_channels) - 1

    def level(layer: str) -> int:
        block, _, rest = layer.partition(".")
        if block not in ("down_blocks", "up_blocks"):
            return last
        number = int(rest.partition(".")[0])
        return number if block == "down_blocks" else last - number

    height, width = latent_size
    return {layer: (-(-height // 2 ** level(layer)), -(-width // 2 ** level(layer))) for layer in layers}


def is_plain(attn: Attention) -> bool:
    """Whether a layer has one set of key and value heads per query head, and no added projections."""
    return attn.added_kv_proj_dim is None and attn.inner_kv_dim == attn.inner_dim


def base_layer(module: nn.Module) -> Any:
    """The projection itself, without the adapters PEFT wraps around it."""
    layer: Any = module
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def adapters(unet: Any) -> list[Any]:
    """The image projections of a U-Net's IP-Adapters."""
    projection = getattr(unet, "encoder_hid_proj", None)
    return list(projection.image_projection_layers) if isinstance(projection, MultiIPAdapterImageProjection) else []


def layer_numbers(unet: Any) -> dict[str, int]:
    """The number that an IP-Adapter's file has for each layer it attends in, by the layer's name."""
    names = [
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if not name.endswith("attn1.processor") and "motion_modules" not in name and not name.startswith("encoder_hid")
    ]
    return {name: 2 * place + 1 for place, name in enumerate(names)}


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """A pipeline's tokenizers and text encoders: one of Stable Diffusion 1.x and 2.x, two of SDXL."""
    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    found = [(getattr(pipe, tokenizer, None), getattr(pipe, encoder, None)) for tokenizer, encoder in pairs]
    return [(tokenizer, encoder) for tokenizer, encoder in found if encoder is not None]


def _block(layer: str) -> str:
    block, _, rest = layer.partition(".")
    return block if block == "mid_block" else f"{block}.{rest.partition('.')[0]}"
