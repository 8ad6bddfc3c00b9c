"""The metric of key-locking: the uncentered second moment of text encodings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from keylock_diffusers.checks import number, one_of, path_text, shown
from keylock_diffusers.denoisers.unet import text_encoders
from keylock_diffusers.encoding import text
from keylock_diffusers.files import cache_folder, keep_tensors, read_tensors
from keylock_diffusers.training.frozen import check_encoder

logger = logging.getLogger(__name__)
_POSITIONS = ("prompt", "all")
_WARN_CONDITION = 1e7
_BATCH = 64


@dataclass(frozen=True)
class Covariance:
    """C = E[e e^T] + ridge, and how it was made."""

    matrix: Tensor  # [D, D] float64
    recipe: Mapping[str, Any]

    def __post_init__(self) -> None:
        shape = list(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"Covariance: matrix must be [D, D], got {shape}")
        if not bool(self.matrix.isfinite().all()) or not torch.allclose(self.matrix, self.matrix.T):
            raise ValueError("Covariance: matrix must be finite and symmetric")

    def direction(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """C^-1 i* / energy [..., D] and the energy i*^T C^-1 i* [...], both float32, of target inputs [..., D].

        Differentiable in the target; s(e) = direction . e.
        """
        exact = target.double()
        solved = torch.linalg.solve(self.matrix.to(target.device), exact.unsqueeze(-1)).squeeze(-1)
        energy = (exact * solved).sum(-1)
        return (solved / energy.unsqueeze(-1)).float(), energy.float()


@torch.no_grad()
def covariance(
    pipe: Any,
    captions: Sequence[str],
    *,
    positions: str = "prompt",
    ridge: float = 1e-3,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Covariance:
    """Estimates C from captions, or takes it from the cache.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        captions: what to encode: a few thousand captions of the kind that the model was trained on.
        positions: "prompt": the encodings from BOS to EOS count; "all": padding too.
        ridge: eps in C + eps tr(C) / D; keeps C invertible where the captions' vocabulary is small.
        progress: whether to show a progress bar.
        cache: folder for the result; default as `files.cache_folder`.

    Raises:
        TypeError, ValueError: an argument is not what this says.

    Paper: Perfusion, Tewel et al. 2023, arXiv 2305.01644; ROME, Meng et al. 2022, arXiv 2202.05262.
    """
    check_encoder(pipe, "covariance", two=True)
    folder = _cache_folder(cache)
    if isinstance(captions, (str, bytes)) or not isinstance(captions, Sequence):
        raise TypeError(f"covariance: captions must be a list of texts, got {shown(captions)}")
    captions = list(captions)
    wrong = [caption for caption in captions if not isinstance(caption, str)]
    if wrong:
        raise TypeError(f"covariance: captions must be texts, got {shown(wrong[0])} among them")
    if not captions:
        raise ValueError("covariance: captions must not be empty")
    one_of(positions, "covariance: positions", _POSITIONS)
    ridge = number(ridge, "covariance: ridge", 0)
    encoders = text_encoders(pipe)
    prompts = [[text.tokenize(encoder.tokenizer, words) for words in captions] for encoder in encoders]

    def encoded(start: int) -> Tensor:  # [B, T, D]
        each = zip(encoders, prompts, strict=True)
        return torch.cat([text.encode_rows(encoder, own[start : start + _BATCH])[0] for encoder, own in each], -1)

    first = encoded(0)
    path = folder / f"covariance-{_key(first, captions, positions)}.safetensors"
    moment = _read(path, first.shape[-1])
    if moment is None:
        moment = torch.zeros(first.shape[-1], first.shape[-1], dtype=torch.float64)
        count = 0
        starts = range(0, len(captions), _BATCH)
        for start in tqdm(starts, desc="encoding captions", disable=not progress):
            encodings = encoded(start)
            kept = torch.ones(encodings.shape[:2], dtype=torch.bool)
            if positions == "prompt":
                kept = torch.tensor([prompt.attention for prompt in prompts[0][start : start + _BATCH]]).bool()
            rows = encodings[kept.to(encodings.device)].double().cpu()
            moment += rows.T @ rows
            count += len(rows)
        moment /= count
        keep_tensors(path, {"moment": moment}, {"checksum": _checksum(moment)}, "covariance")
    ridged = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    condition = float(torch.linalg.cond(ridged))
    if not condition < 1 / torch.finfo(moment.dtype).eps:  # nor is it where it is infinite
        raise ValueError(f"covariance: ridge must be larger for these captions, whose metric is singular, got {ridge}")
    if condition > _WARN_CONDITION:
        logger.warning("covariance: condition number %.1e; similarities lose precision, use a larger ridge", condition)
    recipe = {
        "captions": len(captions),
        "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16],
        "positions": positions,
        "ridge": ridge,
        "condition": float(f"{condition:.3g}"),
    }
    return Covariance(ridged, recipe)


def _cache_folder(cache: str | os.PathLike[str] | None) -> Path:
    if cache is not None:
        return Path(path_text(cache, "covariance: cache")).expanduser()
    return cache_folder()


def _key(first: Tensor, captions: Sequence[str], positions: str) -> str:
    """Names the text encoder by what it says of the first captions, rather than by its weights."""
    digest = hashlib.sha256(first.float().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps([list(captions), positions]).encode())
    return digest.hexdigest()[:32]


def _read(path: Path, size: int) -> Tensor | None:
    try:
        tensors, facts = read_tensors(path)
        moment = tensors["moment"]
    except Exception:  # absent or damaged: it is made again
        return None
    return moment if moment.shape == (size, size) and facts.get("checksum") == _checksum(moment) else None


def _checksum(moment: Tensor) -> str:
    return hashlib.sha256(moment.contiguous().numpy().tobytes()).hexdigest()
