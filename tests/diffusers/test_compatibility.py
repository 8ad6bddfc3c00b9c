"""diffusers' own API, feature by feature: ours errs no more than diffusers' processors, and draws the same pictures."""

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

import keylock_diffusers as kd
from keylock_diffusers.testing import random_ip_adapter, random_unet, shadow
from tests.diffusers.compatibility import cases, make, masks
from tests.diffusers.drawing import ROUNDING

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "feature"), cases(), ids=str)
def test_every_call_errs_no_more_than_diffusers(family, feature, dtype):
    pipe, call = make(family, feature, DTYPES[dtype])
    with shadow(pipe) as calls:
        stock = call()
    names = {c.processor for c in calls}
    assert calls and ("image" not in feature or "IPAdapterAttnProcessor2_0" in names)
    if dtype == "float32":
        before = list(pipe.unet.state_dict())
        kd.install(pipe)
        ours = call()
        assert list(pipe.unet.state_dict()) == before
        torch.testing.assert_close(ours, stock, rtol=0, atol=ROUNDING)
        kd.uninstall(pipe)
        assert torch.equal(call(), stock)


@pytest.mark.long
@pytest.mark.parametrize(("which", "dtype"), [("SD 1.5", "float32"), ("SD 1.5", "bfloat16"), ("SDXL", "bfloat16")])
def test_full_size_unets_err_no_more_than_diffusers(which, dtype):
    unet = random_unet(which, DTYPES[dtype])
    width = unet.config.cross_attention_dim
    unet._load_ip_adapter_weights(
        [random_ip_adapter(unet, kind, width=64, seed=n) for n, kind in enumerate(["base", "plus"])]
    )
    for processor in unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale[:] = [[0.7, 0.2], 0.5]
    random = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(unet.dtype)

    added = {"image_embeds": [normal(2, 2, 64), normal(2, 1, 5, 64)]}
    if which == "SDXL":
        added.update(text_embeds=normal(2, 1280), time_ids=normal(2, 6))
    with torch.no_grad(), shadow(unet) as calls:
        unet(
            normal(2, 4, 16, 16),
            3,
            normal(2, 77, width),
            added_cond_kwargs=added,
            cross_attention_kwargs={"ip_adapter_masks": [masks(2, 16, 16), None]},
        )
    assert len(calls) == {"SD 1.5": 16, "SDXL": 70}[which]
