"""Personalised text-to-image diffusion for many users at once, as a drop-in for diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keylock_diffusers.attention_maps import record_attention
    from keylock_diffusers.concept_routing import ConceptUse
    from keylock_diffusers.concepts import Concept, ConceptBank
    from keylock_diffusers.fusion import FusedSubject, SubjectFusion
    from keylock_diffusers.generation import generate
    from keylock_diffusers.image_prompts import ImagePrompt
    from keylock_diffusers.image_streams import ImageUse
    from keylock_diffusers.personalization import Personalization
    from keylock_diffusers.processors import install, uninstall
    from keylock_diffusers.regions import Region
    from keylock_diffusers.requests import Request, RequestError, Use

_HOME = {
    "Concept": "concepts",
    "ConceptBank": "concepts",
    "ConceptUse": "concept_routing",
    "FusedSubject": "fusion",
    "ImagePrompt": "image_prompts",
    "ImageUse": "image_streams",
    "Personalization": "personalization",
    "Region": "regions",
    "Request": "requests",
    "RequestError": "requests",
    "SubjectFusion": "fusion",
    "Use": "requests",
    "generate": "generation",
    "install": "processors",
    "record_attention": "attention_maps",
    "uninstall": "processors",
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
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
