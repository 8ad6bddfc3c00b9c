"""The ops compose into the published methods exactly."""

from __future__ import annotations

import pytest
import torch

from keylock_kernels import rank_one_coefficients, rank_one_linear, rank_one_update
from keylock_kernels.testing import combined_coefficients, perfusion_output, rome_weight

TOKENS, INNER, OUTER = 9, 6, 5


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = normal(4 * INNER, INNER)
    return {
        "encodings": normal(TOKENS, INNER),
        "weight": normal(OUTER, INNER),
        "target_inputs": normal(3, INNER),
        "target_outputs": normal(3, OUTER),
        "second_moment": root.T @ root / len(root),
        "beta": 0.5 * normal(3),
        "tau": torch.tensor([0.1, 0.15, 0.3], dtype=torch.float64),
    }


def direction(layer, j):  # C^-1 i* / (i*^T C^-1 i*)
    solved = torch.linalg.solve(layer["second_moment"], layer["target_inputs"][j])
    return solved / (layer["target_inputs"][j] @ solved)


def personalised(layer, strength):
    """h(e) = W e - sum_j a_j (W i*_j) + sum_j lambda_j g_j o*_j, through the ops."""
    count = len(strength)
    x, targets = layer["encodings"][None], layer["target_inputs"][:count]
    slots = torch.arange(count, dtype=torch.int32)[None]
    v = torch.stack([direction(layer, j) for j in range(count)])
    gates = rank_one_coefficients(
        x, v, slots, beta=layer["beta"][:count], tau=layer["tau"][:count], strength=strength[None]
    )
    a = combined_coefficients(layer["encodings"], targets, layer["second_moment"], strength)
    u = torch.cat([-targets @ layer["weight"].T, layer["target_outputs"][:count]])
    both = torch.arange(2 * count, dtype=torch.int32)[None]
    return rank_one_update(x @ layer["weight"].T, u, both, torch.cat([a[None], gates], -1))[0]


def test_the_gate_replaced_by_the_similarity_is_rome(layer):
    target, output = layer["target_inputs"][0], layer["target_outputs"][0]
    y = rank_one_linear(
        layer["encodings"][None], layer["weight"], (output - layer["weight"] @ target)[None],
        direction(layer, 0)[None], torch.zeros(1, 1, dtype=torch.int32),
    )  # fmt: skip
    edited = rome_weight(layer["weight"], target, output, layer["second_moment"])
    torch.testing.assert_close(y[0], layer["encodings"] @ edited.T)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_full_strength_is_the_papers_cholesky_and_qr(layer, count):
    first = {k: layer[k][:count] for k in ("target_inputs", "target_outputs", "beta", "tau")}
    wanted = perfusion_output(**{**layer, **first})
    actual = personalised(layer, torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_strength_zero_is_the_concepts_absence(layer):
    strength = torch.tensor([0.7, 0.4, 0], dtype=torch.float64)
    torch.testing.assert_close(personalised(layer, strength), personalised(layer, strength[:2]), rtol=0, atol=1e-12)


def test_one_concept_is_removed_in_proportion_to_its_strength(layer):
    a = combined_coefficients(
        layer["encodings"], layer["target_inputs"][:1], layer["second_moment"], torch.full((1,), 0.3).double()
    )
    torch.testing.assert_close(a[:, 0], 0.3 * layer["encodings"] @ direction(layer, 0))


def test_rescaling_the_second_moment_changes_nothing(layer):
    strength = torch.tensor([1, 0.5, 0.8], dtype=torch.float64)
    wanted = personalised(layer, strength)
    torch.testing.assert_close(personalised({**layer, "second_moment": 37 * layer["second_moment"]}, strength), wanted)


def test_a_lora_is_linear_updates(layer):
    down, up = layer["target_inputs"], layer["target_outputs"].T  # [r, K], [O, r]
    slots = torch.arange(3, dtype=torch.int32)[None]
    y = rank_one_linear(layer["encodings"][None], layer["weight"], up.T.contiguous(), down, slots)
    torch.testing.assert_close(y[0], layer["encodings"] @ (layer["weight"] + up @ down).T)
