"""Personalised text-to-image diffusion for many users at once, as a drop-in for diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keylock_kernels._version import __version__

if TYPE_CHECKING:
    from keylock_diffusers.concepts import Concept, ConceptBank
    from keylock_diffusers.encoding.fusion import SubjectFusion
    from keylock_diffusers.generation import generate, visualize
    from keylock_diffusers.generation.engine import Engine
    from keylock_diffusers.generation.maps import AttentionMaps
    from keylock_diffusers.generation.recording import record_attention
    from keylock_diffusers.generation.sweep import Sweep, sweep
    from keylock_diffusers.limits import RequestLimits
    from keylock_diffusers.loras import LoraBank
    from keylock_diffusers.pictures import PictureLimits
    from keylock_diffusers.processors import install, uninstall
    from keylock_diffusers.requests import (
        Attention,
        Control,
        Embedding,
        FusedSubject,
        ImagePrompt,
        Lora,
        Region,
        Request,
        RequestError,
        Use,
    )
    from keylock_diffusers.routing.adapters import LoraCapacity
    from keylock_diffusers.routing.personalization import Personalization
    from keylock_diffusers.routing.rows import ConceptUse, ImageUse, LoraUse, Row

# Where each public name lives; the module itself where the two have one name.
_HOME = {
    "Attention": "requests",
    "AttentionMaps": "generation.maps",
    "Concept": "concepts",
    "ConceptBank": "concepts",
    "ConceptUse": "routing.rows",
    "Control": "requests",
    "Embedding": "requests",
    "Engine": "generation.engine",
    "FusedSubject": "requests",
    "ImagePrompt": "requests",
    "ImageUse": "routing.rows",
    "Lora": "requests",
    "LoraBank": "loras",
    "LoraCapacity": "routing.adapters",
    "LoraUse": "routing.rows",
    "Personalization": "routing.personalization",
    "PictureLimits": "pictures",
    "Region": "requests",
    "Request": "requests",
    "RequestError": "requests",
    "RequestLimits": "limits",
    "Row": "routing.rows",
    "SubjectFusion": "encoding.fusion",
    "Sweep": "generation.sweep",
    "Use": "requests",
    "generate": "generation.generate",
    "install": "processors",
    "record_attention": "generation.recording",
    "sweep": "generation.sweep",
    "uninstall": "processors",
    "visualize": "generation.visualize",
}

__all__ = [
    "Attention",
    "AttentionMaps",
    "Concept",
    "ConceptBank",
    "ConceptUse",
    "Control",
    "Embedding",
    "Engine",
    "FusedSubject",
    "ImagePrompt",
    "ImageUse",
    "Lora",
    "LoraBank",
    "LoraCapacity",
    "LoraUse",
    "Personalization",
    "PictureLimits",
    "Region",
    "Request",
    "RequestError",
    "RequestLimits",
    "Row",
    "SubjectFusion",
    "Sweep",
    "Use",
    "__version__",
    "generate",
    "install",
    "record_attention",
    "sweep",
    "uninstall",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    found = module if _HOME[name].endswith(f".{name}") and not hasattr(module, name) else getattr(module, name)
    globals()[name] = found  # the next look-up costs nothing
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
