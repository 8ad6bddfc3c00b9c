"""LoRA files of every tool's spelling and the embeddings of textual inversion as plain data, and banks of them."""

from keylock_diffusers.loras.adapter import Adapter, AdapterFacts, LearnedWord, LoraFileError, LowRank
from keylock_diffusers.loras.bank import BankStats, LoraBank
from keylock_diffusers.loras.embeddings import read_embedding
from keylock_diffusers.loras.files import inspect_adapter, read_adapter
from keylock_diffusers.loras.model import ModelShapes
from keylock_diffusers.loras.pool import AdapterPool, Held, PoolStats
from keylock_diffusers.loras.store import LoraExistsError, UnknownLoraError
from keylock_diffusers.loras.writing import write_adapter, write_word

__all__ = [
    "Adapter",
    "AdapterFacts",
    "AdapterPool",
    "BankStats",
    "Held",
    "LearnedWord",
    "LoraBank",
    "LoraExistsError",
    "LoraFileError",
    "LowRank",
    "ModelShapes",
    "PoolStats",
    "UnknownLoraError",
    "inspect_adapter",
    "read_adapter",
    "read_embedding",
    "write_adapter",
    "write_word",
]
