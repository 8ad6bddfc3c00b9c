"""Every kind of request against the plain pipeline's own call, listed by class; alone, and in mixed batches."""

import copy
import dataclasses
import inspect
import itertools

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import Control, Request
from keylock_diffusers.denoisers.families import FAMILIES
from keylock_diffusers.generation.generate import _PER_REQUEST
from tests.diffusers import compatibility as tiny
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.drawing import APART, COMPANY, ROUNDING, TEXT, picture, random

SIZE, STEPS = tiny.SIZE, 4
NEGATIVE = "a car"
# Of other sizes than what is drawn, and the mask with soft edges.
HALF = tiny.HALF.resize((3 * SIZE, 3 * SIZE), Image.Resampling.BILINEAR)
pytestmark = pytest.mark.usefixtures("one_thread")


def photo(seed, size=SIZE):
    return picture(seed).resize((size, size))


def plain(pipe, seed=1, **kwargs):
    given = {"negative_prompt": NEGATIVE, "guidance_scale": 4.0, "num_inference_steps": STEPS, **kwargs}
    out = pipe(kwargs.pop("prompt", TEXT), generator=torch.Generator().manual_seed(seed), output_type="np", **given)
    return torch.as_tensor(out[0][0])


def draw(pipe, requests, **kwargs):
    drawn = kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "np", **kwargs})
    return [torch.as_tensor(image) for image in drawn]


def request(text=TEXT, **more):
    return Request(text, **{"negative_prompt": NEGATIVE, "guidance_scale": 4.0, "seed": 1, **more})


def controlnet(width=tiny.WIDTH, seed=0, **more):
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": width,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 16),
    }
    control = ControlNetModel(**{**config, **more}).eval()
    for parameter in control.parameters():  # its output layers start at 0
        torch.nn.init.normal_(parameter, std=0.15)
    return control


def sdxl_controlnet():
    return controlnet(
        2 * tiny.WIDTH,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=48 + tiny.WIDTH,
    )


def sd(kind=StableDiffusionPipeline, **more):
    torch.manual_seed(0)
    return tiny.build(kind, tiny.unet(**more))


def xl(kind=StableDiffusionXLPipeline):
    torch.manual_seed(0)
    return tiny.sdxl(kind)


def other(pipe, kind, **more):
    """A pipeline of another task over the same modules."""
    parts = {name: module for name, module in pipe.components.items()}
    options = {} if "XL" in kind.__name__ else {"requires_safety_checker": False}
    made = kind(**parts, **more, **options)
    made.set_progress_bar_config(disable=True)
    return made


def ones(pipe):
    """Per kind of request of Stable Diffusion: the request, and what the plain pipeline of that task draws."""
    begin, large, mask, edges, depth = photo(3), photo(3, 40), HALF, photo(4), photo(5)
    nets = {"edges": controlnet(seed=1), "depth": controlnet(seed=2)}
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9))
    size = {"height": SIZE, "width": SIZE}
    img2img = other(pipe, StableDiffusionImg2ImgPipeline)
    inpaint = other(pipe, StableDiffusionInpaintPipeline)
    one = other(pipe, StableDiffusionControlNetPipeline, controlnet=nets["edges"])
    both = other(pipe, StableDiffusionControlNetPipeline, controlnet=[nets["depth"], nets["edges"]])
    through = other(pipe, StableDiffusionControlNetImg2ImgPipeline, controlnet=nets["edges"])
    window = {"control_guidance_start": 0.25, "control_guidance_end": 0.8}
    return nets, {
        "text to image": (request(), lambda: plain(pipe, **size)),
        "latents": (request(latents=latents), lambda: plain(pipe, latents=latents[None], **size)),
        "image": (request(image=begin, strength=0.75), lambda: plain(img2img, image=begin, strength=0.75)),
        "weak image": (request(image=begin, strength=0.25), lambda: plain(img2img, image=begin, strength=0.25)),
        "mask": (
            request(image=large, mask=mask, strength=0.75),
            lambda: plain(inpaint, image=large, mask_image=mask, strength=0.75, **size),
        ),
        "whole mask": (
            request(image=large, mask=mask, strength=1.0),
            lambda: plain(inpaint, image=large, mask_image=mask, strength=1.0, **size),
        ),
        "control": (
            request(controls=[Control("edges", edges, scale=0.7, start=0.25, end=0.8)]),
            lambda: plain(one, image=edges, controlnet_conditioning_scale=0.7, **window, **size),
        ),
        "two controls": (
            request(controls=[Control("edges", edges, scale=0.7), Control("depth", depth, end=0.5)]),
            lambda: plain(
                both,
                image=[depth, edges],
                controlnet_conditioning_scale=[1.0, 0.7],
                control_guidance_end=[0.5, 1.0],
                **size,
            ),
        ),
        "image and control": (
            request(image=begin, strength=0.75, controls=[Control("edges", edges)]),
            lambda: plain(through, image=begin, control_image=edges, strength=0.75, controlnet_conditioning_scale=1.0),
        ),
    }


KINDS = (
    "text to image", "latents", "image", "weak image", "mask", "whole mask", "control", "two controls",
    "image and control",
)  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """What the plain pipelines draw, and the requests."""
    torch.set_num_threads(1)
    pipe = sd()
    nets, orders = ones(pipe)
    expected = {kind: call() for kind, (_, call) in orders.items()}
    kd.install(pipe)
    return pipe, nets, {kind: order for kind, (order, _) in orders.items()}, expected


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_plain_pipelines_picture(drawn, kind):
    pipe, nets, orders, expected = drawn
    (ours,) = draw(pipe, [orders[kind]], controlnets=nets)
    torch.testing.assert_close(ours, expected[kind], rtol=0, atol=ROUNDING)


def test_the_kinds_are_different_pictures(drawn):
    """Or the comparisons above would compare nothing."""
    *_, expected = drawn
    for one, other in itertools.combinations(expected, 2):
        assert (expected[one] - expected[other]).abs().max() > 4 / 255, (one, other)


def test_all_kinds_in_one_call_are_the_plain_pipelines_pictures(drawn):
    pipe, nets, orders, expected = drawn
    pictures = draw(pipe, list(orders.values()), controlnets=nets, max_batch=16)
    for ours, kind in zip(pictures, orders, strict=True):
        assert (ours - expected[kind]).abs().max() <= COMPANY, kind


def test_a_neighbours_kind_changes_no_bit(drawn):
    """Rows with and without a picture, a mask, another strength, in one batch."""
    pipe, _, orders, _ = drawn
    mine = [orders["text to image"], orders["image"], orders["mask"]]
    alike = draw(pipe, [*mine, orders["weak image"]])
    for neighbour in (orders["latents"], orders["whole mask"], request(image=photo(8), strength=0.5)):
        for ours, theirs in zip(draw(pipe, [*mine, neighbour]), alike[:3], strict=False):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_rescale": 0.7},
        {"eta": 1.0},
        {"timesteps": [900, 500, 300, 10]},
        {"timesteps": [900, 500, 10], "guidance_rescale": 0.3, "eta": 0.5},
        {"sigmas": [8.0, 2.0, 0.5]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["SD 1.x", "SDXL"])
def test_options_of_the_whole_call_are_the_pipelines(family, options):
    pipe = xl() if family == "SDXL" else sd()
    kinds = {"timesteps": LCMScheduler, "sigmas": EulerDiscreteScheduler}
    kind = next((kind for name, kind in kinds.items() if name in options), DDIMScheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    if "timesteps" in options:
        options = {name: value for name, value in options.items() if name != "eta"}
    size = {"height": SIZE, "width": SIZE}
    expected = plain(pipe, **size, **options)
    torch.testing.assert_close(
        draw(kd.install(pipe), [request()], **size, **options)[0], expected, rtol=0, atol=ROUNDING
    )


def test_pictures_and_masks_of_any_shape_and_colour(drawn):
    """A picture alone has its own size, beside a mask the call's; a mask in colours is black or white at half grey."""
    pipe, nets, _, _ = drawn
    kinds = StableDiffusionImg2ImgPipeline, StableDiffusionControlNetPipeline, StableDiffusionInpaintPipeline
    img2img, one, inpaint = (
        other(pipe, kind, **({"controlnet": nets["edges"]} if "Control" in kind.__name__ else {})) for kind in kinds
    )
    wide, tall = photo(6).resize((24, 16)), {"height": 32, "width": 16}
    filled = {"image": photo(3), "strength": 0.75}
    expected = [
        plain(img2img, image=wide, strength=0.75),
        plain(one, image=wide),
        plain(inpaint, mask_image=photo(7), **filled, **tall),
    ]
    orders = [request(image=wide, strength=0.75), request(controls=[Control("edges", wide)])]
    ours = draw(pipe, orders, controlnets=nets) + draw(pipe, [request(mask=photo(7), **filled)], **tall)
    for found, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=ROUNDING)


def test_a_control_of_scale_zero_is_exactly_nothing(drawn):
    pipe, nets, _, _ = drawn
    images = photo(4), torch.full((1, 3, SIZE, SIZE), float("nan"))
    one, poisoned = (
        draw(pipe, [request(controls=[Control("edges", image, scale=0.0)])], controlnets=nets)[0] for image in images
    )
    assert torch.equal(one, poisoned)


def test_pictures_that_the_safety_checker_flags_are_shown_as_by_the_pipeline():
    pipe = sd()

    for flagged in (True, False):
        pipe.safety_checker = lambda images, clip_input, flagged=flagged: (images * 0.5, [flagged] * len(images))
        expected = plain(pipe, height=SIZE, width=SIZE)
        (ours,) = draw(kd.install(pipe), [request()])
        torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
        kd.uninstall(pipe)


SCHEDULERS = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rows_of_different_strength_join_at_their_own_step_with_a_history_of_their_own(kind):
    pipe = sd()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    img2img, inpaint = (other(pipe, task) for task in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline))
    steps = {"num_inference_steps": 6}
    expected = [plain(pipe, height=SIZE, width=SIZE, **steps)]
    expected += [plain(img2img, seed=n, image=photo(n), strength=s, **steps) for n, s in ((2, 0.8), (3, 0.5), (4, 0.2))]
    filled = [{"image": photo(5), "strength": strength} for strength in (0.7, 1.0)]
    expected += [plain(inpaint, seed=5, mask_image=HALF, height=SIZE, width=SIZE, **one, **steps) for one in filled]
    kd.install(pipe)
    orders = [request()]
    orders += [request(seed=n, image=photo(n), strength=s) for n, s in ((2, 0.8), (3, 0.5), (4, 0.2))]
    orders += [request(seed=5, mask=HALF, **one) for one in filled]
    together = draw(pipe, orders, **steps)
    for order, mixed, theirs in zip(orders, together, expected, strict=True):
        torch.testing.assert_close(draw(pipe, [order], **steps)[0], theirs, rtol=0, atol=ROUNDING)
        assert (mixed - theirs).abs().max() <= COMPANY


def test_a_unet_that_reads_the_mask_itself():
    pipe = sd(StableDiffusionInpaintPipeline, in_channels=9)
    orders = [request(seed=n, image=photo(n), mask=HALF, strength=s) for n, s in ((1, 1.0), (2, 0.6))]
    size = {"height": SIZE, "width": SIZE}
    expected = [
        plain(pipe, seed=n, image=photo(n), mask_image=HALF, strength=s, **size) for n, s in ((1, 1.0), (2, 0.6))
    ]
    kd.install(pipe)
    for order, theirs in zip(orders, expected, strict=True):
        torch.testing.assert_close(draw(pipe, [order])[0], theirs, rtol=0, atol=ROUNDING)
    with pytest.raises(kd.RequestError, match="this U-Net fills in: give image and mask"):
        draw(pipe, [request()])


def xl_ones(pipe):
    begin, mask, edges = photo(3), HALF, photo(4)
    size = {"height": SIZE, "width": SIZE}
    nets = {"edges": sdxl_controlnet()}
    img2img = other(pipe, StableDiffusionXLImg2ImgPipeline)
    inpaint = other(pipe, StableDiffusionXLInpaintPipeline)
    one = other(pipe, StableDiffusionXLControlNetPipeline, controlnet=nets["edges"])
    sizes = {"original_size": (900, 700), "target_size": (32, 48), "crops_coords_top_left": (8, 4)}
    negative = {
        "negative_original_size": (64, 32),
        "negative_target_size": (16, 8),
        "negative_crops_coords_top_left": (2, 3),
    }
    words = {"prompt_2": "a dog", "negative_prompt_2": "a tree"}
    return nets, {
        "text to image": (request(), lambda: plain(pipe, **size)),
        "sizes": (request(**sizes), lambda: plain(pipe, **sizes, **size)),
        "negative sizes": (request(**sizes, **negative), lambda: plain(pipe, **sizes, **negative, **size)),
        "second prompt": (request(**words), lambda: plain(pipe, **words, **size)),
        "no negative": (request(negative_prompt=None), lambda: plain(pipe, negative_prompt=None, **size)),
        "image": (
            request(image=begin, strength=0.75, **sizes, **negative),
            lambda: plain(img2img, image=begin, strength=0.75, **sizes, **negative),
        ),
        "mask": (
            request(image=begin, mask=mask, strength=0.75),
            lambda: plain(inpaint, image=begin, mask_image=mask, strength=0.75, **size),
        ),
        "whole mask": (
            request(image=begin, mask=mask, strength=1.0),
            lambda: plain(inpaint, image=begin, mask_image=mask, strength=1.0, **size),
        ),
        "control": (
            request(controls=[Control("edges", edges, scale=0.7, end=0.8)]),
            lambda: plain(one, image=edges, controlnet_conditioning_scale=0.7, control_guidance_end=0.8, **size),
        ),
    }


@pytest.fixture(scope="module")
def xl_drawn():
    torch.set_num_threads(1)
    pipe = xl()
    nets, orders = xl_ones(pipe)
    expected = {kind: call() for kind, (_, call) in orders.items()}
    kd.install(pipe)
    return pipe, nets, {kind: order for kind, (order, _) in orders.items()}, expected


XL_KINDS = (
    "text to image", "sizes", "negative sizes", "second prompt", "no negative", "image", "mask", "whole mask",
    "control",
)  # fmt: skip


@pytest.mark.parametrize("kind", XL_KINDS)
def test_each_kind_of_sdxl_is_the_plain_pipelines_picture(xl_drawn, kind):
    pipe, nets, orders, expected = xl_drawn
    options = {"height": SIZE, "width": SIZE}
    (ours,) = draw(pipe, [orders[kind]], controlnets=nets, **options)
    torch.testing.assert_close(ours, expected[kind], rtol=0, atol=ROUNDING)


def test_all_kinds_of_sdxl_in_one_call_are_the_plain_pipelines_pictures(xl_drawn):
    pipe, nets, orders, expected = xl_drawn
    pictures = draw(pipe, list(orders.values()), controlnets=nets, max_batch=16, height=SIZE, width=SIZE)
    for ours, kind in zip(pictures, orders, strict=True):
        assert (ours - expected[kind]).abs().max() <= COMPANY, kind


@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("kind", [DDIMScheduler, HeunDiscreteScheduler])
def test_base_and_refiner_divide_the_steps(kind, share):
    pipe = xl()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    refiner = other(pipe, StableDiffusionXLImg2ImgPipeline)
    size = {"height": SIZE, "width": SIZE}
    call = {"guidance_scale": 4.0, "num_inference_steps": 6, "negative_prompt": NEGATIVE}
    half = pipe(
        TEXT, generator=torch.Generator().manual_seed(1), output_type="latent", denoising_end=share, **call, **size
    )
    whole = refiner(
        TEXT, image=half[0], generator=torch.Generator().manual_seed(1), output_type="np", denoising_start=share, **call
    )
    noise = random(1, 4, SIZE // 2, SIZE // 2, seed=1).double()
    wide = copy.deepcopy(pipe).to(torch.float64)
    exact = wide(TEXT, latents=noise, output_type="latent", denoising_end=share, **call, **size)[0][0]
    kd.install(pipe)
    steps = {"num_inference_steps": 6}
    (latents,) = draw(pipe, [request()], output_type="latent", denoising_end=share, **steps, **size)
    assert_as_accurate(latents, half[0][0], exact, largest=False)
    (ours,) = draw(pipe, [request(image=latents[None])], denoising_start=share, **steps)
    torch.testing.assert_close(ours, torch.as_tensor(whole[0][0]), rtol=0, atol=ROUNDING)


TASKS = (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)


@pytest.mark.parametrize("kind", TASKS)
def test_any_tasks_pipeline_draws_requests_of_every_task(drawn, xl_drawn, kind):
    pipe, nets, orders, _ = xl_drawn if "XL" in kind.__name__ else drawn
    more = {"controlnet": nets["edges"]} if "ControlNet" in kind.__name__ else {}
    for name in ("text to image", "image", "mask", "control"):
        ours, theirs = (draw(one, [orders[name]], controlnets=nets)[0] for one in (other(pipe, kind, **more), pipe))
        assert torch.equal(ours, theirs), name


def test_a_refiner_is_told_aesthetic_scores():
    pipe = xl(StableDiffusionXLImg2ImgPipeline)
    config = {**pipe.unet.config, "projection_class_embeddings_input_dim": 40 + tiny.WIDTH}
    pipe.unet = UNet2DConditionModel.from_config(config).eval()
    pipe.register_to_config(requires_aesthetics_score=True)
    more = {"strength": 0.75, "aesthetic_score": 7.0, "negative_aesthetic_score": 1.0}
    more |= {"original_size": (900, 700), "negative_original_size": (64, 32)}
    more |= {"crops_coords_top_left": (8, 4), "negative_crops_coords_top_left": (2, 3)}
    expected = plain(pipe, image=photo(3), **more)
    (ours,) = draw(kd.install(pipe), [request(image=photo(3), **more)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_latents_of_sdxls_autoencoders_may_have_a_mean_and_a_deviation():
    pipe = xl()
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 0.2, 0.0], latents_std=[2.0, 1.5, 0.5, 3.0])
    img2img = other(pipe, StableDiffusionXLImg2ImgPipeline)
    size = {"height": SIZE, "width": SIZE}
    expected = [plain(pipe, **size), plain(img2img, image=photo(3), strength=0.75)]
    kd.install(pipe)
    orders = [request(), request(image=photo(3), strength=0.75)]
    for one, theirs in zip(orders, expected, strict=True):
        torch.testing.assert_close(draw(pipe, [one], **size)[0], theirs, rtol=0, atol=ROUNDING)


def test_an_autoencoder_that_overflows_in_float16_encodes_and_decodes_in_float32_and_is_float16_again():
    pipe = kd.install(xl())
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    seen = []
    for part in (pipe.vae.encoder, pipe.vae.decoder):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    draw(pipe, [request(image=photo(3), strength=0.75)])
    assert seen == [torch.float32] * 2 and pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("adaptive", [0.0, 0.002])
def test_perturbed_attention_guidance(guidance, adaptive):
    pipe = sd(StableDiffusionPAGPipeline)
    pipe.set_pag_applied_layers("mid")
    options = {"pag_scale": 2.0, "pag_adaptive_scale": adaptive}
    expected = [plain(pipe, seed=n, guidance_scale=guidance, height=SIZE, width=SIZE, **options) for n in (1, 2)]
    kd.install(pipe)
    before = dict(pipe.unet.attn_processors)
    ours = draw(pipe, [request(guidance_scale=guidance, seed=n) for n in (1, 2)], **options)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= COMPANY
    assert dict(pipe.unet.attn_processors) == before


def test_guidance_that_is_an_input_of_the_model_is_each_rows_own():
    torch.manual_seed(0)
    pipe = tiny.latent_consistency()
    call = {"num_inference_steps": STEPS, "original_inference_steps": 20, "height": SIZE, "width": SIZE}

    def stock(seed, scale):
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(TEXT, guidance_scale=scale, generator=generator, output_type="np", **call)[0][0])

    expected = [stock(1, 4.0), stock(2, 8.5)]
    kd.install(pipe)
    orders = [Request(TEXT, seed=1, guidance_scale=4.0), Request(TEXT, seed=2, guidance_scale=8.5)]
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    together = draw(pipe, orders, original_inference_steps=20)
    handle.remove()
    assert len(calls) == STEPS
    for order, theirs, mixed in zip(orders, expected, together, strict=True):
        (ours,) = draw(pipe, [order], original_inference_steps=20)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
        assert (mixed - theirs).abs().max() <= COMPANY


def test_one_video_a_request(concept_for):
    torch.manual_seed(0)
    pipe = tiny.animate_diff()
    call = {"num_frames": 2, "num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "pt"}

    def stock(seed, scale):
        out = pipe(TEXT, guidance_scale=scale, generator=torch.Generator().manual_seed(seed), **call)
        return out.frames[0]

    expected = [stock(1, 4.0), stock(2, 6.0)]
    kd.install(pipe)
    alice = concept_for(pipe)
    orders = [
        Request(TEXT, seed=1, guidance_scale=4.0),
        Request(TEXT, seed=2, guidance_scale=6.0),
        Request("<alice-cat> on blue", concepts=[alice], seed=3, guidance_scale=4.0),
    ]
    videos = draw(pipe, orders, **call)
    for ours, theirs in zip(videos, expected, strict=False):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= COMPANY
    other_concept = draw(pipe, [*orders[:2], Request("a cat on blue", seed=3, guidance_scale=4.0)], **call)
    assert torch.equal(other_concept[0], videos[0]) and (other_concept[2] - videos[2]).abs().max() > APART


# What the supported pipelines' calls take that neither a request nor `generate` does, and why.
LEFT_OUT = {
    "return_dict": "generate returns the pictures",
    "padding_mask_crop": "crop the picture and the mask beforehand",
    "guess_mode": "the unconditional half would have another control than its row",
}
PIPELINES = (
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    LatentConsistencyModelPipeline,
    AnimateDiffPipeline,
)


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_keyword_of_the_pipelines_call_has_its_place(kind):
    of_call = {*inspect.signature(kd.generate).parameters, *(name for family in FAMILIES for name in family.OPTIONS)}
    of_request = {field.name for field in dataclasses.fields(Request)} | _PER_REQUEST
    for name in inspect.signature(kind.__call__).parameters:
        assert name in of_call | of_request | LEFT_OUT.keys() | {"self", "kwargs"}, name
