"""Running an op with gradients, and the option sets the tests go through."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keylock_kernels import localized_attention, native_cuda, rank_one_linear
from keylock_kernels.testing import attention_inputs, low_rank_inputs, rank_one_inputs

# Triton's interpreter takes a process of its own, in which the same tests judge its kernels alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# `make test-gpu` runs the same tests on a GPU (conftest.py makes it torch's default device).
DEVICE = os.environ.get("KEYLOCK_TEST_DEVICE", "cpu")
# `make test-ptx` runs them as compiled for the GPU that this names, on the machine of tests/ptx.
EXECUTED = os.environ.get("KEYLOCK_TEST_PTX")
TRITON_ALONE = INTERPRETED or DEVICE != "cpu" or EXECUTED is not None
GPU_BACKENDS = ("triton",) if INTERPRETED or EXECUTED or native_cuda.missing() is not None else ("triton", "cuda")
UPDATE_BACKENDS = GPU_BACKENDS if TRITON_ALONE else ("eager", "native")
LINEAR_BACKENDS = GPU_BACKENDS if TRITON_ALONE else ("eager", "bmm", "native")
ATTENTION_BACKENDS = GPU_BACKENDS if TRITON_ALONE else ("eager", "sdpa", "native")

# Every option alone and all of them together; sizes are odd on purpose.
RANK_ONE_CASES: dict[str, dict[str, Any]] = {
    "linear": dict(gate=None, bias=False, strength=False),
    "sigmoid": dict(gate="table", bias=False, strength=False),
    "per row": dict(gate="row", bias=True, strength=True),
    "everything": dict(gate="table", bias=True, strength=True),
}
LOW_RANK_CASES: dict[str, dict[str, Any]] = {
    "plain": dict(bias=False, strength=False, weights=False, scale=False),
    "strength": dict(bias=False, weights=False, scale=False),
    "weights": dict(strength=False, scale=False),
    "everything": dict(),
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


def low_rank_case(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Ranks of several chunks, of part of one, and of nothing; rows that carry none, one and several."""
    return low_rank_inputs(4, 7, 9, 11, (3, 0, 17, 1, 6), 3, seed=seed, dtype=dtype, **LOW_RANK_CASES[name])


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


def layer_and_attention(
    layer: dict[str, Any], picture: dict[str, Any], upstream: list[Tensor], backend: str
) -> list[Tensor]:
    """What a captured step does: both ops, and the gradients of activations and queries alone."""
    leaves = [layer["x"].detach().requires_grad_(), picture["query"].detach().requires_grad_()]
    found = [
        rank_one_linear(**{**layer, "x": leaves[0]}, backend=backend),
        *localized_attention(**{**picture, "query": leaves[1]}, backend=backend),
    ]
    return [*found, *torch.autograd.grad(found, leaves, upstream)]


def attention_roundings(backend: str, dtype: torch.dtype) -> int:
    """How many roundings of the largest element a backend's error may add to eager's.

    torch's own float32 attention has eager's root mean square error, but single elements that err up to 1.6 times
    what eager's largest error would allow (measured on AVX-512, over shapes and seeds). On GPUs one of its backends
    multiplies in TF32, three times.
    """
    return 8 if backend == "sdpa" and dtype == torch.float32 else 1


def property_examples(interpreted: int = 60) -> int:
    """How many examples a property test draws; each is a handful of kernels to compile for a GPU, or to execute."""
    if EXECUTED:
        return 5
    return interpreted if INTERPRETED else 60 if DEVICE == "cpu" else 10


def widest(backend: str) -> torch.dtype:
    """The widest dtype that a backend computes in."""
    return torch.float32 if backend == "cuda" else torch.float64


def assert_agree(actual: tuple[list[Tensor], dict[str, Tensor]], exact: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    """Results and gradients are the float64 ones; in float32 only what a wrong index would do is noticed."""
    narrow = actual[0][0].dtype == torch.float32
    tolerances = {"rtol": 1e-4, "atol": 1e-4} if narrow else {}
    torch.testing.assert_close(actual, exact, check_dtype=not narrow, **tolerances)


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
