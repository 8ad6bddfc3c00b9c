"""Attention and linear ops that let every row of a diffusion batch carry its own personalisation.

Nothing heavy is imported here: names resolve on first use, so that ``python -m keylock_kernels``
can still report on an environment in which torch does not import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._version import __version__ as __version__
    from .backend import explain as explain
    from .ops.localized_attention.api import localized_attention as localized_attention
    from .ops.low_rank.low_rank import low_rank_linear as low_rank_linear
    from .ops.low_rank.low_rank import low_rank_update as low_rank_update
    from .ops.low_rank.rank_one import rank_one_coefficients as rank_one_coefficients
    from .ops.low_rank.rank_one import rank_one_linear as rank_one_linear
    from .ops.low_rank.rank_one import rank_one_update as rank_one_update

_HOMES = {
    "__version__": "_version",
    "explain": "backend",
    "localized_attention": "ops.localized_attention.api",
    "low_rank_linear": "ops.low_rank.low_rank",
    "low_rank_update": "ops.low_rank.low_rank",
    "rank_one_coefficients": "ops.low_rank.rank_one",
    "rank_one_linear": "ops.low_rank.rank_one",
    "rank_one_update": "ops.low_rank.rank_one",
}

__all__ = [
    "__version__",
    "explain",
    "localized_attention",
    "low_rank_linear",
    "low_rank_update",
    "rank_one_coefficients",
    "rank_one_linear",
    "rank_one_update",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
