"""The judge of who is seen, a coat encoder, trained contrastively on coats that no user has.

``python -m benchmarks.quality.judges FOLDER`` trains it anew; what it learned is committed. What is seen is judged by
the embedded model's own classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keylock_diffusers import embedded
from keylock_diffusers.embedded import autoencoder, classifier, glyphs, render
from keylock_diffusers.embedded.coats import Coat
from keylock_diffusers.embedded.glyphs import BACKGROUNDS
from keylock_diffusers.training import loop

FILE = Path(__file__).with_name("coat-encoder.safetensors")
# Glyphs that one coat is shown on, by kind.
COATED: dict[str, tuple[str, ...]] = {
    "cat": (
        "cat", "grinning cat", "cat with tears of joy", "cat with heart eyes", "smirking cat", "kissing cat",
        "scared cat", "crying cat", "pouting cat",
    ),
    "face": (
        "grinning face", "face with tears of joy", "winking face", "face with heart eyes", "kissing face",
        "face with tongue", "thinking face", "sleeping face", "crying face", "face with sunglasses",
    ),
    "dog": ("dog",),
    "bear": ("bear",),
    "car": ("car",),
    "house": ("house",),
}  # fmt: skip
_KINDS = ("cat", "face", "dog", "bear", "car", "house")
_SHARES = (0.5, 0.25, 0.08, 0.07, 0.05, 0.05)
_WIDTHS = (32, 64, 96, 128)
_TEMPERATURE = 0.07


class CoatEncoder(nn.Module):
    """Pictures [B, 3, 128, 128] in -1..1 to unit vectors [B, 96] that say which coat is seen."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, _WIDTHS[0], 8, stride=4, padding=2),
            nn.GroupNorm(8, _WIDTHS[0]),
            nn.SiLU(),
        ]
        for inputs, outputs in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            for convolution in (
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, stride=2, padding=1)
            ):  # fmt: skip
                layers += [convolution, nn.GroupNorm(8, outputs), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(2 * _WIDTHS[-1], 256), nn.SiLU(), nn.Linear(256, 96))

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.body(pixels)
        return F.normalize(self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)), dim=1)


def view(coat: Coat | None, glyph: str, background: str, random: np.random.Generator) -> np.ndarray:
    """A picture [128, 128, 3] of a coat on a glyph, as large as alone or as one of two."""
    side = int(random.integers(88, 120) if random.random() < 0.5 else random.integers(54, 63))
    left, top = (int(random.integers(1, render.SIZE - side)) for _ in range(2))
    return render.compose([(render.named(glyph, coat), left, top, side)], background)[0]


def half(image: np.ndarray, right: bool) -> np.ndarray:
    """One half of a picture, beside nothing but its background."""
    part = image[:, render.SIZE // 2 :] if right else image[:, : render.SIZE // 2]
    edge = np.median(np.concatenate([image[0], image[-1]]), 0).astype(image.dtype)
    made = np.broadcast_to(edge, image.shape).copy()
    made[:, render.SIZE // 4 : 3 * render.SIZE // 4] = part
    return made


@torch.no_grad()
def decoded(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures as the autoencoder gives them back: the best that the model could draw."""
    return torch.cat([vae.decode(vae.encode(part).latents).sample.clamp(-1, 1) for part in pixels.split(64)])


class Judge:
    """Names coats among those of users and decoys, and glyphs in any coat."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.classifier = classifier.load()
        self.encoder = CoatEncoder()
        self.encoder.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()})
        self.encoder.eval()
        self._known = cache(self._of)

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> Tensor:  # [n, 96]
        return self.encoder(autoencoder.pixels(list(images)))

    @torch.no_grad()
    def glyph(self, image: np.ndarray, kind: str) -> str:
        """Which glyph of a kind a picture's only subject is: its expression; of a kind with but one, any glyph."""
        logits = self.classifier(autoencoder.pixels([image]))[0]
        known = COATED[kind] if len(COATED[kind]) > 1 else tuple(glyphs.INDEX)
        return known[int(logits[[glyphs.INDEX[caption] for caption in known]].argmax())]

    def _of(self, coat: Coat | None, glyph: str, background: str) -> Tensor:  # [96]
        """How a coat looks on a glyph and background: the mean of four views, through the autoencoder."""
        random = np.random.default_rng(7)
        views = [view(coat, glyph, background, random) for _ in range(4)]
        with torch.no_grad():
            seen = self.encoder(decoded(self.vae, autoencoder.pixels(views)))
        return F.normalize(seen.mean(0), dim=0)

    def similarities(
        self, image: np.ndarray, coats: Sequence[Coat | None], glyph: str, background: str
    ) -> Tensor:  # [coats]
        """How much a picture looks like each coat on that glyph and background."""
        known = torch.stack([self._known(coat, glyph, background) for coat in coats])
        return known @ self.encode([image])[0]


def _examples(identities: int, views: int, seed: int) -> np.ndarray:  # [identities, views, 128, 128, 3]
    random = np.random.default_rng((2026, 9, seed))
    backgrounds = list(BACKGROUNDS)
    made = []
    for _ in range(identities):
        coat = Coat.random(random)
        kind = _KINDS[random.choice(len(_KINDS), p=_SHARES)]
        made.append(
            [
                view(coat, str(random.choice(COATED[kind])), backgrounds[random.integers(len(backgrounds))], random)
                for _ in range(views)
            ]
        )
    return np.asarray(made)


def train_coats(
    folder: Path, *, identities: int = 2600, held_out: int = 200, views: int = 4, steps: int = 1500
) -> float:
    """Trains (or resumes) the coat encoder; how many of the held-out coats it finds among each other."""
    vae = embedded.load().vae
    pixels = autoencoder.pixels(list(_examples(identities, views, 0).reshape(-1, render.SIZE, render.SIZE, 3)))
    both = torch.stack([pixels, decoded(vae, pixels)], 1).view(identities, views, 2, *pixels.shape[1:])
    known = identities - held_out
    torch.manual_seed(0)
    model = CoatEncoder().train()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = loop.generator(5, step)
        chosen = torch.randint(known, (64,), generator=random)
        shown = torch.rand(64, views, generator=random).argsort(1)[:, :2]
        sides = []
        for n in range(2):
            through = torch.randint(2, (64,), generator=random)
            seen = both[chosen, shown[:, n], through]
            sides.append(model(seen + 0.04 * torch.randn(seen.shape, generator=random)))
        scores = sides[0] @ sides[1].T / _TEMPERATURE
        right = torch.arange(64)
        value = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        return value, {"loss": value.item()}

    schedule = loop.Schedule(steps, 64, 1e-3, warmup=50, average_decay=0.99, seed=5)
    loop.fit(
        model, loss, folder / "coat-encoder.safetensors", schedule, accelerator=loop.fastest(), desc="coat encoder"
    )
    model.eval()
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, FILE)
    with torch.no_grad():
        one, other = (model(both[known:, n, 1]) for n in range(2))
    return float(((one @ other.T).argmax(1) == torch.arange(held_out)).float().mean())


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    print(f"held-out coats found among 200: {train_coats(place):.3f}")
