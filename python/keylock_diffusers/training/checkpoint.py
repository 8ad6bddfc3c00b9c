"""The checkpoint of every trainer: one safetensors file, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers.checks import path_text
from keylock_diffusers.files import held, keep_tensors, read_tensors

logger = logging.getLogger(__name__)


def save(path: str | Path, tensors: Mapping[str, Tensor], facts: Any, *, run: str, step: int) -> bool:
    """Writes everything that the next step depends on; a disk that is full or read-only is warned of.

    Args:
        path: the file.
        tensors: what is learned and what its optimiser remembers.
        facts: the rest, as JSON.
        run: what makes the run the same run: see `digest`.
        step: the next one.

    Returns:
        Whether it was written.
    """
    header = {"step": json.dumps(step), "run": run, "facts": json.dumps(facts)}
    return keep_tensors(path, tensors, header, "checkpoint")


def check_path(path: Any) -> None:
    """That a checkpoint could be there, or None.

    Raises:
        TypeError, ValueError: it is no path, or a folder.
    """
    if path is not None and Path(path_text(path, "checkpoint_path")).is_dir():
        raise ValueError(f"checkpoint_path must be a file, got the folder {path}")


def hold(stack: contextlib.ExitStack, path: str | Path) -> None:
    """Holds a checkpoint for this run until `stack` is left, or the process ends.

    Raises:
        ValueError: another run holds it.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        mine = stack.enter_context(held(path))
    except OSError as error:
        logger.warning("checkpoint %s cannot be locked (%s); nothing keeps another run from writing it", path, error)
        return
    if not mine:
        raise ValueError(f"checkpoint {path} is being written by another run; wait for it, or name another file")


def restore(path: str | Path, run: str) -> tuple[dict[str, Tensor], Any, int]:
    """What `save` was given: tensors, facts and the next step.

    Raises:
        ValueError: the file is damaged, or of another run.
    """
    try:
        tensors, header = read_tensors(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint {error}") from error
    if header.get("run") != run:
        raise ValueError(
            f"checkpoint {path} is of another run: its pictures, settings, metric or model differ from these; "
            "remove it to begin anew, or name another file"
        )
    return tensors, json.loads(header["facts"]), int(json.loads(header["step"]))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """What an optimiser remembers, by name."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{number}/{name}": tensor for number, held in state.items() for name, tensor in held.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Puts back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            number, _, name = key.removeprefix(prefix).partition("/")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def digest(facts: Any, tensors: Iterable[Tensor]) -> str:
    """Names what makes a run the same run: settings, as JSON, and tensors it begins with."""
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().double().numpy().tobytes())
    return hashed.hexdigest()
