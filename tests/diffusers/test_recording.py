"""Maps of calls that skip steps, are interrupted, or are another pipeline's; and what is told of those without any."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import keylock_diffusers as kd
from keylock_diffusers import AttentionMaps, Request
from tests.diffusers.test_addons import STEPS, Skipping, draw, order, plain


def test_a_skipped_steps_layers_have_means_of_the_others(ready):
    Skipping(ready, every=2)
    each, mean = AttentionMaps(["cat"], every_step=True), AttentionMaps(["cat"])
    for maps in (each, mean):
        draw(ready, order(), record=maps, num_inference_steps=5)
        with kd.record_attention(ready, ["cat"], every_step=maps.every_step) as own:
            plain(ready, num_inference_steps=5)
        maps.images += own.images
    for steps, one in zip(each.images, mean.images, strict=True):
        counts = {layer: len(maps) for layer, maps in steps.maps["cat"].items()}
        assert {counts[layer] for layer in counts if layer.startswith("up")} == {5}
        assert {counts[layer] for layer in counts if not layer.startswith("up")} == {3}
        for layer, maps in steps.maps["cat"].items():
            torch.testing.assert_close(one.maps["cat"][layer][0], maps.mean(0))


@pytest.mark.parametrize("size", [None, 32])
def test_another_pipelines_calls_add_nothing_to_a_pictures_maps(ready, size):
    second = StableDiffusionImg2ImgPipeline(**ready.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)

    def maps(then=None):
        with kd.record_attention(ready, ["cat"]) as found:
            image = ready("a cat", generator=torch.Generator().manual_seed(1), num_inference_steps=STEPS).images[0]
            if then:
                then(image if size is None else image.resize((size, size)))
        return found.images

    alone = maps()
    after = maps(lambda image: second("a cat", image=image, strength=0.7, num_inference_steps=STEPS))
    by_hand = maps(lambda _: ready.unet(torch.zeros(2, 4, 4, 4), 10, torch.zeros(2, 32, 32)))
    generated = maps(lambda _: draw(ready, order()))
    for found in (after, by_hand, generated):
        assert len(found) == 1 and torch.equal(found[0].mean("cat"), alone[0].mean("cat"))


def test_a_call_that_leaves_no_maps_is_told(ready, caplog):
    positive, negative = ready.encode_prompt("a cat", "cpu", 1, True)
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "output_type": "latent"}
    with kd.record_attention(ready, ["cat"]) as maps:
        plain(ready)
        ready(num_inference_steps=1, **given)
    assert [image.prompt for image in maps.images] == ["a cat on blue"]
    assert [record.levelname for record in caplog.records] == [
        "WARNING"
    ] and "prompt_embeds leaves no maps" in caplog.text
    caplog.clear()
    with kd.record_attention(ready, ["cat"]):
        ready(num_inference_steps=1, **given)
    assert len(caplog.records) == 1
    caplog.clear()
    with kd.record_attention(ready, ["cat"]):
        draw(ready, order())
    assert "nothing was recorded" in caplog.text and "record=AttentionMaps" in caplog.text
    with pytest.raises(ValueError, match="'cat' is in none of the prompts; in prompt_embeds no words are known"):
        embeds = Request(prompt_embeds=positive[0], negative_prompt_embeds=negative[0], seed=1)
        draw(ready, embeds, record=AttentionMaps(["cat"]))


def test_an_interrupted_call_leaves_the_maps_of_its_steps(ready, caplog):
    def stop(pipe, step, _time, given):
        pipe._interrupt = step >= 1
        return given

    with kd.record_attention(ready, ["cat"], every_step=True) as maps:
        plain(ready, callback_on_step_end=stop)
        plain(ready)
    generated = AttentionMaps(["cat"], every_step=True)
    draw(ready, order(), callback_on_step_end=stop, record=generated)
    for image, steps in ((maps.images[0], 2), (maps.images[1], STEPS), (generated.images[0], 2)):
        assert {len(found) for found in image.maps["cat"].values()} == {steps}
    assert not caplog.records

    def before_the_first(*_):
        ready._interrupt = True

    handle, nothing = ready.text_encoder.register_forward_pre_hook(before_the_first), AttentionMaps(["cat"])
    assert draw(ready, order(), record=nothing) == [None] and not nothing.images
    handle.remove()


def test_a_call_that_is_broken_off_leaves_nothing_to_the_next(pipe):
    def stop(*_):
        raise LookupError

    kd.install(pipe)
    options = {"num_inference_steps": 2, "output_type": "np"}
    with kd.record_attention(pipe, ["cat"]) as found:
        with pytest.raises(LookupError):
            pipe("a cat", callback_on_step_end=stop, **options)
        kd.generate(pipe, [kd.Request("a cat and a dog", seed=1)], **options)
        assert found.images == []


def test_what_somebody_put_on_the_pipeline_stays_there(pipe):
    kd.install(pipe)
    encode = pipe.encode_prompt
    pipe.encode_prompt = theirs = lambda *args, **kwargs: encode(*args, **kwargs)
    with kd.record_attention(pipe, ["cat"]) as found:
        pipe("a cat", num_inference_steps=1, output_type="np")
    assert pipe.encode_prompt is theirs and "maybe_free_model_hooks" not in vars(pipe) and len(found.images) == 1
