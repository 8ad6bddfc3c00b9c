"""The embedded base model: what ships is a real, trained pipeline that draws what it is asked.

The floors of quality are what the shipped weights reach, and rise with them; docs/embedded-model.md says what is
aimed at.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

import keylock_diffusers as kd
from keylock_diffusers import embedded
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.embedded import (
    autoencoder,
    classifier,
    coats,
    evaluate,
    glyphs,
    image_encoder,
    prompts,
    render,
)
from keylock_diffusers.embedded.diffusion import build_tokenizer
from keylock_diffusers.encoding import text
from keylock_diffusers.generation.maps import AttentionMaps
from tests.diffusers.accuracy import assert_as_accurate

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


def test_all_assets_together_are_small():
    files = [f for f in embedded.ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32 * MIB
    assert all(f.stat().st_size <= 12 * MIB for f in files)


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


def test_prompts_of_pairs_and_coats_name_glyphs_in_words_of_the_vocabulary():
    pairs, worn = prompts.pairs(), prompts.coats()
    assert len(set(pairs)) == len(set(worn)) == 64 and prompts.pairs() == pairs
    assert all(len(evaluate.subjects(prompt)[0]) == 2 for prompt in pairs)
    assert len({evaluate.subjects(prompt)[0] for prompt in worn}) == 8
    for prompt in (*pairs, *worn):
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
    assert evaluate.subjects("a grinning striped gray black cat next to a house on teal") == (
        ("grinning cat", "house"),
        "teal",
    )
    assert evaluate.phrases("a grinning striped gray black cat next to a house on teal") == (
        ("grinning striped gray black cat", "house"),
        "teal",
    )


@pytest.mark.skipif(not render.FONT.exists(), reason="renders need the font fonts-noto-color-emoji")
def test_renders_are_a_function_of_seed_and_index():
    first, again, other = render.draw(3, 5), render.draw(3, 5), render.draw(4, 5)
    assert np.array_equal(first.image, again.image) and first.caption == again.caption
    assert not np.array_equal(first.image, other.image)
    for index in range(40):
        picture = render.draw(3, index)
        assert picture.masks.shape == (len(picture.labels), 128, 128)
        names, background = evaluate.subjects(picture.caption)
        assert names == tuple(glyphs.GLYPHS[label].caption for label in picture.labels)
        assert background == picture.background
        border = evaluate.background_name(picture.image)
        assert border == picture.background
        # outside the masks there is only background
        outside = picture.masks.sum(0) == 0
        assert len(np.unique(picture.image[outside], axis=0)) == 1


@pytest.mark.skipif(not render.FONT.exists(), reason="renders need the font fonts-noto-color-emoji")
def test_captions_name_coats_on_every_group_and_those_they_do_not_name_are_drawn_too():
    worn, of_coats = {}, {*glyphs.DYES, *coats.WORDS.values()}
    for index in range(400):
        picture = render.draw(11, index, pairs=0.0)
        glyph, scene = glyphs.GLYPHS[picture.labels[0]], picture.caption.rsplit(" on ", 1)[0]
        worn.setdefault(glyph.group, []).append(bool(of_coats & set(scene.split()) - set(glyph.caption.split())))
    assert {group for group, found in worn.items() if any(found)} >= {
        "cat",
        "face",
        "animal",
        "food",
        "vehicle",
        "thing",
    }
    assert not all(worn["cat"]) and not any(worn["heart"])
    cats = [n for n in range(400) if glyphs.GLYPHS[render.draw(11, n, pairs=0.0).labels[0]].group == "cat"]
    same = [n for n in cats if np.array_equal(render.draw(11, n).image, render.draw(11, n, coats=1.0).image)]
    assert 0.2 * len(cats) < len(same) < 0.7 * len(cats)
    assert all(render.draw(11, n).labels == render.draw(11, n, coats=1.0).labels for n in cats)
    assert render.with_coat("face with tears of joy", "spotted red blue") == "spotted red blue face with tears of joy"
    assert render.with_coat("racing car", "black") == "black racing car"


HELD_OUT = Path(__file__).parent / "held_out"


def held_out():
    """Renders that no model was trained on: pictures, masks, and what they show; as `benchmarks.localization` draws."""
    facts = json.loads((HELD_OUT / "captions.json").read_text())
    pictures = np.split(np.asarray(Image.open(HELD_OUT / "renders.png").convert("RGB")), len(facts), axis=1)
    masks = np.split(np.asarray(Image.open(HELD_OUT / "masks.png")) > 127, len(facts), axis=1)
    return facts, pictures, masks


@pytest.fixture(scope="module")
def adapted():
    return kd.install(embedded.load_adapter(embedded.load()))


def draw(pipe, orders, steps=15):
    images = kd.generate(pipe, orders, num_inference_steps=steps, output_type="np")
    return [(image * 255).round().astype(np.uint8) for image in images]


def test_the_adapter_loads_through_diffusers_own_loader_in_half_precision_files():
    pipe = embedded.load_adapter(embedded.load())
    assert type(pipe.image_encoder).__name__ == "CLIPVisionModelWithProjection"
    assert pipe.feature_extractor.size in ({"shortest_edge": 128}, {"height": 128, "width": 128})
    for file in embedded.ADAPTER.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}


def test_the_image_encoder_sees_pictures_as_it_did_in_training(adapted):
    """What diffusers' feature extractor makes of a picture is what the encoder was trained on."""
    _, pictures, _ = held_out()
    pixels = autoencoder.pixels(pictures)
    ours, exact = image_encoder.normalised(pixels), image_encoder.normalised(pixels.double())
    theirs = adapted.feature_extractor([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    assert_as_accurate(theirs, ours, exact)


def test_an_image_prompt_alone_gives_its_subject_and_words_rule_the_background(adapted):
    facts, pictures, _ = held_out()
    others = ["red" if fact["background"] != "red" else "blue" for fact in facts]
    orders = [
        kd.Request(words, image_prompts=[kd.ImagePrompt(Image.fromarray(p))], seed=n, guidance_scale=prompts.GUIDANCE)
        for wanted in ([""] * len(facts), [f"on {other}" for other in others])
        for n, (words, p) in enumerate(zip(wanted, pictures, strict=True))
    ]
    drawn = draw(adapted, orders)
    judge = classifier.load()
    alone, worded = drawn[: len(facts)], drawn[len(facts) :]
    assert sum(name[0] == fact["glyph"] for name, fact in zip(judge.names(alone), facts, strict=True)) >= 9
    assert sum(evaluate.background_name(p) == other for p, other in zip(worded, others, strict=True)) >= 14


def test_an_image_prompt_of_scale_0_is_none_to_the_bit(adapted):
    _, pictures, _ = held_out()
    order = kd.Request("a cat on blue", seed=1)
    absent = dataclasses.replace(order, image_prompts=[kd.ImagePrompt(Image.fromarray(pictures[0]), scale=0.0)])
    one, none = (draw(adapted, [o, order], steps=4) for o in (absent, order))
    assert np.array_equal(one[0], none[0]) and np.array_equal(one[1], none[1])


def test_regions_put_subjects_where_they_belong(base):
    """Against the order in which the model was taught to place them."""
    left = np.zeros((128, 128), np.float32)
    left[:, :64] = 1
    pairs = [("dog", "pizza"), ("tree", "cat"), ("taxi", "apple"), ("star", "bear"), ("gift", "fox"), ("panda", "bell")]
    orders = [
        kd.Request(
            f"a {first} and a {second} on white",
            regions=[kd.Region(1 - left, first), kd.Region(left, second)],
            seed=n,
            guidance_scale=prompts.GUIDANCE,
        )
        for n, (first, second) in enumerate(pairs)
    ]
    judge = classifier.load()
    found = 0
    for (first, second), image in zip(pairs, draw(kd.install(base), orders), strict=True):
        halves = [np.where(mask[..., None] > 0, image, 250).astype(np.uint8) for mask in (1 - left, left)]
        found += sum(name[0] == asked for name, asked in zip(judge.names(halves), (first, second), strict=True))
    kd.uninstall(base)
    assert found >= 8


def test_maps_of_words_lie_on_their_subjects(base):
    facts, pictures, masks = held_out()
    kd.install(base)
    tokenized = [text.tokenize(base.tokenizer, fact["caption"]) for fact in facts]
    words = [evaluate.phrases(fact["caption"])[0][0] for fact in facts]
    layers = tuple(cross_attention_layers(base.unet))
    maps = AttentionMaps(tuple(dict.fromkeys(words)), layers, every_step=False)
    readout = maps.readout(base.unet, [[t] for t in tokenized], base.tokenizer, (16, 16))
    with torch.no_grad():
        latents = base.vae.encode(autoencoder.pixels(pictures)).latents * base.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        times = torch.full((len(facts),), 400)
        noisy = base.scheduler.add_noise(latents, noise, times)
        encodings = text.encode(base.text_encoder, tokenized)
        base.unet(noisy, times, encodings, cross_attention_kwargs={"readout": readout})
    kd.uninstall(base)
    overlaps = []
    for row, (word, mask) in enumerate(zip(words, masks, strict=True)):
        found = readout.picture(row, "").mean(word, mask.shape).numpy()
        above = [found >= level for level in np.quantile(found, np.linspace(0, 1, 50))]
        overlaps.append(max((m & mask).sum() / (m | mask).sum() for m in above))
    assert np.mean(overlaps) >= 0.7
    assert np.mean([mask.mean() for mask in masks]) < 0.5  # what a map of one value would get
