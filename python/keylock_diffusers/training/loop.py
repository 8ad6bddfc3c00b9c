"""One resumable training loop, through accelerate: any device, any number of processes, mixed precision.

Every random draw is a function of (seed, step, process), so a run that was interrupted and resumed from its checkpoint
repeats what an uninterrupted run would have done, but for fp16's loss scale, which starts anew.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from tqdm import tqdm

from keylock_diffusers import checks
from keylock_diffusers.concepts import BaseModel
from keylock_diffusers.files import read_tensors
from keylock_diffusers.training import checkpoint

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
        for field, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("seed", 0)):
            checks.check_field(self, field, checks.whole, least)
        for field in ("learning_rate", "weight_decay"):
            checks.check_field(self, field, checks.number, 0)
        checks.check_field(self, "average_decay", checks.number, 0, 1, optional=True)
        if self.learning_rate == 0:
            raise ValueError(f"{type(self).__name__}: learning_rate must be above 0, got 0")


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
    for field in fields:
        checks.check_field(config, field, checks.number, 0, 1)
    shares = [getattr(config, field) for field in fields]
    if sum(shares) > 1:
        raise ValueError(f"{type(config).__name__}: {', '.join(fields)} must be shares, got {shares}")


def digest(config: Schedule, count: int, module: nn.Module, base: BaseModel) -> str:
    """Names what makes a run the same run: settings, number of examples, first weights and base model."""
    return checkpoint.digest([asdict(config), count, base.to_json()], module.parameters())


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


class Trainable(Protocol):
    """What a run of steps trains."""

    def step(self, number: int) -> Mapping[str, float] | None:
        """One step; figures to show, or None where nothing is left to learn."""

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """All that the next step depends on: tensors, and facts as JSON."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Puts back what `state` gave."""


@dataclass(frozen=True)
class Run:
    """How a run of steps is kept and shown.

    Args:
        steps: how many.
        path: of its checkpoint, to resume from and to write; None: nothing is kept.
        digest: what makes the run the same run; a checkpoint of another is refused.
        every: steps between two writes; there is one every two minutes besides.
        desc: of the progress bar.
        progress: whether to show it.
        writes: whether this process writes the checkpoint.
    """

    steps: int
    path: str | Path | None = None
    digest: str = ""
    every: int | None = None
    desc: str = "training"
    progress: bool = True
    writes: bool = True


def run(trainable: Trainable, how: Run) -> None:
    """Steps to the end, from where the checkpoint left off.

    Ctrl-C waits for the end of a step and for the checkpoint; a second one does not. A checkpoint that cannot be
    written is warned of, and the steps go on.

    Raises:
        ValueError: the checkpoint is of another run, is written by another run at the time, or cannot be read.
        KeyboardInterrupt: what it says is for people: where the run goes on.
    """
    checkpoint.check_path(how.path)
    with contextlib.ExitStack() as stack:
        if how.path is not None and how.writes:
            checkpoint.hold(stack, how.path)
        _steps(trainable, how, stack.enter_context(_interrupts(how.path is not None)))


def _steps(trainable: Trainable, how: Run, stopped: Callable[[], bool]) -> None:
    first = 0
    if how.path is not None and Path(how.path).exists():
        tensors, facts, first = checkpoint.restore(how.path, how.digest)
        trainable.restore(tensors, facts)
    written, kept = time.monotonic(), not how.writes
    bar = tqdm(
        range(first, how.steps),
        initial=first,
        total=how.steps,
        desc=how.desc,
        mininterval=5 if how.every is None else 0.1,
        disable=not how.progress,
    )
    for number in bar:
        figures = trainable.step(number)
        if figures is None:
            break
        bar.set_postfix({key: f"{figure:.4g}" for key, figure in figures.items()}, refresh=False)
        stop = stopped()
        due = how.every is not None and (number + 1) % how.every == 0
        due = due or stop or time.monotonic() - written > CHECKPOINT_SECONDS
        if how.path is not None and how.writes and (due or number + 1 == how.steps):
            kept = checkpoint.save(how.path, *trainable.state(), run=how.digest, step=number + 1)
            written = time.monotonic()
        if stop:
            bar.close()
            where = f"is in {how.path}, from where the same call goes on" if kept else "could not be kept"
            raise KeyboardInterrupt(f"{how.desc} was stopped; what {number + 1} steps have learned {where}")


@contextlib.contextmanager
def _interrupts(put_off: bool) -> Iterator[Callable[[], bool]]:
    """Puts Ctrl-C off and gives what tells whether it came; the second one is not put off.

    So it does with SIGTERM where that has been given Python's handler of Ctrl-C. Where this handler is not at work, in
    a thread or in an application with one of its own, nothing changes.
    """
    asked: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    ours = []
    if put_off and threading.current_thread() is threading.main_thread():
        pythons = signal.default_int_handler
        ours = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) is pythons]
    for kind in ours:
        signal.signal(kind, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for kind in ours:
            signal.signal(kind, signal.default_int_handler)


class _Objective(nn.Module):
    """The loss as a module, which is what accelerate wraps."""

    def __init__(self, module: nn.Module, loss: Callable[[int], tuple[Tensor, dict[str, float]]]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.loss(step)


class _Fit:
    """One module under one schedule; a `Trainable`."""

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[int], tuple[Tensor, dict[str, float]]],
        schedule: Schedule,
        accelerator: Accelerator,
        desc: str,
    ) -> None:
        self.module, self.schedule, self.accelerator, self.desc = module, schedule, accelerator, desc
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=rate(schedule, 0), weight_decay=schedule.weight_decay, betas=(0.9, 0.99)
        )
        module.to(accelerator.device)
        self.objective, self.prepared = accelerator.prepare(_Objective(module, loss), self.optimizer)
        self.average = Average(module, schedule.average_decay)
        self.figures: dict[str, float] = {}

    def step(self, number: int) -> Mapping[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.schedule, number)
        self.prepared.zero_grad(set_to_none=True)
        value, named = self.objective(number)
        if not torch.isfinite(value):
            value = value.detach()
            raise FloatingPointError(
                f"{self.desc}: the loss is {float(value)} at step {number}; lower the learning rate"
            )
        self.accelerator.backward(value)
        self.accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
        self.prepared.step()
        self.average.update(self.module, number)
        for key, figure in named.items():
            self.figures[key] = 0.98 * self.figures.get(key, figure) + 0.02 * figure
        return self.figures

    def state(self) -> tuple[dict[str, Tensor], Any]:
        tensors = {f"module/{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.values.items()}
        return tensors | checkpoint.optimizer_tensors(self.optimizer, "optimizer/"), None

    def restore(self, tensors: Mapping[str, Tensor], facts: Any) -> None:
        prefix = "module/"
        self.module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for name, value in self.average.values.items():
            value.copy_(tensors[f"average/{name}"])
        checkpoint.restore_optimizer(self.optimizer, tensors, "optimizer/")


def fit(
    module: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    checkpoint_path: str | Path | None,
    schedule: Schedule,
    *,
    accelerator: Accelerator,
    run_digest: str = "",
    desc: str = "training",
    progress: bool = True,
) -> None:
    """Minimises `loss(step)` over `module`'s parameters with AdamW, cosine decay and a weight average.

    Resumes from the checkpoint where it exists and writes it every two minutes and on Ctrl-C. At the end the module
    holds the averaged weights.

    Args:
        module: what learns; it is moved to the accelerator's device.
        loss: a step's loss, and figures to show; it runs under the accelerator's precision, and computes with the
            parameters of `module` themselves.
        checkpoint_path: a safetensors file; None: nothing is kept.
        schedule: how long and how fast; what a step learns from is the loss's own affair.
        accelerator: whose devices and precision are used; several processes average their gradients.
        run_digest: what makes the run the same run; a checkpoint of another is refused.
        desc: of the progress bar.
        progress: whether to show it.

    Raises:
        ValueError: the checkpoint is of another run, or cannot be read.
        FloatingPointError: the loss is not finite; the checkpoint written last is from before.
    """
    trained = _Fit(module, loss, schedule, accelerator, desc)
    main = accelerator.is_main_process
    run(trained, Run(schedule.steps, checkpoint_path, run_digest, None, desc, progress and main, main))
    trained.average.copy_to(module)


def load_average(path: Path, module: nn.Module) -> None:
    """Puts a checkpoint's averaged weights into `module`."""
    tensors, _ = read_tensors(path, lambda name: name.startswith("average/"))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[f"average/{name}"])
