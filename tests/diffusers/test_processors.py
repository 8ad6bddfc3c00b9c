"""The processors: a drop-in that errs no more than diffusers' own, and leaves no trace."""

import logging

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)

import keylock_diffusers as kd
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.processors import CrossAttnProcessor, SelfAttnProcessor, verify
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import Row
from tests.diffusers.accuracy import assert_as_accurate, widened
from tests.diffusers.compatibility import sdxl_unet
from tests.diffusers.drawing import APART


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(unet, **kwargs):
    latents, text = random(2, 4, 8, 8).to(unet.dtype), random(2, 7, 32, seed=1).to(unet.dtype)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 500]), text, **kwargs).sample


def assert_attention_as_accurate(attn, ours, theirs, hidden, *arguments, **more):
    """Ours errs against float64 at most twice what diffusers' own processor does, plus a rounding."""

    def run(processor, dtype):
        def cast(a):
            return a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a

        attn.set_processor(processor)
        with torch.no_grad():
            return attn.to(dtype)(*map(cast, (hidden, *arguments)), **{name: cast(a) for name, a in more.items()})

    exact = run(theirs, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_accurate(run(ours, dtype), run(theirs, dtype), exact)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "out_bias": False},
        {"residual_connection": True, "rescale_output_factor": 1.7},
        {"norm_num_groups": 4, "residual_connection": True},
        {"cross_attention_norm": "layer_norm"},
        {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
        {"qk_norm": "layer_norm"},
        {"qk_norm": "rms_norm"},
        {"dim_head": 40, "heads": 1},
        {"upcast_attention": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("spatial", [False, True], ids=["3-D", "4-D"])
def test_every_switch_of_the_attention_module_is_honoured(options, spatial):
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, **{"heads": 2, "dim_head": 8, **options}).eval()
    hidden = random(2, 16, 3, 5) if spatial else random(2, 15, 16)
    assert_attention_as_accurate(
        attn, CrossAttnProcessor("layer"), AttnProcessor2_0(), hidden, random(2, 7, 12, seed=1)
    )


def test_a_norm_over_space_is_honoured():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, cross_attention_dim=12, heads=2, dim_head=8, spatial_norm_dim=4).eval()
    given = random(2, 32, 3, 5), random(2, 7, 12, seed=1), None
    zq = random(2, 4, 3, 5, seed=2)
    assert_attention_as_accurate(attn, CrossAttnProcessor("layer"), AttnProcessor2_0(), *given, temb=zq)


def test_unscaled_queries_stay_unscaled():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8, scale_qk=False).eval()
    assert_attention_as_accurate(
        attn, CrossAttnProcessor("layer"), AttnProcessor(), random(2, 15, 16), random(2, 7, 12, seed=1)
    )


def test_without_a_context_it_attends_to_itself():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8).eval()
    assert_attention_as_accurate(attn, CrossAttnProcessor("layer"), AttnProcessor2_0(), random(2, 15, 16))


@pytest.mark.parametrize("queries", [1, 15], ids=["per key", "per query and key"])
def test_attention_masks_are_honoured(queries):
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    mask = torch.where(random(2, queries, 7, seed=2) > 0.3, -10000.0, 0.0)
    mask[..., 0] = 0
    assert_attention_as_accurate(
        attn, CrossAttnProcessor("layer"), AttnProcessor2_0(), random(2, 15, 16), random(2, 7, 12, seed=1), mask
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_unets_encoder_attention_mask_of_any_dtype_gives_the_same_picture(pipe, dtype):
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1]]).to(dtype)
    stock, exact = (call(unet, encoder_attention_mask=mask) for unet in (pipe.unet, widened(pipe.unet)))
    kd.install(pipe)
    assert_as_accurate(call(pipe.unet, encoder_attention_mask=mask), stock, exact, largest=False)
    assert (call(pipe.unet) - stock).abs().max() > APART


def test_a_mask_over_queries_with_a_personalization_is_refused():
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    attn.set_processor(CrossAttnProcessor("layer"))
    with pytest.raises(ValueError, match=r"layer: attention_mask must be \[B, 1, T\]"):
        attn(
            random(2, 15, 16),
            random(2, 7, 12),
            torch.zeros(2, 15, 7),
            personalization=Personalization([Row(), Row()]),
        )


def test_install_changes_no_picture_and_uninstall_restores_the_very_objects(pipe):
    before, state = dict(pipe.unet.attn_processors), list(pipe.unet.state_dict())
    stock, exact = call(pipe.unet), call(widened(pipe.unet))
    assert kd.install(pipe) is pipe
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {CrossAttnProcessor, SelfAttnProcessor}
    assert_as_accurate(call(pipe.unet), stock, exact, largest=False)
    assert list(pipe.unet.state_dict()) == state
    assert kd.uninstall(pipe) is pipe
    after = pipe.unet.attn_processors
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert torch.equal(call(pipe.unet), stock)


def test_install_twice_is_install_once(pipe):
    before = dict(pipe.unet.attn_processors)
    kd.install(pipe)
    ours = dict(pipe.unet.attn_processors)
    kd.install(pipe)
    assert all(pipe.unet.attn_processors[name] is ours[name] for name in ours)
    kd.uninstall(kd.uninstall(pipe))
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)


def test_uninstall_restores_after_an_exception_in_a_call(pipe):
    before = dict(pipe.unet.attn_processors)
    kd.install(pipe)
    with pytest.raises(ValueError, match="call prepare"):
        call(
            pipe.unet,
            cross_attention_kwargs={"personalization": Personalization([Row(), Row()])},
        )
    kd.uninstall(pipe)
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)


def test_stock_eager_processors_are_replaced_and_come_back(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())
    kd.install(pipe)
    verify(pipe)
    kd.uninstall(pipe)
    assert all(type(p) is AttnProcessor for p in pipe.unet.attn_processors.values())


def test_processors_that_do_more_are_kept_and_named_once(pipe, caplog):
    layers = cross_attention_layers(pipe.unet)
    first, *_ = layers

    class Theirs(AttnProcessor2_0):
        pass

    theirs = Theirs()
    layers[first].set_processor(theirs)
    with caplog.at_level(logging.WARNING):
        kd.install(pipe)
    assert layers[first].processor is theirs
    assert f"1 attention layers keep their processor: {first} (Theirs)" in caplog.text
    with pytest.raises(RuntimeError, match=f"{first} has the processor Theirs"):
        verify(pipe)


def test_attention_slicing_after_install_is_seen_by_verify_and_undone_by_install(pipe):
    kd.install(pipe)
    pipe.unet.set_attn_processor(SlicedAttnProcessor(1))
    with pytest.raises(RuntimeError, match="install"):
        kd.generate(pipe, [kd.Request("a cat")], num_inference_steps=1)
    verify(kd.install(pipe))
    kd.uninstall(pipe)
    assert all(type(p) is SlicedAttnProcessor for p in pipe.unet.attn_processors.values())


def test_self_attention_processors_are_made_anew_as_load_ip_adapter_does(pipe):
    kd.install(pipe)
    for attn in (m for m in pipe.unet.modules() if isinstance(m, Attention) and not m.is_cross_attention):
        attn.set_processor(type(attn.processor)())
    kd.uninstall(pipe)
    assert all(type(p) is AttnProcessor2_0 for p in pipe.unet.attn_processors.values())


def test_other_keywords_do_not_reach_self_attention_with_a_warning(pipe, caplog):
    stock, exact = call(pipe.unet), call(widened(pipe.unet))
    kd.install(pipe)
    personalization = Personalization([Row(), Row()]).prepare(pipe, random(2, 7, 32, seed=1))
    with caplog.at_level(logging.WARNING):
        personalised = call(pipe.unet, cross_attention_kwargs={"personalization": personalization})
    assert "not expected" not in caplog.text
    assert_as_accurate(personalised, stock, exact, largest=False)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_personalization_of_other_rows_is_refused(pipe, rows):
    kd.install(pipe)
    personalization = Personalization([Row()] * rows).prepare(pipe, random(rows, 7, 32))
    with pytest.raises(ValueError, match=rf"prepared for \[{rows}, 7\] rows and tokens, but .* runs on 2 rows"):
        call(pipe.unet, cross_attention_kwargs={"personalization": personalization})


def test_a_personalization_of_another_text_is_refused(pipe):
    kd.install(pipe)
    personalization = Personalization([Row(), Row()]).prepare(pipe, random(2, 7, 32, seed=9))
    with pytest.raises(ValueError, match="was given another text than was prepared"):
        call(pipe.unet, cross_attention_kwargs={"personalization": personalization})
    personalization.prepare(pipe, random(2, 7, 32, seed=1))
    call(pipe.unet, cross_attention_kwargs={"personalization": personalization})


@pytest.mark.parametrize("wrong", [object(), torch.nn.Linear(2, 2)], ids=["no module", "no U-Net"])
def test_install_needs_a_unet(wrong):
    with pytest.raises(TypeError, match="pipe must be a pipeline with a U-Net"):
        kd.install(wrong)


def test_sdxls_unet_gives_the_same_picture():
    torch.manual_seed(0)
    unet = sdxl_unet().eval()
    added = {"text_embeds": random(2, 32), "time_ids": random(2, 6)}

    def picture(unet=unet, like=lambda given: given):
        given = like((random(2, 4, 8, 8), 3, random(2, 9, 64, seed=1)))
        with torch.no_grad():
            return unet(*given, added_cond_kwargs=like(added)).sample

    stock, exact = picture(), picture(widened(unet), widened)
    kd.install(unet)
    assert len(cross_attention_layers(unet)) == 12
    assert_as_accurate(picture(), stock, exact, largest=False)
    kd.uninstall(unet)
    assert torch.equal(picture(), stock)


def test_a_lora_loaded_through_peft_is_applied_under_ours(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False))
    stock, exact = call(pipe.unet), call(widened(pipe.unet))
    kd.install(pipe)
    assert_as_accurate(call(pipe.unet), stock, exact, largest=False)
    text = random(2, 7, 32, seed=1)
    personalization = Personalization([Row(), Row()]).prepare(pipe, text)
    prepared = call(pipe.unet, cross_attention_kwargs={"personalization": personalization})
    assert_as_accurate(prepared, stock, exact, largest=False)


def test_gradient_checkpointing_gives_the_same_gradients(pipe):
    kd.install(pipe)
    unet = pipe.unet.train()

    def gradients():
        unet.zero_grad()
        unet(random(2, 4, 8, 8), torch.tensor([10, 500]), random(2, 7, 32, seed=1)).sample.square().sum().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    plain = gradients()
    unet.enable_gradient_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(again[name], plain[name])
