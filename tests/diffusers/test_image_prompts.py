"""generate with image prompts: each row its own, as the plain pipeline draws it alone, whatever its neighbours have."""

import threading

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, RequestError
from keylock_diffusers.masks import resize_masks
from tests.diffusers.compatibility import SIZE, STEPS, WIDTH, masks
from tests.diffusers.drawing import APART, BARELY_APART, ROUNDING, build, draw, picture, plain, random, request


@pytest.fixture(scope="module")
def two():
    """An installed pipeline with two adapters."""
    return kd.install(build(adapters=("base", "plus")))


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
            assert torch.equal(draw(two, changed, on_error="return")[row], together[row])


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
    (ours,) = draw(pipe, [request(prompt)], num_inference_steps=4, callback_on_step_end=callback)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
    assert seen == [0, 1, 2, 3]
    late = draw(pipe, [request(ImagePrompt(picture(0), scale=0.8, start=0.5))], num_inference_steps=4)[0]
    always = draw(pipe, [request(ImagePrompt(picture(0), scale=0.8))], num_inference_steps=4)[0]
    never = draw(pipe, [request()], num_inference_steps=4)[0]
    for a, b in ((late, always), (late, never), (ours, late)):
        assert (a - b).abs().max() > BARELY_APART
    both = draw(pipe, [request(prompt), request(ImagePrompt(picture(0), scale=0.8))], num_inference_steps=4)
    for a, b in zip(both, (ours, always), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


def test_what_does_not_change_is_done_once(two, monkeypatch):
    projections, resized = [], []
    handles = [
        layer.register_forward_hook(lambda *_: projections.append(1))
        for layer in two.unet.encoder_hid_proj.image_projection_layers
    ]
    original = resize_masks

    def counting(masks, pixels, size):
        resized.append(pixels)
        return original(masks, pixels, size)

    monkeypatch.setattr("keylock_diffusers.routing.images.resize_masks", counting)
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


@pytest.mark.parametrize("shape", [(1, 65), (1000, 1), (40, 25)])
def test_regions_of_any_aspect_ratio_are_stretched_over_the_picture(two, shape):
    left = torch.zeros(shape)
    left[:, : max(1, shape[1] // 2)] = 1
    (ours,) = draw(two, [request(ImagePrompt(picture(0), region=left))])
    assert ours.isfinite().all()
    with pytest.raises(ValueError, match="about the aspect ratio of the picture"):
        resize_masks(torch.ones(1, 1, 6500), 64)


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


def test_two_pipelines_share_a_unet_and_interleave_in_two_threads(two):
    other = type(two)(**{**two.components, "safety_checker": None}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    orders = mixed()[:4]
    expected = draw(two, orders[:2]), draw(two, orders[2:])
    results, barrier = {}, threading.Barrier(2)

    def work(n, pipe):
        results[n] = draw(pipe, orders[2 * n : 2 * n + 2], callback_on_step_end=lambda *_: barrier.wait() and {} or {})

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
        assert (together[a] - together[b]).abs().max() > APART


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
    assert (together[0] - absent).abs().max() > BARELY_APART
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
        (ImagePrompt(picture(0), adapter=2), "adapter of an image prompt must be a whole number from 0 to 1, got 2"),
        (
            ImagePrompt(picture(0), adapter=True),
            "adapter of an image prompt must be a whole number from 0 to 1, got True",
        ),
        (
            ImagePrompt(picture(0), clip_embeds=random(1, 5, WIDTH)),
            "clip_embeds of an image prompt cannot be given beside image",
        ),
        (ImagePrompt(embeds=[1]), "embeds of an image prompt must be a tensor, got list"),
        (ImagePrompt(embeds=torch.zeros(1, 4, dtype=torch.int32)), "must be a floating-point tensor, got torch.int32"),
        (ImagePrompt(embeds=random(WIDTH)), r"embeds of an image prompt must be \[n, D\] for this adapter, got \[32\]"),
        (ImagePrompt(embeds=random(2, 1, WIDTH)), r"got \[2, 1, 32\]; diffusers' own have the negative first"),
        (ImagePrompt("http://localhost/"), "image of an image prompt must be a picture.*got str; open it first"),
        (ImagePrompt([picture(0), b"x"]), "image of an image prompt must be a picture.*got bytes"),
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
        (ImagePrompt(picture(0), scale={"up": {"blok_0": 1.0}}), "must name this U-Net's blocks, got up: 'blok_0'"),
        (ImagePrompt(picture(0), scale={"mid": "x"}), "must hold finite numbers, got 'x'"),
        (ImagePrompt(picture(0), scale={"up": {"block_1": [1.0] * 7}}), "Expected 2 scales for up.block_1, got 7"),
        (ImagePrompt(picture(0), start=-0.1), r"start of an image prompt must lie in \[0, 1\], got -0.1"),
        (ImagePrompt(picture(0), end=float("nan")), r"end of an image prompt must lie in \[0, 1\], got nan"),
        (ImagePrompt(picture(0), region="left"), "region of an image prompt must be a picture or a tensor, got str"),
        (ImagePrompt(picture(0), region=torch.zeros(8, 8)), "region of an image prompt must not be empty"),
        (ImagePrompt(picture(0), region=random(2, 8, 8)), r"must be \[height, width\], got \[2, 8, 8\]"),
        (ImagePrompt(picture(0), region=random(8, 8)), "must hold weights in 0..1, 0..255 or 0..65535, got -"),
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
    with pytest.raises(RequestError) as raised:
        draw(two, [request(), crowd], image_lengths=[[4]])
    assert raised.value.images is None, "it was found only after others were drawn"
    for lengths in ([4, 4], [[4], [16], [4]], [[0]], "44"):
        with pytest.raises((TypeError, ValueError), match="generate: image_lengths.* must be"):
            draw(two, [request()], image_lengths=lengths)
    with pytest.raises(TypeError, match="callback is no keyword that StableDiffusionPipeline takes"):
        draw(two, [request()], callback=print)
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
    assert (drawn[0] - draw(two, [request(ImagePrompt(picture(0)))])[0]).abs().max() > APART


def test_without_negative_encodings_the_unconditional_half_reads_zeros():
    pipe = kd.install(build(adapters=("faceid-plus",)))
    faces, clip = random(1, WIDTH), random(1, 5, WIDTH, seed=3)
    nothing = {"negative_embeds": torch.zeros_like(faces), "negative_clip_embeds": torch.zeros_like(clip)}
    silent = ImagePrompt(embeds=faces, clip_embeds=clip)
    for order in (
        request(silent),
        request(ImagePrompt(embeds=faces, clip_embeds=clip, negative_embeds=nothing["negative_embeds"])),
        request(ImagePrompt(embeds=faces, clip_embeds=clip, negative_clip_embeds=nothing["negative_clip_embeds"])),
    ):
        spelt = request(ImagePrompt(embeds=faces, clip_embeds=clip, **nothing))
        one, other = draw(pipe, [order, spelt])
        assert torch.equal(one, other)
    loud = request(ImagePrompt(embeds=faces, clip_embeds=clip, negative_clip_embeds=clip))
    assert not torch.equal(*draw(pipe, [loud, request(silent)]))


def test_blocks_that_a_scale_does_not_name_count_nothing(two):
    one, other = (
        draw(two, [request(ImagePrompt(picture(0), scale=scale)), request(seed=2)])[0]
        for scale in ({"down": {"block_0": [0.6]}}, {"down": {"block_0": [0.6]}, "up": {"block_1": [0.0, 0.0]}})
    )
    everywhere = draw(two, [request(ImagePrompt(picture(0), scale=0.6)), request(seed=2)])[0]
    assert torch.equal(one, other) and not torch.equal(one, everywhere)
