"""Each kernel once, forward and backward, against float64 by the error of eager; a line each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.first_gpu import device
from benchmarks.harness import DEVICE
from keylock_kernels import localized_attention, low_rank_linear, low_rank_update, rank_one_linear, rank_one_update
from keylock_kernels.testing import (
    assert_as_accurate_as_eager,
    attention_inputs,
    cast,
    low_rank_inputs,
    rank_one_inputs,
)

ATTENTION: dict[str, dict[str, Any]] = {
    "text": {},
    "images": dict(images=(4, 4), weights="pixel"),
    "regions": dict(regions=True, bias=True),
    "sums": dict(images=(4,), weights="row", read=40, sums=True),
    "long": dict(images=(257,)),
}
LAYERS = {"prompt": 77, "pixels": 300}  # tokens
DTYPES = ("bfloat16", "float32", "float16")
Op = Callable[..., Any]


def cases(dtype: torch.dtype) -> dict[str, tuple[Op, dict[str, Any]]]:
    """What is called, by name."""
    found: dict[str, tuple[Op, dict[str, Any]]] = {}
    for name, options in ATTENTION.items():
        inputs = attention_inputs(2, 200, 77, 2, 40, dtype=dtype, device=DEVICE, **options)
        found[name] = localized_attention, inputs
    for name, tokens in LAYERS.items():
        found[f"layer, {name}"] = (
            rank_one_linear,
            rank_one_inputs(2, tokens, 128, 96, 40, 3, dtype=dtype, device=DEVICE),
        )
        adapters = low_rank_inputs(2, tokens, 128, 96, (8, 40, 3), 2, dtype=dtype, device=DEVICE)
        found[f"adapters, {name}"] = low_rank_linear, adapters
    adapters = low_rank_inputs(2, 77, 128, 96, (8, 40, 3), 2, bias=False, scale=False, dtype=dtype, device=DEVICE)
    adapters["base"] = F.linear(adapters["x"], adapters.pop("weight"))
    found["update by adapters"] = low_rank_update, adapters
    given = torch.rand(2, 77, 3, device=DEVICE)
    u, slots = (rank_one_inputs(2, 77, 128, 96, 40, 3, dtype=dtype, device=DEVICE)[name] for name in ("u", "slots"))
    base = torch.randn(2, 77, 96, device=DEVICE).to(dtype)
    found["update"] = rank_one_update, {"base": base, "u": u, "slots": slots, "coefficients": given}
    return found


def results(op: Op, inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """What an op returns, and every gradient, by name."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    returned = op(**{**inputs, **leaves}, backend=backend)
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    upstream = [torch.ones_like(output) for output in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    named = {f"result {n}": output.detach() for n, output in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check(op: Op, inputs: dict[str, Any], backend: str, stub: bool) -> str | None:
    """What is wrong, or None."""
    try:
        actual = results(op, inputs, backend)
        if not stub:  # which has computed nothing
            exact, near = results(op, cast(inputs, torch.float64), "eager"), results(op, inputs, "eager")
            for name, value in actual.items():
                # One rounding more than the tests allow: tensor cores cut sums off, and errors of one sign add up.
                assert_as_accurate_as_eager(value, near[name], exact[name], name, roundings=2)
    except Exception as error:  # whatever it is, the other kernels are still to be seen
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2], help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", help="of these names alone; default: all")
    device.add_option(parser)
    arguments = parser.parse_args()
    device.start(arguments.stub)
    failed = done = 0
    for dtype in arguments.dtypes:
        for name, (op, inputs) in cases(getattr(torch, dtype)).items():
            if arguments.cases and name not in arguments.cases:
                continue
            for backend in device.backends():
                wrong = check(op, inputs, backend, arguments.stub)
                print("FAILS" if wrong else "ok", f"{name}, {dtype}, {backend}", wrong or "", flush=True)
                done, failed = done + 1, failed + (wrong is not None)
    print(f"{done} calls, {failed} fail{', nothing was computed' if arguments.stub else ''}")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
