"""Masks of subjects that nobody drew: where the model, or CLIPSeg, sees their super-class in their pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from keylock_diffusers.checks import number, reason_of, shown, whole
from keylock_diffusers.generation.maps import AttentionMaps
from keylock_diffusers.pictures import upright
from keylock_diffusers.training import loop
from keylock_diffusers.training.captions import Captions
from keylock_diffusers.training.config import Subject
from keylock_diffusers.training.frozen import check_pipeline, encode_images, frozen, noise_levels

_TIMES = (0.2, 0.4, 0.6)  # of the schedule: where what a picture shows is told apart
_BINS = 64


@torch.inference_mode(False)
@torch.no_grad()
def attention_masks(
    pipe: Any, subject: Subject, *, draws: int = 2, times: Sequence[float] = _TIMES
) -> list[Image.Image]:
    """Masks of a subject's pictures, for its `Subject.masks`.

    Each picture is noised at some times of the schedule, the U-Net reads its caption with the super-class in the
    placeholder's place, and where the super-class's word is attended to is read out of the same pass, as a mean over
    layers, heads, times and draws. What is above Otsu's threshold of that map is the subject.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline; as before afterwards.
        subject: whose placeholder is a word of its own; masks that it has are not looked at.
        draws: of noise at each time.
        times: shares of the schedule, 0 without noise and 1 nothing but noise.

    Returns:
        Per picture a mask of its size, white where the subject is.

    Raises:
        TypeError, ValueError: an argument is not what this says, or a picture cannot be used.

    Papers: maps of words, Tang et al., DAAM, arXiv 2210.04885; the threshold, Otsu 1979.

    Example:
        >>> subject = replace(subject, masks=attention_masks(pipe, subject))  # doctest: +SKIP
    """
    if not isinstance(subject, Subject):
        raise TypeError(f"attention_masks: subject must be a Subject, got {shown(subject)}")
    whole(draws, "attention_masks: draws", 1)
    shares = [number(share, "attention_masks: times", 0, 1) for share in times]
    if not shares or not subject.super_class:
        raise ValueError("attention_masks: times must not be empty, and the subject must have a super-class")
    check_pipeline(pipe, "attention_masks", two=True)
    with frozen(pipe):
        maps = _maps(pipe, subject, draws, shares)
    return [_mask(upright(image), seen) for image, seen in zip(subject.images, maps, strict=True)]


@torch.no_grad()
def clipseg_masks(model: str | os.PathLike[str], subject: Subject) -> list[Image.Image]:
    """Masks of a subject's pictures by CLIPSeg, which is asked for the super-class.

    Args:
        model: folder of a CLIPSeg model with its processor, or its name on a hub.
        subject: whose pictures they are.

    Returns:
        As `attention_masks`; what CLIPSeg holds for more likely than not is the subject.

    Raises:
        TypeError, ValueError: there is no such model, or the subject has no super-class.

    Paper: Lueddecke and Ecker, CLIPSeg, arXiv 2112.10003.
    """
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    if not isinstance(subject, Subject):
        raise TypeError(f"clipseg_masks: subject must be a Subject, got {shown(subject)}")
    if not subject.super_class:
        raise ValueError("clipseg_masks: the subject must have a super-class")
    try:
        network = CLIPSegForImageSegmentation.from_pretrained(model).eval()
        processor = CLIPSegProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"clipseg_masks: {str(model)!r:.80} is no CLIPSeg model: {reason_of(error)}") from error
    made = []
    for place in range(len(subject.images)):
        image = upright(subject.images[place])
        given = processor(text=[subject.super_class], images=[image], padding=True, return_tensors="pt")
        logits = network(**given).logits
        likely = logits.view(1, 1, *logits.shape[-2:]).sigmoid()
        fine = F.interpolate(likely, (image.height, image.width), mode="bilinear")[0, 0]
        made.append(Image.fromarray(((fine > 0.5) * 255).to(torch.uint8).numpy()))
    return made


def _maps(pipe: Any, subject: Subject, draws: int, shares: Sequence[float]) -> list[Tensor]:  # [h, w] each
    captions = Captions(pipe, "attention_masks")
    prompts, orders = captions.of(subject), captions.orders(subject)
    latents = encode_images(pipe, subject.images).float()
    scheduler, unet = captions.denoiser.pipe.scheduler, captions.denoiser.unet
    last = scheduler.config.num_train_timesteps - 1
    recorded = AttentionMaps([subject.placeholder])
    found = []
    for row, (prompt, order) in enumerate(zip(prompts, orders, strict=True)):
        clean, size = latents[row : row + 1], (latents.shape[2], latents.shape[3])
        readout = recorded.readout(unet, [[prompt[0]]], captions.encoders[0].tokenizer, size).to(clean.device)
        for draw, share in enumerate([*shares] * draws):
            noise = torch.randn(clean.shape, generator=loop.generator(subject.seed, draw, row)).to(clean)
            at = torch.tensor([round(share * last)], device=clean.device)
            signal, sigma = noise_levels(scheduler, at, clean.device)
            noisy = (signal * clean + sigma * noise).to(unet.dtype)
            captions.denoised(noisy, at, captions.read([prompt]), [order], readout=readout)
            readout.commit()
        found.append(readout.picture(0, "").mean(subject.placeholder, size))
    return found


def _mask(image: Image.Image, seen: Tensor) -> Image.Image:
    """What lies above the threshold, as large as the middle square of a picture, which is what was seen of it."""
    side = min(image.size)
    fine = F.interpolate(seen[None, None], (side, side), mode="bicubic", antialias=True)[0, 0].clamp(min=0)
    inside = (fine > _otsu(fine)).numpy()
    mask = Image.new("L", image.size)
    left, top = ((length - side) // 2 for length in image.size)
    mask.paste(Image.fromarray((inside * 255).astype(np.uint8)), (left, top))
    return mask


def _otsu(values: Tensor) -> float:
    """The threshold that leaves the least variance within what is below it and what is above."""
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, _BINS, low, high).double()
    wide = (high - low) / _BINS
    centres = low + wide * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
    below = counts.cumsum(0)
    above = counts.sum() - below
    sums = (counts * centres).cumsum(0)
    gap = sums / below.clamp(min=1) - (sums[-1] - sums) / above.clamp(min=1)
    return low + wide * (int((below * above * gap * gap).argmax()) + 1)
