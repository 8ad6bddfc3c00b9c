"""Trainers of image prompt adapters and of subject fusion: they learn, resume, and leave the pipeline as it was."""

import dataclasses
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Request, SubjectFusion
from keylock_diffusers.training import (
    AdapterConfig,
    AdapterExample,
    FusionConfig,
    FusionExample,
    FusionSubject,
    ImageAdapter,
    loop,
    train_image_adapter,
    train_subject_fusion,
)
from tests.diffusers.compatibility import WIDTH, image_encoder
from tests.diffusers.drawing import picture, random

ADAPTER = AdapterConfig(steps=4, batch_size=3, learning_rate=1e-2, average_decay=0.9)
FUSION = FusionConfig(steps=4, batch_size=3, learning_rate=1e-2, warmup=0, localize=1.0)


@pytest.fixture
def ready(pipe):
    """With an image encoder, as adapters' pipelines have."""
    for name, module in image_encoder().items():
        pipe.register_modules(**{name: module})
    return pipe


def damaged():
    """A PNG whose end is missing."""
    stored = io.BytesIO()
    picture(1).save(stored, "PNG")
    return Image.open(io.BytesIO(stored.getvalue()[:-60]))


def adapter_examples():
    return [
        AdapterExample(picture(1), "a cat on blue"),
        AdapterExample(picture(2), "a dog", picture(3)),
        AdapterExample(random(4, 8, 8), "a house", random(WIDTH, seed=3)),
    ]


def mask():
    made = Image.new("L", (16, 16))
    made.paste(255, (0, 0, 8, 16))
    return made


def fusion_examples():
    return [
        FusionExample(
            picture(1),
            "a cat and a dog",
            [FusionSubject("cat", picture(2), mask()), FusionSubject("dog", random(WIDTH, seed=3))],
        ),
        FusionExample(
            random(4, 8, 8),
            "a house",
            [FusionSubject("house", random(WIDTH, seed=4), random(1, 8, 8, seed=6).sigmoid())],
        ),
        FusionExample(picture(5), "a car", []),
    ]


def train(kind, pipe, steps=4, **options):
    trainer, examples, config = {
        "adapter": (train_image_adapter, adapter_examples(), ADAPTER),
        "fusion": (train_subject_fusion, fusion_examples(), FUSION),
    }[kind]
    config = options.pop("config", dataclasses.replace(config, steps=steps))
    return trainer(pipe, options.pop("examples", examples), config, progress=False, **options)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_it_learns_something_else_with_more_steps_and_the_same_again(ready, kind):
    four, again, two = (state(train(kind, ready, steps)) for steps in (4, 4, 2))
    assert equal(four, again) and not equal(four, two)
    assert all(tensor.isfinite().all() for tensor in four.values())


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_in_bfloat16_every_step_computes_with_the_weights_of_the_one_before(ready, kind):
    """Autocast's copies of the first step's weights are not kept: learning changes losses as it does in float32."""

    def losses(precision, rate):
        AcceleratorState._reset_state()
        accelerator, seen = Accelerator(cpu=True, mixed_precision=precision), []
        backward = accelerator.backward
        accelerator.backward = lambda loss: (seen.append(loss.item()), backward(loss))
        config = dataclasses.replace({"adapter": ADAPTER, "fusion": FUSION}[kind], steps=8, learning_rate=rate)
        train(kind, ready, config=config, accelerator=accelerator)
        return torch.tensor(seen)

    full, half, still = losses("no", 0.1), losses("bf16", 0.1), losses("no", 1e-9)
    AcceleratorState._reset_state()
    assert len(full) == 8 and (half - full).abs().max() < 0.2 * (full - still).abs().max()


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_the_pipeline_is_as_before(ready, kind):
    before = {name: state(getattr(ready, name)) for name in ("unet", "text_encoder", "vae", "image_encoder")}
    processors = dict(ready.unet.attn_processors)
    flags = [p.requires_grad for p in ready.unet.parameters()]
    ready.unet.train()
    train(kind, ready)
    assert all(equal(before[name], state(getattr(ready, name))) for name in before)
    assert ready.unet.attn_processors == processors and ready.unet.training
    assert [p.requires_grad for p in ready.unet.parameters()] == flags


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(ready, kind, tmp_path, monkeypatch):
    whole = state(train(kind, ready))
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1)
    real, calls = loop.generator, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "generator", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(kind, ready, checkpoint_path=path)
    monkeypatch.setattr(loop, "generator", real)
    assert path.exists() and not list(tmp_path.glob("*.partial"))
    assert equal(state(train(kind, ready, checkpoint_path=path)), whole)


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(ready, kind, tmp_path):
    path = tmp_path / "run.safetensors"
    train(kind, ready, checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train(kind, ready, steps=5, checkpoint_path=path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        train(kind, ready, checkpoint_path=path)


def test_the_file_loads_through_load_ip_adapter_and_draws_what_was_learned(ready, tmp_path):
    made = train("adapter", ready)
    assert made.save(tmp_path / "ip-adapter.safetensors", torch.float32) > 0
    ready.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    projection = ready.unet.encoder_hid_proj.image_projection_layers[0]
    embeds = random(2, WIDTH)
    assert torch.equal(projection(embeds), made.projection(embeds))
    for name, (key, value) in made(embeds).items():
        processor = ready.unet.get_submodule(name).processor
        tokens = made.projection(embeds)
        assert torch.equal(processor.to_k_ip[0](tokens), key) and torch.equal(processor.to_v_ip[0](tokens), value)
    kd.install(ready)
    images = kd.generate(ready, [Request("", image_prompts=[ImagePrompt(picture(1))], seed=1)], num_inference_steps=2)
    assert images[0].size == (16, 16)


def test_an_adapter_starts_from_the_texts_keys_and_values(ready):
    made = ImageAdapter(ready.unet, WIDTH)
    for name in made.numbers:
        attn = ready.unet.get_submodule(name)
        key, value = made.keys[name.replace(".", "-")], made.values[name.replace(".", "-")]
        assert torch.equal(key.weight, attn.to_k.weight) and torch.equal(value.weight, attn.to_v.weight)
    assert made.projection(random(2, WIDTH)).shape == (2, 4, ready.unet.config.cross_attention_dim)


def test_dropped_conditions_are_dropped(ready):
    """Without images nothing reaches the projection's weight; without text no caption matters."""
    everything = dataclasses.replace(ADAPTER, drop_text=0.0, drop_image=1.0, drop_both=0.0, average_decay=None)
    torch.manual_seed(0)
    start = ImageAdapter(ready.unet, WIDTH)
    weight = train("adapter", ready, config=dataclasses.replace(everything, weight_decay=0.0)).projection.image_embeds
    assert torch.equal(weight.weight, start.projection.image_embeds.weight)
    wordless = dataclasses.replace(everything, drop_text=1.0, drop_image=0.0)
    renamed = [dataclasses.replace(example, caption="a robot") for example in adapter_examples()]
    one, other = train("adapter", ready, config=wordless), train("adapter", ready, config=wordless, examples=renamed)
    assert equal(state(one), state(other))


def test_an_adapter_goes_on_from_given_weights_which_it_leaves_alone(ready, tmp_path):
    start = train("adapter", ready)
    before, path = state(start), tmp_path / "run.safetensors"
    hardly = dataclasses.replace(ADAPTER, learning_rate=1e-12)
    near = state(train("adapter", ready, start=start, config=hardly))
    assert all(torch.allclose(near[name], tensor, rtol=0, atol=1e-9) for name, tensor in before.items())
    made = train("adapter", ready, start=start, checkpoint_path=path)
    assert equal(state(start), before) and not equal(state(made), before)
    assert not equal(state(made), state(train("adapter", ready)))
    with pytest.raises(ValueError, match="another run"):
        train("adapter", ready, checkpoint_path=path)  # from new weights
    narrow = ImageAdapter(ready.unet, WIDTH + 1)
    with pytest.raises(ValueError, match=rf"start must read encodings \[{WIDTH}\], got {WIDTH + 1}"):
        train("adapter", ready, start=narrow)


def test_what_was_saved_is_loaded(ready, tmp_path):
    made, path = train("adapter", ready), tmp_path / "adapter.safetensors"
    made.save(path, torch.float32)
    assert equal(state(ImageAdapter.load(path, ready.unet)), state(made))
    made.save(path)
    half = state(ImageAdapter.load(path, ready.unet))
    assert all(torch.equal(half[name], tensor.half().float()) for name, tensor in state(made).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("image_proj.norm.bias"), r"image_proj.norm.bias of .* must be \[32\], got nothing"),
        (lambda given: given.pop("image_proj.proj.weight"), r"image_proj.proj.weight of .* must be .*, got nothing"),
        (lambda given: given.update(more=torch.ones(2)), r"more of .* must be absent, got \[2\]"),
        (lambda given: given["image_proj.norm.bias"].fill_(float("nan")), "image_proj.norm.bias of .* must be finite"),
    ],
)
def test_a_file_of_another_adapter_is_refused(ready, tmp_path, change, message):
    given = ImageAdapter(ready.unet, WIDTH).published(torch.float32)
    change(given)
    path = tmp_path / "adapter.safetensors"
    save_file(given, path)
    with pytest.raises(ValueError, match=f"ImageAdapter: {message}"):
        ImageAdapter.load(path, ready.unet)


def test_fusion_goes_on_from_given_weights_and_learns_where_subjects_are(ready):
    torch.manual_seed(5)
    start = SubjectFusion(WIDTH)
    before = state(start)
    made = train("fusion", ready, start=start)
    assert equal(before, state(start)) and not equal(before, state(made)) and not made.training
    assert not any(p.requires_grad for p in made.parameters())
    unlocalized = train("fusion", ready, config=dataclasses.replace(FUSION, localize=0.0))
    assert not equal(state(unlocalized), state(train("fusion", ready)))


@pytest.mark.parametrize(
    ("kind", "examples", "error", "message"),
    [
        ("adapter", [], ValueError, "examples must not be empty"),
        ("fusion", [], ValueError, "examples must not be empty"),
        ("adapter", [AdapterExample(torch.zeros(4, 8, 8), "a cat")], ValueError, "prompt must be given where image is"),
        ("adapter", [AdapterExample(torch.zeros(4, 8, 8), "a cat", torch.zeros(2, 3))], ValueError, r"must be \[D\]"),
        (
            "fusion",
            [FusionExample(torch.zeros(4, 8, 8), "a cat", [FusionSubject("dog", torch.zeros(WIDTH))])],
            ValueError,
            "the words 'dog' are not in the caption 'a cat'",
        ),
        (
            "fusion",
            [FusionExample(torch.zeros(4, 8, 8), "a cat", [FusionSubject("cat", torch.zeros(3))])],
            ValueError,
            r"encodings must be \[32\], as wide as the text's, got \[3\]",
        ),
        ("adapter", [AdapterExample(picture(1), "a cat")], TypeError, "pipe must have an image_encoder"),
        ("adapter", None, TypeError, "examples must have a length and items, got None"),
        ("fusion", "ab", TypeError, "examples must have a length and items, got 'ab'"),
        (
            "adapter",
            [AdapterExample(damaged(), "a cat", random(WIDTH))],
            ValueError,
            "image of example 0 cannot be decoded",
        ),
    ],
)
def test_wrong_examples_are_named(pipe, kind, examples, error, message):
    config = dataclasses.replace(FUSION, drop_text=0.0, drop_subjects=0.0) if kind == "fusion" else ADAPTER
    with pytest.raises(error, match=message):
        train(kind, pipe, examples=examples, config=config)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (ADAPTER, {"steps": 0}, "steps must be a whole number of at least 1"),
        (ADAPTER, {"learning_rate": 0.0}, "learning_rate must be above 0"),
        (ADAPTER, {"drop_text": 0.9, "drop_image": 0.2}, "must be shares"),
        (FUSION, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (FUSION, {"localize": -1.0}, "localize must be a finite number of at least 0"),
        (FUSION, {"drop_text": -0.1}, r"drop_text must lie in \[0, 1\], got -0.1"),
        (ADAPTER, {"drop_image": float("nan")}, r"drop_image must lie in \[0, 1\], got nan"),
        (ADAPTER, {"warmup": -1}, "warmup must be a whole number of at least 0"),
        (ADAPTER, {"weight_decay": float("inf")}, "weight_decay must be a finite number of at least 0"),
        (ADAPTER, {"average_decay": 1.5}, r"average_decay must lie in \[0, 1\]"),
        (ADAPTER, {"seed": "1"}, "seed must be a whole number"),
        (FUSION, {"localization_form": "l2"}, "localization_form must be one of"),
        (FUSION, {"learning_rate": -1.0}, "learning_rate must be a finite number of at least 0"),
    ],
)
def test_wrong_settings_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_fusion_survives_steps_without_a_subject(ready):
    bare = [FusionExample(random(4, 8, 8), "a car", [])]
    assert all(t.isfinite().all() for t in state(train("fusion", ready, examples=bare)).values())


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_pipelines_that_cannot_be_trained_on_are_refused(ready, build_tiny, kind, tmp_path):
    train("adapter", ready).save(tmp_path / "a.safetensors")
    ready.load_ip_adapter(str(tmp_path), subfolder="", weight_name="a.safetensors", image_encoder_folder=None)
    with pytest.raises(ValueError, match="pipe must have no IP-Adapter loaded"):
        train(kind, ready)
    half = build_tiny().to(dtype=torch.float16)
    with pytest.raises(ValueError, match="gradients vanish in float16"):
        train(kind, half)


@pytest.mark.parametrize("kind", ["adapter", "fusion"])
def test_they_train_in_bfloat16(ready, kind):
    ready.to(dtype=torch.bfloat16)
    assert all(t.isfinite().all() for t in state(train(kind, ready)).values())


def test_a_checkpoint_of_another_base_model_or_a_mask_of_another_size_is_refused(ready, build_tiny, tmp_path):
    path = tmp_path / "run.safetensors"
    tensors = [FusionExample(random(4, 8, 8), "a cat", [FusionSubject("cat", random(WIDTH), torch.rand(1, 8, 8))])]
    train("fusion", ready, examples=tensors, checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train("fusion", build_tiny(seed=5), examples=tensors, checkpoint_path=path)
    flat = [FusionExample(random(4, 8, 8), "a cat", [FusionSubject("cat", random(WIDTH), torch.rand(8, 8))])]
    with pytest.raises(ValueError, match=r"mask must be \[1, 8, 8\], got \[8, 8\]"):
        train("fusion", ready, examples=flat, config=dataclasses.replace(FUSION, drop_text=0.0, drop_subjects=0.0))
    with pytest.raises(ValueError, match="start must be as wide as the text, 32, got 16"):
        train("fusion", ready, start=SubjectFusion(16))


def test_an_interrupted_run_goes_on_from_its_own_first_weights_alone(ready, tmp_path):
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        starts.append(SubjectFusion(WIDTH))
    train("fusion", ready, start=starts[0], checkpoint_path=tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="is of another run"):
        train("fusion", ready, start=starts[1], checkpoint_path=tmp_path / "run.safetensors")


def test_an_image_prompt_of_its_own_is_what_is_read(ready):
    """A picture of the same subject, as the picture and as its encoding."""
    with torch.no_grad():
        encoding = ready.encode_image(picture(3), "cpu", 1)[0][0]
    one, other, itself = (
        state(train("adapter", ready, examples=[AdapterExample(picture(1), "a cat", prompt)]))
        for prompt in (picture(3), encoding, None)
    )
    assert equal(one, other) and not equal(one, itself)


def test_a_loss_that_is_not_finite_stops_the_run(ready):
    bad = [AdapterExample(torch.full((4, 8, 8), torch.nan), "a cat", torch.zeros(WIDTH))]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        train("adapter", ready, examples=bad)
