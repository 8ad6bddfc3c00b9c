"""Where things are in diffusers' U-Nets: layers, resolutions, projections, image prompt adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn

from keylock_diffusers.denoisers.neighbours import is_opaque

_FACE = "faceid_"  # begins diffusers' names of the LoRAs that come with FaceID adapters
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


class TextEncoder(NamedTuple):
    """One of a pipeline's text encoders."""

    tokenizer: Any
    model: Any
    penultimate: bool  # whether the last layer but one is read, not normalised, as SDXL does


def text_encoders(pipe: Any) -> list[TextEncoder]:
    """A pipeline's tokenizers and text encoders: one of Stable Diffusion 1.x and 2.x, two of SDXL."""
    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    found = [(getattr(pipe, tokenizer, None), getattr(pipe, encoder, None)) for tokenizer, encoder in pairs]
    several = hasattr(pipe, "text_encoder_2")
    return [TextEncoder(tokenizer, encoder, several) for tokenizer, encoder in found if encoder is not None]


@contextmanager
def lora_scale(modules: Sequence[nn.Module], scale: float | None) -> Iterator[None]:
    """While it lasts, the modules' LoRA weights count `scale` times as much, for this caller alone, and those that came
    with a FaceID adapter not at all: rows with its image prompts carry them (see `face_updates`).

    PEFT keeps the scale in layers that all callers share: whoever else runs these modules waits. What was there is put
    back to the bit.
    """
    layers = [layer for module in modules for layer in _tuner_layers(module)]
    if not layers:
        yield
        return
    with ExitStack() as held:
        for module in sorted(modules, key=id):  # always in one order, or two callers wait for each other
            held.enter_context(lock_of(module))
        before = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                if scale is not None:
                    layer.scale_layer(scale)
                layer.scaling.update(dict.fromkeys((name for name in layer.scaling if name.startswith(_FACE)), 0.0))
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)


def face_updates(unet: nn.Module, adapter: int) -> dict[str, tuple[Any, Any, float]]:
    """The LoRA that came with a FaceID adapter and is switched on, A, B and a factor by the projections' names."""
    name = f"{_FACE}{adapter}"
    if name not in getattr(unet, "peft_config", {}):
        return {}
    with lock_of(unet):
        layers: dict[str, Any] = {
            module: layer
            for module, layer in unet.named_modules()
            if name in getattr(layer, "lora_A", ()) and name in layer.active_adapters and not layer.disable_adapters
        }
        return {
            module: (layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
            for module, layer in layers.items()
        }


class ProjectionState:
    """What the key and value projections of layers compute with, to notice whoever changes it.

    It is asked in every step: a look at what was there, not a list made anew. What somebody's own code projects may
    change at any time: it counts as changed.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: Mapping[str, Attention]) -> None:
        self._projections = [(attn, side, getattr(attn, side)) for attn in layers.values() for side in ("to_k", "to_v")]
        modules = [module for *_, projection in self._projections for module in projection.modules()]
        self._modules, self._opaque = modules, any(is_opaque(module) for module in modules)
        # The parameters themselves: an address, or an id, is given to another tensor once they are gone.
        self._parameters = [
            (module._parameters, name, p, None if p.is_inference() else p._version)
            for module in modules
            for name, p in module._parameters.items()
            if p is not None and p.device.type != "meta"  # offloading makes those anew
        ]
        tuners: list[Any] = [module for module in modules if isinstance(getattr(module, "scaling", None), dict)]
        self._tuners = [(tuner, _adapters_of(tuner)) for tuner in tuners]

    def changed(self) -> bool:
        """Whether anything was changed since."""
        return (
            self._opaque
            or any(getattr(attn, side) is not projection for attn, side, projection in self._projections)
            or any(
                held.get(name) is not p or (version is not None and p._version != version)
                for held, name, p, version in self._parameters
            )
            or any(_adapters_of(tuner) != before for tuner, before in self._tuners)
            or any(is_opaque(module) for module in self._modules)
        )


def _adapters_of(tuner: Any) -> list[Any]:
    """Which of a PEFT layer's adapters count, and how much."""
    return [dict(tuner.scaling), tuner.disable_adapters, list(tuner.active_adapters), list(tuner.merged_adapters)]


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(module: nn.Module) -> Any:
    """What callers hold who change for themselves what a module's other callers read too."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(uncompiled(module), threading.RLock())


def _tuner_layers(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if hasattr(m, "scale_layer") and isinstance(getattr(m, "scaling", None), dict)]


def blocks_of(unet: nn.Module, layers: Iterable[str]) -> list[nn.Module]:
    """The blocks that layers lie in, each once."""
    return [unet.get_submodule(name) for name in dict.fromkeys(layer.rpartition(".")[0] for layer in layers)]


def are_compiled(blocks: Iterable[nn.Module]) -> bool:
    """Whether blocks are compiled one by one, as `compile_repeated_blocks` does."""
    return any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks)


def adapter_scales(unet: Any) -> dict[int, float]:
    """The scale of each IP-Adapter, where it is one number in all layers."""
    found: dict[int, set[Any]] = {}
    for attn in cross_attention_layers(unet).values():
        for adapter, scale in enumerate(getattr(attn.processor, "scale", ())):
            found.setdefault(adapter, set()).add(scale if isinstance(scale, (int, float)) else None)
    return {adapter: float(*scales) for adapter, scales in found.items() if len(scales) == 1 and None not in scales}


@contextmanager
def perturbed_attention(pipe: Any, on: bool, guided: bool) -> Iterator[None]:
    """While it lasts, a PAG pipeline's layers attend to themselves alone in the rows that are perturbed."""
    if not on:
        yield
        return
    unet = unet_of(pipe)
    with lock_of(unet):
        before = {name: attn.processor for name, attn in attention_modules(unet).items()}
        pipe._set_pag_attn_processor(pag_applied_layers=pipe.pag_applied_layers, do_classifier_free_guidance=guided)
        try:
            yield
        finally:
            for name, attn in attention_modules(unet).items():
                if attn.processor is not before[name]:
                    attn.processor = before[name]


def _block(layer: str) -> str:
    block, _, rest = layer.partition(".")
    return block if block == "mid_block" else f"{block}.{rest.partition('.')[0]}"
