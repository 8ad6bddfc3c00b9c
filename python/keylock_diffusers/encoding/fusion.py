"""Subject fusion: a picture's encoding mixed into the encoding of the word that names it (FastComposer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keylock_diffusers.checks import floats, reason_of
from keylock_diffusers.encoding.pictures import for_image_encoder
from keylock_diffusers.files import check_weights, read_tensors, write_tensors
from keylock_diffusers.pictures import PictureLimits
from keylock_diffusers.requests import FusedSubject

_PREFIX = "postfuse_module."  # of these weights in a whole FastComposer model


class SubjectFusion(nn.Module):
    """FastComposer's fusion of a word's encoding with a picture's: two perceptrons with residuals, then a norm.

    fuse(w, i) = norm(mlp2(h) + h) with h = mlp1([w; i]) + w, where each mlp is a norm, a layer, a GELU and a layer.
    Parameters have their published names, ``mlp1.layernorm.weight`` to ``layer_norm.bias``.

    Args:
        width: of the text encodings and of the image encodings, D.

    Paper: Xiao et al., FastComposer, arXiv 2305.10431.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1, self.mlp2 = _Perceptron(2 * width, width), _Perceptron(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.float()  # whatever the default dtype is

    @property
    def width(self) -> int:
        """Of the encodings, D."""
        return self.layer_norm.normalized_shape[0]

    def forward(
        self,
        words: Tensor,  # [n, D]
        images: Tensor,  # [n, D]
    ) -> Tensor:  # [n, D]
        """The fused encodings of n words, each with its picture."""
        hidden = self.mlp1(torch.cat([words, images], -1)) + words
        return self.layer_norm(self.mlp2(hidden) + hidden)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Tensor]) -> SubjectFusion:
        """Reads a safetensors file, or a state dict, of these weights alone or of a whole FastComposer model.

        Raises:
            ValueError: the weights are not there, or not those of one width, or not finite.
            OSError: there is no such file.
        """
        weights = _read(Path(source)) if isinstance(source, (str, Path)) else dict(source)
        if any(name.startswith(_PREFIX) for name in weights):
            weights = {n.removeprefix(_PREFIX): t for n, t in weights.items() if n.startswith(_PREFIX)}
        norm = weights.get("layer_norm.weight")
        if norm is None or norm.ndim != 1:
            raise ValueError(
                f"SubjectFusion: layer_norm.weight [D] must be among the weights, got {sorted(weights)[:5]}"
            )
        with torch.device("meta"):  # nothing is allocated before the shapes are checked
            made = cls(len(norm))
        check_weights(weights, made.state_dict(), "SubjectFusion")
        made.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        return made.eval()

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> int:
        """Writes a safetensors file, whole or not at all; returns its bytes."""
        return write_tensors(path, {name: tensor.to(dtype) for name, tensor in self.state_dict().items()})


class _Perceptron(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(inputs)
        self.fc1, self.fc2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.layernorm(x))))


@dataclass(frozen=True, eq=False)
class FusionUse:
    """One subject of a row: which tokens are fused, and with what."""

    tokens: tuple[int, ...]
    embeds: Tensor  # [D]


def fuse(
    fusion: SubjectFusion,
    text: Tensor,  # [B, T, D]
    rows: Sequence[Sequence[FusionUse]],
) -> Tensor:  # [B, T, D]
    """Text encodings with each row's subjects fused in, differentiable; a row's result does not depend on the others.

    Args:
        fusion: the module.
        text: the encodings.
        rows: per row its subjects.
    """
    places = [(row, token, use.embeds) for row, uses in enumerate(rows) for use in uses for token in use.tokens]
    if not places:
        return text
    weight = fusion.layer_norm.weight
    fused = []
    for row, token, embeds in places:  # one product each: how several round may depend on their number
        fused.append(fusion(text[row, token][None].to(weight), embeds[None].to(weight))[0].to(text))
    where = tuple(torch.tensor([place[n] for place in places], device=text.device) for n in (0, 1))
    return text.index_put(where, torch.stack(fused))


def encode_subject(
    subject: Any, pipe: Any, fusion: SubjectFusion | None, limits: PictureLimits = PictureLimits()
) -> Tensor:  # [D]
    """A subject's picture as the fusion module takes it.

    Raises:
        TypeError, ValueError: what is wrong with the subject.
    """
    if not isinstance(subject, FusedSubject):
        raise TypeError(f"subjects must be FusedSubject objects, got {type(subject).__name__}")
    if not isinstance(subject.prompt, str):
        raise TypeError(f"prompt of a FusedSubject must be text, got {type(subject.prompt).__name__}")
    if fusion is None:
        raise ValueError("subjects need a fusion module: give generate fusion=SubjectFusion.load(...)")
    if (subject.image is None) == (subject.embeds is None):
        got = "neither" if subject.image is None else "both"
        raise ValueError(f"give either image or embeds of a FusedSubject, got {got}")
    embeds = subject.embeds
    if embeds is None:
        if getattr(pipe, "image_encoder", None) is None:
            raise ValueError("image of a FusedSubject needs the pipeline's image_encoder, which is not loaded")
        image = for_image_encoder(subject.image, "image of a FusedSubject", limits)
        try:
            with torch.no_grad():
                embeds = pipe.encode_image(image, pipe._execution_device, 1)[0][0]
        except Exception as error:  # whatever an encoder raises, the request fails alone
            raise ValueError(f"image of a FusedSubject cannot be encoded: {reason_of(error)}") from error
    if floats(embeds, "the encoding of a FusedSubject").shape != (fusion.width,):
        raise ValueError(f"the encoding of a FusedSubject must be [{fusion.width}], got {list(embeds.shape)}")
    return embeds


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"SubjectFusion: there is no file {path}")
    try:
        weights, _ = read_tensors(path, lambda name: name.startswith(_PREFIX))  # of a whole model, these alone
        return weights or read_tensors(path)[0]
    except ValueError as error:
        raise ValueError(f"SubjectFusion: {error}") from error
