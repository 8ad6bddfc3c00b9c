"""The key-locked rank-one edit as tensors: coefficients per token and output vectors per layer.

Inference and training share it; everything is differentiable. One concept is two updates per
projection, in slots s and S + s of a table of 2S output vectors: u = -W i* with coefficient a, and
u = o* with coefficient strength * gate (Perfusion, Tewel et al. 2023, arXiv 2305.01644).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from keylock_diffusers.concepts import Concept
from keylock_diffusers.denoisers.unet import base_layer
from keylock_kernels import rank_one_coefficients, rank_one_linear, rank_one_update
from keylock_kernels.ops.precision import exact_products
from keylock_kernels.ops.rows import row_matmul

# Metric cosine above which two concepts of one prompt count as the same: their Gram matrix is then
# so ill conditioned that the combination means nothing.
_SAME = 1 - 1e-6
# Of a combination's coefficients; beyond it several concepts nearly depend on each other.
_LARGEST_MIX = 1e4


# Slots [B, 2R] and coefficients [B, T, 2R] of a batch.
Edit = tuple[Tensor, Tensor]


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


def mixing(concepts: Sequence[Concept], slots: Tensor, strength: Tensor) -> Tensor:
    """`combination` for every row of a batch.

    Args:
        concepts: what the slots stand for, S of them.
        slots: [B, R] int32, -1 none.
        strength: [B, R] float32.

    Returns:
        [B, R, R] float32; rows and columns of empty slots are 0.

    Raises:
        ValueError: a row uses one concept twice, or two that are the same.
    """
    mix = torch.zeros(*slots.shape, slots.shape[1], dtype=torch.float64)
    for row, chosen in enumerate(slots.tolist()):
        places = torch.tensor([place for place, slot in enumerate(chosen) if slot >= 0], dtype=torch.int64)
        used = [concepts[chosen[place]] for place in places]
        if len(used) < 2:
            mix[row, places, places] = strength[row, places].double()
            continue
        metric = gram(
            torch.stack([concept.target_input for concept in used]),
            torch.stack([concept.direction for concept in used]),
            torch.tensor([concept.energy for concept in used]),
        )
        cosine = metric / (metric.diagonal()[:, None] * metric.diagonal()).sqrt()
        for i, j in torch.triu_indices(len(used), len(used), 1).T.tolist():
            if abs(cosine[i, j]) > _SAME:
                raise ValueError(
                    f"concepts {used[i].placeholder} and {used[j].placeholder} of one prompt have the same target "
                    "input: their combination is not defined; use one of them"
                )
        mix[row, places[:, None], places] = combination(metric, strength[row, places].double())
        if not mix[row].isfinite().all() or mix[row].abs().max() > _LARGEST_MIX * strength[row].abs().max().clamp(1):
            names = ", ".join(concept.placeholder for concept in used)
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


def project_vectors(projection: nn.Module, vectors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W x for vectors [S, D] -> [S, O] in float32, through whatever wraps the projection, without its bias.

    A wrapped projection is called in `dtype`, the one it computes in.

    One product per vector: a concept's outputs must not depend on how many others are in the batch.
    """
    if _is_plain(projection):
        rows, weight = vectors.float()[:, None], projection.weight.float().T
        with exact_products(vectors.device):
            if vectors.device.type == "cpu":
                return row_matmul(rows, weight)[:, 0]
            return torch.cat([row @ weight for row in rows])
    out = torch.cat([projection(vector.to(dtype)[None]) for vector in vectors])
    if getattr(base_layer(projection), "bias", None) is not None:
        out = out - projection(torch.zeros_like(vectors[:1], dtype=dtype))
    return out.float()


def tables(
    attn: Any,
    targets: Tensor,  # [S, D]
    super_encodings: Tensor,  # [S, D]
    values: Tensor,  # [S, O]
    dtype: torch.dtype,  # what the layer computes in
) -> tuple[Tensor, Tensor]:  # [2S, O], [2S, O] float32
    """A layer's output vectors, -W i* then o*, of keys (locked to the super-class) and of values (learned)."""
    size = len(targets)
    keys = project_vectors(attn.to_k, torch.cat([targets, super_encodings]), dtype)
    return torch.cat([-keys[:size], keys[size:]]), torch.cat(
        [-project_vectors(attn.to_v, targets, dtype), values.float()]
    )


def project_layers(
    layers: Mapping[str, Any],
    streams: tuple[Tensor, Tensor],  # what keys and what values read, [B, T, D] each
    tables: Mapping[str, tuple[Tensor, Tensor]],
    edits: tuple[Edit | None, Edit | None],
) -> dict[str, tuple[Tensor, Tensor]]:  # [B, T, O] each
    """Every layer's edited keys and values.

    What is not edited goes through the same op, so that a row's bits do not depend on whether another has a concept.

    Raises:
        ValueError: a layer that is edited normalises its text, for which the edit is not defined.
    """
    projected = {}
    for name, attn in layers.items():
        texts: Sequence[Tensor] = streams
        if attn.norm_cross:
            if any(edit is not None for edit in edits):
                raise ValueError(f"{name}: concepts are not defined for a layer that normalises its text")
            texts = [attn.norm_encoder_hidden_states(stream) for stream in streams]
        key, value = (
            _edited(
                projection, stream, *(_nothing(projection, stream) if edit is None else (tables[name][side], *edit))
            )
            for side, (projection, stream, edit) in enumerate(zip((attn.to_k, attn.to_v), texts, edits, strict=True))
        )
        projected[name] = (key, value)
    return projected


def _nothing(projection: nn.Module, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output vectors, slots and coefficients of no update at all."""
    slots = torch.full((len(text), 1), -1, dtype=torch.int32, device=text.device)
    u = torch.zeros(1, base_layer(projection).out_features, device=text.device)
    return u, slots, torch.zeros(*text.shape[:2], 1, device=text.device)


def _edited(
    projection: nn.Module,
    text: Tensor,  # [B, T, D]
    u: Tensor,  # [2S, O] float32
    slots: Tensor,  # [B, 2R]
    coefficients: Tensor,  # [B, T, 2R]
) -> Tensor:  # [B, T, O]
    if _is_plain(projection):
        return rank_one_linear(text, projection.weight, u, None, slots, bias=projection.bias, coefficients=coefficients)
    return rank_one_update(projection(text), u, slots, coefficients)


def _is_plain(projection: Any) -> TypeGuard[nn.Linear]:
    """Whether a projection's weight may be used directly: no adapter, quantisation, hook or offloading on it."""
    return (
        type(projection) is nn.Linear
        and type(projection.weight) in (Tensor, nn.Parameter)  # torchao and DTensor keep nn.Linear
        and projection.weight.device.type != "meta"
        and projection.weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and not hasattr(projection, "_hf_hook")
        and not hasattr(projection, "_diffusers_hook")
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
    )
