"""Which benchmarks the targets of docs/performance.md are about: `--targets` runs these alone."""

from __future__ import annotations

from typing import Any

import pytest

SDXL, SDXL_DEEP, SD15 = "sdxl-4096x10x64", "sdxl-1024x20x64", "sd1.5-4096x8x40"


def _attention(*levels: str, **more: Any) -> list[dict[str, Any]]:
    return [{"level": level, "rows": 8, "dtype": "bfloat16", **more} for level in levels]


# By test, the parameters of each case.
TARGETS: dict[str, list[dict[str, Any]]] = {
    "test_text_only": _attention(SDXL, SDXL_DEEP, SD15),
    "test_image_streams": [
        *_attention(SDXL, images=1, tokens=4),
        *_attention(SDXL, images=4, tokens=4),
        *_attention(SDXL, images=4, tokens=16),
        *_attention(SDXL, images=8, tokens=4),
    ],
    "test_columns_read_out": _attention(SDXL),
    "test_backward": [case | {"rows": rows} for case in _attention(SDXL, images=0) for rows in (1, 8, 32)],
    "test_rank_one_linear": [
        {"form": form, "inner": 2048, "outer": 640, "rows": 8, "dtype": "bfloat16"}
        for form in ("coefficients", "linear")
    ],
    "test_low_rank_linear": [
        {"projection": projection, "rank": rank, "taken": 1, "dtype": "bfloat16"}
        for projection, ranks in (
            ("sdxl-to_q-4096x640x640", (8, 16, 32)),
            ("sdxl-to_q-1024x1280x1280", (16,)),
            ("sdxl-to_k-77x2048x640", (16,)),
            ("sdxl-ff_in-1024x1280x10240", (16,)),
            ("sdxl-ff_out-1024x5120x1280", (16,)),
            ("sd1.5-to_q-256x1280x1280", (16,)),
        )
        for rank in ranks
    ],
    "test_step_with_loras": [{"model": "SDXL", "dtype": "bfloat16"}],
}


def has(item: pytest.Item) -> bool:
    """Whether a collected benchmark is one of the targets'."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    parameters = dict(item.callspec.params)
    for name in parameters.keys() & {"level", "projection"}:
        parameters[name] = parameters[name].name
    parameters["dtype"] = str(parameters.get("dtype")).removeprefix("torch.")
    cases = TARGETS.get(item.originalname, [])
    return any(all(parameters.get(name) == value for name, value in case.items()) for case in cases)
