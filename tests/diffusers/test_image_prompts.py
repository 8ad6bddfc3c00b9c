"""generate with image prompts: each row its own, as the plain pipeline draws it alone, whatever its neighbours have."""

import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Request, RequestError
from keylock_diffusers.image_prompts import ImageRouting, ImageUse
from keylock_diffusers.personalization import ConceptUse
from keylock_diffusers.processors import images as processor_images
from tests.diffusers.compatibility import SIZE, STEPS, WIDTH, Feature, make, masks

ROUNDING = 1 / 255 / 8
TEXT = "a cat on blue"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def build(family="SD 1.x", adapters=("base",)):
    pipe, _ = make(family, "text only")
    Feature(adapters=adapters).load(pipe)
    return pipe


def plain(pipe, seed=1, **kwargs):
    kwargs = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "height": SIZE, "width": SIZE, **kwargs}
    out = pipe(TEXT, generator=torch.Generator().manual_seed(seed), output_type="np", **kwargs)
    return torch.as_tensor(out.images[0])


def draw(pipe, requests, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, **kwargs}
    drawn = kd.generate(pipe, requests, output_type="np", **kwargs)
    return [image if isinstance(image, Exception) else torch.as_tensor(image) for image in drawn]


def request(*prompts, seed=1, text=TEXT, **more):
    return Request(text, image_prompts=prompts, seed=seed, guidance_scale=more.pop("guidance_scale", 4.0), **more)


@pytest.fixture(scope="module")
def two():
    """An installed pipeline with two adapters."""
    return kd.install(build(adapters=("base", "plus")))


FACE, FACE_CLIP = random(2, 1, WIDTH), random(1, 2, 5, WIDTH, seed=3)
MASKED = {"cross_attention_kwargs": {"ip_adapter_masks": [masks(2)]}}
# What the pipeline is given beside the prompt, its scale, and the same as image prompts.
SINGLE = {
    "nothing": ((), {}, None, []),
    "one image": (
        ("base",),
        {"ip_adapter_image": [[picture(0)]]},
        0.6,
        [ImagePrompt(picture(0), scale=0.6)],
    ),
    "16 tokens": (("plus",), {"ip_adapter_image": [[picture(0)]]}, 1.0, [ImagePrompt(picture(0))]),
    "every hidden state": (("full-face",), {"ip_adapter_image": [[picture(0)]]}, 1.0, [ImagePrompt(picture(0))]),
    "images in one softmax": (
        ("base",),
        {"ip_adapter_image": [[picture(0), picture(1)]]},
        0.5,
        [ImagePrompt([picture(0), picture(1)], scale=0.5)],
    ),
    "regions": (
        ("base",),
        {"ip_adapter_image": [[picture(0), picture(1)]], **MASKED},
        [[0.7, 1.3]],
        [ImagePrompt(picture(n), scale=s, region=masks(2)[0, n]) for n, s in enumerate((0.7, 1.3))],
    ),
    "two adapters": (
        ("base", "plus"),
        {"ip_adapter_image": [[picture(0)], [picture(1)]]},
        [0.4, 0.9],
        [ImagePrompt(picture(0), scale=0.4), ImagePrompt(picture(1), scale=0.9, adapter=1)],
    ),
    "per block": (
        ("base",),
        {"ip_adapter_image": [[picture(0)]]},
        {"up": {"BLOCK": [0.0, 0.7, 0.3]}},
        [ImagePrompt(picture(0), scale={"up": {"BLOCK": [0.0, 0.7, 0.3]}})],
    ),
    "embeddings": (
        ("base",),
        {"ip_adapter_image_embeds": [random(2, 2, WIDTH)]},
        1.0,
        [ImagePrompt(embeds=random(2, 2, WIDTH)[1], negative_embeds=random(2, 2, WIDTH)[0])],
    ),
    "FaceID": (
        ("faceid",),
        {"ip_adapter_image_embeds": [FACE]},
        1.0,
        [ImagePrompt(embeds=FACE[1], negative_embeds=FACE[0])],
    ),
    "FaceID-Plus": (
        ("faceid-plus",),
        {"ip_adapter_image_embeds": [FACE]},
        1.0,
        [
            ImagePrompt(
                embeds=FACE[1],
                negative_embeds=FACE[0],
                clip_embeds=FACE_CLIP[0, [1]],
                negative_clip_embeds=FACE_CLIP[0, [0]],
            )
        ],
    ),
}


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL"])
@pytest.mark.parametrize("case", SINGLE)
def test_one_request_is_the_plain_pipelines_call(case, family, guidance):
    adapters, arguments, scale, prompts = SINGLE[case]
    if guidance == 1 and "ip_adapter_image_embeds" in arguments:
        arguments = {"ip_adapter_image_embeds": [arguments["ip_adapter_image_embeds"][0][1:]]}
    pipe = build(family, adapters)
    if case == "per block":
        config = pipe.unet.config
        block = next(n for n, kind in enumerate(config.up_block_types) if "Cross" in kind)
        numbers = [0.0, 0.7, 0.3][: config.layers_per_block + 1]
        scale = {"up": {f"block_{block}": numbers}}
        prompts = [ImagePrompt(picture(0), scale=scale)]
    if adapters:
        pipe.set_ip_adapter_scale(scale)
    if case == "FaceID-Plus":
        clip = FACE_CLIP if guidance > 1 else FACE_CLIP[:, 1:]
        pipe.unet.encoder_hid_proj.image_projection_layers[0].clip_embeds = clip
    expected = plain(pipe, guidance_scale=guidance, **arguments)
    if adapters:
        pipe.set_ip_adapter_scale([0.123] * len(adapters))  # the request's own scale is what counts
    (ours,) = draw(kd.install(pipe), [request(*prompts, guidance_scale=guidance)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
    if adapters:
        (without,) = draw(pipe, [request(guidance_scale=guidance)])
        assert (without - ours).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize("negative", [None, "", "a dog"])
def test_sdxls_negative_prompts_are_the_pipelines(negative):
    pipe = build("SDXL", ())
    expected = plain(pipe, negative_prompt=negative)
    (ours,) = draw(kd.install(pipe), [request(negative_prompt=negative)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_sdxls_encodings_are_given_with_their_pooled_ones():
    pipe = build("SDXL", ())
    expected = plain(pipe, negative_prompt="a dog")
    text, negative, pooled, negative_pooled = pipe.encode_prompt(TEXT, negative_prompt="a dog")
    given = Request(
        prompt_embeds=text[0],
        negative_prompt_embeds=negative[0],
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=negative_pooled[0],
        seed=1,
        guidance_scale=4.0,
    )
    (ours,) = draw(kd.install(pipe), [given])
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
    with pytest.raises(
        RequestError, match=r"prompt_embeds need pooled_prompt_embeds \[32\] with this pipeline, got NoneType"
    ):
        draw(pipe, [Request(prompt_embeds=text[0], guidance_scale=1.0)])
    with pytest.raises(RequestError, match="pooled_prompt_embeds must be None without prompt_embeds, got Tensor"):
        draw(pipe, [Request(TEXT, pooled_prompt_embeds=pooled[0])])


def mixed():
    """Six users: two images in regions, one large image prompt, both adapters, a schedule, several together, none."""
    left, right = masks(2)[0]
    return [
        request(
            ImagePrompt(picture(0), scale=0.7, region=left), ImagePrompt(picture(1), scale=0.9, region=right), seed=1
        ),
        request(ImagePrompt(picture(2), adapter=1), seed=2, text="a dog on green"),
        request(ImagePrompt(picture(3), scale=0.4), ImagePrompt(picture(4), scale=1.2, adapter=1, region=left), seed=3),
        request(ImagePrompt(picture(5), end=0.5), seed=4),
        request(ImagePrompt([picture(6), picture(7), picture(8)]), seed=5),
        request(seed=6),
    ]


def test_a_mixed_batch_draws_each_as_if_alone(two):
    orders = mixed()
    together = draw(two, orders)
    for order, image in zip(orders, together, strict=True):
        torch.testing.assert_close(image, draw(two, [order])[0], rtol=0, atol=ROUNDING)


def test_at_equal_size_a_row_is_the_same_to_the_bit_whatever_its_neighbours_have(two):
    orders = mixed()
    together = draw(two, orders)
    others = [
        request(seed=11),
        request(ImagePrompt(embeds=torch.full((2, WIDTH), 1e30)), seed=12),
        request(ImagePrompt([picture(1)] * 5, adapter=1, region=masks(1)[0, 0]), seed=13),
    ]
    for row, order in enumerate(orders):
        for other in others:
            changed = [other] * len(orders)
            changed[row] = order
            assert torch.equal(draw(two, changed)[row], together[row])


def test_another_rows_poisoned_images_masks_and_scales_change_nothing(two):
    """The batch object is given what `generate` would refuse."""
    personalization, call = step(two, rows=3)
    uses = [[ImageUse(random(4, WIDTH, seed=n), region=random(16, 16, seed=n))] for n in range(3)]
    personalization.assign([[]] * 3, torch.arange(3), uses).prepare(two, TEXTS[:3])
    clean = call()
    nan = float("nan")
    poisons = [
        ImageUse(torch.full((4, WIDTH), nan), region=random(16, 16)),
        ImageUse(random(4, WIDTH), region=torch.full((16, 16), nan)),
        ImageUse(random(4, WIDTH), scale=nan, region=random(16, 16)),
        ImageUse(torch.full((4, WIDTH), 1e30), scale=1e30, region=random(16, 16)),
    ]
    for poison in poisons:
        personalization.assign([[]] * 3, torch.arange(3), [uses[0], [poison], uses[2]]).prepare(two, TEXTS[:3])
        poisoned = call()
        assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and not torch.equal(poisoned[1], clean[1])


def test_permuted_requests_are_permuted_pictures(two):
    orders = mixed()
    order = [3, 0, 5, 1, 4, 2]
    together, again = draw(two, orders), draw(two, [orders[n] for n in order])
    for place, n in enumerate(order):
        torch.testing.assert_close(again[place], together[n], rtol=0, atol=ROUNDING)


def test_padding_of_rows_with_fewer_images_is_exactly_nothing(two):
    alone = request(ImagePrompt(picture(0), scale=0.7), seed=1)
    few = draw(two, [alone, request(seed=2)])[0]
    room = draw(two, [alone, request(seed=2)], image_lengths=[[4, 4, 16], [16]])[0]
    assert torch.equal(few, room)


def test_images_switch_on_and_off_between_steps(two):
    pipe = build(adapters=("base",))
    pipe.set_ip_adapter_scale(0.8)

    def switch(pipe, step, timestep, given):
        pipe.set_ip_adapter_scale(0.0 if step + 1 >= 2 else 0.8)
        return given

    arguments = dict(num_inference_steps=4, ip_adapter_image=[[picture(0)]])
    expected = plain(pipe, callback_on_step_end=switch, **arguments)
    kd.install(pipe)
    seen = []

    def callback(pipe, step, timestep, given):
        seen.append(step)
        return given

    prompt = ImagePrompt(picture(0), scale=0.8, end=0.5)
    (ours,) = draw(pipe, [request(prompt)], num_inference_steps=4, callback=callback)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
    assert seen == [0, 1, 2, 3]
    late = draw(pipe, [request(ImagePrompt(picture(0), scale=0.8, start=0.5))], num_inference_steps=4)[0]
    always = draw(pipe, [request(ImagePrompt(picture(0), scale=0.8))], num_inference_steps=4)[0]
    never = draw(pipe, [request()], num_inference_steps=4)[0]
    for a, b in ((late, always), (late, never), (ours, late)):
        assert (a - b).abs().max() > 2 * ROUNDING
    both = draw(pipe, [request(prompt), request(ImagePrompt(picture(0), scale=0.8))], num_inference_steps=4)
    for a, b in zip(both, (ours, always), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_every_step_belongs_to_one_of_two_adjoining_schedules(total):
    for cut in (0.0, 0.25, 0.5, 1.0):
        before, after = ImageUse(random(4, 8), end=cut), ImageUse(random(4, 8), start=cut)
        for step in range(total):
            # A step that the cut goes through belongs to neither, as with ControlNets.
            through = step / total < cut < (step + 1) / total
            assert before.active(step, total) + after.active(step, total) == (0 if through else 1)


def test_what_does_not_change_is_done_once(two, monkeypatch):
    projections, resized = [], []
    handles = [
        layer.register_forward_hook(lambda *_: projections.append(1))
        for layer in two.unet.encoder_hid_proj.image_projection_layers
    ]
    original = processor_images.resize_masks

    def counting(masks, pixels, size):
        resized.append(pixels)
        return original(masks, pixels, size)

    monkeypatch.setattr("keylock_diffusers.image_prompts.resize_masks", counting)
    region = masks(1)[0, 0]
    shared = ImagePrompt(picture(0), region=region)
    draw(two, [request(shared), request(shared, seed=2), request(ImagePrompt(picture(1), adapter=1, region=region))])
    assert len(projections) == 2 * 2  # two prompts, positive and negative; not their rows, not the steps
    pixels = [(SIZE // 2) ** 2, (SIZE // 4) ** 2]
    assert sorted(resized) == sorted(pixels)  # one region, whatever the rows, layers and steps
    for handle in handles:
        handle.remove()


def test_one_attention_call_per_layer_whatever_the_images(two, monkeypatch):
    from keylock_diffusers.processors import attention

    calls = []
    original = attention.localized_attention

    def counting(*args, **kwargs):
        calls.append(len(kwargs.get("image_lengths", ())))
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "localized_attention", counting)
    draw(two, mixed())
    layers = len([name for name in two.unet.attn_processors if "attn2" in name])
    assert len(calls) == STEPS * layers and set(calls) == {3}


TEXTS = random(6, 7, WIDTH, seed=9)


def step(pipe, rows, image_lengths=None):
    """A batch object for `rows` rows, and a U-Net step with it."""
    personalization = kd.Personalization([[]] * rows, torch.arange(rows), image_lengths=image_lengths)
    latents, text = random(rows, 4, 8, 8, seed=8), TEXTS[:rows].clone()

    def call(unet=None):
        with torch.no_grad():
            return (pipe.unet if unet is None else unet)(
                latents,
                torch.tensor(10),
                text,
                added_cond_kwargs={"image_embeds": [torch.empty(rows, 0, 1)] * 2},
                cross_attention_kwargs={"personalization": personalization},
            ).sample

    call.text = text
    return personalization, call


def test_buffers_stay_where_they_are_for_other_users(two):
    personalization, call = step(two, rows=3, image_lengths=[[4, 4], [16]])

    def users(seed, count):
        return [
            [ImageUse(random(4, WIDTH, seed=seed + n), scale=0.1 * n, region=random(9, 9))] * (n % count)
            for n in range(3)
        ]

    def prepare(seed, count):
        personalization.assign([[]] * 3, torch.arange(3), users(seed, count))
        personalization.prepare(two, call.text, latent_size=(8, 8))
        return [tensor.data_ptr() for tensor in personalization.tensors()], call()

    places, first = prepare(0, 3)
    again, second = prepare(50, 2)
    personalization.at_step(0, 4)
    assert again == places == [tensor.data_ptr() for tensor in personalization.tensors()]
    assert not torch.equal(first, second)
    assert prepare(0, 3)[0] == places and torch.equal(call(), first)


def test_a_text_written_in_place_after_prepare_is_noticed(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    call()
    call.text[1, 3] += 1
    with pytest.raises(ValueError, match="was given another text than was prepared"):
        call()
    personalization.prepare(two, call.text)
    call()
    with torch.inference_mode():
        frozen = call.text.clone()
        personalization.prepare(two, frozen)
        streams = [personalization.keys_and_values(layer, 2, frozen) for layer in personalization.kv]
        frozen[0, 0] = 3
        with pytest.raises(ValueError, match="another text"):
            for layer in personalization.kv:
                personalization.keys_and_values(layer, 2, frozen)
        assert len(streams) == len(personalization.kv)


@pytest.mark.parametrize("what", ["image", "region", "concept", "key_text"])
def test_whatever_else_is_written_in_place_is_noticed(two, concept_for, what):
    alice, (_, call) = concept_for(two), step(two, rows=2)
    use = ImageUse(random(4, WIDTH), region=random(8, 8))
    uses = [[ConceptUse(alice, beta=0.5, tau=0.1)], []]
    personalization = kd.Personalization(uses, torch.arange(2), [[use], []])
    key_text = call.text.clone()
    personalization.prepare(two, call.text, key_text)
    first, *_ = personalization.kv
    personalization.keys_and_values(first, 2, call.text)
    written = {"image": use.tokens, "region": use.region, "concept": alice.values, "key_text": key_text}[what]
    written[0] += 1
    with pytest.raises(
        ValueError, match=f"{what if what == 'key_text' else ''}.* was written to after it was prepared"
    ):
        personalization.keys_and_values(first, 2, call.text)
    personalization.prepare(two, call.text, key_text)
    personalization.keys_and_values(first, 2, call.text)


def test_a_failed_prepare_leaves_nothing_of_the_users_before(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    call()
    personalization.assign([[]] * 2, torch.arange(2), [[ImageUse(random(4, 5))], []])
    with pytest.raises(ValueError, match=r"image tokens must be \[L, 32\], got \[4, 5\]"):
        personalization.prepare(two, call.text)
    with pytest.raises(ValueError, match="nothing was prepared"):
        call()


def test_images_beside_a_personalization_are_refused(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    attn = next(module for name, module in two.unet.named_modules() if name.endswith("attn2"))
    for more in ({"ip_adapter_masks": [masks(1), None]}, {}):
        states = [random(2, 0 if more else 1, 4, WIDTH)] * 2
        with pytest.raises(ValueError, match="must not be given beside a personalization"):
            attn(random(2, 64, attn.query_dim), (call.text, states), personalization=personalization, **more)


@pytest.mark.parametrize("shape", [(1, 65), (1000, 1), (40, 25)])
def test_regions_of_any_aspect_ratio_are_stretched_over_the_picture(two, shape):
    left = torch.zeros(shape)
    left[:, : shape[1] // 2] = 1
    (ours,) = draw(two, [request(ImagePrompt(picture(0), region=left))])
    assert ours.isfinite().all()
    with pytest.raises(ValueError, match="about the aspect ratio of the picture"):
        processor_images.resize_masks(torch.ones(1, 1, 6500), 64)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler, DDIMScheduler])
def test_schedules_count_the_schedulers_own_steps(two, scheduler, monkeypatch):
    seen = []
    original = kd.Personalization.at_step
    monkeypatch.setattr(
        kd.Personalization, "at_step", lambda self, n, total: seen.append((n, total)) or original(self, n, total)
    )
    prepared = []
    original_prepare = kd.Personalization.prepare
    monkeypatch.setattr(
        kd.Personalization,
        "prepare",
        lambda self, *a, **k: prepared.append(k["steps"]) or original_prepare(self, *a, **k),
    )
    draw(
        two,
        [request(ImagePrompt(picture(0), end=0.5))],
        scheduler=scheduler.from_config(two.scheduler.config),
        num_inference_steps=4,
    )
    total = seen[-1][1]
    assert prepared == [total] and seen == [(n, total) for n in range(1, total)]
    assert total == {PNDMScheduler: 13, HeunDiscreteScheduler: 7, DDIMScheduler: 4}[scheduler]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_generate_follows_offloading_hooks(offload, monkeypatch):
    """The CPU stands at both ends: there is no other device here."""
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, add_hook_to_module

    pipe = kd.install(build(adapters=("base", "plus")))
    expected = draw(pipe, mixed())
    if offload == "sequential":
        cpu_offload(pipe.unet, "cpu")
    else:
        add_hook_to_module(pipe.unet, CpuOffload("cpu"))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
    for ours, theirs in zip(draw(pipe, mixed()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_a_height_alone_is_taken_as_the_pipeline_takes_it():
    for family in ("SD 1.x", "SDXL"):
        pipe = kd.install(build(family))
        image = ImagePrompt(picture(0), region=masks(1)[0, 0])
        for size in ({"height": 2 * SIZE}, {"width": 2 * SIZE}, {}):
            (ours,) = kd.generate(pipe, [request(image)], num_inference_steps=1, output_type="np", **size)
            expected = plain(
                pipe, num_inference_steps=1, **{"height": None, "width": None, **size}, ip_adapter_image=[[picture(0)]]
            )
            assert ours.shape == expected.shape


def test_new_users_without_prepare_are_refused(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    personalization.assign([[]] * 2, torch.arange(2), [[ImageUse(random(4, WIDTH))], []])
    with pytest.raises(ValueError, match="nothing was prepared"):
        call()


def test_two_pipelines_share_a_unet_and_interleave_in_two_threads(two):
    other = type(two)(**{**two.components, "safety_checker": None}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    orders = mixed()[:4]
    expected = draw(two, orders[:2]), draw(two, orders[2:])
    results, barrier = {}, threading.Barrier(2)

    def work(n, pipe):
        results[n] = draw(pipe, orders[2 * n : 2 * n + 2], callback=lambda *_: barrier.wait() and {} or {})

    threads = [threading.Thread(target=work, args=(n, pipe)) for n, pipe in enumerate((two, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        for ours, theirs in zip(results[n], expected[n], strict=True):
            assert torch.equal(ours, theirs)


def test_concepts_and_image_prompts_share_rows(two, concept_for):
    alice = concept_for(two)
    image = ImagePrompt(picture(0), scale=0.5)
    orders = [
        request(image, text="<alice-cat> on blue", concepts=[alice]),
        request(image, text="a cat on blue"),
        request(text="<alice-cat> on blue", concepts=[alice]),
    ]
    together = draw(two, orders)
    for order, drawn in zip(orders, together, strict=True):
        torch.testing.assert_close(drawn, draw(two, [order])[0], rtol=0, atol=ROUNDING)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (together[a] - together[b]).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize("lock", ["local", "global"])
def test_sdxl_concepts_are_drawn_from_both_encoders_words(concept_for, lock):
    pipe = kd.install(build("SDXL"))
    alice, bob = concept_for(pipe), concept_for(pipe, "<bob-dog>", "dog", seed=2)
    assert len(alice.word_embeddings) == 2 and alice.target_input.shape == (2 * WIDTH,)
    orders = [
        request(text="<alice-cat> on blue", concepts=[kd.Use(alice, lock=lock)]),
        request(ImagePrompt(picture(0)), text="<bob-dog> on blue", concepts=[kd.Use(bob, lock=lock)]),
        request(text="a cat on blue"),
    ]
    together = draw(pipe, orders)
    for order, drawn in zip(orders, together, strict=True):
        torch.testing.assert_close(drawn, draw(pipe, [order])[0], rtol=0, atol=ROUNDING)
    absent = draw(pipe, [request(text="<alice-cat> on blue", concepts=[kd.Use(alice, strength=0.0)])])[0]
    assert (together[0] - absent).abs().max() > 4 * ROUNDING
    # Each encoder's learned word counts, also in the pooled encoding.
    for encoder in range(2):
        words = list(alice.word_embeddings)
        words[encoder] = words[encoder] + 1
        changed = concept_for(pipe)
        object.__setattr__(changed, "word_embeddings", tuple(words))
        other = draw(pipe, [request(text="<alice-cat> on blue", concepts=[kd.Use(changed, lock=lock)])])[0]
        assert not torch.equal(other, draw(pipe, [orders[0]])[0])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ImagePrompt(torch.zeros(1, 3, 3)), "image of an image prompt cannot be encoded by adapter 0"),
        (ImagePrompt(picture(0), scale={3: 1.0}), "must name this U-Net's blocks"),
        (ImagePrompt(picture(0), scale={"left": {"block_9": 1.0}}), "must name this U-Net's blocks"),
        ("a picture", "image_prompts must be ImagePrompt objects, got str"),
        (ImagePrompt(), "give either image or embeds of an image prompt, got none"),
        (ImagePrompt(picture(0), embeds=random(1, WIDTH)), "give either image or embeds"),
        (ImagePrompt([]), "at least one picture, got none"),
        (ImagePrompt(picture(0), adapter=2), "adapter of an image prompt must be 0 to 1, got 2"),
        (ImagePrompt(picture(0), adapter=True), "adapter of an image prompt must be 0 to 1, got True"),
        (
            ImagePrompt(picture(0), clip_embeds=random(1, 5, WIDTH)),
            "clip_embeds of an image prompt cannot be given beside image",
        ),
        (ImagePrompt(embeds=[1]), "embeds of an image prompt must be a floating-point tensor, got list"),
        (ImagePrompt(embeds=torch.zeros(1, 4, dtype=torch.int32)), "must be a floating-point tensor, got torch.int32"),
        (ImagePrompt(embeds=random(WIDTH)), r"embeds of an image prompt must be \[n, D\] or \[n, S, D\], got \[32\]"),
        (ImagePrompt(embeds=random(1, 5)), r"embeds \[1, 5\] of an image prompt cannot be encoded by adapter 0"),
        (
            ImagePrompt(embeds=random(1, WIDTH), negative_embeds=random(2, WIDTH)),
            r"negative_embeds of an image prompt must be \[1, 32\], as embeds, got \[2, 32\]",
        ),
        (
            ImagePrompt(embeds=random(1, WIDTH), clip_embeds=random(1, 5, WIDTH)),
            "belong to FaceID-Plus adapters, got one with ImageProjection",
        ),
        (ImagePrompt(picture(0), scale="much"), "scale of an image prompt must be a finite number or a dict"),
        (ImagePrompt(picture(0), scale=float("inf")), "scale of an image prompt must be a finite number"),
        (ImagePrompt(picture(0), scale={"mid": "x"}), "must hold finite numbers, got 'x'"),
        (ImagePrompt(picture(0), scale={"up": {"block_1": [1.0] * 7}}), "Expected 2 scales for up.block_1, got 7"),
        (ImagePrompt(picture(0), start=-0.1), r"start of an image prompt must lie in \[0, 1\], got -0.1"),
        (ImagePrompt(picture(0), end=float("nan")), r"end of an image prompt must lie in \[0, 1\], got nan"),
        (ImagePrompt(picture(0), region="left"), "region of an image prompt must be a picture or a tensor, got str"),
        (ImagePrompt(picture(0), region=random(1, 8, 8)), r"must be \[height, width\], got \[1, 8, 8\]"),
        (
            ImagePrompt(picture(0), region=torch.full((8, 8), float("nan"))),
            "region of an image prompt must hold finite numbers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_in_an_image_prompt_fails_its_request_alone(two, prompt, message):
    with pytest.raises(RequestError, match=message) as caught:
        draw(two, [request(), request(prompt)])
    assert caught.value.index == 1
    good, bad = draw(two, [request(), request(prompt)], on_error="return")
    assert isinstance(bad, RequestError) and torch.equal(good, draw(two, [request()])[0])


def test_mistakes_that_depend_on_the_pipeline_are_named(two):
    bare = kd.install(build(adapters=()))
    with pytest.raises(RequestError, match="image_prompts need an IP-Adapter: call pipe.load_ip_adapter"):
        draw(bare, [request(ImagePrompt(picture(0)))])
    face = kd.install(build(adapters=("faceid-plus",)))
    for prompt in (ImagePrompt(embeds=random(1, WIDTH)), ImagePrompt(picture(0))):
        with pytest.raises(RequestError, match="needs embeds and clip_embeds of as many faces, got [01] and 0"):
            draw(face, [request(prompt)])
    blind = kd.install(build(adapters=("base",)))
    blind.image_encoder = None
    with pytest.raises(RequestError, match="it needs the pipeline's image_encoder, which is not loaded"):
        draw(blind, [request(ImagePrompt(picture(0)))])
    crowd = request(ImagePrompt(picture(0)), ImagePrompt(picture(1)))
    with pytest.raises(RequestError, match="image_lengths has 1 streams for adapter 0, but a row has 2"):
        draw(two, [crowd], image_lengths=[[4]])
    good, bad = draw(two, [request(), crowd], image_lengths=[[4]], on_error="return")
    assert isinstance(good, torch.Tensor) and isinstance(bad, RequestError)
    for lengths in ([4, 4], [[4], [16], [4]], [[0]], "44"):
        with pytest.raises(ValueError, match="image_lengths must be a list of token counts per IP-Adapter, at most 2"):
            draw(two, [request()], image_lengths=lengths)
    with pytest.raises(TypeError, match="callback_on_step_end is given as callback"):
        draw(two, [request()], callback_on_step_end=print)
    with pytest.raises(TypeError, match="ip_adapter_masks belongs to each Request"):
        draw(two, [request()], cross_attention_kwargs={"ip_adapter_masks": [masks(1)]})
    with pytest.raises(RuntimeError, match="install"):
        draw(build(adapters=("base",)), [request(ImagePrompt(picture(0)))])


def test_regions_may_be_pictures_arrays_bits_and_bytes(two):
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    forms = [half, half.bool(), half.numpy(), (255 * half).byte(), Image.fromarray((255 * half).byte().numpy())]
    drawn = [draw(two, [request(ImagePrompt(picture(0), region=region))])[0] for region in forms]
    assert all(torch.equal(image, drawn[0]) for image in drawn[1:])
    assert (drawn[0] - draw(two, [request(ImagePrompt(picture(0)))])[0]).abs().max() > 10 * ROUNDING


def test_streams_are_laid_out_with_the_least_padding():
    def use(length, adapter=0):
        return ImageUse(torch.zeros(length, 8), adapter=adapter)

    routing = ImageRouting([[use(4), use(16)], [use(16, 1)], [use(8)], []])
    assert routing.lengths == ((16, 4), (16,))
    bias = routing.key_bias(torch.float32)
    assert [int((row == 0).sum()) for row in bias] == [20, 16, 8, 0]
    assert ImageRouting([[use(4)], [use(4)]]).key_bias(torch.float32) is None
    fixed = ImageRouting([[use(4)], []], [[16, 4]])
    assert fixed.scales("any", 0, 1) == ((1.0, 0.0), (0.0, 0.0))
    with pytest.raises(
        ValueError, match=r"image_lengths \[4\] of adapter 0 have no place for an image prompt of 16 tokens"
    ):
        ImageRouting([[use(16)]], [[4]])
