"""From a LoRA file on the disk, page cache warm, to its rows in a pool: SDXL, rank 16, its 722 Linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import DEVICE, QUICK, Case, Contestant, make_sets
from keylock_diffusers.loras import Adapter, AdapterPool, LowRank, ModelShapes, read_adapter, write_adapter
from keylock_diffusers.loras.packed import read_packed, write_packed
from keylock_diffusers.loras.tables import Updates
from tests.diffusers.lora_files import full_size

MODEL, RANK = ("SD 1.5", 4) if QUICK else ("SDXL", 16)
IN_BLOCKS = (".transformer_blocks.", ".proj_in", ".proj_out")  # what kohya trains by default


@pytest.fixture
def files(tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    """Writes an adapter in both forms; everything in float16, as such files are."""
    shapes = full_size(MODEL)

    def make(seed: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(seed)

        def factor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).half()

        wanted = {name: weight for name, weight in shapes.items() if any(part in name for part in IN_BLOCKS)}
        adapter = {name: LowRank(factor(RANK, weight[1]), factor(weight[0], RANK)) for name, weight in wanted.items()}
        packed, plain = tmp_path / f"{seed}.packed", tmp_path / f"{seed}.safetensors"
        write_packed(packed, Adapter(adapter), str(seed))
        write_adapter(plain, Adapter(adapter), model=ModelShapes(shapes))
        read_packed(packed, str(seed))  # which checks its hash, once in a process
        content = torch.frombuffer(bytearray(packed.read_bytes()), dtype=torch.uint8)
        content = content.pin_memory() if DEVICE.type == "cuda" else content
        copied = torch.zeros_like(content, device=DEVICE)
        return {"seed": seed, "packed": packed, "plain": plain, "adapter": adapter, "bytes": content, "to": copied}

    return make


def test_filling_a_slot(files, compare):
    shapes = full_size(MODEL)
    pool = AdapterPool(shapes, DEVICE, torch.float16, rows=RANK)  # of one slot, which every call fills anew
    with pool.hold([]) as held:
        tables = {name: pair for name in shapes if (pair := held.tables(name)) is not None}

    def fill(adapter: Updates) -> None:
        pool.hold([adapter]).release()

    def packed(inputs: dict[str, Any]) -> None:
        found = read_packed(inputs["packed"], str(inputs["seed"]), pinned=DEVICE.type == "cuda")
        assert found is not None
        fill(found.denoiser)

    def read(inputs: dict[str, Any]) -> None:
        fill(read_adapter(inputs["plain"], denoiser=shapes, text_encoders=[]).denoiser)

    def loaded(inputs: dict[str, Any]) -> None:
        """The library of safetensors, and a copy a tensor."""
        tensors = load_file(inputs["plain"])
        for name in inputs["adapter"]:
            up, down = tables[name]
            up.copy_(tensors[f"unet.{name}.lora_B.weight"].flatten(1).t(), non_blocking=True)
            down.copy_(tensors[f"unet.{name}.lora_A.weight"].flatten(1), non_blocking=True)

    def judge(inputs: dict[str, Any]) -> Callable[[Any], None]:
        def accept(_: Any) -> None:
            for name, update in inputs["adapter"].items():
                up, down = (table.cpu() for table in tables[name])
                assert torch.equal(up, update.up.t()) and torch.equal(down, update.down)

        return accept

    sets = make_sets(files)
    compare(
        Case(
            f"lora_bank/{MODEL.replace(' ', '').lower()}/r{RANK}",
            sets,
            [
                Contestant("packed file to pool", "library", packed),
                Contestant("packed file to pool, again", "again", packed),
                Contestant("diffusers' file, read_adapter, to pool", "peer", read),
                Contestant("diffusers' file, load_file, copy_ a tensor", "peer", loaded),
                Contestant("copy of the bytes", "floor", lambda inputs: inputs["to"].copy_(inputs["bytes"])),
            ],
            judge,
            moved_bytes=2 * len(sets[0]["bytes"]),
            graph=False,
            facts={"target, x floor": 3.0},
        )
    )
