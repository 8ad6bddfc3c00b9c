"""The first numbers of a GPU: attention, layers, how forward attention is best cut, and the host."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.first_gpu import device
from benchmarks.harness import DEVICE
from keylock_kernels import localized_attention, rank_one_linear, rank_one_update
from keylock_kernels.testing import SHAPES, Shape

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
IMAGES, TOKENS = 4, 4  # masked image prompts, and tokens of each
MATMUL = 8e14  # FLOP per second, about what cuBLAS reaches on an H100
TINY = (Shape("tiny", 128, 77, 1, 64, 64),)  # to see without a GPU that a measurement runs
LEVELS = [s for s in SHAPES if s.name in ("sdxl-4096x10x64", "sdxl-1024x20x64", "sd1.5-4096x8x40")] if GPU else TINY
ROWS = (8, 2) if GPU else (1,)
SLOTS, TAKEN = 8, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def attention(level: Shape, rows: int, images: int) -> tuple[list[dict[str, Any]], int]:
    """Input sets, and the bytes that one call has to move."""
    keys = images * TOKENS

    def make() -> dict[str, Any]:
        sizes = {"query": level.pixels, "key": level.tokens, "value": level.tokens}
        if images:
            sizes |= {"image_key": keys, "image_value": keys}
        inputs: dict[str, Any] = {n: normal(rows, size, level.heads, level.head_dim) for n, size in sizes.items()}
        if images:
            weights = torch.rand(rows, images, level.pixels, device=DEVICE).to(DTYPE)
            inputs |= {"image_lengths": (TOKENS,) * images, "image_weights": weights}
        return inputs

    width = 2 * DTYPE.itemsize * rows * level.width
    moved = width * (level.pixels + level.tokens + keys) + DTYPE.itemsize * rows * images * level.pixels
    return device.input_sets(make), moved


def through(backend: str) -> device.Call:
    return lambda inputs: localized_attention(**inputs, backend=backend)


def sdpa(inputs: dict[str, Any]) -> Tensor:  # [B, H, N, D]
    return F.scaled_dot_product_attention(*(inputs[name].transpose(1, 2) for name in ("query", "key", "value")))


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def measure_time() -> None:
    """Forward attention by every backend beside the time that its bytes take."""
    rate = device.copy_rate()
    print(f"copy: {rate / 1e12:.2f} TB/s")
    for level in LEVELS:
        for rows in ROWS:
            for images in (0, IMAGES):
                sets, moved = attention(level, rows, images)
                found = {name: device.seconds(through(name), sets) for name in device.backends()}
                if not images:
                    found["SDPA"] = device.seconds(sdpa, sets)
                line = ", ".join(f"{name} {us(value)} ({moved / rate / value:.0%})" for name, value in found.items())
                print(f"{level.name} B{rows}, {images} images, floor {us(moved / rate)}: {line}", flush=True)


def measure_sweep() -> None:
    """Which stages and how many tiles per program suit forward attention, of the 16-bit configurations."""
    from keylock_kernels.ops.launching import ceil_div, processors
    from keylock_kernels.ops.localized_attention import triton as kernels

    rate = device.copy_rate()
    for level in LEVELS:
        rows, tiles = ROWS[0], ceil_div(level.pixels, 64)
        others = rows * level.heads
        now = kernels.per_program(tiles, others, DEVICE)
        # As few tiles each as let all programs run at once, 3 to 5 on a multiprocessor.
        waves = {
            next((n for n in range(1, tiles) if others * ceil_div(tiles, n) <= resident * processors(DEVICE)), tiles)
            for resident in (3, 4, 5)
        }
        for images in (0, IMAGES):
            sets, moved = attention(level, rows, images)
            found = []
            for stages in (1, 2, 3):
                rules = tuple(
                    rule._replace(tile=rule.tile._replace(stages=stages)) if rule.size == 2 else rule
                    for rule in kernels.FORWARD
                )
                for each in sorted({now, 4, *waves}):
                    with (
                        mock.patch.object(kernels, "FORWARD", rules),
                        mock.patch.object(kernels, "per_program", lambda *_, each=each: each),
                    ):
                        try:
                            taken = device.seconds(through("triton"), sets)
                        except Exception as error:  # a configuration may ask for more than the device has
                            print(f"{level.name}: {stages} stages, {each} tiles: {type(error).__name__}: {error}")
                            continue
                    found.append((taken, f"{stages} stages, {each} tiles {us(taken)} ({moved / rate / taken:.0%})"))
            best = "; ".join(text for _, text in sorted(found))
            print(
                f"{level.name} B{rows}, {images} images, floor {us(moved / rate)}, now {now} tiles: {best}", flush=True
            )


def layers(rows: int, tokens: int, inner: int, outer: int) -> list[dict[str, Any]]:
    """Input sets of rank_one_linear, coefficients given."""

    def make() -> dict[str, Any]:
        return {
            "x": normal(rows, tokens, inner),
            "weight": normal(outer, inner),
            "u": normal(SLOTS, outer),
            "v": None,
            "slots": torch.randint(-1, SLOTS, (rows, TAKEN), device=DEVICE, dtype=torch.int32),
            "coefficients": torch.rand(rows, tokens, TAKEN, device=DEVICE),
        }

    return device.input_sets(make)


def plain(inputs: dict[str, Any]) -> Tensor:  # [B, T, O]
    return F.linear(inputs["x"], inputs["weight"])


def measure_linear() -> None:
    """Layers and updates beside the plain product and the time that bytes and FLOP take."""
    rate = device.copy_rate()
    sizes = [(8, 77, 2048, 640), (8, 77, 768, 320), (8, 4096, 640, 640), (8, 1024, 1280, 1280)]
    for rows, tokens, inner, outer in sizes if GPU else [(1, 77, 64, 64)]:
        sets = layers(rows, tokens, inner, outer)
        bases = [{"base": plain(s), **{name: s[name] for name in ("u", "slots", "coefficients")}} for s in sets]
        moved = DTYPE.itemsize * (rows * tokens * (inner + outer) + inner * outer)
        floor = max(moved / rate, 2 * rows * tokens * inner * outer / MATMUL)
        found = {"F.linear": device.seconds(plain, sets)}
        for name in device.backends():
            found[name] = device.seconds(lambda s, name=name: rank_one_linear(**s, backend=name), sets)
            found[f"update, {name}"] = device.seconds(lambda s, name=name: rank_one_update(**s, backend=name), bases)
        line = ", ".join(f"{name} {us(value)}" for name, value in found.items())
        print(f"{rows} x {tokens} tokens, {inner} to {outer}, floor {us(floor)}: {line}", flush=True)


def measure_host() -> None:
    """How long a small call keeps Python busy, which is all that it costs."""
    level = Shape("small", 64, 77, 2, 40, 768)
    for images in (0, IMAGES):
        (inputs, *_), _ = attention(level, 2, images)
        for name in (*device.backends(), "sdpa"):
            best = math.inf
            for repeat in range(6):
                start = time.perf_counter()
                for _ in range(200 if repeat else 20):
                    localized_attention(**inputs, backend=name)
                if repeat:  # after the one in which kernels are compiled
                    best = min(best, (time.perf_counter() - start) / 200)
                if GPU:
                    torch.cuda.synchronize()
            print(f"{images} images, {name}: {us(best)}", flush=True)


MEASURES: dict[str, Callable[[], None]] = {
    "time": measure_time,
    "sweep": measure_sweep,
    "linear": measure_linear,
    "host": measure_host,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=MEASURES)
    device.add_option(parser)
    arguments = parser.parse_args()
    device.start(arguments.stub)
    with torch.no_grad():
        MEASURES[arguments.measure]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
