"""Requests as plain data: what JSON may say of them, and what is wrong with one."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import T5Config, T5EncoderModel

import keylock_diffusers as kd
from keylock_diffusers import Control, Embedding, FusedSubject, ImagePrompt, Region, Request, RequestError, Use
from tests.diffusers.test_oracles import controlnet


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "pictures"
    (inside / "deep").mkdir(parents=True)
    for name in ("photo.png", "deep/mask.png"):
        Image.new("RGB", (8, 6), "red").save(inside / name)
    (inside / "deep" / "word.safetensors").touch()
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    return inside


def test_json_says_all_that_a_request_can_hold_but_tensors(folder):
    order = {
        "id": "bob-7",
        "prompt": "a (cat:1.2) and <alice-cat>",
        "prompt_2": "a cat",
        "concepts": ["alice/cat", {"concept": "bob/dog", "beta": 0.5, "lock": "global", "region": "deep/mask.png"}],
        "embeddings": [{"source": "deep/word.safetensors", "name": "<word>"}],
        "image_prompts": [{"image": ["photo.png", "photo.png"], "scale": 0.4, "end": 0.5}],
        "subjects": [{"prompt": "cat", "image": "photo.png"}],
        "regions": [{"mask": "deep/mask.png", "prompt": "cat"}],
        "negative_regions": [{"mask": "deep/mask.png", "tokens": [1, 2]}],
        "controls": [{"name": "edges", "image": "photo.png", "scale": 0.7, "start": 0.1, "end": 0.9}],
        "image": "photo.png",
        "mask": "deep/mask.png",
        "strength": 0.6,
        "original_size": [10, 20],
        "seed": 3,
    }
    made = Request.from_json(json.loads(json.dumps(order)), folder)
    assert (made.id, made.prompt_2, made.strength, made.seed) == ("bob-7", "a cat", 0.6, 3)
    assert made.original_size == (10, 20) and made.image.size == (8, 6)
    kinds = {
        "concepts": Use,
        "embeddings": Embedding,
        "image_prompts": ImagePrompt,
        "subjects": FusedSubject,
        "controls": Control,
    }
    for name, kind in {**kinds, "regions": Region, "negative_regions": Region}.items():
        assert getattr(made, name) and all(type(item) is kind for item in getattr(made, name)), name
    assert made.concepts[0].concept == "alice/cat" and made.concepts[1].region.size == (8, 6)
    assert made.embeddings[0].source == folder / "deep" / "word.safetensors" and made.embeddings[0].name == "<word>"
    assert len(made.image_prompts[0].image) == 2 and made.negative_regions[0].tokens == [1, 2]


def test_every_field_of_a_request_that_json_can_hold_is_read():
    tensors = ("prompt_embeds", "latents")
    for field in dataclasses.fields(Request):
        if not field.name.endswith(tensors):
            value = [] if field.type.startswith("Sequence") else "x" if field.name in ("id", "prompt") else None
            Request.from_json({"prompt": "a cat", field.name: value})
        else:
            with pytest.raises(TypeError, match=f"'{field.name}' is no field of a request"):
                Request.from_json({field.name: [1]})


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([], TypeError, "a request must be an object, got list"),
        ({"promt": "a"}, TypeError, "'promt' is no field of a request; did you mean prompt?"),
        ({"prompt": "a", "concepts": "alice/cat"}, TypeError, "concepts must be a list, got str"),
        ({"prompt": "a", "concepts": [3]}, TypeError, r"concepts\[0\] must be an object, got int"),
        (
            {"prompt": "a", "concepts": [{"strength": 1}]},
            TypeError,
            "missing 1 required positional argument: 'concept'",
        ),
        ({"prompt": "a", "regions": [{"mask": "no.png", "prompt": "a"}]}, OSError, "no.png"),
        ({"prompt": "a", "image": "../outside.png"}, ValueError, "image must be a file inside"),
        ({"prompt": "a", "image": "link.png"}, ValueError, "image must be a file inside"),
        ({"prompt": "a", "image": "http://localhost/a.png"}, OSError, ""),
        ({"prompt": "a", "image": 7}, TypeError, "image must be the name of a file, got int"),
        ({"prompt": "a", "target_size": 7}, TypeError, "target_size must be a list, got int"),
    ],
)
def test_what_is_wrong_in_json_is_named(folder, order, error, message):
    with pytest.raises(error, match=message):
        Request.from_json(order, folder)


def test_without_a_folder_no_picture_is_opened(folder):
    with pytest.raises(ValueError, match="image must be None where no folder of pictures was given"):
        Request.from_json({"prompt": "a", "image": str(folder / "photo.png")})


PHOTO = Image.fromarray(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": PHOTO}, "mask needs an image"),
        ({"image": PHOTO, "strength": 1.5}, r"strength must lie in \[0, 1\], got 1.5"),
        ({"image": PHOTO, "strength": 0.1}, "strength 0.1 leaves no step of 3"),
        ({"image": PHOTO, "latents": torch.zeros(4, 8, 8)}, "give either image or latents"),
        ({"latents": torch.zeros(4, 4, 4)}, r"latents must be \[4, 8, 8\], got \[4, 4, 4\]"),
        ({"latents": [1]}, "latents must be a tensor, got list"),
        ({"controls": [Control("edges", PHOTO)]}, r"a ControlNet given to generate \(depth\), got 'edges'"),
        ({"controls": [Control("depth", PHOTO, scale="1")]}, "scale of a Control must be a finite number"),
        ({"controls": [Control("depth", PHOTO, end=2)]}, r"end of a Control must lie in \[0, 1\], got 2"),
        ({"controls": [Control("depth", PHOTO), Control("depth", PHOTO)]}, "controls must have different names"),
        ({"controls": ["depth"]}, "controls must be Control objects, got str"),
        ({"image": [PHOTO, PHOTO]}, "image must be one picture, got 2"),
        ({"prompt_2": 7}, "prompt_2 must be text, got int"),
        ({"original_size": (1, 2, 3)}, r"original_size must be two numbers, got \(1, 2, 3\)"),
        ({"negative_crops_coords_top_left": "ab"}, "negative_crops_coords_top_left must be two numbers"),
        ({"aesthetic_score": float("nan")}, "aesthetic_score must be a finite number, got nan"),
    ],
)
def test_each_mistake_is_named_and_costs_the_others_nothing(ready, changes, message):
    options = {"num_inference_steps": 3, "output_type": "pt", "controlnets": {"depth": controlnet()}}
    bad = Request("a cat", seed=1, guidance_scale=4.0, id="the bad one", **changes)
    with pytest.raises(RequestError, match=message) as caught:
        kd.generate(ready, [bad], **options)
    assert caught.value.id == "the bad one" and "the bad one" in str(caught.value)
    good = Request("a dog", seed=1, guidance_scale=4.0)
    drawn = kd.generate(ready, [good, bad], on_error="return", **options)
    assert isinstance(drawn[1], RequestError)
    assert torch.equal(drawn[0], kd.generate(ready, [good], **options)[0])


def test_pipelines_without_clip_text_encoders_are_refused(ready):
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ready.text_encoder = T5EncoderModel(config)
    for pipe in (ready, ready.unet):
        with pytest.raises(TypeError, match="must be a pipeline with CLIP text encoders"):
            kd.generate(pipe, [Request("a cat")])


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("heigth", "heigth is no keyword that StableDiffusionPipeline takes here"),
        ("guidance_rescal", "did you mean guidance_rescale"),
        ("denoising_end", "denoising_end is no keyword"),
        ("strength", "strength belongs to each Request"),
    ],
)
def test_keywords_that_mean_nothing_are_named(ready, keyword, message):
    with pytest.raises(TypeError, match=message):
        kd.generate(ready, [Request("a cat")], **{keyword: 1})
