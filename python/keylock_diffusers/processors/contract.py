"""What a layer asks of a batch, and what it gives back: all that processors know of the rest of the package."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class ImageStreams(NamedTuple):
    """Keys and values of a layer's image tokens, one softmax and one weight per stream."""

    key: Tensor  # [B, sum(L), C]
    value: Tensor  # [B, sum(L), C]
    lengths: tuple[int, ...]
    weights: Tensor | None  # [B, I] or [B, I, N]; None: all 1
    key_bias: Tensor | None = None  # [B, sum(L)]


class RowUpdates(NamedTuple):
    """What rows add to the output of a projection: sum over r of coefficients[b, t, r] * u[slots[b, r]]."""

    u: Tensor  # [S, O] float32
    slots: Tensor  # [B, R] int32, -1 for none
    coefficients: Tensor  # [B, T, R] float32


class AdapterUpdates(NamedTuple):
    """What rows' low-rank adapters add to a projection: see `keylock_kernels.low_rank_linear`.

    A row without an adapter has slots of -1 and an output scale of 1. A projection without tokens takes its input as
    one token. Where it is a convolution over several pixels, `kernels` has those of each row's adapters, J times as
    many as the largest rank, and a slot is a row of `up`.
    """

    up: Tensor  # [P, O]
    slots: Tensor  # [B, J] int32, or [B, J * R] beside kernels
    strength: Tensor  # [B, J] float32
    down: Tensor | None = None  # [P, K]
    offsets: Tensor | None = None  # [S + 1] int32
    token_weights: Tensor | None = None  # [B, J, N] float32
    output_scale: Tensor | None = None  # [B, O] float32
    max_rank: int | None = None
    kernels: Tensor | None = None  # [B, J * R, C, kh, kw]


class Kept(NamedTuple):
    """All that one layer reads of a batch in one step, as tensors alone."""

    key: Tensor  # [B, T, C]
    value: Tensor  # [B, T, C]
    images: ImageStreams | None
    visibility: tuple[Tensor, Tensor] | None  # [B, N] and [B, T]


class Bound:
    """Passed in the place of a batch while every layer's processor holds its own `Kept`.

    So blocks of one shape are compiled once: inside a graph there are tensors, and no layer's name.
    """


BOUND = Bound()


class LayerInputs(Protocol):
    """What a layer may ask of a batch, passed as ``cross_attention_kwargs={"personalization": inputs}``."""

    def keys_and_values(self, layer: str, rows: int, text: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The layer's keys and values [B, T, C] for a batch of `rows` whose text [B, T, D] is given.

        None: none are kept; the layer projects its text now, with `updates`.
        """

    def updates(self, projection: str) -> RowUpdates | None:
        """What the rows add to the output of a projection, by its module's name; None: nothing."""

    def image_streams(self, layer: str, pixels: int) -> ImageStreams | None:
        """The layer's image tokens at a resolution of [N] pixels; None where no row has any."""

    def visibility(self, layer: str, pixels: int) -> tuple[Tensor, Tensor] | None:
        """Bitfields int32 [B, N] of pixels and [B, T] of keys: see `keylock_kernels.localized_attention`."""


class Readout(Protocol):
    """What is read out of the attention while it is computed, passed as ``cross_attention_kwargs={"readout": r}``."""

    def wanted(self, layer: str, rows: int, pixels: int) -> tuple[Tensor, Tensor | None] | None:
        """Which tokens to read in a layer, int32 [B, M], -1 for none, and with which weights [B, N, M].

        Without weights the maps themselves are read; None: nothing is.
        """

    def receive(self, layer: str, read: Tensor) -> None:
        """Takes what was read: sums [B, H, M] with weights, maps [B, H, N, M] without."""
