"""The linear layers and convolutions of a model, which low-rank updates may reach, by the names that LoRA files use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from keylock_diffusers.denoisers.base import Size

# What runs on something else than the batch's rows, or is another model's: AnimateDiff's motion, image projections.
_APART = ("motion_modules", "encoder_hid_proj", "processor", "temp_convs", "transformer_in")
_WITHOUT_PIXELS = ("time_embedding.", "add_embedding.", "class_embedding.", "time_embed_act.")


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and convolution of a model by name, in the model's own order.

    Where PEFT wraps one, it is what is wrapped, by the name that it has without; adapters are none.
    """
    return dict(_below(model, ""))


def _below(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        yield from _below(base, name)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):  # quantised linear layers are subclasses
        if not (isinstance(module, nn.Conv2d) and module.groups > 1):
            yield name, module
    else:
        for child, inner in module.named_children():
            if child not in _APART:
                yield from _below(inner, f"{name}.{child}" if name else child)


def weight_shape(module: Any) -> tuple[int, ...]:
    """The shape of a projection's weight, however it is stored."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels, *module.kernel_size
    return module.out_features, module.in_features


def weight_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: weight_shape(module) for name, module in modules.items()}


def output_size(unet: Any, name: str, latent: Size) -> Size | None:
    """Height and width of what a projection of a U-Net gives; None where it has no pixels.

    Every level of a U-Net is half as high and wide as the one above; a sampler's convolution gives the next one's size.
    """
    if name.startswith(_WITHOUT_PIXELS) or name.endswith("time_emb_proj"):
        return None
    last = len(unet.config.block_out_channels) - 1
    block, _, rest = name.partition(".")
    if block == "mid_block":
        level = last
    elif block not in ("down_blocks", "up_blocks"):
        level = 0
    else:
        number = int(rest.partition(".")[0])
        level = number if block == "down_blocks" else last - number
        level += (".downsamplers." in name) - (".upsamplers." in name)
    height, width = latent
    return -(-height // 2**level), -(-width // 2**level)


def reads_text(name: str) -> bool:
    """Whether a projection of a U-Net reads the text rather than the picture."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))
