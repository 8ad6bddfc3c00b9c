"""Personalised text-to-image diffusion for many users at once, as a drop-in for diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keylock_diffusers.concepts import Concept, ConceptBank
    from keylock_diffusers.encoding.fusion import SubjectFusion
    from keylock_diffusers.generation import generate, visualize
    from keylock_diffusers.generation.maps import record_attention
    from keylock_diffusers.processors import install, uninstall
    from keylock_diffusers.requests import FusedSubject, ImagePrompt, Region, Request, RequestError, Use
    from keylock_diffusers.routing.concepts import ConceptUse
    from keylock_diffusers.routing.images import ImageUse
    from keylock_diffusers.routing.personalization import Personalization

# Where each public name lives; the module itself where the two have one name.
_HOME = {
    "Concept": "concepts",
    "ConceptBank": "concepts",
    "ConceptUse": "routing.concepts",
    "FusedSubject": "requests",
    "ImagePrompt": "requests",
    "ImageUse": "routing.images",
    "Personalization": "routing.personalization",
    "Region": "requests",
    "Request": "requests",
    "RequestError": "requests",
    "SubjectFusion": "encoding.fusion",
    "Use": "requests",
    "generate": "generation.generate",
    "install": "processors",
    "record_attention": "generation.maps",
    "uninstall": "processors",
    "visualize": "generation.visualize",
}

__all__ = [
    "Concept",
    "ConceptBank",
    "ConceptUse",
    "FusedSubject",
    "ImagePrompt",
    "ImageUse",
    "Personalization",
    "Region",
    "Request",
    "RequestError",
    "SubjectFusion",
    "Use",
    "generate",
    "install",
    "record_attention",
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
