"""Drop-in attention processors, and what swaps them in and out."""

from keylock_diffusers.processors.attention import (
    CrossAttnProcessor,
    IPAdapterCrossAttnProcessor,
    SelfAttnProcessor,
)
from keylock_diffusers.processors.contract import AdapterUpdates, ImageStreams, LayerInputs, Readout, RowUpdates
from keylock_diffusers.processors.swap import install, uninstall, verify, verify_routes

__all__ = [
    "AdapterUpdates",
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
    "verify_routes",
]
