"""The embedded model's image encoder: what a picture shows, in one vector that an image prompt adapter reads.

A `CLIPVisionModelWithProjection` as Stable Diffusion's adapters use, trained on renders to say which glyphs are in a
picture and what colour they have, and not where they are or on what background: those are the text's to rule.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from keylock_diffusers.training import loop

from . import ADAPTER, IMAGE_ENCODER_FOLDER, autoencoder, render
from .glyphs import GLYPHS

WIDTH = 192
CHECKPOINT = "image-encoder.safetensors"
# What diffusers' feature extractor normalises pictures with: CLIP's own mean and deviation, per channel, of 0..1.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
_COLOUR_WEIGHT = 4.0


def build(seed: int = 0) -> CLIPVisionModelWithProjection:
    """The untrained encoder."""
    torch.manual_seed(seed)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=render.SIZE,
            patch_size=16,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            projection_dim=WIDTH,
            attn_implementation="eager",  # torch's fused CPU attention has a slow backward at this size
        )
    )


def normalised(pixels: Tensor) -> Tensor:
    """Pictures [B, 3, 128, 128] in -1..1 as the encoder takes them."""
    return ((pixels + 1) / 2 - _MEAN.to(pixels)) / _DEVIATION.to(pixels)


def colour(picture: render.Picture) -> Tensor:
    """The mean colour [3], in 0..1, of what stands on the background."""
    weights = picture.masks.max(0)[..., None]
    return torch.from_numpy((picture.image / 255 * weights).sum((0, 1)) / weights.sum()).float()


class Reader(nn.Module):
    """The encoder and what its vector is trained by: the glyphs' logits [B, glyphs] and the colour [B, 3]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.encoder = build(seed)
        self.glyphs, self.colour = nn.Linear(WIDTH, len(GLYPHS)), nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.encoder(normalised(pixels)).image_embeds
        return self.glyphs(embeds), self.colour(embeds)


def train(folder: Path, *, steps: int = 5000, batch: int = 64, seed: int = 200) -> CLIPVisionModelWithProjection:
    """Trains (or resumes) on renders with any coat on any glyph."""
    accelerator = loop.fastest()
    device = accelerator.device
    model = Reader(seed).to(device).train()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = [render.draw(seed, step * batch + i, pairs=0.2, coats=0.6) for i in range(batch)]
        targets = torch.zeros(batch, len(GLYPHS))
        for row, picture in enumerate(pictures):
            targets[row, list(picture.labels)] = 1 / len(picture.labels)
        pixels = autoencoder.pixels([p.image for p in pictures])
        logits, colours = (out.float() for out in model(pixels.to(device)))
        named = F.cross_entropy(logits, targets.to(device))
        coloured = F.mse_loss(colours, torch.stack([colour(p) for p in pictures]).to(device))
        right = (targets.gather(1, logits.argmax(1, keepdim=True).cpu()) > 0).float().mean()
        return named + _COLOUR_WEIGHT * coloured, {
            "loss": named.item(), "colour": coloured.sqrt().item(), "right": right.item()
        }  # fmt: skip

    loop.fit(
        model,
        loss,
        folder / CHECKPOINT,
        loop.Schedule(steps, batch, 1e-3, warmup=200, average_decay=0.995, seed=seed),
        accelerator=accelerator,
        desc="image encoder",
    )
    return model.encoder.eval()


def restore(folder: Path) -> CLIPVisionModelWithProjection:
    """The encoder of the checkpoint in `folder`, with averaged weights; where there is none, the exported one."""
    if not (folder / CHECKPOINT).exists():
        return CLIPVisionModelWithProjection.from_pretrained(ADAPTER / IMAGE_ENCODER_FOLDER, dtype=torch.float32).eval()
    model = Reader()
    loop.load_average(folder / CHECKPOINT, model)
    return model.encoder.eval()
