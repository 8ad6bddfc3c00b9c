"""Comparing our processors with diffusers' own: on the same inputs of a real call, or under somebody else's tests."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor

from keylock_diffusers.denoisers.unet import cross_attention_layers, is_plain, layer_numbers, unet_of
from keylock_diffusers.processors.attention import (
    ATTENTION_OF_IMAGES,
    ATTENTION_OF_TEXT,
    Call,
    CrossAttnProcessor,
    ip_adapter_attention,
)
from keylock_diffusers.processors.swap import replacement

PROJECTIONS = ("base", "plus", "full-face", "faceid", "faceid-plus")


@dataclass(frozen=True)
class ShadowedCall:
    """One call of a layer, repeated by our processor; errors are the largest against a float64 computation."""

    layer: str
    processor: str  # diffusers'
    dtype: torch.dtype
    ours: float
    stock: float
    largest: float  # value of the exact output

    @property
    def allowed(self) -> float:
        """Twice what diffusers' own processor errs, plus one rounding of the largest value."""
        return 2 * self.stock + torch.finfo(self.dtype).eps * self.largest

    @property
    def passed(self) -> bool:
        return self.ours <= self.allowed  # False for NaN


@contextmanager
def shadow(pipe: Any) -> Iterator[list[ShadowedCall]]:
    """While it lasts, every cross-attention call of diffusers' processors in a U-Net is repeated by ours, same inputs.

    The pipeline is given diffusers' results, so that one call's difference is not carried into the next. Calls of
    processors that `install` would not replace are not repeated, nor are those in which diffusers' processor raises.

    Args:
        pipe: a pipeline with a U-Net, or the U-Net, without our processors; weights must not be offloaded.

    Yields:
        The calls so far.

    Raises:
        AssertionError: at the end, where ours erred by more than `ShadowedCall.allowed`; it names the layers.

    Example:
        >>> with shadow(pipe) as calls:  # doctest: +SKIP
        ...     pipe("a cat", ip_adapter_image=picture)
    """
    calls: list[ShadowedCall] = []
    busy: list[str] = []

    def repeat(layer: str) -> Any:
        def hook(attn: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if busy or not isinstance(output, Tensor):
                return
            ours = replacement(layer, attn)
            if ours is None:
                return
            busy.append(layer)
            try:
                calls.append(_repeated(layer, attn, ours, args, kwargs, output))
            finally:
                busy.clear()

        return hook

    handles = [
        attn.register_forward_hook(repeat(name), with_kwargs=True)
        for name, attn in cross_attention_layers(unet_of(pipe)).items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    failed = [call for call in calls if not call.passed]
    if failed:
        lines = [
            f"{c.layer} ({c.processor}, {c.dtype}): ours errs {c.ours:.3g}, diffusers' {c.stock:.3g}"
            for c in failed[:5]
        ]
        raise AssertionError(f"{len(failed)} of {len(calls)} calls err too much: " + "; ".join(lines))


@torch.no_grad()
def _repeated(
    layer: str, attn: Attention, ours: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> ShadowedCall:
    exact = copy.deepcopy(attn)
    exact._forward_hooks.clear()
    exact._forward_hooks_with_kwargs.clear()
    wide = exact.double()(*_wide(args), **_wide(kwargs))
    named = inspect.signature(ours.__call__).parameters
    repeated = ours(attn, *args, **{name: value for name, value in kwargs.items() if name in named})

    def largest(tensor: Tensor) -> float:
        return float(tensor.abs().max()) if tensor.numel() else 0.0

    return ShadowedCall(
        layer,
        type(attn.processor).__name__,
        output.dtype,
        ours=largest(repeated.double() - wide),
        stock=largest(output.double() - wide),
        largest=largest(wide),
    )


def _wide(value: Any) -> Any:
    """Floating-point tensors in float64, however deep they lie."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    return type(value)(_wide(item) for item in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def patch() -> Iterator[None]:
    """While it lasts, diffusers' own classes compute cross-attention with our code.

    Any test suite of diffusers' processors then tests ours, for example from a conftest.py that enters it once.
    AttnProcessor2_0 (where a layer is given a context) and IPAdapterAttnProcessor2_0 are patched.

    Example:
        >>> with patch():  # doctest: +SKIP
        ...     pytest.main(["diffusers/tests/pipelines/test_ip_adapters.py"])
    """
    text = CrossAttnProcessor("patched")

    def attend_text(
        self: Any,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if isinstance(encoder_hidden_states, Tensor) and is_plain(attn) and attn.scale_qk:
            return text(*given)
        return ATTENTION_OF_TEXT(self, *given, *args, **kwargs)

    def attend_images(
        self: Any,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        call = Call(hidden_states, encoder_hidden_states, attention_mask, temb)
        return ip_adapter_attention(self, attn, call, ip_adapter_masks, None)

    AttnProcessor2_0.__call__ = attend_text  # type: ignore[method-assign,assignment]
    IPAdapterAttnProcessor2_0.__call__ = attend_images  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttnProcessor2_0.__call__ = ATTENTION_OF_TEXT  # type: ignore[method-assign]
        IPAdapterAttnProcessor2_0.__call__ = ATTENTION_OF_IMAGES  # type: ignore[method-assign]


# Configurations of the published U-Nets, and of one a fortieth as large with SD 1.5's layers.
UNETS: dict[str, dict[str, Any]] = {
    "small": {
        "sample_size": 64,
        "block_out_channels": (64, 128, 192, 192),
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
    },
    "SD 1.5": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "transformer_layers_per_block": (1, 2, 10),
        "projection_class_embeddings_input_dim": 2816,
        "cross_attention_dim": 2048,
    },
}
_BLOCK = 1 << 22  # random numbers that are drawn once and laid side by side


def random_unet(model: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A U-Net with random weights, made in seconds even where it is of full size.

    Args:
        model: one of `UNETS`.
        dtype: of the weights.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
    unet = unet.to(dtype).to_empty(device="cpu").eval()
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, parameter in unet.named_parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), _BLOCK):
            flat[start : start + _BLOCK] = block[: len(flat) - start]
        if parameter.ndim > 1:
            parameter.data *= parameter[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data *= 0.1
    return unet


def random_ip_adapter(unet: Any, projection: str = "base", *, width: int = 32, seed: int = 0) -> dict[str, Any]:
    """An IP-Adapter with random weights in the layout of the published files, for `pipe.load_ip_adapter`.

    Args:
        unet: the U-Net it is for.
        projection: one of `PROJECTIONS`: "base" (4 tokens of a pooled encoding), "plus" (16 of all hidden states, by a
            resampler), "full-face" (every hidden state is a token), "faceid" and "faceid-plus" (4 of a face encoding).
        width: of the image (or face) encodings.
        seed: of the weights.

    Raises:
        ValueError: there is no such projection.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"random_ip_adapter: projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    random = torch.Generator().manual_seed(seed)
    dim = unet.config.cross_attention_dim

    def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, Tensor]:
        made = {f"{name}.weight": torch.randn(out, into, generator=random) * into**-0.5}
        return {**made, f"{name}.bias": 0.1 * torch.randn(out, generator=random)} if bias else made

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.1 * torch.randn(size, generator=random), f"{name}.bias": torch.zeros(size)}

    def resampler(prefix: str, inner: int) -> dict[str, Tensor]:
        made = {**linear(f"{prefix}proj_in", inner, width), **linear(f"{prefix}proj_out", dim, inner)}
        made.update(norm(f"{prefix}norm_out", dim))
        for n in range(4):
            block = f"{prefix}layers.{n}"
            made.update({**norm(f"{block}.0.norm1", inner), **norm(f"{block}.0.norm2", inner)})
            made.update(linear(f"{block}.0.to_q", 64, inner, bias=False))
            made.update(linear(f"{block}.0.to_kv", 128, inner, bias=False))
            made.update(linear(f"{block}.0.to_out", inner, 64, bias=False))
            made.update(norm(f"{block}.1.0", inner))
            made.update(linear(f"{block}.1.1", 4 * inner, inner, bias=False))
            made.update(linear(f"{block}.1.3", inner, 4 * inner, bias=False))
        return made

    if projection == "base":
        image_proj = {**linear("proj", 4 * dim, width), **norm("norm", dim)}
    elif projection == "full-face":
        image_proj = {**linear("proj.0", width, width), **linear("proj.2", dim, width), **norm("proj.3", dim)}
    elif projection == "faceid":
        image_proj = {**linear("proj.0", 2 * width, width), **linear("proj.2", 4 * dim, 2 * width), **norm("norm", dim)}
    elif projection == "plus":
        image_proj = {"latents": torch.randn(1, 16, 64, generator=random) / 8, **resampler("", 64)}
    else:
        image_proj = {**linear("proj.0", 2 * width, width), **linear("proj.2", 4 * 64, 2 * width), **norm("norm", 64)}
        image_proj.update(resampler("perceiver_resampler.", 64))
    layers: dict[str, Tensor] = {}
    for name, number in layer_numbers(unet).items():
        for side in ("to_k_ip", "to_v_ip"):
            layers.update(linear(f"{number}.{side}", unet.get_submodule(name).inner_dim, dim, bias=False))
    return {"image_proj": image_proj, "ip_adapter": layers}
