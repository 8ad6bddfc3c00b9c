"""The key-locked rank-one edit as tensors: coefficients per token and output vectors per layer.

Inference and training share it; everything is differentiable. One concept is two updates per
projection, in slots s and S + s of a table of 2S output vectors: u = -W i* with coefficient a, and
u = o* with coefficient strength * gate (Perfusion, Tewel et al. 2023, arXiv 2305.01644).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keylock_diffusers.concepts import KeyLockedConcept
from keylock_kernels import rank_one_coefficients

# Metric cosine above which two concepts of one prompt count as the same: their Gram matrix is then
# so ill conditioned that the combination means nothing.
_SAME = 1 - 1e-6
# Of a combination's coefficients; beyond it several concepts nearly depend on each other.
_LARGEST_MIX = 1e4


@dataclass(frozen=True)
class Gates:
    """Which concepts each row's prompt uses, and how."""

    slots: Tensor  # [B, R] int32, -1 none
    beta: Tensor  # [B, R] float32
    tau: Tensor  # [B, R] float32
    strength: Tensor  # [B, R] float32

    def pairs(self, size: int) -> Tensor:  # [B, 2R] int32
        """Slots into a table of 2 * `size` vectors: first the -W i*, then the o*."""
        return torch.cat([self.slots, torch.where(self.slots >= 0, self.slots + size, -1)], 1).int()


def gram(target_inputs: Tensor, directions: Tensor, energies: Tensor) -> Tensor:
    """G_jk = i*_j^T C^-1 i*_k [S, S] float64, of target inputs [S, D], directions [S, D] and energies [S]."""
    half = energies.double()[:, None] * (directions.double() @ target_inputs.double().T)
    return (half + half.T) / 2


def combination(gram: Tensor, strength: Tensor) -> Tensor:
    """The matrix A [R, R] with a(e) = A s(e), exact for several concepts at any strengths.

    Solves (L G + (I - L) diag(G)) A = L diag(G) with L = diag(strength): at strength 1 the concepts' joint edit,
    at strength 0 a concept that is exactly absent, and for one concept A = strength.

    Args:
        gram: [R, R] float64.
        strength: [R] float64.
    """
    diagonal, scale = torch.diag(gram.diagonal()), torch.diag(strength)
    identity = torch.eye(len(strength), dtype=gram.dtype)
    return torch.linalg.solve_ex(scale @ gram + (identity - scale) @ diagonal, scale @ diagonal).result


def mixing(concepts: Sequence[KeyLockedConcept], strengths: Sequence[float]) -> Tensor:  # [R, R] float32
    """`combination` for the concepts of one prompt.

    Raises:
        ValueError: a concept is used twice, two are the same, or they cannot be combined.
    """
    strength = torch.tensor(strengths, dtype=torch.float32).double()
    if len(concepts) < 2:
        return torch.diag(strength).float()
    metric = gram(
        torch.stack([concept.target_input for concept in concepts]),
        torch.stack([concept.direction for concept in concepts]),
        torch.tensor([concept.energy for concept in concepts], dtype=torch.float64),
    )
    cosine = metric / (metric.diagonal()[:, None] * metric.diagonal()).sqrt()
    for i, j in torch.triu_indices(len(concepts), len(concepts), 1).T.tolist():
        if abs(cosine[i, j]) > _SAME:
            raise ValueError(
                f"concepts {concepts[i].placeholder} and {concepts[j].placeholder} of one prompt have the same target "
                "input: their combination is not defined; use one of them"
            )
    mix = combination(metric, strength)
    if not mix.isfinite().all() or mix.abs().max() > _LARGEST_MIX * strength.abs().max().clamp(1):
        names = ", ".join(concept.placeholder for concept in concepts)
        raise ValueError(f"concepts {names} of one prompt cannot be combined at these strengths: use fewer of them")
    return mix.float()


def coefficients(
    text: Tensor,  # [B, T, D]
    directions: Tensor,  # [S, D] float32
    gates: Gates,
    mix: Tensor | None = None,  # [B, R, R], None: one concept per row at strength 1
) -> Tensor:  # [B, T, 2R] float32
    """Both coefficients of every concept, per token: a, and strength * sigmoid((s - beta) / tau)."""
    similarity = rank_one_coefficients(text, directions, gates.slots)
    gate = rank_one_coefficients(text, directions, gates.slots, beta=gates.beta, tau=gates.tau, strength=gates.strength)
    a = similarity
    if mix is not None:
        # Term by term, so that a row's sum does not depend on how many concepts its neighbours use.
        columns = mix.to(similarity)[:, None].unbind(-1)  # [B, 1, R] each
        a = sum((similarity[..., [k]] * column for k, column in enumerate(columns)), torch.zeros_like(similarity))
    return torch.cat([a, gate], -1)


def table(
    project: Callable[[Tensor], Tensor],  # [S, D] -> [S, O] float32
    side: str,  # to_k or to_v
    targets: Tensor,  # [S, D]
    super_encodings: Tensor,  # [S, D]
    values: Tensor,  # [S, O]
) -> Tensor:  # [2S, O] float32
    """A projection's output vectors, -W i* then o*: keys are locked to the super-class, values are learned.

    Args:
        project: W, without its bias.
    """
    if side == "to_v":
        return torch.cat([-project(targets), values.float()])
    return torch.cat([-project(targets), project(super_encodings)])
