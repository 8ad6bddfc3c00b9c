"""One resumable training loop, through accelerate: any device, any number of processes, mixed precision.

Every random draw is a function of (seed, step, process), so a run that was interrupted and resumed from its checkpoint
repeats what an uninterrupted run would have done, but for fp16's loss scale, which starts anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from keylock_diffusers.concepts import BaseModel

CHECKPOINT_SECONDS = 120


def fastest() -> Accelerator:
    """The devices that accelerate finds, in bfloat16 where they multiply in it: GPUs, and CPUs with AVX-512 BF16."""
    bfloat16 = PartialState().device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return Accelerator(mixed_precision="bf16" if bfloat16 else "no")


def generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """A CPU generator for one step's draws; CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + process * 7_368_787_201) % 2**63)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a module is trained, and on what.

    Args:
        steps: optimiser steps.
        batch_size: examples per step and process.
        learning_rate: AdamW's, after `warmup` steps; it falls as a cosine.
        weight_decay: AdamW's.
        warmup: steps.
        average_decay: of the weights' moving average, which is what is returned; None: the last weights.
        seed: of every draw.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: int = 0
    average_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("steps", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{name}: {field} must be at least 1, got {getattr(self, field)}")
        if not self.learning_rate > 0:
            raise ValueError(f"{name}: learning_rate must be above 0, got {self.learning_rate}")


def rate(schedule: Schedule, step: int) -> float:
    """AdamW's learning rate in a step: it rises over `warmup` steps, and falls as a cosine to a fiftieth.

    learning_rate * min(1, (step + 1) / warmup) * (0.02 + 0.98 (1 + cos(pi step / steps)) / 2)
    """
    warm = min(1.0, (step + 1) / max(schedule.warmup, 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / schedule.steps)
    return schedule.learning_rate * warm * (0.02 + 0.98 * cosine)


def check_shares(config: Schedule, *fields: str) -> None:
    """The shares of rows that learn without something.

    Raises:
        ValueError: they are none, or too many together.
    """
    shares = [getattr(config, field) for field in fields]
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"{type(config).__name__}: {', '.join(fields)} must be shares, got {shares}")


def digest(config: Schedule, count: int, module: nn.Module, base: BaseModel) -> str:
    """Names what makes a run the same run: settings, number of examples, first weights and base model."""
    hashed = hashlib.sha256(json.dumps([asdict(config), count, base.to_json()], sort_keys=True).encode())
    for parameter in module.parameters():
        hashed.update(parameter.detach().cpu().contiguous().float().numpy().tobytes())
    return hashed.hexdigest()


class Average:
    """Exponential moving average of a module's parameters; early steps count less. Without a decay there is none."""

    def __init__(self, module: nn.Module, decay: float | None) -> None:
        self.decay = decay
        named = () if decay is None else module.named_parameters()
        self.values = {name: p.detach().clone() for name, p in named}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [parameters[n].detach() for n in self.values], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        for name, value in self.values.items():
            parameters[name].copy_(value)


class _Objective(nn.Module):
    """The loss as a module, which is what accelerate wraps."""

    def __init__(self, module: nn.Module, loss: Callable[[int], tuple[Tensor, dict[str, float]]]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.loss(step)


def fit(
    module: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    checkpoint: str | Path | None,
    schedule: Schedule,
    *,
    accelerator: Accelerator,
    run: str = "",
    desc: str = "training",
    progress: bool = True,
) -> None:
    """Minimises `loss(step)` over `module`'s parameters with AdamW, cosine decay and a weight average.

    Resumes from `checkpoint` where it exists and writes it every two minutes. At the end the module holds the averaged
    weights.

    Args:
        module: what learns; it is moved to the accelerator's device.
        loss: a step's loss, and figures to show; it runs under the accelerator's precision, and computes with the
            parameters of `module` themselves.
        checkpoint: a safetensors file; None: nothing is kept.
        schedule: how long and how fast; what a step learns from is the loss's own affair.
        accelerator: whose devices and precision are used; several processes average their gradients.
        run: what makes the run the same run; a checkpoint of another is refused.
        desc: of the progress bar.
        progress: whether to show it.

    Raises:
        ValueError: the checkpoint is of another run, or cannot be read.
        FloatingPointError: the loss is not finite; the checkpoint written last is from before.
    """
    steps, decay = schedule.steps, schedule.weight_decay
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate(schedule, 0), weight_decay=decay, betas=(0.9, 0.99))
    module.to(accelerator.device)
    objective, prepared = accelerator.prepare(_Objective(module, loss), optimizer)
    average = Average(module, schedule.average_decay)
    path = None if checkpoint is None else Path(checkpoint)
    start = _restore(path, module, optimizer, average, run) if path is not None and path.exists() else 0
    written = time.monotonic()
    figures: dict[str, float] = {}
    shown = progress and accelerator.is_main_process
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=desc, mininterval=5, disable=not shown)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate(schedule, step)
        prepared.zero_grad(set_to_none=True)
        value, named = objective(step)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{desc}: the loss is {float(value)} at step {step}; lower the learning rate")
        accelerator.backward(value)
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        prepared.step()
        average.update(module, step)
        for key, number in named.items():
            figures[key] = 0.98 * figures.get(key, number) + 0.02 * number
        bar.set_postfix({key: f"{number:.4f}" for key, number in figures.items()}, refresh=False)
        due = time.monotonic() - written > CHECKPOINT_SECONDS or step + 1 == steps
        if path is not None and due and accelerator.is_main_process:
            _write(path, step + 1, module, optimizer, average, run)
            written = time.monotonic()
    average.copy_to(module)


def load_average(checkpoint: Path, module: nn.Module) -> None:
    """Puts a checkpoint's averaged weights into `module`."""
    with safe_open(checkpoint, "pt") as file, torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(file.get_tensor(f"average/{name}"))


def _write(
    path: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, run: str
) -> None:
    tensors = {f"module/{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.values.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{k}": v for k, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, {"step": json.dumps(step), "run": run}
    )
    os.replace(partial, path)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, run: str) -> int:
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    if header.get("run", "") != run:
        raise ValueError(f"checkpoint {path} is of another run: its examples, settings or model differ from these")
    module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module/")})
    for key, value in average.values.items():
        value.copy_(tensors[f"average/{key}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, number, name = key.split("/")
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(json.loads(header["step"]))
