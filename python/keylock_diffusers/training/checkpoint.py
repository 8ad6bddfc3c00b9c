"""The trainer's checkpoint: one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FACTS = ("loss", "best", "best_step", "steps", "stopped")


class ConceptTrainingError(RuntimeError):
    """One subject's training had to stop; the others' goes on."""


def save(path: str | Path, learners: Sequence[Any], run: str, step: int) -> None:
    """Writes everything that the next step depends on."""
    tensors: dict[str, Tensor] = {}
    facts = []
    for number, learner in enumerate(learners):
        tensors |= {f"{number}/{name}": getattr(learner, name).detach() for name in ("embedding", "values", "target")}
        for place, state in learner.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}/optimizer/{place}/{name}": tensor for name, tensor in state.items()}
        facts.append(
            {name: getattr(learner, name) for name in _FACTS} | {"failure": learner.failure and str(learner.failure)}
        )
    header = {"step": json.dumps(step), "run": run, "facts": json.dumps(facts)}
    partial = Path(path).with_suffix(f".{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, header)
    os.replace(partial, path)


def restore(path: str | Path, learners: Sequence[Any], run: str) -> int:
    """Puts the learners where the checkpoint left them; returns the next step.

    Raises:
        ValueError: the file is damaged, or of another run: see `digest`.
    """
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    if header.get("run") != run:
        raise ValueError(
            f"checkpoint {path} is of another run: its subjects, pictures, settings, metric or model differ from these"
        )
    for number, (learner, facts) in enumerate(zip(learners, json.loads(header["facts"]), strict=True)):
        with torch.no_grad():
            for name in ("embedding", "values", "target"):
                getattr(learner, name).copy_(tensors[f"{number}/{name}"])
        for name in _FACTS:
            setattr(learner, name, facts[name])
        learner.failure = facts["failure"] and ConceptTrainingError(facts["failure"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            parts = key.split("/")
            if parts[0] == str(number) and parts[1] == "optimizer":
                state.setdefault(int(parts[2]), {})[parts[3]] = tensor
        learner.optimizer.load_state_dict(
            {"state": state, "param_groups": learner.optimizer.state_dict()["param_groups"]}
        )
    return int(json.loads(header["step"]))


def digest(learners: Sequence[Any], config: Any, metric: Any, base: Any) -> str:
    """Names what makes a run the same run: subjects, pictures, settings, metric and model; more steps continue it."""
    settings: dict[str, Any] = {key: value for key, value in asdict(config).items() if key != "steps"}
    for number, learner in enumerate(learners):
        subject = learner.subject
        prompts = [prompt.ids for prompt in learner.prompts]
        settings[str(number)] = [subject.placeholder, subject.super_class, subject.seed, prompts]
    hashed = hashlib.sha256(json.dumps([settings, base.to_json()], sort_keys=True).encode())
    for tensor in (metric.matrix, *(t for one in learners for t in (one.latents, one.weights, one.super_encoding))):
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()
