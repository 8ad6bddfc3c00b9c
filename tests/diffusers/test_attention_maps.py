"""Attention maps: what the layers computed, per picture and word, and the pictures made of them."""

import copy
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import AttentionMaps, Region, Request
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.generation import visualize
from keylock_diffusers.generation.maps import WordMaps
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.drawing import ROUNDING, build, random
from tests.diffusers.losses import Keeping

STEPS = 3
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


def test_maps_are_the_eager_attentions_columns(pipe):
    """A plain call with diffusers' processors that keep everything, and one recorded."""
    kept, layers = {}, cross_attention_layers(pipe.unet)
    for name in layers:
        kept[name] = []
        processor = Keeping()
        pipe.unet.get_submodule(name).set_processor(processor)
        pipe.unet.get_submodule(name).register_forward_hook(
            lambda attn, _in, _out, name=name, processor=processor: kept[name].append(processor.kept)
        )
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    prompts, noise = ["a cat with tears of joy on blue", "a dog"], random(2, 4, 8, 8)
    pipe(prompts, latents=noise, **arguments)
    eager = {name: list(steps) for name, steps in kept.items()}
    for steps in kept.values():
        steps.clear()
    pipe.to(torch.float64)(prompts, latents=noise.double(), **arguments)
    pipe.to(torch.float32)
    for name, attn in layers.items():
        attn._forward_hooks.clear()
        attn.set_processor(kd.processors.CrossAttnProcessor(name))
    with kd.record_attention(pipe, ["tears of joy", "dog"], every_step=True) as maps:
        pipe(prompts, latents=noise, **arguments)
    first, second = maps.images
    assert list(first.maps) == ["tears of joy"] and list(second.maps) == ["dog"]
    for recorded, word, row, tokens in ((first, "tears of joy", 2, [4, 5, 6]), (second, "dog", 3, [2])):
        for name in layers:
            sides = (
                torch.stack([step[row, :, :, tokens].mean(0).sum(-1) for step in side[name]]) for side in (eager, kept)
            )
            found = recorded.maps[word][name]
            assert found.shape[0] == STEPS
            assert_as_accurate(found.flatten(1), *sides, largest=False)


def alone_and_exact(pipe, orders, words, *, every_step=False, **options):
    """The maps of orders drawn by themselves, in float32 and in float64."""
    found = []
    for one in (pipe, kd.install(copy.deepcopy(pipe).to(torch.float64))):
        maps = AttentionMaps(words, every_step=every_step)
        draw(one, orders, record=maps, **options)
        found.append(maps.images)
    return found


def test_in_a_mixed_batch_each_picture_has_its_own_and_stays_the_same(ready, concept_for):
    alice = concept_for(ready, super_class="crying cat")
    orders = [
        Request("<alice-cat> on blue", concepts=[alice], seed=1, num_images=2),
        Request("a house", seed=2, guidance_scale=1.0),
        Request("a cat and a dog", regions=[Region(LEFT, "cat"), Region(1 - LEFT, "dog")], seed=3, guidance_scale=4.0),
        Request("a cat and a cat", seed=4),
    ]
    before = draw(ready, orders)
    maps = AttentionMaps(["cat", "<alice-cat>", "house"])
    after = draw(ready, orders, max_batch=2, record=maps)
    for one, other in zip(before, after, strict=True):
        for a, b in zip(*(x if isinstance(x, list) else [x] for x in (one, other)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)
    assert [list(m.maps) for m in maps.images] == [["<alice-cat>"], ["<alice-cat>"], ["house"], ["cat"], ["cat"]]
    assert [m.prompt for m in maps.images] == [orders[n].prompt for n in (0, 0, 1, 2, 3)]
    (alone,), (exact,) = alone_and_exact(ready, [orders[3]], ["cat"])
    for layer, found in maps.images[4].maps["cat"].items():
        assert_as_accurate(found, alone.maps["cat"][layer], exact.maps["cat"][layer], largest=False)


def test_the_pictures_bits_do_not_change(ready):
    orders = [Request("a cat on blue", seed=1), Request("a dog", seed=2)]
    before = draw(ready, orders)
    during = draw(ready, orders, record=AttentionMaps(["cat"]))
    for one, other in zip(before, during, strict=True):
        assert torch.equal(one, other)


def test_means_over_steps_and_layers_are_the_steps_own(ready):
    orders, layers = [Request("a cat on blue", seed=1)], list(cross_attention_layers(ready.unet))[:2]
    each, mean = AttentionMaps(["cat"], layers, every_step=True), AttentionMaps(["cat"], layers)
    draw(ready, orders, record=each)
    draw(ready, orders, record=mean)
    assert list(mean.images[0].maps["cat"]) == layers
    for layer in layers:
        steps, one = each.images[0].maps["cat"][layer], mean.images[0].maps["cat"][layer]
        assert len(steps) == STEPS and len(one) == 1
        assert_as_accurate(one[0], steps.mean(0), steps.double().mean(0))
    finest = max(m.shape[-2:] for m in mean.images[0].maps["cat"].values())
    assert mean.images[0].mean("cat").shape == finest
    assert mean.images[0].mean("cat", (5, 9), layers[:1]).shape == (5, 9)
    with pytest.raises(KeyError, match="has no map of 'dog'; it has those of: cat"):
        mean.images[0].mean("dog")


@pytest.mark.parametrize("family", ["SD 1.x", "SDXL"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_plain_calls_are_recorded_with_adapters_too(family, guidance):
    pipe = kd.install(build(family))
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    with kd.record_attention(pipe, ["cat"]) as maps:
        for prompt in (["a cat", "a dog"], "two cat"):
            pipe(prompt, ip_adapter_image=image, guidance_scale=guidance, num_images_per_prompt=2, **options)
    assert [list(m.maps) for m in maps.images] == [["cat"]] * 2 + [[]] * 2 + [["cat"]] * 2
    assert "encode_prompt" not in vars(pipe) and not pipe.unet._forward_pre_hooks


def test_everything_is_put_back_after_an_exception(ready):
    with pytest.raises(RuntimeError, match="stop"), kd.record_attention(ready, ["cat"]):
        raise RuntimeError("stop")
    assert "encode_prompt" not in vars(ready) and not ready.unet._forward_pre_hooks
    draw(ready, [Request("a dog", seed=1)])


def test_recorders_of_one_pipeline_nest_and_overlap(ready):
    arguments = {"num_inference_steps": 1, "output_type": "latent"}
    with kd.record_attention(ready, ["cat"]) as outer:
        with kd.record_attention(ready, ["cat"]) as inner:
            ready("a cat", **arguments)
            ready("a cat", **arguments)
        ready("a cat", **arguments)
    assert len(inner.images) == 2 and len(outer.images) == 1
    assert "encode_prompt" not in vars(ready) and not ready.unet._forward_pre_hooks

    barrier, found = threading.Barrier(2), []

    def record():
        with kd.record_attention(ready, ["cat"]) as maps:
            barrier.wait()
            ready("a cat", num_inference_steps=1, output_type="latent")
            barrier.wait()
        found.append([m.prompt for m in maps.images])

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["a cat"], ["a cat"]] and "encode_prompt" not in vars(ready)


def test_a_call_that_was_broken_off_leaves_no_maps(ready):
    def stop(*_):
        raise KeyboardInterrupt

    with kd.record_attention(ready, ["cat"]) as maps:
        with pytest.raises(KeyboardInterrupt):
            ready("a cat", num_inference_steps=3, callback_on_step_end=stop)
        ready("a cat on blue", num_inference_steps=1, output_type="latent")
    assert [m.prompt for m in maps.images] == ["a cat on blue"]


def test_a_failed_request_does_not_take_the_others_down(ready):
    maps = AttentionMaps(["dog"])
    drawn = draw(ready, [Request("a cat", seed=1), Request("<nobody> dog")], on_error="return", record=maps)
    assert isinstance(drawn[0], torch.Tensor) and isinstance(drawn[1], kd.RequestError) and len(maps.images) == 1


def test_something_that_is_no_pipeline_is_refused_and_leaves_nothing(ready):
    with pytest.raises(TypeError, match="pipe must be a text-to-image pipeline, got UNet2DConditionModel"):
        with kd.record_attention(ready.unet, ["cat"]):
            pass
    draw(ready, [Request("a dog", seed=1)])


def test_another_threads_calls_are_not_recorded(ready):
    errors = []

    def elsewhere():
        try:
            draw(ready, [Request("a dog", seed=1)])
            ready("a dog", num_inference_steps=1, output_type="latent")
        except Exception as error:
            errors.append(error)

    with kd.record_attention(ready, ["cat"]) as maps:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        ready("a cat", num_inference_steps=1, output_type="latent")
    assert not errors and [m.prompt for m in maps.images] == ["a cat"]


def test_what_another_thread_does_between_two_steps_is_not_recorded(ready):
    def step(_pipe, number, _timestep, given):
        if number == 0:
            rows = torch.zeros(2, 4, 8, 8), 10, torch.zeros(2, 32, 32)
            thread = threading.Thread(target=torch.no_grad()(ready.unet), args=rows)
            thread.start()
            thread.join()
        return given

    with kd.record_attention(ready, ["cat"], every_step=True) as maps:
        ready("a cat", num_inference_steps=2, output_type="latent", callback_on_step_end=step)
    assert {len(steps) for steps in maps.images[0].maps["cat"].values()} == {2}


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], {}, r"words must be a list of words, got \[\]"),
        ("cat", {}, "words must be a list of words, got 'cat'"),
        ([" "], {}, "words must be a list of words"),
        (["cat"], {"layers": ["nowhere"]}, "layers must be cross-attention layers of the U-Net"),
    ],
)
def test_wrong_arguments_are_named(ready, words, options, message):
    with pytest.raises(ValueError, match=message), kd.record_attention(ready, words, **options):
        pass


def test_a_word_in_no_prompt_is_named_before_anything_is_drawn(ready):
    calls = []
    ready.unet.register_forward_hook(lambda *_: calls.append(1))
    maps = AttentionMaps(["house"])
    with pytest.raises(ValueError, match="'house' is in none of the"):
        draw(ready, [Request("a cat", seed=1)], record=maps)
    assert not calls and not maps.images


def test_starts_ends_image_prompts_and_several_words_together():
    """Everything that a pixel attends to is one in all: text by itself, each image prompt by itself."""
    pipe = kd.install(build())
    pictures = [Image.fromarray(np.full((16, 16, 3), n, np.uint8)) for n in (30, 200)]
    prompts = [kd.ImagePrompt(picture, scale=s) for picture, s in zip(pictures, (0.5, 0.0), strict=True)]
    orders = [Request("a cat and a dog", image_prompts=prompts, seed=1), Request("a cat", seed=2)]
    words = ["<|startoftext|>", "a", "cat", "and", "dog", "<|endoftext|>", ("cat", "dog"), 0, 1]
    maps = AttentionMaps(words)
    draw(pipe, orders, record=maps, height=16, width=16)
    found, other = (image.maps for image in maps.images)
    assert list(found) == [*words[:6], "cat + dog", "image prompt 0", "image prompt 1"]
    assert list(other) == ["<|startoftext|>", "a", "cat", "<|endoftext|>", "cat + dog"]
    for layer, both in found["cat + dog"].items():
        cat, dog = found["cat"][layer], found["dog"][layer]
        assert_as_accurate(both, cat + dog, cat.double() + dog.double())
        assert torch.equal(other["cat + dog"][layer], other["cat"][layer])
        whole = sum(found[word][layer] for word in words[:6])
        eager = random(*whole.shape, len(words)).softmax(-1).sum(-1)
        for total in (whole, found["image prompt 0"][layer], found["image prompt 1"][layer]):
            assert_as_accurate(total, eager, torch.ones_like(total))
    named = AttentionMaps({"animals": ("cat", "dog"), "picture": 0})
    draw(pipe, orders[:1], record=named, height=16, width=16)
    assert list(named.images[0].maps) == ["animals", "picture"]
    with pytest.raises(ValueError, match="the word 'image prompt 2' is in none of the prompts"):
        draw(pipe, orders, record=AttentionMaps([2]), height=16, width=16)
    for wrong in ([-1], [()], [True], {"name": ""}):
        with pytest.raises(ValueError, match="words must be a list of words"):
            AttentionMaps(wrong)


def test_a_picture_that_joins_late_has_maps_of_its_own_steps(ready):
    photo = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    orders = [Request("a cat", seed=1), Request("a cat", seed=2, image=photo, strength=0.7)]
    for every in (True, False):
        together = AttentionMaps(["cat"], every_step=every)
        draw(ready, orders, record=together, height=16, width=16)
        (alone,), (exact,) = alone_and_exact(ready, orders[1:], ["cat"], every_step=every, height=16, width=16)
        for layer, found in together.images[1].maps["cat"].items():
            assert len(found) == (2 if every else 1) and len(together.images[0].maps["cat"][layer]) >= len(found)
            assert_as_accurate(found, alone.maps["cat"][layer], exact.maps["cat"][layer], largest=False)


def test_a_pipeline_without_our_processors_is_refused(pipe):
    with pytest.raises(RuntimeError, match="cannot personalise"), kd.record_attention(pipe, ["cat"]):
        pass


def test_maps_have_the_layers_height_and_width(ready):
    maps = AttentionMaps(["cat"])
    draw(ready, [Request("a cat", seed=1)], height=16, width=24, record=maps)
    shapes = {layer.partition(".")[0]: tuple(m.shape[1:]) for layer, m in maps.images[0].maps["cat"].items()}
    assert shapes == {"down_blocks": (8, 12), "mid_block": (4, 6), "up_blocks": (8, 12)}


def test_the_mean_of_a_word_is_over_all_steps_and_layers():
    maps = {"one": torch.stack([LEFT, 1 - LEFT]), "other": torch.zeros(2, 8, 8)}
    assert torch.equal(WordMaps("a cat", {"cat": maps}).mean("cat"), torch.full((8, 8), 0.25))


# Pictures


def recorded(**maps):
    return WordMaps("a cat and a dog", {word: {"layer": values[None]} for word, values in maps.items()})


def test_heat_maps_are_dark_where_lowest_and_bright_where_highest():
    picture = np.asarray(visualize.heat_map(torch.tensor([[0.0, 0.5], [0.2, 1.0]])), float).sum(-1)
    assert picture.argmin() == 0 and picture.argmax() == 3
    assert visualize.heat_map(torch.zeros(3, 5), (10, 6)).size == (10, 6)
    flat = np.asarray(visualize.heat_map(torch.full((3, 3), 7.0)))
    assert (flat == flat[0, 0]).all()


def test_overlays_have_the_pictures_size_and_show_where():
    picture = np.full((20, 30, 3), 0.5)
    shown = np.asarray(visualize.overlay(picture, LEFT), float).sum(-1)
    assert shown.shape == (20, 30) and shown[:, :12].mean() > shown[:, 18:].mean() + 100
    plain = visualize.overlay(Image.new("RGB", (4, 4), (200, 10, 10)), LEFT, strength=0.0)
    assert len(set(plain.getpixel((0, 0)))) == 1  # grey


def test_a_grid_has_a_row_per_picture_and_an_overlay_per_word():
    maps = [recorded(cat=LEFT, dog=1 - LEFT), recorded()]
    images = [Image.new("RGB", (16, 16), "red"), np.zeros((16, 32, 3), np.uint8)]
    sheet = visualize.grid(images, maps, cell=40)
    narrow = visualize.grid(images, maps, ["dog", "bird"], cell=40, captions=["one", "two"])
    assert sheet.width > narrow.width and sheet.height == narrow.height
    assert sheet.getpixel((10, 50)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: visualize.grid([], []), "must be equally many, got 0, 0 and 0"),
        (lambda: visualize.grid([Image.new("RGB", (2, 2))], []), "must be equally many, got 1, 0 and 0"),
        (lambda: visualize.heat_map(torch.zeros(3)), r"a map must be a tensor \[height, width\], got \[3\]"),
        (lambda: visualize.heat_map(torch.full((2, 2), torch.nan)), "a map must be finite"),
        (lambda: visualize.overlay(np.zeros((2, 2, 3)), LEFT, 2.0), r"strength must lie in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_pictures_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="a picture must be a PIL image or an array, got int"):
        visualize.overlay(3, LEFT)
