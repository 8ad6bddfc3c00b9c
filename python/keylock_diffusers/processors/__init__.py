"""Drop-in attention processors, and what swaps them in and out."""

from keylock_diffusers.processors.attention import (
    CrossAttnProcessor,
    IPAdapterCrossAttnProcessor,
    SelfAttnProcessor,
)
from keylock_diffusers.processors.contract import ImageStreams, LayerInputs, Readout, RowUpdates
from keylock_diffusers.processors.swap import install, uninstall, verify

__all__ = [
    "CrossAttnProcessor",
    "IPAdapterCrossAttnProcessor",
    "ImageStreams",
    "LayerInputs",
    "Readout",
    "RowUpdates",
    "SelfAttnProcessor",
    "install",
    "uninstall",
    "verify",
]
