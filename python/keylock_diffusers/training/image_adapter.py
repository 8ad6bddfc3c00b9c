"""Trains an image prompt adapter: a second, decoupled cross-attention to the tokens of a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from keylock_diffusers import text
from keylock_diffusers.concepts import BaseModel, base_layer, cross_attention_layers
from keylock_diffusers.concepts.files import write_atomically
from keylock_diffusers.image_prompts import layer_numbers
from keylock_diffusers.processors.images import ImageStreams
from keylock_diffusers.training import loop
from keylock_diffusers.training.frozen import (
    check_pipeline,
    encoded_prompts,
    frozen,
    latents_of,
    noise_levels,
    prediction_target,
)

TOKENS = 4  # per image: what `load_ip_adapter` takes files of this kind to have


@dataclass(frozen=True, eq=False)
class AdapterExample:
    """One picture to learn from, with its words and its image prompt.

    Args:
        image: what is to be drawn: a picture, or its scaled latents [c, h, w].
        caption: its words.
        prompt: the image prompt: a picture, or its encoding [D] by the pipeline's image encoder; default `image`, which
            must be a picture then. Another picture of the same subject teaches the adapter the subject and leaves the
            rest to the words.
    """

    image: Image.Image | Tensor  # [c, h, w]
    caption: str
    prompt: Image.Image | Tensor | None = None  # [D]


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter is trained; the defaults are IP-Adapter's on Stable Diffusion 1.5.

    Args:
        steps: optimiser steps.
        batch_size: pictures per step and process.
        learning_rate: AdamW's, after `warmup` steps; it falls as a cosine.
        weight_decay: AdamW's.
        warmup: steps.
        drop_text, drop_image, drop_both: shares of the rows that learn without words, image or both, for guidance.
        average_decay: of the weights' moving average, which is what is returned; None: the last weights.
        seed: of every draw.
    """

    steps: int = 1_000_000
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 0
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05
    average_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"AdapterConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"AdapterConfig: learning_rate must be above 0, got {self.learning_rate}")
        shares = [self.drop_text, self.drop_image, self.drop_both]
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"AdapterConfig: drop_text, drop_image and drop_both must be shares, got {shares}")


class ImageAdapter(nn.Module):
    """An IP-Adapter's weights: one projection to image tokens, and keys and values in every cross-attention layer.

    Args:
        unet: the U-Net it is for; keys and values start as those of its text.
        width: of the image encodings.

    Paper: Ye et al., IP-Adapter, arXiv 2308.06721.
    """

    def __init__(self, unet: Any, width: int) -> None:
        super().__init__()
        self.numbers = layer_numbers(unet)
        self.projection = ImageProjection(width, unet.config.cross_attention_dim, TOKENS)
        layers = cross_attention_layers(unet)
        self.keys = nn.ModuleDict({_key(name): _copy(attn.to_k) for name, attn in layers.items()})
        self.values = nn.ModuleDict({_key(name): _copy(attn.to_v) for name, attn in layers.items()})

    def forward(self, embeds: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer the keys and values [B, tokens, C] of image encodings [B, D]."""
        tokens = self.projection(embeds)
        return {name: (self.keys[_key(name)](tokens), self.values[_key(name)](tokens)) for name in self.numbers}

    def published(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """The weights by the names of the published files."""
        projection = {"image_proj.proj": self.projection.image_embeds, "image_proj.norm": self.projection.norm}
        named = {f"{name}.{part}": t for name, module in projection.items() for part, t in module.named_parameters()}
        for name, number in self.numbers.items():
            named[f"ip_adapter.{number}.to_k_ip.weight"] = self.keys[_key(name)].weight
            named[f"ip_adapter.{number}.to_v_ip.weight"] = self.values[_key(name)].weight
        return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in named.items()}

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> int:
        """Writes a safetensors file that `pipe.load_ip_adapter` reads, whole or not at all; returns its bytes."""
        data = save(self.published(dtype))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        return len(data)


def train_image_adapter(
    pipe: Any,
    examples: Sequence[AdapterExample],
    config: AdapterConfig = AdapterConfig(),
    *,
    accelerator: Accelerator | None = None,
    checkpoint_path: str | Path | None = None,
    progress: bool = True,
) -> ImageAdapter:
    """Learns an image prompt adapter; the pipeline is frozen, and as before afterwards.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x pipeline with an ``image_encoder`` (a CLIPVisionModelWithProjection), or
            without one where every example's prompt is an encoding.
        examples: what to learn from: anything with a length and items; pictures are encoded when they are drawn.
        config: how.
        accelerator: accelerate's, for several devices and mixed precision; default ``Accelerator()``.
        checkpoint_path: a safetensors file to resume from and to write every two minutes.
        progress: whether to show a progress bar.

    Returns:
        The adapter; `ImageAdapter.save` writes it as `pipe.load_ip_adapter` reads it.

    Raises:
        ValueError: no examples, or an example, a pipeline in float16 or with an IP-Adapter, or a checkpoint of another
            run.
        TypeError: the pipeline has two text encoders, or lacks an image encoder that is needed.

    Paper: Ye et al., IP-Adapter, arXiv 2308.06721.
    """
    if not len(examples):
        raise ValueError("train_image_adapter: examples must not be empty")
    accelerator = accelerator or Accelerator()
    device, unet = accelerator.device, pipe.unet
    check_pipeline(pipe, "train_image_adapter")
    with frozen(pipe, device):
        width = encoded_prompts(pipe, [_prompt(examples[0])], device, "train_image_adapter").shape[-1]
        torch.manual_seed(config.seed)
        adapter = ImageAdapter(unet, width)
        empty = text.tokenize(pipe.tokenizer, "")
        layers = cross_attention_layers(unet)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            random = loop.generator(config.seed, step, accelerator.process_index)
            rows = [examples[n] for n in torch.randint(len(examples), (config.batch_size,), generator=random).tolist()]
            times = torch.randint(pipe.scheduler.config.num_train_timesteps, (config.batch_size,), generator=random).to(
                device
            )
            share = torch.rand(config.batch_size, generator=random)
            edges = torch.tensor([config.drop_text, config.drop_image, config.drop_both]).cumsum(0)
            kind = torch.bucketize(share, edges, right=True)  # 0: no text, 1: no image, 2: neither, 3: both
            with torch.no_grad():
                clean = latents_of(pipe, [row.image for row in rows], device)
                noise = torch.randn(clean.shape, generator=random).to(device)
                prompts = [
                    empty if dropped else text.tokenize(pipe.tokenizer, row.caption)
                    for row, dropped in zip(rows, ((kind == 0) | (kind == 2)).tolist(), strict=True)
                ]
                encodings = text.encode(pipe.text_encoder, prompts).to(unet.dtype)
                embeds = encoded_prompts(pipe, [_prompt(row) for row in rows], device, "train_image_adapter")
                embeds = torch.where(((kind == 1) | (kind == 2)).to(device)[:, None], 0, embeds)
                text_kv = {name: (attn.to_k(encodings), attn.to_v(encodings)) for name, attn in layers.items()}
            signal, sigma = noise_levels(pipe.scheduler, times, device)
            image_kv = {
                name: (key.to(text_kv[name][0]), value.to(text_kv[name][1]))
                for name, (key, value) in adapter(embeds).items()
            }
            inputs = _Inputs(text_kv, image_kv, (TOKENS,))
            noisy = (signal * clean + sigma * noise).to(unet.dtype)
            predicted = unet(noisy, times, encodings, cross_attention_kwargs={"personalization": inputs}).sample
            value = F.mse_loss(predicted.float(), prediction_target(pipe.scheduler, clean, noise, signal, sigma))
            return value, {"loss": value.item()}

        loop.fit(
            adapter,
            loss,
            checkpoint_path,
            accelerator=accelerator,
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup=config.warmup,
            decay=config.average_decay,
            weight_decay=config.weight_decay,
            run=_digest(config, len(examples), adapter, BaseModel.of(pipe)),
            desc="image adapter",
            progress=progress,
        )
    return adapter.eval()


@dataclass
class _Inputs:
    """What processors read of a batch: plain keys and values of the text, and the adapter's of the images."""

    text_kv: Mapping[str, tuple[Tensor, Tensor]]
    image_kv: Mapping[str, tuple[Tensor, Tensor]]
    lengths: tuple[int, ...]

    def keys_and_values(self, layer: str, rows: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.text_kv[layer]

    def image_streams(self, layer: str, pixels: int) -> ImageStreams:
        key, value = self.image_kv[layer]
        return ImageStreams(key, value, self.lengths, None)

    def text_regions(self, layer: str, pixels: int) -> None:
        return None


def _key(layer: str) -> str:
    return layer.replace(".", "-")  # module names have no dots


def _copy(projection: nn.Module) -> nn.Linear:
    weight = base_layer(projection).weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def _prompt(example: AdapterExample) -> Image.Image | Tensor:
    if example.prompt is None and isinstance(example.image, Tensor):
        raise ValueError("AdapterExample: prompt must be given where image is latents, got None")
    return example.image if example.prompt is None else example.prompt


def _digest(config: AdapterConfig, count: int, adapter: ImageAdapter, base: BaseModel) -> str:
    """Names what makes a run the same run; more steps continue it only with the same schedule."""
    hashed = hashlib.sha256(json.dumps([asdict(config), count, base.to_json()], sort_keys=True).encode())
    for parameter in adapter.parameters():  # the weights it starts from
        hashed.update(parameter.detach().cpu().contiguous().float().numpy().tobytes())
    return hashed.hexdigest()
