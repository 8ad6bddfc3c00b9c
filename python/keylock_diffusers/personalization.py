"""What one batch carries: which concepts each row of the U-Net uses, and the keys and values they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keylock_diffusers import edits
from keylock_diffusers.concepts import Concept, cross_attention_layers
from keylock_diffusers.processors.swap import unet_of


@dataclass(frozen=True)
class ConceptUse:
    """One concept in one row: its gate, its strength, and which streams it edits."""

    concept: Concept
    beta: float
    tau: float
    strength: float = 1.0
    lock: str = "local"  # "local": keys and values are edited; "global": values only


class Personalization:
    """Different users' concepts in one batch of a U-Net, passed as ``cross_attention_kwargs={"personalization": p}``.

    Routing is data: row b of the U-Net's batch belongs to prompt ``row_index[b]``, or to none (-1), as the
    unconditional rows of guidance do. Such a row is computed without any update.

    Args:
        uses: per prompt, the concepts it uses.
        row_index: int64 [B], the prompt of each row of the U-Net's batch; -1 for none.

    Raises:
        ValueError: a row index outside [-1, len(uses)), or one prompt that uses the same concept twice.
    """

    def __init__(self, uses: Sequence[Sequence[ConceptUse]], row_index: Tensor) -> None:
        if row_index.ndim != 1 or row_index.dtype != torch.int64:
            raise ValueError(
                f"Personalization: row_index must be int64 [B], got {row_index.dtype} {list(row_index.shape)}"
            )
        if row_index.numel() and not -1 <= int(row_index.min()) <= int(row_index.max()) < len(uses):
            raise ValueError(
                f"Personalization: row_index must lie in [-1, {len(uses)}), "
                f"got {int(row_index.min())} to {int(row_index.max())}"
            )
        self.row_index = row_index
        self.kv: dict[str, tuple[Tensor, Tensor]] = {}
        self._unseen: Tensor | None = None  # the prepared text, until a layer was given the same
        self._concepts = list({id(use.concept): use.concept for row in uses for use in row}.values())
        self._uses = [list(row) for row in uses]
        for row in self._uses:
            _gates_of([row], self._concepts)

    @torch.no_grad()
    def prepare(self, pipe: Any, text: Tensor, key_text: Tensor | None = None) -> Personalization:
        """Projects every layer's keys and values, which no timestep changes, once for the whole generation.

        Args:
            pipe: the pipeline or U-Net whose layers are projected.
            text: the encodings the U-Net is given, [B, T, D], one row per entry of ``row_index``.
            key_text: what keys read where that differs (global key-locking), [B, T, D].

        Returns:
            This object; a second call replaces what the first one made.

        Raises:
            ValueError: the number of rows does not match.
        """
        for name, tensor in (("text", text), ("key_text", key_text)):
            if tensor is not None and (tensor.ndim != 3 or len(tensor) != len(self.row_index)):
                raise ValueError(
                    f"Personalization.prepare: {name} must be [{len(self.row_index)}, T, D], got {list(tensor.shape)}"
                )
        key_text = text if key_text is None else key_text
        unet = unet_of(pipe)
        hook: Any = getattr(unet, "_hf_hook", None)
        if type(hook).__name__ == "CpuOffload":  # whole-model offloading moves the U-Net in when it is called, or here
            hook.pre_forward(unet)
        layers = cross_attention_layers(unet)
        key_edits = self._edits(key_text, locks=("local",))
        value_edits = self._edits(text, locks=("local", "global"))
        edited = key_edits is not None or value_edits is not None
        tables = self._tables(layers, text) if edited else {}
        self.kv = edits.project_layers(layers, (key_text, text), tables, (key_edits, value_edits))
        self._unseen = text
        return self

    def keys_and_values(self, layer: str, rows: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """A layer's prepared keys and values [B, T, C].

        Args:
            layer: the attention module's name.
            rows: the batch size the layer runs at.
            text: the encodings the layer was given; their values are compared once after each `prepare`.

        Raises:
            ValueError: the batch differs from what was prepared, or nothing was.
        """
        if layer not in self.kv:
            raise ValueError(
                f"Personalization: nothing was prepared for layer {layer!r}; call prepare(pipe, text) first"
            )
        key, value = self.kv[layer]
        if key.shape[0] != rows or (text is not None and text.shape[:2] != key.shape[:2]):
            raise ValueError(
                f"Personalization: prepared for {list(key.shape[:2])} rows and tokens, but {layer} runs on {rows} rows"
                + ("" if text is None else f" with text {list(text.shape)}")
            )
        if text is not None and self._unseen is not None and not torch.compiler.is_compiling():
            if not torch.allclose(text, self._unseen.to(text), rtol=0, atol=0, equal_nan=True):
                raise ValueError(f"Personalization: {layer} was given another text than was prepared; prepare it again")
            self._unseen = None
        return key, value

    def _edits(self, text: Tensor, locks: tuple[str, ...]) -> edits.Edit | None:
        """The edit of the rows' concepts with one of `locks`; None if there are none."""
        rows = [
            [use for use in self._uses[row] if use.lock in locks] if row >= 0 else [] for row in self.row_index.tolist()
        ]
        if not any(rows):
            return None
        gates, mix = _gates_of(rows, self._concepts)
        gates = edits.Gates(*(t.to(text.device) for t in (gates.slots, gates.beta, gates.tau, gates.strength)))
        directions = torch.stack([concept.direction for concept in self._concepts]).to(text.device)
        slots = gates.pairs(len(self._concepts))
        return slots, edits.coefficients(text, directions, gates, mix.to(text.device))

    def _tables(self, layers: Mapping[str, Any], text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per layer, the output vectors [2S, O] of keys and of values."""
        device, dtype = text.device, text.dtype
        targets = torch.stack([concept.target_input for concept in self._concepts]).to(device)
        supers = torch.stack([concept.super_class_encoding for concept in self._concepts]).to(device).float()
        values = [concept.values_per_layer() for concept in self._concepts]
        return {
            name: edits.tables(attn, targets, supers, torch.stack([value[name] for value in values]).to(device), dtype)
            for name, attn in layers.items()
        }


def _gates_of(rows: Sequence[Sequence[ConceptUse]], concepts: Sequence[Concept]) -> tuple[edits.Gates, Tensor]:
    """The gates of a batch's rows and how each row's concepts combine [B, R, R].

    Raises:
        ValueError: a row uses a concept twice.
    """
    slot_of = {id(concept): slot for slot, concept in enumerate(concepts)}
    width = max((len(row) for row in rows), default=0)

    def table(value: Callable[[ConceptUse], float], empty: float, dtype: torch.dtype) -> Tensor:  # [B, R]
        filled = [[value(use) for use in row] + [empty] * (width - len(row)) for row in rows]
        return torch.tensor(filled, dtype=dtype).reshape(len(rows), width)

    gates = edits.Gates(
        slots=table(lambda use: slot_of[id(use.concept)], -1, torch.int32),
        beta=table(lambda use: use.beta, 0.0, torch.float32),
        tau=table(lambda use: use.tau, 1.0, torch.float32),
        strength=table(lambda use: use.strength, 0.0, torch.float32),
    )
    return gates, edits.mixing(concepts, gates.slots, gates.strength)
