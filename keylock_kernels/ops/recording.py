"""When autograd records around an op, and when inside one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def refuse_double_backward(op: str) -> None:
    """Called first in a backward: gradients are recorded there only under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not supported; call backward without create_graph=True")


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Autograd on, also inside an op that a compiled graph calls with autograd's dispatch keys shut off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
