"""Running an op with gradients, and the option sets the tests go through."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keylock_kernels import native_cuda, rank_one_linear
from keylock_kernels.testing import attention_inputs, rank_one_inputs

# Triton's interpreter takes a process of its own, in which the same tests judge its kernels alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# `make test-gpu` runs the same tests on a GPU (conftest.py makes it torch's default device).
DEVICE = os.environ.get("KEYLOCK_TEST_DEVICE", "cpu")
TRITON_ALONE = INTERPRETED or DEVICE != "cpu"
GPU_BACKENDS = ("triton",) if INTERPRETED or native_cuda.missing() is not None else ("triton", "cuda")
RANK_ONE_BACKENDS = GPU_BACKENDS if TRITON_ALONE else ("eager", "native")
ATTENTION_BACKENDS = GPU_BACKENDS if TRITON_ALONE else ("eager", "sdpa", "native")

# Every option alone and all of them together; sizes are odd on purpose.
RANK_ONE_CASES: dict[str, dict[str, Any]] = {
    "linear": dict(gate=None, bias=False, strength=False),
    "sigmoid": dict(gate="table", bias=False, strength=False),
    "per row": dict(gate="row", bias=True, strength=True),
    "everything": dict(gate="table", bias=True, strength=True),
}
ATTENTION_CASES: dict[str, dict[str, Any]] = {
    "text": dict(),
    "bias": dict(bias=True),
    "regions": dict(regions=True),
    "images": dict(images=(4, 3)),
    "weights per row": dict(images=(4, 3), weights="row"),
    "weights per pixel": dict(images=(4, 0, 3), bias=True, weights="pixel"),
    "maps": dict(images=(5,), read=4),
    "everything": dict(images=(4, 3), bias=True, regions=True, weights="pixel", read=3, sums=True),
}


def rank_one_case(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return rank_one_inputs(3, 7, 9, 11, 4, 3, seed=seed, dtype=dtype, **RANK_ONE_CASES[name])


def attention_case(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return attention_inputs(3, 13, 7, 2, 5, seed=seed, dtype=dtype, **ATTENTION_CASES[name])


def floating(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}


def run(
    op: Callable[..., Any],
    inputs: dict[str, Any],
    wanted: list[str] | None = None,
    upstream: list[Tensor] | None = None,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The op's results and the gradients of ``wanted`` (default: all) for fixed upstream gradients."""
    wanted = list(floating(inputs)) if wanted is None else wanted
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in wanted}
    results = op(**{**inputs, **leaves}, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    if upstream is None:
        upstream = gradients_like(results)
    grads = torch.autograd.grad(
        results,
        list(leaves.values()),
        [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)],
        allow_unused=True,  # with no slots or no keys an input takes no part
        materialize_grads=True,
    )
    return [r.detach() for r in results], dict(zip(leaves, grads, strict=True))


def gradients_like(results: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(99)
    drawn = (torch.randn(r.shape, generator=generator, dtype=torch.float64, device="cpu") for r in results)
    return [gradient.to(r.device) for gradient, r in zip(drawn, results, strict=True)]


def linear_through_coefficients(**inputs: Any) -> Tensor:
    """rank_one_linear with its coefficients made by the caller."""
    from keylock_kernels import rank_one_coefficients

    backend = inputs.pop("backend", "auto")
    gate = {k: inputs.pop(k) for k in ("beta", "tau", "strength") if k in inputs}
    c = rank_one_coefficients(inputs["x"], inputs["v"], inputs["slots"], **gate)
    return rank_one_linear(**{**inputs, "v": None}, coefficients=c, backend=backend)
