"""How much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from keylock_diffusers.pictures import PictureLimits


@dataclass(frozen=True)
class RequestLimits:
    """How much one request may ask for; checked before anything is allocated for it.

    Args:
        num_images: of one request.
        pictures: that it holds altogether, and masks: image prompts, subjects, controls, regions, what it begins from.
        pixels: of all of them together; numbers, of those that are given encoded.
        concepts: that it uses.
        loras: that it uses.
        embeddings: learned words that it brings, those within its LoRA files among them.
        text: letters of each of its prompts.
        tokens: of each of its prompts, and of given encodings.
        drawn: pixels of what is drawn where the request's own picture gives the size.
        picture: what each of its pictures may be.
    """

    num_images: int = 64
    pictures: int = 64
    pixels: int = 128_000_000
    concepts: int = 64
    loras: int = 8
    embeddings: int = 64
    text: int = 10_000
    tokens: int = 1_024
    drawn: int = 2_048 * 2_048
    picture: PictureLimits = PictureLimits()
