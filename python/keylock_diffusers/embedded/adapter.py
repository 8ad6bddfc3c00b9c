"""The embedded model's image prompt adapter: trained to take the subject from a picture and the rest from the words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from keylock_diffusers.training import loop
from keylock_diffusers.training.image_adapter import AdapterConfig, AdapterExample, ImageAdapter, train_image_adapter

from . import ADAPTER, ADAPTER_FILE, IMAGE_ENCODER_FOLDER, autoencoder, image_encoder, load, render

CONFIG = AdapterConfig(
    steps=8000,
    batch_size=32,
    learning_rate=1e-3,
    warmup=100,
    drop_text=0.35,
    drop_image=0.05,
    drop_both=0.05,
    average_decay=0.995,
)
CHECKPOINT = "image-adapter.safetensors"
_BATCH = 64


@torch.no_grad()
def examples(pipe: Any, encoder: CLIPVisionModelWithProjection, size: int, seed: int) -> list[AdapterExample]:
    """Pictures whose image prompt shows the same subject elsewhere, on another background.

    Half of the captions name the background alone, so that the subject has to come from the image.
    """
    made = []
    for start in tqdm(range(0, size, _BATCH), desc="encoding pictures", mininterval=5):
        numbers = range(start, min(start + _BATCH, size))
        takes = [[render.draw(seed, n, pairs=0.1, coats=0.5, take=take) for n in numbers] for take in (0, 1)]
        pixels = [autoencoder.pixels([p.image for p in pictures]) for pictures in takes]
        latents = pipe.vae.encode(pixels[0]).latents * pipe.vae.config.scaling_factor
        embeds = encoder(image_encoder.normalised(pixels[1])).image_embeds
        for n, picture, latent, embed in zip(numbers, takes[0], latents.half(), embeds, strict=True):
            words = picture.caption if n % 2 else f"on {picture.background}"
            made.append(AdapterExample(latent, words, embed))
    return made


def train(
    folder: Path,
    pipe: Any,
    encoder: CLIPVisionModelWithProjection,
    *,
    config: AdapterConfig = CONFIG,
    start: ImageAdapter | None = None,
    pool: int = 30_000,
    seed: int = 300,
) -> Any:
    """Trains (or resumes) the adapter on renders, from other weights than new ones where `start` is given."""
    return train_image_adapter(
        pipe,
        examples(pipe, encoder.float().eval(), pool, seed),
        config,
        start=start,
        accelerator=loop.fastest(),
        checkpoint_path=folder / CHECKPOINT,
    )


def export(folder: Path) -> int:
    """Writes the adapter and its image encoder, of the checkpoints in `folder`, in float16; returns their bytes."""
    pipe = load()
    encoder = image_encoder.restore(folder)
    made = ImageAdapter(pipe.unet, image_encoder.WIDTH)
    loop.load_average(folder / CHECKPOINT, made)
    made.save(ADAPTER / ADAPTER_FILE)
    encoder.half().save_pretrained(ADAPTER / IMAGE_ENCODER_FOLDER)
    return sum(file.stat().st_size for file in ADAPTER.rglob("*") if file.is_file())
