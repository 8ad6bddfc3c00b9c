"""diffusers' own IP-Adapter API on our processors: order of calls, offloading, training, masks and mistakes."""

import logging

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch.utils._python_dispatch import TorchDispatchMode

import keylock_diffusers as kd
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.masks import resize_masks
from keylock_diffusers.processors import IPAdapterCrossAttnProcessor
from keylock_diffusers.processors.images import adapter_streams
from keylock_diffusers.testing import patch, random_ip_adapter, shadow
from tests.diffusers.accuracy import assert_as_accurate, widened
from tests.diffusers.compatibility import SIZE, WIDTH, Feature, make, masks, unet
from tests.diffusers.drawing import APART, ROUNDING

TWO_MASKED = "three masked images, a scale each"


def layer(adapters=1, scale=1.0):
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    attn.set_processor(IPAdapterAttnProcessor2_0(16, 12, num_tokens=(4,) * adapters, scale=[scale] * adapters))
    return attn


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(attn):
    attn.set_processor(IPAdapterCrossAttnProcessor("layer", attn.processor))
    return attn


def assert_ours_as_accurate(attn, *given):
    """Of a layer with diffusers' processor, which ours replaces for good."""
    with torch.no_grad():
        exact, eager = widened(attn)(*widened(given)), attn(*given)
        assert_as_accurate(ours(attn)(*given), eager, exact)


def load(pipe, *kinds):
    Feature(adapters=kinds).load(pipe)


def test_the_shadow_sees_a_wrong_weight(monkeypatch):
    from keylock_diffusers.processors import images

    pipe, call = make("SD 1.x", TWO_MASKED)
    monkeypatch.setattr(images, "resize_masks", lambda *given: 1.001 * resize_masks(*given))
    with pytest.raises(
        AssertionError, match=r"calls err too much: .*attn2 \(IPAdapterAttnProcessor2_0, torch.float32\)"
    ):
        with shadow(pipe):
            call()


def test_the_shadow_leaves_no_hook_and_changes_no_picture():
    pipe, call = make("SD 1.x", TWO_MASKED)
    expected = call()
    with shadow(pipe):
        assert torch.equal(call(), expected)
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_patched_classes_of_diffusers_compute_with_ours_and_come_back():
    pipe, call = make("SD 1.x", TWO_MASKED)
    expected = call()
    stock = AttnProcessor2_0.__call__, IPAdapterAttnProcessor2_0.__call__
    used = []
    op = torch.ops.keylock.localized_attention.default

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            used.append(func)
            return func(*args, **(kwargs or {}))

    with patch(), Count():
        patched = call()
    assert used.count(op) == 2 * len(cross_attention_layers(pipe.unet))  # of two steps
    torch.testing.assert_close(patched, expected, rtol=0, atol=ROUNDING)
    assert (AttnProcessor2_0.__call__, IPAdapterAttnProcessor2_0.__call__) == stock


def test_load_install_set_scale_and_unload_in_any_order():
    pipe, _ = make("SD 1.x", "text only")
    reference, _ = make("SD 1.x", "text only")

    def both(act):
        act(reference)
        act(pipe)

    def same(*, images, ip=True):
        feature = Feature(adapters=("base",) * images, images=(1,) * images)
        given = [
            p(
                "a cat",
                num_inference_steps=1,
                height=SIZE,
                width=SIZE,
                generator=torch.Generator().manual_seed(1),
                output_type="np",
                **(feature.arguments(p) if ip else {}),
            ).images
            for p in (pipe, reference)
        ]
        torch.testing.assert_close(*(torch.as_tensor(g) for g in given), rtol=0, atol=ROUNDING)

    before = list(pipe.unet.state_dict())
    kd.install(pipe)
    same(images=0, ip=False)
    both(lambda p: load(p, "base"))  # on installed processors, without installing again
    same(images=1)
    kd.install(pipe)
    same(images=1)
    both(lambda p: p.set_ip_adapter_scale(0.3))
    same(images=1)
    both(lambda p: load(p, "base", "base"))  # loaded again over ours
    kd.install(pipe)
    both(lambda p: p.set_ip_adapter_scale([0.3, 0.9]))
    same(images=2)
    kd.uninstall(pipe)
    assert type(pipe.unet.encoder_hid_proj) is MultiIPAdapterImageProjection
    scales = [p.scale for p in pipe.unet.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0)]
    assert scales == [[0.3, 0.9]] * len(cross_attention_layers(pipe.unet))
    same(images=2)
    kd.install(pipe)
    encoder = pipe.image_encoder
    both(lambda p: p.unload_ip_adapter())
    assert all(type(p) is AttnProcessor2_0 for n, p in pipe.unet.attn_processors.items() if "attn2" in n)
    same(images=0, ip=False)
    kd.install(pipe)
    same(images=0, ip=False)
    pipe.image_encoder = reference.image_encoder = encoder
    both(lambda p: load(p, "base"))
    kd.install(pipe)
    same(images=1)
    both(lambda p: p.unload_ip_adapter())
    kd.uninstall(pipe)
    assert list(pipe.unet.state_dict()) == before
    assert all(type(p) is AttnProcessor2_0 for p in pipe.unet.attn_processors.values())


def test_nothing_is_held_twice_and_uninstall_restores_the_very_objects():
    pipe, _ = make("SD 1.x", "two adapters")
    before, projection = dict(pipe.unet.attn_processors), pipe.unet.encoder_hid_proj
    state = {name: tensor.data_ptr() for name, tensor in pipe.unet.state_dict().items()}
    kd.install(pipe)
    assert {name: tensor.data_ptr() for name, tensor in pipe.unet.state_dict().items()} == state
    assert list(pipe.unet.state_dict()) == list(state)
    kd.uninstall(pipe)
    after = pipe.unet.attn_processors
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert pipe.unet.encoder_hid_proj is projection


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("feature", [TWO_MASKED, "one image, 16 tokens"])
def test_offloading_hooks_are_honoured(monkeypatch, feature, offload):
    """There is no other device here to offload from: the hooks run with the CPU on both ends, weights on meta."""
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, add_hook_to_module

    pipe, call = make("SD 1.x", feature)
    expected = call()
    kd.install(pipe)
    if offload == "sequential":
        cpu_offload(pipe.unet, "cpu")
        assert any(p.device.type == "meta" for p in pipe.unet.parameters())
    else:
        add_hook_to_module(pipe.unet, CpuOffload("cpu"))
    # The pipeline asks its U-Net for a device, which offloaded weights do not have.
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
    torch.testing.assert_close(call(), expected, rtol=0, atol=ROUNDING)


def test_layerwise_casting_is_honoured():
    """Stored in float8, computed in float32: only the modules know. diffusers' image projections fail under it."""
    pipe, call = make("SD 1.x", "text only")
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(p.dtype == torch.float8_e4m3fn for p in pipe.unet.parameters())
    expected = call()
    kd.install(pipe)
    torch.testing.assert_close(call(), expected, rtol=0, atol=ROUNDING)


def test_a_unet_is_saved_as_without_ours(tmp_path):
    pipe, _ = make("SD 1.x", "two adapters")
    pipe.unet.save_pretrained(tmp_path / "stock")
    kd.install(pipe)
    pipe.unet.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_kolors_way_of_projecting_text_is_left_to_the_unet():
    """A U-Net whose text is projected first, and stays so under an adapter."""
    torch.manual_seed(0)
    model = unet(encoder_hid_dim=24, encoder_hid_dim_type="text_proj").eval()
    text, latents = random(2, 7, 24, seed=1), random(2, 4, 8, 8)
    model._load_ip_adapter_weights([random_ip_adapter(model, width=WIDTH)])

    def picture(model=model, like=lambda given: given):
        added = {"image_embeds": [random(2, 2, WIDTH, seed=2)]}
        with torch.no_grad():
            return model(like(latents), 3, like(text), added_cond_kwargs=like(added)).sample

    stock, exact = picture(), picture(widened(model), widened)
    kd.install(model)
    assert_as_accurate(picture(), stock, exact, largest=False)


def test_what_diffusers_refuses_to_reset_comes_back_after_uninstall():
    pipe, call = make("SD 1.x", "text only")
    kd.install(pipe)
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
        pipe.unet.set_default_attn_processor()
    kd.uninstall(pipe).unet.set_default_attn_processor()


def test_gradients_with_checkpointing_match_diffusers():
    pipe, _ = make("SD 1.x", "two adapters, None among masks")
    unet = pipe.unet.train()
    unet.requires_grad_(False)
    learned = {n: p for n, p in unet.named_parameters() if "_ip." in n or n.startswith("encoder_hid_proj")}
    assert learned
    for parameter in learned.values():
        parameter.requires_grad_(True)

    def gradients(unet=unet, like=lambda given: given):
        unet.zero_grad()
        embeds = [random(2, 2, WIDTH, seed=2), random(2, 1, 5, WIDTH, seed=3)]
        sample = unet(
            like(random(2, 4, 8, 8)),
            torch.tensor([10, 500]),
            like(random(2, 7, WIDTH, seed=1)),
            added_cond_kwargs={"image_embeds": like(embeds)},
            cross_attention_kwargs={"ip_adapter_masks": [masks(2), None]},
        ).sample
        sample.square().sum().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if name in learned}

    stock, exact = gradients(), gradients(widened(unet), widened)
    kd.install(pipe)
    plain = gradients()
    unet.enable_gradient_checkpointing()
    again = gradients()
    assert any(g.abs().max() > 0 for g in stock.values())
    assert stock.keys() == exact.keys() == learned.keys()
    assert all(torch.equal(again[name], plain[name]) for name in stock)
    assert_as_accurate(*([found[name] for name in stock] for found in (plain, stock, exact)), largest=False)


def test_two_users_embeddings_in_one_call_raise_where_diffusers_mixes_them():
    pipe, _ = make("SD 1.x", "precomputed embeddings")
    embeds = [random(4, 1, WIDTH)]  # two users' negative and positive
    arguments = dict(num_inference_steps=1, height=SIZE, width=SIZE, ip_adapter_image_embeds=embeds, output_type="np")
    pipe(["a cat", "a dog"], **arguments)
    kd.install(pipe)
    with pytest.raises(ValueError, match=r"image tokens for 8 rows, but the batch has 4.*image_prompts"):
        pipe(["a cat", "a dog"], **arguments)


def test_masks_elsewhere_are_resized_where_they_are_and_travel_as_one_number_per_pixel():
    attn = ours(layer())
    state, query, mask = random(2, 2, 4, 12), random(2, 64, 16), masks(2, 256, 256)
    moved = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].device != out.device:
                moved.append(args[0].numel())
            return out

    processor = attn.processor.to("meta")
    with Watch():
        streams = adapter_streams(
            [state.to("meta")], [1.0], processor.to_k_ip, processor.to_v_ip, [mask], query.to("meta")
        )
    assert streams.weights.device.type == "meta" and streams.weights.shape == (2, 2, 64)
    assert moved[2:] == [2 * 64]  # after the two that moved this test's own inputs


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_masks_of_any_dtype(dtype):
    attn = ours(layer())
    text, state = random(2, 7, 12), random(2, 1, 4, 12, seed=1)
    mask = (random(1, 1, 16, 16, seed=2) > 0).float()

    def out(mask):
        with torch.no_grad():
            return attn(random(2, 64, 16), (text, [state]), ip_adapter_masks=[mask])

    assert torch.equal(out(mask.to(dtype)), out(mask))


def test_the_last_tokens_of_a_plain_tensor_are_the_images_as_they_once_were():
    attn = layer()
    assert_ours_as_accurate(attn, random(2, 9, 16), random(2, 7 + 4, 12, seed=1))


def test_a_text_mask_over_queries_is_left_to_diffusers():
    attn = layer()
    hidden, text, state = random(2, 9, 16), random(2, 7, 12, seed=1), random(2, 1, 4, 12, seed=2)
    mask = torch.where(random(2, 9, 7, seed=3) > 0, 0.0, -10000.0)
    with torch.no_grad():
        stock = attn(hidden, (text, [state]), mask)
        assert torch.equal(ours(attn)(hidden, (text, [state]), mask), stock)


@pytest.mark.parametrize(
    "options", [{"qk_norm": "layer_norm"}, {"scale_qk": False}, {"upcast_attention": True}], ids=str
)
def test_switches_that_diffusers_adapters_ignore_are_ignored(options):
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8, **options).eval()
    attn.set_processor(IPAdapterAttnProcessor2_0(16, 12, scale=[0.7]))
    assert_ours_as_accurate(attn, random(2, 9, 16), (random(2, 7, 12, seed=1), [random(2, 1, 4, 12, seed=2)]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_unets_text_mask_beside_images(dtype):
    pipe, _ = make("SD 1.x", "two adapters, None among masks")
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1]]).to(dtype)

    def call(unet=pipe.unet, like=lambda given: given, **more):
        embeds = [random(2, 2, WIDTH, seed=2), random(2, 1, 5, WIDTH, seed=3)]
        with torch.no_grad():
            return unet(
                like(random(2, 4, 8, 8)),
                10,
                like(random(2, 7, WIDTH, seed=1)),
                added_cond_kwargs={"image_embeds": like(embeds)},
                cross_attention_kwargs={"ip_adapter_masks": [masks(2), None]},
                **more,
            ).sample

    exact = call(widened(pipe.unet), widened, encoder_attention_mask=mask)
    with shadow(pipe):
        stock = call(encoder_attention_mask=mask)
    kd.install(pipe)
    assert_as_accurate(call(encoder_attention_mask=mask), stock, exact, largest=False)
    assert (call() - stock).abs().max() > APART


def test_scales_that_are_all_0_need_no_masks():
    attn = layer(scale=[0.0, 0.0])
    assert_ours_as_accurate(attn, random(2, 9, 16), (random(2, 7, 12, seed=1), [random(2, 2, 4, 12, seed=2)]))


def test_scale_0_is_the_text_alone_to_the_bit():
    attn = ours(layer(scale=0.0))
    hidden, text, state = random(2, 9, 16), random(2, 7, 12, seed=1), random(2, 1, 4, 12, seed=2)
    with torch.no_grad():
        without = attn(hidden, (text, [state * float("nan")]))
        assert torch.equal(without, attn(hidden, (text, [state])))
        attn.set_processor(AttnProcessor2_0())
        assert_as_accurate(without, attn(hidden, text), widened(attn)(*widened((hidden, text))))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"masks": [None, None]}, ValueError, r"one per adapter \(1 with image tokens, 1 with a scale\), got 2"),
        ({"masks": [masks(2)[0]]}, ValueError, r"must be a tensor \[1, images, height, width\].*got \[2, 16, 16\]"),
        ({"masks": [[1]]}, ValueError, "got list"),
        ({"masks": [masks(3)]}, ValueError, "a mask for each of 2 images, got 3"),
        # Two users' masks under guidance, which diffusers repeats into twice as many rows as there are.
        ({"masks": [masks(2).expand(2, -1, -1, -1)], "rows": 4}, ValueError, "1 or 4 rows, got 2"),
        ({"masks": [masks(2)], "scale": [0.5]}, ValueError, "must have 2 numbers, one a mask, got 1"),
        ({"scale": [0.5, 0.5]}, TypeError, "one scale per image, which needs ip_adapter_masks"),
        ({"text": None}, ValueError, r"must be \(text, \[image tokens\]\) with an IP-Adapter, got None"),
    ],
    ids=str,
)
def test_each_mistake_is_named(arguments, error, message):
    attn = ours(layer())
    if "scale" in arguments:
        attn.processor.scale[0] = arguments["scale"]
    rows = arguments.get("rows", 2)
    text = None if "text" in arguments else (random(rows, 7, 12), [random(rows, 2, 4, 12, seed=1)])
    with pytest.raises(error, match=message):
        attn(random(rows, 64, 16), text, ip_adapter_masks=arguments.get("masks"))


def test_one_mask_per_row_is_each_rows_own():
    stock, attn = layer(), ours(layer())
    hidden, text, state = random(2, 64, 16), random(2, 7, 12, seed=1), random(2, 1, 4, 12, seed=2)
    both = torch.cat([masks(2)[:, :1], masks(2)[:, 1:]])  # [2, 1, height, width]
    with torch.no_grad():
        together = attn(hidden, (text, [state]), ip_adapter_masks=[both])
        for row in range(2):
            given = hidden[[row]], (text[[row]], [state[[row]]])
            mask = {"ip_adapter_masks": [both[[row]]]}
            eager, exact = stock(*given, **mask), widened(stock)(*widened(given), **mask)
            assert_as_accurate(together[[row]], eager, exact)
            assert_as_accurate(attn(*given, **mask), eager, exact)


def test_image_tokens_without_an_adapters_processor_say_what_to_call(pipe):
    kd.install(pipe)
    attn = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    with pytest.raises(ValueError, match=r"call keylock_diffusers.install\(pipe\) after load_ip_adapter"):
        attn(random(2, 9, attn.query_dim), (random(2, 7, 32), [random(2, 1, 4, 32)]))


def test_no_warning_is_logged_in_a_call(caplog):
    pipe, call = make("SD 1.x", TWO_MASKED)
    kd.install(pipe)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        call()
    assert not caplog.records


def test_random_adapters_of_an_unknown_kind(pipe):
    with pytest.raises(ValueError, match="projection must be one of base, plus"):
        random_ip_adapter(pipe.unet, "minus")
