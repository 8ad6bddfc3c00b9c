"""What the localization loss costs a training step: peak memory and time, beside attention that keeps its matrices."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from keylock_diffusers.denoisers.unet import cross_attention_layers, resolutions_of
from keylock_diffusers.processors import install
from keylock_diffusers.testing import UNETS, random_unet
from keylock_diffusers.training.localization import Localization, localization_layers, localization_loss

_TEXT = 77
TURNS = {"SD 1.5": 9, "SDXL": 5}
MEMORY_BATCH = {"SD 1.5": 4, "SDXL": 1}


class KeepingProcessor:
    """Attention as FastComposer computes it: the matrix of probabilities is made, kept, and the loss taken from it."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.probabilities: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        query, context = attn.to_q(hidden_states), encoder_hidden_states
        key, value = attn.to_k(context), attn.to_v(context)
        query, key, value = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        if self.keep:
            self.probabilities = (attn.scale * query @ key.transpose(-1, -2)).softmax(-1)  # [B, H, N, T]
            out = self.probabilities @ value
        else:
            out = nn.functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """A U-Net's cross-attention layers alone, each on its own pixels: what they save for the backward pass adds up."""

    def __init__(self, model: str, batch: int) -> None:
        super().__init__()
        with torch.device("meta"):
            unet = UNet2DConditionModel(**UNETS[model])
        self.config = unet.config
        side = unet.config.sample_size
        self.sizes = resolutions_of(unet, cross_attention_layers(unet), (side, side))
        self.latent_size = (side, side)
        self.layers = dict(cross_attention_layers(unet))
        for name, attn in self.layers.items():
            attn.to_empty(device="cpu").requires_grad_(False)
            for parameter in attn.parameters():
                nn.init.normal_(parameter, std=0.02)
            self.add_module(name.replace(".", "-"), attn)
        random = torch.Generator().manual_seed(0)
        self.text = torch.randn(batch, _TEXT, unet.config.cross_attention_dim, generator=random).requires_grad_()
        self.hidden = {
            name: torch.randn(batch, h * w, self.layers[name].query_dim, generator=random)
            for name, (h, w) in self.sizes.items()
        }
        self.localized = localization_layers(unet)
        self.unet = [unet]  # not as a submodule

    def localization(self) -> Localization:
        """The loss's collector: one subject a row, in the left half."""
        tokens = torch.full((len(self.text), 1), 5)
        return Localization(self.unet[0], tokens, left_half(len(self.text)), self.latent_size)

    def run(self, **options: Any) -> Tensor:
        outputs = [attn(self.hidden[name], self.text, **options) for name, attn in self.layers.items()]
        return torch.stack([output.square().mean() for output in outputs]).mean()


def left_half(batch: int) -> Tensor:  # [B, 1, 64, 64]
    mask = torch.zeros(batch, 1, 64, 64)
    mask[..., :32] = 1
    return mask


def peak_bytes(step: Callable[[], None]) -> int:
    """The most memory that tensors on the CPU took at once during a step, beyond what there was before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_memory(model: str) -> dict[str, float]:
    """MiB beyond the step without the loss, at the published sizes, of all the cross-attention layers together."""
    module = CrossAttention(model, MEMORY_BATCH[model])
    peaks = {}
    for name in ("plain", "eager"):
        processors = {layer: KeepingProcessor(name == "eager" and layer in module.localized) for layer in module.layers}
        for layer, attn in module.layers.items():
            attn.set_processor(processors[layer])

        def step(processors: dict[str, KeepingProcessor] = processors, name: str = name) -> None:
            loss = module.run()
            if name == "eager":
                localization = module.localization()
                kept = {layer: processors[layer].probabilities for layer in module.localized}
                terms = [
                    (kept[layer][..., 5:6] * localization.mean_weights(module.sizes[layer])[:, None]).sum(2).mean(1)
                    for layer in module.localized
                ]
                loss = loss + 1e-3 * torch.stack(terms).mean()
            loss.backward()
            for processor in processors.values():
                processor.probabilities = None

        step()
        peaks[name] = peak_bytes(step)
    unet = module.unet[0]
    for layer, attn in module.layers.items():
        attn.processor = None
        unet.get_submodule(layer).set_processor(_plain())
    install(unet)

    def ours(localized: bool) -> None:
        localization = module.localization() if localized else None
        loss = module.run(**({} if localization is None else {"readout": localization}))
        if localization is not None:
            loss = loss + 1e-3 * localization_loss(localization)
        loss.backward()

    for name, localized in (("ours, plain", False), ("ours", True)):
        ours(localized)
        peaks[name] = peak_bytes(lambda localized=localized: ours(localized))
    mib = {name: value / 2**20 for name, value in peaks.items()}
    extra = {"eager": mib["eager"] - mib["plain"], "ours": mib["ours"] - mib["ours, plain"]}
    return {
        "batch": MEMORY_BATCH[model],
        "without the loss, SDPA": mib["plain"],
        "without the loss, ours": mib["ours, plain"],
        **extra,
        "ratio": extra["ours"] / extra["eager"],
    }


def measure_time(model: str, side: int = 64) -> dict[str, Any]:
    """A whole training step of a U-Net of full size, one picture: with the loss over without, the median of turns.

    Args:
        model: one of `TURNS`.
        side: of the latents.
    """
    unet = random_unet(model).requires_grad_(False)
    install(unet)
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, side, side, generator=random)
    text = torch.randn(1, _TEXT, unet.config.cross_attention_dim, generator=random).requires_grad_()
    tokens, mask = torch.tensor([[5]]), left_half(1)
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if model == "SDXL" else None

    def step(localized: bool) -> float:
        start = time.perf_counter()
        localization = Localization(unet, tokens, mask, (side, side)) if localized else None
        options = None if localization is None else {"readout": localization}
        named = {"cross_attention_kwargs": options, "added_cond_kwargs": added}
        loss = unet(noisy, torch.tensor([500]), text, **named).sample.square().mean()
        if localization is not None:
            loss = loss + 1e-3 * localization_loss(localization)
        loss.backward()
        return time.perf_counter() - start

    step(False), step(True)
    taken: dict[bool, list[float]] = {False: [], True: []}
    turns = TURNS[model]
    for turn in range(turns):
        for localized in (False, True) if turn % 2 == 0 else (True, False):
            taken[localized].append(step(localized))
    ratios = sorted(after / before for before, after in zip(taken[False], taken[True], strict=True))
    without = sorted(taken[False])[turns // 2]
    quartiles = ratios[turns // 4], ratios[-1 - turns // 4]
    return {"without": without, "ratio": ratios[turns // 2], "quartiles": quartiles, "turns": turns}


def _plain() -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()
