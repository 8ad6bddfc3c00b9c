"""The factors of many learners' low-rank adapters as the batched op's tables, differentiable in all of them.

A learner's factors are one vector, in which its pairs lie one after the other: an optimiser's step is a step on one
tensor, however many projections learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keylock_diffusers.checks import shown
from keylock_diffusers.denoisers.projections import projections, weight_shape
from keylock_diffusers.denoisers.unet import uncompiled
from keylock_diffusers.loras.adapter import LowRank
from keylock_diffusers.processors.contract import AdapterUpdates
from keylock_diffusers.routing.adapters import is_flat
from keylock_diffusers.training.config import LoraTrainingConfig


class _Pair(NamedTuple):
    """Where a projection's factors are, and what they are."""

    component: int
    name: str
    down: tuple[int, ...]  # [r, K], or [r, C, kh, kw] of a convolution over several pixels
    up: tuple[int, int]  # [r, O]: the columns of B, as tables have them
    flat: bool


class Factors:
    """Which projections of a pipeline learn, and a learner's factors of them.

    Args:
        denoiser: the pipeline's description.
        config: rank and targets.

    Attributes:
        modules: the projections by name, per component: the denoiser first, then each text encoder.

    Raises:
        ValueError: a target is the name of no projection.
    """

    def __init__(self, denoiser: Any, config: LoraTrainingConfig) -> None:
        self._rank, self._scale = config.rank, config.scale
        encoders = [projections(uncompiled(encoder.model)) for encoder in denoiser.encoders()]
        self.modules = [
            _chosen([denoiser.projections()], config.targets, "targets")[0],
            *_chosen(encoders, config.text_targets, "text_targets"),
        ]
        self._pairs = [
            self._pair(component, name, module)
            for component, modules in enumerate(self.modules)
            for name, module in modules.items()
        ]
        self._sizes = [math.prod(shape) for pair in self._pairs for shape in (pair.down, pair.up)]

    def begin(self, random: torch.Generator, dtype: torch.dtype) -> Tensor:
        """A new learner's factors: A from PEFT's distribution, U(-1, 1) / sqrt(K), and B from zero."""
        parts = []
        for pair in self._pairs:
            down = torch.empty(pair.down, dtype=torch.float32)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=random)
            parts += [down.flatten(), torch.zeros(math.prod(pair.up), dtype=torch.float32)]
        return torch.cat(parts).to(dtype)

    def updates(self, factors: Sequence[Tensor], rows: int) -> list[dict[str, AdapterUpdates]]:
        """What each projection adds, per component, where every learner has so many rows.

        Args:
            factors: per learner, what `begin` gave.
            rows: of each learner, one learner's after another's.
        """
        device, dtype, rank, count = factors[0].device, factors[0].dtype, self._rank, len(factors)
        numbers = torch.arange(count, dtype=torch.int32, device=device)
        slots = numbers.repeat_interleave(rows)[:, None]
        places = slots * rank + torch.arange(rank, dtype=torch.int32, device=device)
        offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * rank
        strength = torch.full((count * rows, 1), self._scale, dtype=dtype, device=device)
        parts = [own.split(self._sizes) for own in factors]
        found: list[dict[str, AdapterUpdates]] = [{} for _ in self.modules]
        for number, pair in enumerate(self._pairs):
            down = torch.stack([own[2 * number].view(pair.down) for own in parts])  # [S, r, ...]
            up = torch.cat([own[2 * number + 1].view(pair.up) for own in parts])
            if pair.flat:
                made = AdapterUpdates(up, slots, strength, down.flatten(0, 1), offsets, max_rank=rank)
            else:
                kernels = down[:, None].expand(-1, rows, *pair.down).flatten(0, 1)
                made = AdapterUpdates(up, places, strength, max_rank=rank, kernels=kernels)
            found[pair.component][pair.name] = made
        return found

    def low_rank(self, factors: Tensor) -> list[dict[str, LowRank]]:
        """A learner's factors as updates, per component.

        Raises:
            ValueError: they are not finite.
        """
        parts = factors.detach().cpu().split(self._sizes)
        found: list[dict[str, LowRank]] = [{} for _ in self.modules]
        for number, pair in enumerate(self._pairs):
            inner = weight_shape(self.modules[pair.component][pair.name])[1:]
            down, up = parts[2 * number].view(self._rank, *inner), parts[2 * number + 1].view(pair.up)
            found[pair.component][pair.name] = LowRank(down.clone(), up.T.contiguous(), self._scale)
        return found

    def _pair(self, component: int, name: str, module: nn.Module) -> _Pair:
        outer, *inner = weight_shape(module)
        flat = is_flat(module)
        return _Pair(component, name, (self._rank, *(inner[:1] if flat else inner)), (self._rank, outer), flat)


def _chosen(
    models: Sequence[Mapping[str, nn.Module]], targets: str | Sequence[str], field: str
) -> list[dict[str, nn.Module]]:
    """Those projections of each model that targets name."""
    if isinstance(targets, str):
        return [{n: m for n, m in model.items() if targets == "all" or is_flat(m)} for model in models]
    for target in targets:
        if not any(_ends(name, target) for model in models for name in model):
            known = sorted({name.rpartition(".")[2] for model in models for name in model})
            raise ValueError(
                f"LoraTrainingConfig: {field} must name projections of the model, or ends of names, got "
                f"{shown(target)}; last parts of names are {', '.join(known)}"
            )
    return [{n: m for n, m in model.items() if any(_ends(n, target) for target in targets)} for model in models]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
