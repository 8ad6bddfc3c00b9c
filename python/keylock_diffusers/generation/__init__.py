"""Drawing: plans of requests, the engine of one batch, maps and their pictures."""

from keylock_diffusers.generation.generate import generate

__all__ = ["generate"]
