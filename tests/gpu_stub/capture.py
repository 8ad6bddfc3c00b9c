"""``python -m tests.gpu_stub.capture``: no kernel of the captured step is met for the first time inside the capture."""

from __future__ import annotations

import torch

from keylock_kernels import localized_attention, rank_one_linear
from keylock_kernels.testing import attention_inputs, rank_one_inputs
from tests.gpu_stub import driver
from tests.kernels.helpers import layer_and_attention, run

OPTIONS = dict(images=(4, 4), weights="row", read=2)  # as in tests/kernels/test_gpu.py


def main() -> None:
    stub = driver.activate()
    layer = rank_one_inputs(2, 77, 64, 80, 4, 2, dtype=torch.bfloat16)
    picture = attention_inputs(2, 256, 77, 2, 40, dtype=torch.bfloat16, **OPTIONS)
    forward = (rank_one_linear(**layer, backend="triton"), *localized_attention(**picture, backend="triton"))
    upstream = [torch.ones_like(result) for result in forward]
    layer_and_attention(layer, picture, upstream, "triton")
    loaded = stub.counts.loaded
    with stub.capture():
        layer_and_attention(layer, picture, upstream, "triton")
    assert stub.counts.loaded == loaded
    print(f"{loaded} kernels, all of them loaded before the capture")
    try:
        with stub.capture():
            run(localized_attention, picture, backend="triton")
    except RuntimeError as error:
        assert "call once what is captured" in str(error), error
        print(f"refused: {error}")
    else:
        raise AssertionError("other gradients were captured without having been asked for before")
    run(localized_attention, picture, backend="triton")
    with stub.capture():
        run(localized_attention, picture, backend="triton")
    print("ok, once it has been called")


if __name__ == "__main__":
    main()
