"""Drop-in attention processors, and what swaps them in and out."""

from keylock_diffusers.processors.attention import (
    CrossAttnProcessor,
    IPAdapterCrossAttnProcessor,
    Readout,
    SelfAttnProcessor,
)
from keylock_diffusers.processors.swap import install, uninstall, verify

__all__ = [
    "CrossAttnProcessor",
    "IPAdapterCrossAttnProcessor",
    "Readout",
    "SelfAttnProcessor",
    "install",
    "uninstall",
    "verify",
]
