"""The step itself: compiled once for every user, and as many launches with images as without."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Request
from keylock_diffusers.routing.rows import ImageUse
from tests.diffusers.compatibility import SIZE, STEPS, WIDTH, Feature, make, masks
from tests.diffusers.drawing import ROUNDING

FAMILIES = ("SD 1.x", "SDXL")
ROOM = [[4, 4], [16]]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def pipe(request):
    torch.compiler.reset()
    pipe, _ = make(request.param, "text only")
    Feature(adapters=("base", "plus")).load(pipe)
    yield kd.install(pipe)
    torch.compiler.reset()


def users(concept_for, pipe):
    """Different concepts, gates, images, scales, regions and schedules; then none of them."""
    alice, bob = concept_for(pipe), concept_for(pipe, "<bob-dog>", "dog", seed=2)
    left, right = masks(2)[0]

    def image(seed, **more):
        return ImagePrompt(embeds=random(1, WIDTH, seed=seed), **more)

    def plus(seed, **more):
        return ImagePrompt(embeds=random(1, 5, WIDTH, seed=seed), adapter=1, **more)

    def order(text, *prompts, concepts=(), seed=1):
        return Request(text, image_prompts=prompts, concepts=concepts, seed=seed, guidance_scale=4.0)

    return [
        [order("<alice-cat> on blue", image(1, region=left), concepts=[alice]), order("a dog")],
        [
            order("<bob-dog> on green", image(2), image(3, scale=0.3, region=right), concepts=[kd.Use(bob, beta=0.4)]),
            order("<alice-cat> and <bob-dog>", plus(4, end=0.5), concepts=[alice, kd.Use(bob, lock="global")]),
        ],
        [order("a house"), order("a tree", plus(5, scale=0.0), seed=5)],
        [order("a house", image(6, scale={"mid": 1.0})), order("<alice-cat>", concepts=[kd.Use(alice, strength=0.5)])],
    ]


def draw(pipe, orders, **more):
    options = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "np", "image_lengths": ROOM}
    images = kd.generate(pipe, orders, **options, **more)
    return [torch.as_tensor(image) for image in images]


def test_other_users_never_recompile_a_step(pipe, concept_for):
    batches = users(concept_for, pipe)
    expected = [draw(pipe, orders) for orders in batches]
    plain = pipe.unet
    counter = CompileCounter()
    pipe.unet = torch.compile(plain, backend=counter, fullgraph=True)
    for orders, pictures in zip(batches, expected, strict=True):
        for ours, theirs in zip(draw(pipe, orders), pictures, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
        assert counter.frame_count == 1, "a step was compiled again"


def test_other_users_regions_never_recompile_a_step(pipe, concept_for):
    alice, bob = concept_for(pipe), concept_for(pipe, "<bob-dog>", "dog", seed=2)
    left, right = masks(2)[0]
    use = {"concepts": [kd.Use(alice, region=left), kd.Use(bob, region=right)]}

    def order(text, seed=1, **more):
        return Request(text, seed=seed, guidance_scale=4.0, **more)

    batches = [
        [order("<alice-cat> and <bob-dog>", **use), order("a house")],
        [order("a cat", regions=[kd.Region(left, "cat")]), order("a dog", regions=[kd.Region(right, "dog")])],
        [order("a tree"), order("a cat on blue", seed=3)],
        [order("a cat and a dog", endings="hidden", regions=[kd.Region(left, "cat")]), order("a dog")],
    ]

    def draw_all():
        options = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "np"}
        return [kd.generate(pipe, orders, image_lengths=ROOM, max_regions=2, **options) for orders in batches]

    expected = draw_all()
    counter = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    for ours, theirs in zip(draw_all(), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=ROUNDING)
    assert counter.frame_count == 1, "a step was compiled again"


def test_a_compiled_step_is_recorded(pipe):
    orders = [Request("a cat on blue", seed=1, guidance_scale=4.0), Request("a dog", seed=2, guidance_scale=4.0)]
    expected, maps = kd.AttentionMaps(["cat"]), kd.AttentionMaps(["cat"])
    draw(pipe, orders, record=expected)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    draw(pipe, orders, record=maps)
    for layer, found in maps.images[0].maps["cat"].items():
        assert torch.equal(found, expected.images[0].maps["cat"][layer])


def test_a_default_device_does_not_break_the_graph(pipe, concept_for):
    """Under one, torch cannot trace some of a tensor's methods."""
    orders = users(concept_for, pipe)[0]
    expected = draw(pipe, orders)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    try:
        torch.set_default_device("cpu")
        ours = draw(pipe, orders)
    finally:
        torch.set_default_device(None)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


def test_the_compiled_code_computes_the_same(pipe, concept_for):
    if pipe.unet.config.addition_embed_type is not None:
        pytest.skip("one family is enough for the code generator, which takes half a minute for each")
    orders = users(concept_for, pipe)[0]
    expected = draw(pipe, orders)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    for ours, theirs in zip(draw(pipe, orders), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_the_plain_api_compiles_without_a_graph_break():
    torch.compiler.reset()
    pipe, call = make("SD 1.x", "three masked images, a scale each")
    kd.install(pipe)
    expected = call()
    counter = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    torch.testing.assert_close(call(), expected, rtol=0, atol=ROUNDING)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_regions_that_were_not_prepared_are_refused_inside_a_compiled_step(pipe):
    width = pipe.unet.config.cross_attention_dim
    row = kd.Row(images=(ImageUse(random(4, width), region=masks(1)[0, 0]),))
    personalization, text = kd.Personalization([row]), random(1, 7, width)
    name, attn = next((name, module) for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    pixels = 64 if name.startswith("down_blocks.0") else 16
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    personalization.prepare(pipe, text)
    with pytest.raises(Exception, match=f"no regions were prepared for {pixels} pixels; give prepare the latent_size"):
        compiled(random(1, pixels, attn.query_dim), text, personalization=personalization)
    personalization.prepare(pipe, text, latent_size=(8, 8))
    ours = compiled(random(1, pixels, attn.query_dim), text, personalization=personalization)
    assert torch.equal(ours, attn(random(1, pixels, attn.query_dim), text, personalization=personalization))


def launches(pipe, images):
    """The operators that a U-Net step launches kernels for, counted on the meta device."""
    unet = pipe.unet.to("meta")
    width = unet.config.cross_attention_dim
    rows = [
        [
            ImageUse(torch.empty(4, width, device="meta"), scale=0.5 + n, region=masks(2)[0, n % 2])
            for n in range(images)
        ]
    ] * 2
    personalization = kd.Personalization([kd.Row(images=row) for row in rows])
    text = torch.empty(2, 7, width, device="meta")
    personalization.prepare(unet, text, latent_size=(8, 8))
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                counted.append(func)
            return out

    added = {"image_embeds": [torch.empty(2, 0, 1, device="meta")] * 2}
    if unet.config.addition_embed_type is not None:
        added.update(text_embeds=torch.empty(2, WIDTH, device="meta"), time_ids=torch.empty(2, 6, device="meta"))
    with torch.no_grad(), Count():
        unet(
            torch.empty(2, 4, 8, 8, device="meta"),
            torch.empty((), device="meta"),
            text,
            added_cond_kwargs=added,
            cross_attention_kwargs={"personalization": personalization},
        )
    return counted


def test_four_masked_images_launch_no_more_kernels_than_none(pipe):
    without, four = launches(pipe, 0), launches(pipe, 4)
    op = torch.ops.keylock.localized_attention.default
    layers = len([name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")])
    assert without.count(op) == four.count(op) == layers
    assert len(four) <= len(without)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_cuda_graph_serves_every_user(pipe):
    """On the CPU test_image_prompts.py asserts the reason: no buffer moves."""
    unet, width = pipe.unet.to("cuda"), pipe.unet.config.cross_attention_dim
    personalization = kd.Personalization([kd.Row()] * 2, image_lengths=ROOM)
    text, latents = random(2, 7, width).cuda(), random(2, 4, 8, 8, seed=1).cuda()
    timestep = torch.tensor(10, device="cuda")  # copied from the CPU, which a capture forbids
    added = {"image_embeds": [torch.empty(2, 0, 1, device="cuda")] * 2}
    if unet.config.addition_embed_type is not None:
        added.update(text_embeds=random(2, WIDTH).cuda(), time_ids=random(2, 6).cuda())

    def users(seed, count):
        here = [
            ImageUse(random(4, width, seed=seed + n).cuda(), scale=0.5 + n, region=masks(2)[0, n]) for n in range(count)
        ]
        personalization.assign([kd.Row(images=here), kd.Row(images=here[:1])])
        personalization.prepare(unet, text, latent_size=(8, 8))

    def step():
        with torch.no_grad():
            return unet(
                latents,
                timestep,
                text,
                added_cond_kwargs=added,
                cross_attention_kwargs={"personalization": personalization},
            ).sample

    users(0, 2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, count in ((0, 2), (50, 1), (90, 0)):
        users(seed, count)
        graph.replay()
        assert torch.equal(captured, step())
