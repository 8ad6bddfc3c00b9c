"""The embedded model's autoencoder: 64 x 64 pictures to 16 x 16 x 12 latents and back.

The encoder is a closed form, the twelve principal components of 4 x 4 patches, so that latents are
known before anything is trained; the decoder learns to undo it and to clean up after the U-Net.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from keylock_diffusers.training import loop

from . import render

CHANNELS = 12
_PATCH = 4
_HIDDEN = 3 * _PATCH * _PATCH  # the encoder's convolutions carry a whole patch
_SCALING = 2.0  # raw latents have half of unit deviation: the decoder's tanh(x / 3) is nearly linear there
_NOISE = 0.08  # added to unit-variance latents in training, so that small errors of the U-Net do not show


def pixels(images: list[np.ndarray]) -> Tensor:
    """Pictures [64, 64, 3] uint8 as one tensor [B, 3, 64, 64] in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def build(seed: int = 0) -> AutoencoderTiny:
    """The autoencoder with its encoder in place and an untrained decoder."""
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        encoder_block_out_channels=(_HIDDEN,) * 3,
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=CHANNELS,
        scaling_factor=_SCALING,
    )
    _set_encoder(model, pixels([render.draw(seed + 3, i).image for i in range(2000)]))
    return model


@torch.no_grad()
def _set_encoder(model: AutoencoderTiny, images: Tensor) -> None:
    """Gather each 4 x 4 patch by two strided convolutions, then project it on its principal components.

    A component of deviation d is scaled by d ** -0.5: halfway between the spectrum of pixels, where
    edges drown in noise first, and full whitening, where they would count as much as colour.
    """
    gather_1, gather_2 = torch.zeros(12, 3, 3, 3), torch.zeros(_HIDDEN, 12, 3, 3)
    for gather, width in ((gather_1, 3), (gather_2, 12)):
        for out in range(4 * width):
            channel, row, column = out % width, out // width // 2, out // width % 2
            gather[out, channel, 1 + row, 1 + column] = 1  # a stride-2 window starts one pixel early
    patches = F.conv2d(F.conv2d((images + 1) / 2, gather_1, stride=2, padding=1), gather_2, stride=2, padding=1)
    rows = patches.permute(0, 2, 3, 1).reshape(-1, _HIDDEN).double()
    variances, vectors = torch.linalg.eigh(torch.cov(rows.T))
    deviations, vectors = variances[-CHANNELS:].flip(0).sqrt(), vectors[:, -CHANNELS:].flip(1)
    gains = deviations**-0.5
    gains = gains / (deviations * gains).square().mean().sqrt() / _SCALING
    projection = (vectors * gains).T  # [12, 48]

    first, second, third, last = (m for m in model.encoder.layers if isinstance(m, torch.nn.Conv2d))
    for convolution in (first, second, third, last):
        convolution.weight.zero_()
        if convolution.bias is not None:
            convolution.bias.zero_()
    first.weight[:3, :, 1, 1] = torch.eye(3)
    second.weight[:12, :3] = gather_1
    third.weight[:, :12] = gather_2
    last.weight[:, :, 1, 1] = projection.float()
    last.bias = torch.nn.Parameter(-(projection @ rows.mean(0)).float())


def train(
    folder: Path, *, start: AutoencoderTiny | None = None, steps: int = 6000, batch: int = 16, seed: int = 0
) -> AutoencoderTiny:
    """Trains the decoder with L1 on pixels and on their differences; resumes as `diffusion.train` does."""
    accelerator = loop.fastest()
    device = accelerator.device
    model = build(seed).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        target = pixels([render.draw(seed, step * batch + i).image for i in range(batch)]).to(device)
        latents = model.encode(target).latents
        noise = torch.randn(latents.shape, generator=loop.generator(seed, step)).to(device)
        drawn = model.decode(latents + _NOISE / _SCALING * noise).sample.float()
        error = F.l1_loss(drawn, target)
        edges = F.l1_loss(drawn.diff(dim=2), target.diff(dim=2)) + F.l1_loss(drawn.diff(dim=3), target.diff(dim=3))
        return error + 0.5 * edges, {"l1": error.item(), "edges": edges.item()}

    loop.fit(
        model.decoder,
        loss,
        folder / "decoder.safetensors",
        loop.Schedule(steps, batch, 2e-3, warmup=200, average_decay=0.99, seed=seed),
        accelerator=accelerator,
        desc="decoder",
    )
    return model.eval()
