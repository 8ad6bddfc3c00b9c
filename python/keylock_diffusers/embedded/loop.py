"""One resumable training loop for the parts of the embedded model.

Every random draw is a function of (seed, step), so a run that was interrupted and resumed from its
checkpoint repeats what an uninterrupted run would have done.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_SECONDS = 120


def device() -> torch.device:
    """The device that trains: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(kind: str) -> torch.autocast:
    """bfloat16 where the hardware multiplies in it: on a GPU, and on a CPU with AVX-512 BF16."""
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or torch.cpu._is_avx512_bf16_supported())


def generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one step's draws; CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Average:
    """Exponential moving average of a module's parameters; early steps count less."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [parameters[n].detach() for n in self.values], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def fit(
    module: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    checkpoint: Path,
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 200,
    decay: float = 0.998,
    weight_decay: float = 0.01,
) -> None:
    """Minimise `loss(step)` over `module`'s parameters with AdamW, cosine decay and a weight average.

    Resumes from `checkpoint` where it exists and writes it every two minutes. At the end the module
    holds the averaged weights.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    average = Average(module, decay)
    start = _restore(checkpoint, module, optimizer, average) if checkpoint.exists() else 0
    written = time.monotonic()
    figures: dict[str, float] = {}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=checkpoint.stem, mininterval=5)
    for step in bar:
        rate = (
            learning_rate
            * min(1.0, (step + 1) / warmup)
            * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        value, named = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module, step)
        for key, number in named.items():
            figures[key] = 0.98 * figures.get(key, number) + 0.02 * number
        bar.set_postfix({key: f"{number:.4f}" for key, number in figures.items()}, refresh=False)
        if time.monotonic() - written > CHECKPOINT_SECONDS or step + 1 == steps:
            _write(checkpoint, step + 1, module, optimizer, average)
            written = time.monotonic()
    average.copy_to(module)


def load_average(checkpoint: Path, module: nn.Module) -> None:
    """Puts a checkpoint's averaged weights into `module`."""
    with safe_open(checkpoint, "pt") as file, torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(file.get_tensor(f"average/{name}"))


def _write(path: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> None:
    tensors = {f"module/{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.values.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{k}": v for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, {"step": json.dumps(step)})
    os.replace(partial, path)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> int:
    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["step"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module/")})
    for key, value in average.values.items():
        value.copy_(tensors[f"average/{key}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, number, name = key.split("/")
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
