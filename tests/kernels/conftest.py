from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.helpers import DEVICE

torch.set_default_device(DEVICE)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out unfilled starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
