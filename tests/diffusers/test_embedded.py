"""The embedded base model: what ships is a real, trained pipeline that draws what it is asked.

The floors of quality are what the shipped weights reach, and rise with them; docs/embedded-model.md says what is
aimed at.
"""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from keylock_diffusers import embedded
from keylock_diffusers.embedded import classifier, evaluate, glyphs, prompts, render
from keylock_diffusers.embedded.diffusion import build_tokenizer

MIB = 2**20


@pytest.fixture(scope="module")
def base():
    return embedded.load()


def test_diffusers_own_loader_loads_it():
    pipe = StableDiffusionPipeline.from_pretrained(embedded.BASE_MODEL)
    names = {name: type(getattr(pipe, name)).__name__ for name in ("tokenizer", "text_encoder", "unet")}
    assert names == {
        "tokenizer": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
    }


def test_it_is_small_and_in_half_precision_safetensors():
    files = [f for f in embedded.BASE_MODEL.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 24 * MIB
    shards = [f for f in files if f.suffix == ".safetensors"]
    assert shards and all(f.stat().st_size <= 12 * MIB for f in shards)
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_all_parts_load_in_one_dtype():
    pipe = StableDiffusionPipeline.from_pretrained(embedded.BASE_MODEL)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_cross_attention_is_on_two_levels_the_finest_among_them(base):
    config = base.unet.config
    attended = [kind.startswith("CrossAttn") for kind in config.down_block_types]
    assert config.sample_size == 16 and attended[0] and sum(attended) >= 2


def test_its_tokenizer_is_the_one_that_is_built_and_knows_every_word(base):
    built = build_tokenizer()
    assert base.tokenizer.get_vocab() == built.get_vocab()
    for glyph in glyphs.GLYPHS:
        words = f"a {glyph.caption} on blue"
        assert base.tokenizer(words).input_ids == built(words).input_ids
        assert len(base.tokenizer(words).input_ids) == len(words.split()) + 2


def test_the_autoencoder_restores_pictures(base):
    from keylock_diffusers.demo import pictures

    images = [np.asarray(image) for user in pictures.USERS for image in pictures.load(user)[0]]
    target = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        restored = base.vae.decode(base.vae.encode(target).latents).sample
    assert (restored - target).abs().mean() < 0.04  # of a range of 2


def test_the_classifier_names_the_demos_pictures():
    from keylock_diffusers.demo import pictures

    judge = classifier.load()
    asked = ["cat", "grinning cat", "crying cat", "smirking cat"] * len(pictures.USERS)
    images = [np.asarray(image) for user in pictures.USERS for image in pictures.load(user)[0]]
    named = [name for (name,) in judge.names(images)]
    assert sum(a == b for a, b in zip(asked, named, strict=True)) >= 11


def test_it_draws_what_it_is_asked(base):
    chosen = prompts.CONTACT_SHEET[0:24:2]
    images = base(
        list(chosen),
        num_inference_steps=12,
        guidance_scale=prompts.GUIDANCE,
        generator=[torch.Generator().manual_seed(n) for n in range(len(chosen))],
        output_type="np",
    ).images
    pictures = list((images * 255).round().astype(np.uint8))
    judge = classifier.load()
    named = sum(judge.names([p])[0] == evaluate.subjects(c)[0] for p, c in zip(pictures, chosen, strict=True))
    grounds = sum(evaluate.background_name(p) == evaluate.subjects(c)[1] for p, c in zip(pictures, chosen, strict=True))
    assert named >= 8 and grounds >= 11


def test_the_contact_sheets_prompts_are_all_drawable():
    assert len(prompts.CONTACT_SHEET) == 32 and len(set(prompts.CONTACT_SHEET)) == 32
    for prompt in prompts.CONTACT_SHEET:
        names, background = evaluate.subjects(prompt)
        assert set(names) <= set(glyphs.INDEX) and background in glyphs.BACKGROUNDS


def test_the_vocabulary_is_curated_and_holds_the_cats():
    assert 200 <= len(glyphs.GLYPHS) <= 300
    cats = {glyph.caption for glyph in glyphs.GLYPHS if glyph.group == "cat"}
    assert {"grinning cat", "cat with tears of joy", "cat with heart eyes", "pouting cat", "crying cat"} <= cats
    assert all("cat" in caption.split() for caption in cats)
    assert len({glyph.caption for glyph in glyphs.GLYPHS}) == len(glyphs.GLYPHS)


def test_captions_say_what_a_scene_holds():
    assert render.caption(["owl"], "blue", 1) == "an owl on blue"
    assert render.caption(["cat", "house"], "white", 3) == "a cat next to a house on white"
    assert evaluate.subjects("a gray cat on pink") == (("cat",), "pink")


@pytest.mark.skipif(not render.FONT.exists(), reason="renders need the font fonts-noto-color-emoji")
def test_renders_are_a_function_of_seed_and_index():
    first, again, other = render.draw(3, 5), render.draw(3, 5), render.draw(4, 5)
    assert np.array_equal(first.image, again.image) and first.caption == again.caption
    assert not np.array_equal(first.image, other.image)
    for index in range(40):
        picture = render.draw(3, index)
        assert picture.masks.shape == (len(picture.labels), 64, 64)
        names, background = evaluate.subjects(picture.caption.replace("gray ", "").replace("black ", ""))
        assert background == picture.background
        border = evaluate.background_name(picture.image)
        assert border == picture.background
        # outside the masks there is only background
        outside = picture.masks.sum(0) == 0
        assert len(np.unique(picture.image[outside], axis=0)) == 1
