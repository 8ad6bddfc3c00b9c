"""The subject fusion of the benchmark (FastComposer), trained on renders in coats that no user has.

``python -m benchmarks.quality.fusion FOLDER`` trains it anew; what it learned is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from keylock_diffusers import embedded
from keylock_diffusers.embedded import autoencoder, image_encoder, render
from keylock_diffusers.embedded.glyphs import BACKGROUNDS, GLYPHS
from keylock_diffusers.encoding.fusion import SubjectFusion
from keylock_diffusers.training import FusionConfig, FusionExample, FusionSubject, loop, train_subject_fusion

FILE = Path(__file__).with_name("fusion.safetensors")
CONFIG = FusionConfig(
    steps=6000,
    batch_size=24,
    learning_rate=1e-3,
    warmup=100,
    drop_text=0.1,
    drop_subjects=0.05,
    average_decay=0.995,
    seed=400,
)
_SEED, _BATCH = 400, 48


def alone(picture: render.Picture, place: int, number: int) -> np.ndarray:  # [128, 128, 3]
    """One of a picture's subjects, cut out and as large as alone, on a background that `number` says."""
    mask = picture.masks[place]
    rows, columns = (np.flatnonzero(mask.max(axis)) for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    cut = Image.fromarray(np.dstack([picture.image, (mask * 255).astype(np.uint8)]), "RGBA").crop(box)
    scale = 104 / max(cut.size)
    side = max(1, round(cut.width * scale)), max(1, round(cut.height * scale))
    backgrounds = list(BACKGROUNDS.values())
    canvas = Image.new("RGBA", (render.SIZE, render.SIZE), (*backgrounds[number % len(backgrounds)], 255))
    layer = Image.new("RGBA", canvas.size)
    layer.paste(cut.resize(side, Image.Resampling.LANCZOS), tuple((render.SIZE - length) // 2 for length in side))
    return np.asarray(Image.alpha_composite(canvas, layer).convert("RGB"))


def word(label: int) -> str:
    """The word of a glyph's caption that its picture is fused into."""
    words = GLYPHS[label].caption.split()
    return next((noun for noun in ("cat", "face") if noun in words), words[-1])


@torch.no_grad()
def examples(pipe: Any, size: int) -> list[FusionExample]:
    """Pictures of one or two subjects, with each of them on a picture of its own."""
    made = []
    for start in tqdm(range(0, size, _BATCH), desc="encoding pictures", mininterval=5):
        pictures = [render.draw(_SEED, n, coats=0.8) for n in range(start, min(start + _BATCH, size))]
        latents = pipe.vae.encode(autoencoder.pixels([p.image for p in pictures])).latents
        latents = (latents * pipe.vae.config.scaling_factor).half()
        cut = [alone(p, place, start + n) for n, p in enumerate(pictures) for place in range(len(p.labels))]
        embeds = iter(pipe.image_encoder(image_encoder.normalised(autoencoder.pixels(cut))).image_embeds)
        for picture, latent in zip(pictures, latents, strict=True):
            subjects = _subjects(picture, [next(embeds) for _ in picture.labels], latent.shape[-2:])
            made.append(FusionExample(latent, picture.caption, subjects))
    return made


def _subjects(picture: render.Picture, embeds: list[Tensor], size: torch.Size) -> list[FusionSubject]:
    words = [word(label) for label in picture.labels]
    masks = torch.nn.functional.interpolate(torch.from_numpy(picture.masks)[:, None], size=size, mode="area")
    return [
        FusionSubject(name, embed, mask)
        for name, embed, mask in zip(words, embeds, masks, strict=True)
        if words.count(name) == 1  # or both pictures would be fused into both
    ]


def train(folder: Path, *, size: int = 24_000) -> SubjectFusion:
    """Trains (or resumes) the fusion module."""
    pipe = embedded.load_adapter(embedded.load())
    learned = examples(pipe, size)
    pipe.unload_ip_adapter()
    return train_subject_fusion(
        pipe, learned, CONFIG, accelerator=loop.fastest(), checkpoint_path=folder / "fusion.safetensors"
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    print(f"{FILE}: {train(place).save(FILE):,} bytes")
