"""LoRA files of every tool's spelling, and the embeddings of textual inversion, as plain data."""

from keylock_diffusers.loras.adapter import Adapter, AdapterFacts, LearnedWord, LoraFileError, LowRank
from keylock_diffusers.loras.embeddings import read_embedding
from keylock_diffusers.loras.files import inspect_adapter, read_adapter

__all__ = [
    "Adapter",
    "AdapterFacts",
    "LearnedWord",
    "LoraFileError",
    "LowRank",
    "inspect_adapter",
    "read_adapter",
    "read_embedding",
]
