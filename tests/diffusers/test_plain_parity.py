"""generate with one request draws what the plain pipeline's call draws."""

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Request, RequestError
from tests.diffusers.compatibility import SIZE, WIDTH, masks
from tests.diffusers.drawing import APART, ROUNDING, TEXT, build, draw, picture, plain, random, request

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
        assert (without - ours).abs().max() > APART


@pytest.mark.parametrize("negative", [None, "", "a dog"])
def test_sdxls_negative_prompts_are_the_pipelines(negative):
    pipe = build("SDXL", ())
    expected = plain(pipe, negative_prompt=negative)
    (ours,) = draw(kd.install(pipe), [request(negative_prompt=negative)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_sdxls_clip_skip_is_the_pipelines():
    pipe = build("SDXL", ())
    skipped, whole = (plain(pipe, negative_prompt="a dog", clip_skip=skip) for skip in (1, None))
    (ours,) = draw(kd.install(pipe), [request(negative_prompt="a dog")], clip_skip=1)
    torch.testing.assert_close(ours, skipped, rtol=0, atol=ROUNDING)
    assert (skipped - whole).abs().max() > APART


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
        RequestError, match=r"prompt_embeds need pooled_prompt_embeds \[32\] with this pipeline, got None"
    ):
        draw(pipe, [Request(prompt_embeds=text[0], guidance_scale=1.0)])
    with pytest.raises(RequestError, match="pooled_prompt_embeds must be None without prompt_embeds, got Tensor"):
        draw(pipe, [Request(TEXT, pooled_prompt_embeds=pooled[0])])


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
