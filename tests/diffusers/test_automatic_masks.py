"""Masks that nobody drew: close to the exact ones, and as good to learn with."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPSegTextConfig,
    CLIPSegVisionConfig,
    ViTImageProcessor,
)

from keylock_diffusers import embedded
from keylock_diffusers.demo import pictures as demo
from keylock_diffusers.demo import story
from keylock_diffusers.training import AddedConfig, attention_masks, automatic_masks, clipseg_masks, train_concepts
from tests.diffusers.compatibility import make
from tests.diffusers.test_training import pictures, subject

WANTED = 0.75  # intersection over union with the exact masks


def overlap(one, other):
    one, other = (np.asarray(mask) > 127 for mask in (one, other))
    return (one & other).sum() / (one | other).sum()


def test_where_the_model_sees_a_cat_is_where_the_cat_is():
    pipe = embedded.load()
    for given in story.subjects()[:2]:
        exact = given.masks
        found = attention_masks(pipe, dataclasses.replace(given, masks=None), draws=1)
        assert np.mean([overlap(a, b) for a, b in zip(found, exact, strict=True)]) >= WANTED
    assert len(demo.USERS) == 3


def test_masks_are_as_large_as_their_pictures_and_lie_where_those_were_seen(pipe):
    wide, tall = pictures(3)[0].resize((48, 16)), pictures(4)[0].resize((16, 40))
    turned = pictures(5)[0].resize((24, 16))
    turned.getexif()[0x0112] = 6  # turned by a quarter
    found = attention_masks(pipe, subject(images=[wide, tall, turned], captions=None))
    assert [mask.size for mask in found] == [(48, 16), (16, 40), (16, 24)]
    for mask, box in zip(found, ((0, 0, 15, 16), (0, 0, 16, 11), (0, 0, 16, 3)), strict=True):
        assert mask.mode == "L" and {value for _, value in mask.getcolors()} == {0, 255}
        assert mask.crop(box).getextrema() == (0, 0)  # beside the middle square


def test_the_same_masks_come_again_and_the_pipeline_is_as_before(pipe):
    processors = dict(pipe.unet.attn_processors)
    one, other = (attention_masks(pipe, subject()) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))
    assert dict(pipe.unet.attn_processors) == processors and all(p.requires_grad for p in pipe.unet.parameters())
    config = AddedConfig(steps=2, batch_size=2)
    masked = dataclasses.replace(subject(), masks=one)
    (concept,) = train_concepts(pipe, [masked], config, progress=False)
    (plain,) = train_concepts(pipe, [subject()], config, progress=False)
    assert not torch.equal(concept.values, plain.values)


def test_stable_diffusion_xl_sees_too():
    found = attention_masks(make("SDXL", "text only")[0], subject(), draws=1, times=[0.4])
    assert [mask.size for mask in found] == [(16, 16)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0}, "attention_masks: draws must be a whole number of at least 1, got 0"),
        ({"times": []}, "attention_masks: times must not be empty"),
        ({"times": [1.5]}, r"attention_masks: times must lie in \[0, 1\], got 1.5"),
        ({"subject": "cat"}, "attention_masks: subject must be a Subject, got 'cat'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(pipe, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        attention_masks(**{"pipe": pipe, "subject": subject(), **changes})


def test_otsus_threshold_parts_two_heaps():
    values = torch.cat([torch.full((50,), 0.1), torch.full((30,), 0.8)]) + 0.01 * torch.arange(80) / 80
    assert 0.11 <= automatic_masks._otsu(values) < 0.8


@pytest.fixture
def clipseg(tmp_path, pipe):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPSegTextConfig(vocab_size=len(pipe.tokenizer), eos_token_id=pipe.tokenizer.eos_token_id, **small)
    vision = CLIPSegVisionConfig(image_size=16, patch_size=4, **small)
    config = CLIPSegConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16, reduce_dim=8,
        extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(tmp_path / "clipseg")
    size = {"height": 16, "width": 16}
    CLIPSegProcessor(ViTImageProcessor(size=size), pipe.tokenizer).save_pretrained(tmp_path / "clipseg")
    return tmp_path / "clipseg"


def test_clipsegs_masks_are_as_large_as_their_pictures(clipseg):
    one = subject(images=[pictures(1)[0].resize((40, 24)), pictures(2)[0]], captions=None)
    found = clipseg_masks(clipseg, one)
    assert [(mask.size, mask.mode) for mask in found] == [((40, 24), "L"), ((16, 16), "L")]
    assert all({value for _, value in mask.getcolors()} <= {0, 255} for mask in found)
    assert all(isinstance(mask, Image.Image) for mask in dataclasses.replace(one, masks=found).masks)


def test_what_is_no_clipseg_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="clipseg_masks: .* is no CLIPSeg model"):
        clipseg_masks(tmp_path, subject())
    with pytest.raises(TypeError, match="clipseg_masks: subject must be a Subject, got 'cat'"):
        clipseg_masks(tmp_path, "cat")
