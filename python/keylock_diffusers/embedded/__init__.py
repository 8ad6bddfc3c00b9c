"""The base model that ships with the package, what it was trained on, and how.

A small text-to-image model of emoji-like pictures, 64 x 64: enough to run, test and measure the
whole library anywhere, and no more than that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BASE_MODEL = ASSETS / "base"


def load(**kwargs: Any) -> StableDiffusionPipeline:
    """The embedded pipeline, through diffusers' own loader; keyword arguments are passed on to it.

    Raises:
        FileNotFoundError: the package was built without its assets.
    """
    from diffusers import StableDiffusionPipeline

    if not (BASE_MODEL / "model_index.json").exists():
        raise FileNotFoundError(f"embedded: there is no base model in {BASE_MODEL}; this installation lacks its assets")
    pipe = StableDiffusionPipeline.from_pretrained(BASE_MODEL, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe
