"""DreamBench's scores on tiny random models: what is read, what is drawn, and that likeness is likeness."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from benchmarks.quality import dreambench
from benchmarks.quality.dreambench import Likeness, run, tasks

PROMPTS = """
subject_name,class
red_toy,toy
my_cat,cat

Prompts

Object Prompts
prompt_list = [
'a {0} {1} on blue'.format(unique_token, class_token),
'a {0} {1} next to a house'.format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
'a grinning {0} {1}'.format(unique_token, class_token),
]
"""


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


@pytest.fixture
def data(tmp_path):
    place = tmp_path / "data"
    for number, name in enumerate(("red_toy", "my_cat")):
        (place / name).mkdir(parents=True)
        for n in range(2):
            picture(10 * number + n).save(place / name / f"{n:02}.jpg")
    (place / dreambench.FILE).write_text(PROMPTS)
    return place


@pytest.fixture
def likeness(tmp_path, build_tiny):
    torch.manual_seed(0)
    tokenizer = build_tiny().tokenizer
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **small)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    size = {"height": 16, "width": 16}
    clip.save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    ViTModel(ViTConfig(image_size=16, patch_size=8, **small)).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "dino")
    return Likeness(str(tmp_path / "clip"), str(tmp_path / "dino"))


def test_subjects_have_the_prompts_of_their_kind(data):
    toy, cat = tasks(data)
    assert (toy.name, toy.kind, toy.placeholder) == ("red_toy", "toy", "<red-toy>")
    assert toy.prompts == ("a {} on blue", "a {} next to a house") and cat.prompts == ("a grinning {}",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold classes, object prompts and live subject prompts"),
        (PROMPTS + "\nlost,dog\n", "got none for lost"),
    ],
)
def test_a_folder_that_is_not_dreambenchs_is_refused(data, text, message):
    (data / dreambench.FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks(data)


def test_a_picture_is_most_like_itself(likeness):
    one, other = picture(1), picture(2)
    same = likeness.scores([one], ["a cat"], [one])
    assert same["DINO"] == pytest.approx(1, abs=1e-5) and same["CLIP-I"] == pytest.approx(1, abs=1e-5)
    apart = likeness.scores([one], ["a cat"], [other])
    assert apart["DINO"] < 1 - 1e-6 and apart["CLIP-I"] < 1 - 1e-6 and apart["CLIP-T"] == pytest.approx(same["CLIP-T"])
    both = likeness.scores([one, other], ["a cat", "a cat"], [one])
    assert both["CLIP-I"] == pytest.approx((1 + apart["CLIP-I"]) / 2, abs=1e-5)


@pytest.mark.parametrize("method", dreambench.METHODS)
def test_every_method_is_learned_drawn_and_scored_once(data, likeness, ready, tmp_path, monkeypatch, method):
    monkeypatch.setenv("KEYLOCK_CACHE", str(tmp_path / "cache"))
    options = {"method": method, "steps": 1, "seeds": 1, "inference_steps": 2, "captions": ["a cat on blue", "a dog"]}
    output = tmp_path / "out"
    found = run(ready, data, output, likeness, **options)
    assert set(found["subjects"]) == {"red_toy", "my_cat"} and set(found["mean"]) == {"DINO", "CLIP-I", "CLIP-T"}
    assert all(np.isfinite(list(one.values())).all() for one in found["subjects"].values())
    assert len(list(output.glob(f"*-{method}-*.png"))) == 3 and len(list(output.glob("*.json"))) == 2
    monkeypatch.setattr(dreambench, "train_concepts", lambda *_, **__: pytest.fail("learned anew"))
    monkeypatch.setattr(dreambench, "train_loras", lambda *_, **__: pytest.fail("learned anew"))
    assert run(ready, data, output, likeness, **options) == found
    kept = json.loads((output / f"my_cat-{method}.json").read_text())
    assert kept == found["subjects"]["my_cat"]
