"""The embedded model's autoencoder: 128 x 128 pictures to 16 x 16 x 20 latents and back.

The encoder is a closed form, so that latents are known before anything is trained: of each patch of 8 x 8 pixels the
twelve principal components at half the resolution, and eight of what those leave. The decoder learns to undo it, to
clean up after the U-Net, and, against a discriminator, to draw crisp edges.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.func import functional_call

from keylock_diffusers.training import loop

from . import classifier, render

CHECKPOINT = "decoder.safetensors"
COARSE, FINE = 12, 8
CHANNELS = COARSE + FINE
FACTOR = 8
_WIDTH = 48  # the encoder's convolutions carry a patch of 4 x 4 pixels, the last but one four of them
_SCALING = 2.0  # raw latents have half of unit deviation: the decoder's tanh(x / 3) is nearly linear there
_NOISE = 0.08  # added to unit-variance latents in training, so that small errors of the U-Net do not show
_CROP = 8  # latents a side of what the decoder is trained on
_FEATURES_WEIGHT, _ADVERSARIAL_WEIGHT = 0.5, 0.05
_ALONE = 0.15  # share of the training without the discriminator


def pixels(images: list[np.ndarray]) -> Tensor:
    """Pictures [128, 128, 3] uint8 as one tensor [B, 3, 128, 128] in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def build(seed: int = 0) -> AutoencoderTiny:
    """The autoencoder with its encoder in place and an untrained decoder."""
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        encoder_block_out_channels=(_WIDTH,) * 4,
        decoder_block_out_channels=(40,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(3, 3, 2, 1),
        latent_channels=CHANNELS,
        scaling_factor=_SCALING,
    )
    _set_encoder(model, pixels([render.draw(seed + 3, i, coats=0.2).image for i in range(1500)]))
    return model


@torch.no_grad()
def _set_encoder(model: AutoencoderTiny, images: Tensor) -> None:
    """Gather each 8 x 8 patch by strided convolutions, the last of which projects it on its components."""
    gather_1, gather_2 = torch.zeros(12, 3, 3, 3), torch.zeros(48, 12, 3, 3)
    for gather, width in ((gather_1, 3), (gather_2, 12)):
        for out in range(4 * width):
            channel, row, column = out % width, out // width // 2, out // width % 2
            gather[out, channel, 1 + row, 1 + column] = 1  # a stride-2 window starts one pixel early

    def patches(shown: Tensor) -> Tensor:  # [B, 3, h, w] to [B, 48, h / 4, w / 4], patches of 4 x 4
        return F.conv2d(F.conv2d(shown, gather_1, stride=2, padding=1), gather_2, stride=2, padding=1)

    shown = (images + 1) / 2
    fine = F.pixel_unshuffle(patches(shown), 2).permute(0, 2, 3, 1).reshape(-1, 4 * _WIDTH).double()
    coarse = patches(F.avg_pool2d(shown, 2)).permute(0, 2, 3, 1).reshape(-1, _WIDTH).double()
    projection = _components(fine, coarse)
    convolutions = [m for m in model.encoder.layers if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        convolution.weight.zero_()
        if convolution.bias is not None:
            convolution.bias.zero_()
    first, second, third, fourth, last = convolutions
    first.weight[:3, :, 1, 1] = torch.eye(3)
    second.weight[:12, :3] = gather_1
    third.weight[:, :12] = gather_2
    fourth.weight[:CHANNELS, :, 1:, 1:] = projection.view(CHANNELS, _WIDTH, 2, 2).float()
    last.weight[:, :CHANNELS, 1, 1] = torch.eye(CHANNELS)
    last.bias = nn.Parameter(-(projection @ fine.mean(0)).float())


def _components(fine: Tensor, coarse: Tensor) -> Tensor:
    """Of patches [n, 192], and the same at half the resolution [n, 48], the projection [20, 192] on components.

    A component of deviation d is scaled by d ** -0.5: halfway between the spectrum of pixels, where edges drown in
    noise first, and full whitening, where they would count as much as colour.
    """

    def principal(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        variances, vectors = torch.linalg.eigh(covariance)
        return vectors[:, -count:].flip(1).T, variances[-count:].flip(0).sqrt()

    covariance = torch.cov(fine.T)
    halving = torch.linalg.lstsq(fine - fine.mean(0), coarse - coarse.mean(0)).solution.T
    vectors, deviations = principal(halving @ covariance @ halving.T, COARSE)
    first = vectors @ halving
    told = covariance @ first.T @ torch.linalg.inv(first @ covariance @ first.T) @ first  # what they say of a patch
    rest = torch.eye(len(covariance), dtype=covariance.dtype) - told
    others, smaller = principal(rest @ covariance @ rest.T, FINE)
    projection = torch.cat([first, others @ rest])
    gains = torch.cat([deviations, smaller]) ** -0.5 / deviations.mean().sqrt() / _SCALING
    return projection * gains[:, None]


class Discriminator(nn.Module):
    """Tells patches of pictures [B, 3, h, w] from drawn ones: logits [B, 1, h / 8, w / 8]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(96, 1, 3, padding=1))

    def forward(self, shown: Tensor) -> Tensor:
        return self.body(shown)


def train(
    folder: Path, *, start: AutoencoderTiny | None = None, steps: int = 6000, batch: int = 16, seed: int = 0
) -> AutoencoderTiny:
    """Trains the decoder; resumes as `diffusion.train` does.

    L1 on pixels and on their differences, on features of the classifier, and, after a while, a discriminator's opinion;
    on crops, since a convolution does not know where it is.
    """
    accelerator = loop.fastest()
    device = accelerator.device
    model = build(seed).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    torch.manual_seed(seed)
    discriminator = Discriminator().to(device)
    seen_by = classifier.load().to(device).requires_grad_(False)

    def crops(step: int) -> tuple[Tensor, Tensor]:  # pixels, latents
        random = loop.generator(seed, step)
        shown = pixels([render.draw(seed, step * batch + i, coats=0.3).image for i in range(batch)]).to(device)
        latents = model.encode(shown).latents
        latents = latents + _NOISE / _SCALING * torch.randn(latents.shape, generator=random).to(device)
        places = torch.randint(latents.shape[-1] - _CROP + 1, (batch, 2), generator=random).tolist()
        small = [latents[n, :, y : y + _CROP, x : x + _CROP] for n, (y, x) in enumerate(places)]
        side = FACTOR * _CROP
        large = [shown[n, :, 8 * y : 8 * y + side, 8 * x : 8 * x + side] for n, (y, x) in enumerate(places)]
        return torch.stack(large), torch.stack(small)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        target, latents = crops(step)
        drawn = model.decode(latents).sample
        off = (drawn - target).float()
        error, edges = off.abs().mean(), off.diff(dim=2).abs().mean() + off.diff(dim=3).abs().mean()
        pairs = zip(seen_by.features(drawn), seen_by.features(target), strict=True)
        features = torch.stack([F.l1_loss(ours.float(), theirs.float()) for ours, theirs in pairs]).sum()
        value = error + 0.5 * edges + _FEATURES_WEIGHT * features
        figures = {"l1": error.item(), "edges": edges.item(), "features": features.item()}
        if step >= _ALONE * steps:
            real, made = discriminator(target).float(), discriminator(drawn.detach()).float()
            fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
            fooled = functional_call(discriminator, fixed, (drawn,)).float()
            told = F.relu(1 - real).mean() + F.relu(1 + made).mean()
            value = value + told - _ADVERSARIAL_WEIGHT * fooled.mean()
            figures |= {"told": told.item(), "fooled": fooled.mean().item()}
        return value, figures

    loop.fit(
        nn.ModuleDict({"decoder": model.decoder, "discriminator": discriminator}),
        loss,
        folder / CHECKPOINT,
        loop.Schedule(steps, batch, 1.5e-3, warmup=200, average_decay=0.995, seed=seed),
        accelerator=accelerator,
        desc="decoder",
    )
    return model.eval()
