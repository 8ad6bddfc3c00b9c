"""What the machine is, the table at the end of a run, and the data file of a device."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import DEVICE, QUICK, Clock
from keylock_kernels import __version__

DATA = Path(__file__).resolve().parent / "data"
PACKAGES = ("torch", "triton", "diffusers", "transformers")


def device_name() -> str:
    """The device; of a CPU its widest vector instructions too, which its name does not say."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    bf16 = " BF16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{bf16}"


def environment() -> dict[str, Any]:
    """What numbers depend on: machine, threads and versions."""
    return {
        "device": device_name(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "keylock_kernels": __version__,
        **{name: _version(name) for name in PACKAGES},
        **({"cuda": torch.version.cuda} if DEVICE.type == "cuda" else {}),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def rates() -> dict[str, float]:
    """What the machine can do at best: bytes per second of a copy, FLOP per second of a matrix product."""
    gpu = DEVICE.type == "cuda"
    elements, side = (1 << 28, 8192) if gpu else (1 << 24, 1024)
    if QUICK:
        elements, side = 1 << 20, 128
    source = torch.ones(elements, device=DEVICE)
    found = {"copy_bytes_per_second": 8 * elements / _best(source.clone().copy_, source)}
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        matrix = torch.ones(side, side, device=DEVICE, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"matmul_{name}_flops_per_second"] = 2 * side**3 / _best(matrix.matmul, matrix)
    return found


def _best(run: Any, argument: Any) -> float:
    clock = Clock(run, [argument], graph=False)
    return min(clock.round() for _ in range(5))


def write(result: dict[str, Any], machine: dict[str, Any], folder: Path = DATA) -> Path:
    """Adds one case to the device's data file; a file of another environment is started anew."""
    name = machine["environment"]["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", (name if DEVICE.type == "cuda" else f"cpu {name}").lower()).strip("-")
    path = folder / f"{slug}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    cases = old.get("cases", {}) if old.get("environment") == machine["environment"] else {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cases[result["case"]] = {"date": now, **{k: v for k, v in result.items() if k != "case"}}
    folder.mkdir(exist_ok=True)
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps({**machine, "cases": cases}, indent=1) + "\n")
    os.replace(fresh, path)
    return path


def table(results: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """All cases, each contestant's time beside the strongest peer's and the floor's."""
    facts = [f"{key} {value}" for key, value in machine["environment"].items() if value is not None]
    facts += [f"{key.removesuffix('_per_second')} {value / 1e9:.1f} G/s" for key, value in machine["rates"].items()]
    lines = [
        ", ".join(facts),
        "x peer, x floor: time over the strongest peer's and over the floor's; below 1 is faster",
    ]
    for result in results:
        lines += ["", *_block(result, machine["rates"])]
    return [*lines, "", *_summary(results)]


def main() -> None:
    """``python -m benchmarks.report data/<device>.json``: the lines of a data file."""
    data = json.loads(Path(sys.argv[1]).read_text())
    print(", ".join(f"{key} {value}" for key, value in data["environment"].items() if value is not None))
    print(*_summary([{"case": name, **case} for name, case in data["cases"].items()]), sep="\n")


def _summary(results: list[dict[str, Any]]) -> list[str]:
    """A line a case: what "auto" takes, how many times faster than the strongest peer, and its time over the floor."""
    lines = []
    for result in results:
        times = _times(result)
        first = next((row["contestant"] for row in result["rows"] if row["kind"] == "library"), None)
        if first not in times:
            continue
        peer, floor, noise = _strongest_peer(result), _floor(result), _noise(result)
        cells = [f"{times[peer] / times[first]:.2f}" if peer in times else "", peer or ""]
        cells += [
            f"{times[first] / times[floor]:.2f}" if floor in times else "",
            "" if noise is None else f"{noise:.0%}",
        ]
        lines.append([result["case"], first, *cells])
    heads = ["case", "backend", "faster", "than", "x floor", "noise"]
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    text = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in [heads, *lines]]
    extras = [line for result in results for line in _extras(result)]
    return [*text, "", *extras] if extras else text


def _extras(result: dict[str, Any]) -> list[str]:
    """What features add to a call, and what was counted."""
    lines = []
    for added in result.get("additions", ()):
        ours, peer = added["seconds"], added["peer_seconds"]
        if ours is None or peer is None:
            continue
        lines.append(
            f"{result['case']}: {added['name']} add {_time(ours)} ({added['ratio']:.3f}x), "
            f"{ours / peer:.3f} of the {_time(peer)} they add to the peer"
        )
    return lines + [f"{result['case']}: {name} {value:.3g}" for name, value in result.get("facts", {}).items()]


def _times(result: dict[str, Any]) -> dict[str, float]:
    return {row["contestant"]: row["seconds"] for row in result["rows"] if row["seconds"] is not None}


def _strongest_peer(result: dict[str, Any]) -> str | None:
    times = _times(result)
    peers = [row["contestant"] for row in result["rows"] if row["kind"] == "peer" and row["contestant"] in times]
    return min(peers, key=times.__getitem__, default=None)


def _floor(result: dict[str, Any]) -> str | None:
    return next((row["contestant"] for row in result["rows"] if row["kind"] == "floor"), None)


def _noise(result: dict[str, Any]) -> float | None:
    """How far apart the same backend, timed twice, came out."""
    times = _times(result)
    for row in result["rows"]:
        first = row["contestant"].removesuffix(", again")
        if row["kind"] == "again" and {row["contestant"], first} <= set(times):
            return abs(times[row["contestant"]] / times[first] - 1)
    return None


def _counted_floor(result: dict[str, Any], rates: dict[str, float]) -> float | None:
    """Seconds that moving the counted bytes, or computing the counted FLOPs, takes at the machine's best rates."""
    matmul = rates.get(f"matmul_{result['case'].rsplit('/', 1)[-1]}_flops_per_second")
    counted = ((result["bytes"], rates.get("copy_bytes_per_second")), (result["flops"], matmul))
    times = [count / rate for count, rate in counted if count is not None and rate]
    return max(times, default=None)


def _block(result: dict[str, Any], rates: dict[str, float]) -> list[str]:
    rows = result["rows"]
    times, peer, floor, noise = _times(result), _strongest_peer(result), _floor(result), _noise(result)
    title = [result["case"]]
    if result["bytes"] is not None:
        title.append(f"{result['bytes'] / 1e6:.1f} MB")
    if result["flops"] is not None:
        title.append(f"{result['flops'] / 1e9:.2f} GFLOP")
    counted = _counted_floor(result, rates)
    if counted is not None:
        title.append(f"counted floor {_time(counted)}")
    title += [f"{result['input_sets']} input sets", f"{result['rounds']} rounds"]
    if noise is not None:
        title.append(f"noise {noise:.0%}")
    on_gpu = any(row["host_seconds"] is not None for row in rows)
    width = max(len(_label(row)) for row in rows)
    heads = ["time", *(["host"] if on_gpu else []), "x peer", "x floor", "GB/s", "GFLOP/s"]
    lines = [", ".join(title), f"  {'':{width}}" + "".join(f"{head:>11}" for head in heads)]
    for row in rows:
        if row["seconds"] is None:
            lines.append(f"  {_label(row):{width}}  no number: {row['refused']}")
            continue
        taken = row["seconds"]
        cells = [_time(taken), *([_time(row["host_seconds"])] if on_gpu else [])]
        cells += [f"{taken / times[name]:.2f}" if name in times else "" for name in (peer, floor)]
        least = row["kind"] != "floor"  # a floor moves and computes less than was counted
        cells += [
            f"{n / taken / 1e9:.1f}" if n is not None and least else "" for n in (result["bytes"], result["flops"])
        ]
        note = "  strongest peer" if row["contestant"] == peer else ""
        note += "  not captured: launches included" if on_gpu and not row["graph"] else ""
        lines.append(f"  {_label(row):{width}}" + "".join(f"{cell:>11}" for cell in cells) + note)
    return lines


def _label(row: dict[str, Any]) -> str:
    return row["contestant"] if row["kind"] in ("library", "again") else f"{row['contestant']} ({row['kind']})"


def _time(seconds: float) -> str:
    if seconds < 0:
        return f"-{_time(-seconds)}"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    main()
