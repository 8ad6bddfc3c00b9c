"""The base model that ships with the package, what it was trained on, and how.

A small text-to-image model of emoji-like pictures, 128 x 128: enough to run, test and measure the
whole library anywhere, and no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BASE_MODEL = ASSETS / "base"
ADAPTER = ASSETS / "ip-adapter"
ADAPTER_FILE, IMAGE_ENCODER_FOLDER = "ip-adapter.safetensors", "image_encoder"


def load(**kwargs: Any) -> StableDiffusionPipeline:
    """The embedded pipeline, through diffusers' own loader; keyword arguments are passed on to it.

    Raises:
        FileNotFoundError: the package was built without its assets.
    """
    from diffusers import StableDiffusionPipeline

    if not (BASE_MODEL / "model_index.json").exists():
        raise FileNotFoundError(f"embedded: there is no base model in {BASE_MODEL}; this installation lacks its assets")
    with _without_notes():
        pipe = StableDiffusionPipeline.from_pretrained(BASE_MODEL, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_adapter(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Loads the embedded image prompt adapter and its image encoder, through diffusers' own `load_ip_adapter`.

    Raises:
        FileNotFoundError: the package was built without its assets.
    """
    if not (ADAPTER / ADAPTER_FILE).exists():
        raise FileNotFoundError(f"embedded: there is no adapter in {ADAPTER}; this installation lacks its assets")
    with _without_notes():
        pipe.load_ip_adapter(
            str(ADAPTER), subfolder="", weight_name=ADAPTER_FILE, image_encoder_folder=IMAGE_ENCODER_FOLDER
        )
    return pipe


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without what diffusers notes of this model: that its autoencoder is a tiny one is meant."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)
