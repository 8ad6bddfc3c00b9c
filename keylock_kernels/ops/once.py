"""The ops are differentiable once; a second derivative is an error and never a silent zero."""

from __future__ import annotations

import torch


def refuse_double_backward(op: str) -> None:
    """Called first in a backward: gradients are recorded there only under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not supported; call backward without create_graph=True")
