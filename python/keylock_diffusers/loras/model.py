"""What a LoRA file is read for: a model's modules and the shapes of their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from keylock_diffusers.denoisers.projections import projections, weight_shapes
from keylock_diffusers.denoisers.unet import uncompiled
from keylock_diffusers.loras.adapter import component_name
from keylock_diffusers.loras.modules import DENOISER, ModuleNames, Shapes


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """The shapes of a model's weights, by their modules' names, in the model's order.

    Args:
        denoiser: of every Linear and every convolution at least.
        text_encoders: likewise of each text encoder.

    Example:
        >>> ModelShapes({"proj_in": (8, 8)}).fingerprint[:8]
        'a669dad6'
    """

    denoiser: Shapes
    text_encoders: tuple[Shapes, ...] = ()

    @classmethod
    def of(cls, pipe: Any) -> ModelShapes:
        """Those of a pipeline, without what PEFT has put around its layers, however they are stored.

        Raises:
            ValueError: it has no denoiser.
        """
        unet = getattr(pipe, "unet", None)
        denoiser = getattr(pipe, "transformer", None) if unet is None else unet
        if denoiser is None:
            raise ValueError(f"ModelShapes: {type(pipe).__name__} has neither a U-Net nor a transformer")
        encoders = (getattr(pipe, component_name(number), None) for number in range(3))
        models = [denoiser, *(encoder for encoder in encoders if encoder is not None)]
        shapes = [weight_shapes(projections(uncompiled(model))) for model in models]
        return cls(shapes[0], tuple(shapes[1:]))

    @property
    def components(self) -> Mapping[int, Shapes]:
        """By number: -1 is the denoiser, 0 and above are the text encoders."""
        return {DENOISER: self.denoiser, **dict(enumerate(self.text_encoders))}

    @cached_property
    def names(self) -> ModuleNames:
        """The modules by every name that LoRA files give them."""
        return ModuleNames(self.denoiser, self.text_encoders)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all of it: what is the same for two models of one shape, whatever their weights."""
        listed = [[[name, *shape] for name, shape in shapes.items()] for shapes in self.components.values()]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
