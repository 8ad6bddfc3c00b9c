"""Trains an image prompt adapter: a second, decoupled cross-attention to the tokens of a picture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor, nn

from keylock_diffusers.concepts import BaseModel
from keylock_diffusers.denoisers.unet import base_layer, cross_attention_layers, layer_numbers
from keylock_diffusers.encoding import text
from keylock_diffusers.files import check_weights, read_tensors, write_tensors
from keylock_diffusers.processors import ImageStreams
from keylock_diffusers.training import loop
from keylock_diffusers.training.frozen import (
    check_examples,
    check_pipeline,
    draw,
    encoded_prompts,
    frozen,
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
class AdapterConfig(loop.Schedule):
    """How an adapter is trained; the defaults are IP-Adapter's on Stable Diffusion 1.5.

    Args:
        steps, batch_size, learning_rate, weight_decay, warmup, average_decay, seed: see `loop.Schedule`.
        drop_text, drop_image, drop_both: shares of the rows that learn without words, image or both, for guidance.
    """

    steps: int = 1_000_000
    batch_size: int = 8
    learning_rate: float = 1e-4
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        loop.check_shares(self, "drop_text", "drop_image", "drop_both")


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
        self.projection = ImageProjection(width, unet.config.cross_attention_dim, TOKENS).float()
        layers = cross_attention_layers(unet)
        self.keys = nn.ModuleDict({_key(name): _copy(attn.to_k) for name, attn in layers.items()})
        self.values = nn.ModuleDict({_key(name): _copy(attn.to_v) for name, attn in layers.items()})

    @property
    def width(self) -> int:
        """Of the image encodings."""
        return int(self.projection.image_embeds.in_features)

    def forward(self, embeds: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer the keys and values [B, tokens, C] of image encodings [B, D]."""
        tokens = self.projection(embeds)
        return {name: (self.keys[_key(name)](tokens), self.values[_key(name)](tokens)) for name in self.numbers}

    def published(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """Copies of the weights by the names of the published files."""
        return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self._named().items()}

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> int:
        """Writes a safetensors file that `pipe.load_ip_adapter` reads, whole or not at all; returns its bytes."""
        return write_tensors(path, self.published(dtype))

    @classmethod
    def load(cls, path: str | Path, unet: Any) -> ImageAdapter:
        """What `save` wrote, or a published file of as many tokens, in float32.

        Raises:
            ValueError: its weights are not those of an adapter of this U-Net, or not finite.
            OSError: there is no such file.
        """
        found = {name: tensor.float() for name, tensor in read_tensors(path)[0].items()}
        first = found.get("image_proj.proj.weight")
        made = cls(unet, first.shape[-1] if first is not None and first.ndim == 2 else 1)
        own = made._named()
        check_weights(found, own, "ImageAdapter", f" of {path}")
        for name, tensor in found.items():
            own[name].data.copy_(tensor)
        return made

    def _named(self) -> dict[str, nn.Parameter]:
        """The weights by the names of the published files."""
        projection = {"image_proj.proj": self.projection.image_embeds, "image_proj.norm": self.projection.norm}
        named = {f"{name}.{part}": t for name, module in projection.items() for part, t in module.named_parameters()}
        for name, number in self.numbers.items():
            named[f"ip_adapter.{number}.to_k_ip.weight"] = self.keys[_key(name)].weight
            named[f"ip_adapter.{number}.to_v_ip.weight"] = self.values[_key(name)].weight
        return named


@torch.inference_mode(False)
@torch.enable_grad()
def train_image_adapter(
    pipe: Any,
    examples: Sequence[AdapterExample],
    config: AdapterConfig = AdapterConfig(),
    *,
    start: ImageAdapter | None = None,
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
        start: the weights to go on from, which are copied; default new ones.
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
    check_examples(examples, "train_image_adapter")
    accelerator = accelerator or Accelerator()
    device, unet = accelerator.device, pipe.unet
    check_pipeline(pipe, "train_image_adapter")
    with frozen(pipe, device):
        width = encoded_prompts(pipe, [_prompt(examples[0])], device, "train_image_adapter").shape[-1]
        torch.manual_seed(config.seed)
        if start is not None and start.width != width:
            raise ValueError(f"train_image_adapter: start must read encodings [{width}], got {start.width}")
        adapter = ImageAdapter(unet, width) if start is None else copy.deepcopy(start)
        adapter.train().requires_grad_(True)
        empty = text.tokenize(pipe.tokenizer, "")
        layers = cross_attention_layers(unet)

        edges = torch.tensor([config.drop_text, config.drop_image, config.drop_both], dtype=torch.float32).cumsum(0)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            drawn = draw(pipe, examples, config, step, accelerator.process_index)
            shares = torch.tensor(drawn.share, dtype=torch.float32)
            kind = torch.bucketize(shares, edges, right=True)  # without 0 text, 1 image, 2 either
            wordless, imageless = (kind == 0) | (kind == 2), (kind == 1) | (kind == 2)
            with torch.no_grad():
                prompts = [
                    empty if dropped else text.tokenize(pipe.tokenizer, row.caption)
                    for row, dropped in zip(drawn.rows, wordless.tolist(), strict=True)
                ]
                encodings = text.encode(pipe.text_encoder, prompts).to(unet.dtype)
                embeds = encoded_prompts(pipe, [_prompt(row) for row in drawn.rows], device, "train_image_adapter")
                embeds = torch.where(imageless.to(device)[:, None], 0, embeds)
                text_kv = {name: (attn.to_k(encodings), attn.to_v(encodings)) for name, attn in layers.items()}
            image_kv = {
                name: (key.to(text_kv[name][0]), value.to(text_kv[name][1]))
                for name, (key, value) in adapter(embeds).items()
            }
            inputs = _Inputs(text_kv, image_kv, (TOKENS,))
            options = {"personalization": inputs}
            predicted = unet(drawn.noisy, drawn.times, encodings, cross_attention_kwargs=options).sample
            value = F.mse_loss(predicted.float(), drawn.target)
            return value, {"loss": value.item()}

        loop.fit(
            adapter,
            loss,
            checkpoint_path,
            config,
            accelerator=accelerator,
            run_digest=loop.digest(config, len(examples), adapter, BaseModel.of(pipe)),
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

    def updates(self, projection: str) -> None:
        return None

    def image_streams(self, layer: str, pixels: int) -> ImageStreams:
        key, value = self.image_kv[layer]
        return ImageStreams(key, value, self.lengths, None)

    def visibility(self, layer: str, pixels: int) -> None:
        return None


def _key(layer: str) -> str:
    return layer.replace(".", "-")  # module names have no dots


def _copy(projection: nn.Module) -> nn.Linear:
    weight = base_layer(projection).weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float32)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


def _prompt(example: AdapterExample) -> Image.Image | Tensor:
    if example.prompt is None and isinstance(example.image, Tensor):
        raise ValueError("AdapterExample: prompt must be given where image is latents, got None")
    return example.image if example.prompt is None else example.prompt
