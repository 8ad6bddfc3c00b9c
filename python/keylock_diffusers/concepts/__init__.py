"""Concepts: what personalisation learns about one subject, as a small file, and banks of many of them."""

from keylock_diffusers.concepts.added import AddedConcept
from keylock_diffusers.concepts.bank import ConceptBank, ConceptExistsError, UnknownConceptError
from keylock_diffusers.concepts.base_model import BaseModel, TextEncoderInfo
from keylock_diffusers.concepts.concept import Concept, ConceptSummary
from keylock_diffusers.concepts.files import ConceptFileError
from keylock_diffusers.concepts.key_locked import KeyLockedConcept

__all__ = [
    "AddedConcept",
    "BaseModel",
    "Concept",
    "ConceptBank",
    "ConceptExistsError",
    "ConceptFileError",
    "ConceptSummary",
    "KeyLockedConcept",
    "TextEncoderInfo",
    "UnknownConceptError",
]
