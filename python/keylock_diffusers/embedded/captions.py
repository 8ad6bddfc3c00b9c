"""Captions for the embedded model's metric of key-locking."""

from __future__ import annotations

import numpy as np

from keylock_diffusers.embedded.glyphs import BACKGROUNDS, GLYPHS
from keylock_diffusers.embedded.render import caption


def default_captions(count: int = 2000, seed: int = 0) -> list[str]:
    """Captions of what the embedded model draws, the same for the same seed."""
    random = np.random.default_rng(seed)
    names, backgrounds = [glyph.caption for glyph in GLYPHS], list(BACKGROUNDS)
    captions = []
    for _ in range(count):
        chosen = [names[n] for n in random.choice(len(names), 1 + int(random.random() < 0.4), replace=False)]
        captions.append(caption(chosen, backgrounds[random.integers(len(backgrounds))], int(random.integers(4))))
    return captions
