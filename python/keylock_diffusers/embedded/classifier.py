"""Names the glyphs in a picture: the judge of the embedded model, trained on renders alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keylock_diffusers.training import loop

from . import ASSETS, autoencoder, render
from .glyphs import GLYPHS

FILE = ASSETS / "classifier.safetensors"
_WIDTHS = (3, 32, 64, 96, 128, 192)


class Classifier(nn.Module):
    """Pictures [B, 3, 128, 128] in -1..1 to logits [B, glyphs]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * _WIDTHS[-1], len(GLYPHS))

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.body(pixels)
        return self.head(torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1))

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What its first three layers see in pictures [B, 3, h, w]: [B, 32, h / 2, w / 2] and on."""
        found = []
        for layer in list(self.body.children())[:9]:
            pixels = layer(pixels)
            if isinstance(layer, nn.SiLU):
                found.append(pixels)
        return found

    @torch.no_grad()
    def names(self, images: list[np.ndarray], count: int = 1) -> list[tuple[str, ...]]:
        """Per picture [128, 128, 3] uint8, the captions of its `count` likeliest glyphs."""
        best = self(autoencoder.pixels(images)).topk(count).indices
        return [tuple(GLYPHS[int(n)].caption for n in row) for row in best]


def load() -> Classifier:
    """The trained classifier from the package's assets."""
    model = Classifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()})
    return model.eval()


def train(folder: Path, *, steps: int = 6000, batch: int = 64, seed: int = 100) -> Classifier:
    """Trains (or resumes) on renders with any coat on any glyph, blurred and noised a little as drawn pictures are."""
    torch.manual_seed(seed)
    accelerator = loop.fastest()
    device = accelerator.device
    model = Classifier().to(device).train()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = loop.generator(seed, step)
        pictures = [render.draw(seed, step * batch + i, coats=0.6) for i in range(batch)]
        targets = torch.zeros(batch, len(GLYPHS))
        for row, picture in enumerate(pictures):
            targets[row, list(picture.labels)] = 1 / len(picture.labels)
        pixels = autoencoder.pixels([p.image for p in pictures])
        blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        share = torch.rand(batch, 1, 1, 1, generator=random) * 0.9
        noise = torch.randn(pixels.shape, generator=random) * 0.1 * torch.rand(batch, 1, 1, 1, generator=random)
        logits = model((pixels.lerp(blurred, share) + noise).to(device)).float()
        value = F.cross_entropy(logits, targets.to(device))
        right = (targets.gather(1, logits.argmax(1, keepdim=True).cpu()) > 0).float().mean()
        return value, {"loss": value.item(), "right": right.item()}

    loop.fit(
        model,
        loss,
        folder / "classifier.safetensors",
        loop.Schedule(steps, batch, 2e-3, warmup=200, average_decay=0.995, seed=seed),
        accelerator=accelerator,
        desc="classifier",
    )
    FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}, FILE)
    return model.eval()
