"""Files that are written: an unmodified pipeline makes of them what the adapter says, layer by layer."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from keylock_diffusers.loras import (
    Adapter,
    AdapterFacts,
    LearnedWord,
    LowRank,
    ModelShapes,
    inspect_adapter,
    read_adapter,
    read_embedding,
    write_adapter,
    write_word,
)
from tests.diffusers.lora_files import delta, model_shapes, pairs, parts, pipeline, read, write
from tests.diffusers.test_lora_files import applied, everything, kohya_name

MODELS = ["SD1.5", "SD2", "SDXL"]


def shapes_of(model):
    return ModelShapes.of(pipeline(model))


def random_adapter(model, wanted=everything, *, dora=False, rank=None, scale=None, dtype=torch.float32):
    """Every layer with a rank and a scale of its own."""
    random = torch.Generator().manual_seed(3)
    modules = parts(pipeline(model))
    found = {component: {} for component in modules}
    for number, ((component, name), weight) in enumerate(
        (key, weight) for c, shapes in model_shapes(model).items() for n, weight in shapes.items() for key in [(c, n)]
    ):
        if not wanted(component, name):
            continue
        r = rank or 1 + number % 4
        inner = weight[1:] if math.prod(weight[2:]) > 1 else weight[1:2]
        down = torch.randn(r, *inner, generator=random).to(dtype)
        up = torch.randn(weight[0], r, generator=random).to(dtype)
        magnitude = None
        if dora:
            base = modules[component].get_submodule(name).weight.detach()
            magnitude = base.flatten(1).norm(dim=1) * (0.5 + torch.rand(weight[0], generator=random))
        found[component][name] = LowRank(down, up, scale or (number % 7 - 3.5) / 3, magnitude)
    return Adapter(found.pop(-1), tuple(found.values()))


def fused(pipe, path):
    """Weights of a copy of a pipeline that has loaded the file, by component and module, where they changed."""
    pipe = copy.deepcopy(pipe)
    before = {c: {n: m.weight.detach().clone() for n, m in layers(one)} for c, one in parts(pipe).items()}
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    scales = {
        (component, name): one.scaling["default_0"]
        for component, module in parts(pipe).items()
        for name, one in module.named_modules()
        if hasattr(one, "base_layer")
    }
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"][: len(parts(pipe))])
    after = {
        (component, name): one.base_layer.weight.detach()
        for component, module in parts(pipe).items()
        for name, one in module.named_modules()
        if hasattr(one, "base_layer")
    }
    return before, after, scales


def layers(module):
    return [(name, one) for name, one in module.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]


def updates_of(adapter):
    by_component = {-1: adapter.denoiser, **dict(enumerate(adapter.text_encoders))}
    return {(c, name): one for c, found in by_component.items() for name, one in found.items()}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_an_unmodified_pipeline_makes_of_it_what_the_adapter_says(model, dora, tmp_path, caplog):
    adapter = random_adapter(model, dora=dora)
    path = tmp_path / "lora.safetensors"
    assert write_adapter(path, adapter, model=shapes_of(model)) == path.stat().st_size
    before, after, scales = fused(pipeline(model), path)
    expected = updates_of(adapter)
    assert after.keys() == expected.keys()
    for (component, name), update in expected.items():
        assert scales[component, name] == update.scale
        weight = before[component][name]
        torch.testing.assert_close(after[component, name], applied(update, weight), rtol=1e-4, atol=1e-4)
    assert not [record for record in caplog.records if "unexpected" in record.message or "missing" in record.message]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_it_reads_back_bit_for_bit(model, dora, tmp_path):
    adapter = random_adapter(model, dora=dora, dtype=torch.float16)
    write_adapter(tmp_path / "lora.safetensors", adapter, model=shapes_of(model))
    found, expected = updates_of(read(tmp_path / "lora.safetensors", model)), updates_of(adapter)
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert one.scale == other.scale and one.up.dtype == torch.float16
        assert torch.equal(one.up, other.up) and torch.equal(one.down.flatten(1), other.down.flatten(1))
        assert (one.magnitude is None) == (not dora) and (not dora or torch.equal(one.magnitude, other.magnitude))


@pytest.mark.parametrize(
    "wanted",
    [lambda c, n: c < 0, lambda c, n: c >= 0, lambda c, n: c == 1, lambda c, n: n.endswith("to_q")],
    ids=["denoiser", "text", "second encoder", "one kind"],
)
def test_components_alone(wanted, tmp_path):
    adapter, path = random_adapter("SDXL", wanted), tmp_path / "lora.safetensors"
    write_adapter(path, adapter, model=shapes_of("SDXL"))
    before, after, _ = fused(pipeline("SDXL"), path)
    assert after.keys() == updates_of(adapter).keys()
    for (component, name), update in updates_of(adapter).items():
        expected = applied(update, before[component][name])
        torch.testing.assert_close(after[component, name], expected, rtol=1e-4, atol=1e-4)


def test_one_rank_and_one_scale_need_no_patterns(tmp_path):
    write_adapter(tmp_path / "lora", random_adapter("SD1.5", rank=2, scale=1.5), model=shapes_of("SD1.5"))
    settings = settings_of(tmp_path / "lora")
    assert settings["unet.r"] == 2 and settings["unet.lora_alpha"] == settings["text_encoder.lora_alpha"] == 3
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"] == {}


def settings_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


@pytest.mark.parametrize("scale", [1 / 3, 0.1, -2.7, 1e-30, 3e30, 7 / 11])
@pytest.mark.parametrize("rank", [1, 3, 7, 11])
def test_a_scale_survives_its_division(scale, rank, tmp_path):
    update = LowRank(torch.ones(rank, 4), torch.ones(3, rank), scale)
    write_adapter(tmp_path / "lora", Adapter({"layer": update}))
    settings = settings_of(tmp_path / "lora")
    assert settings["transformer.lora_alpha"] / settings["transformer.r"] == pytest.approx(scale, rel=3e-16)


def test_a_module_whose_name_ends_another_ones_keeps_its_own_rank_and_scale(tmp_path):
    """PEFT takes the first pattern that a name ends with."""
    weight = {"proj": (3, 4), "up.proj": (3, 4), "up.up.proj": (3, 4), "other": (3, 4)}
    updates = {name: LowRank(torch.randn(n + 1, 4), torch.randn(3, n + 1), n + 0.5) for n, name in enumerate(weight)}
    write_adapter(tmp_path / "lora", Adapter(updates))
    settings = settings_of(tmp_path / "lora")
    for field in ("rank_pattern", "alpha_pattern"):
        assert list(settings[f"transformer.{field}"]) == ["up.up.proj", "up.proj", "other", "proj"]
    found = read_adapter(tmp_path / "lora", denoiser=weight, text_encoders=[]).denoiser
    assert {name: (one.rank, one.scale) for name, one in found.items()} == {
        name: (one.rank, one.scale) for name, one in updates.items()
    }


def test_what_kohya_trained_is_what_diffusers_loads_from_it(tmp_path):
    """Every layer's own alpha, which diffusers' own conversion does not keep."""
    tensors = {}
    for (component, name), pair in pairs("SDXL").items():
        base = kohya_name(component, name, "SDXL")
        tensors |= {f"{base}.lora_down.weight": pair.down, f"{base}.lora_up.weight": pair.stored_up()}
        tensors[f"{base}.alpha"] = torch.tensor(1.0 + len(name) % 3)
    adapter = read(write(tmp_path / "kohya.safetensors", tensors, ss_output_name="style"), "SDXL")
    write_adapter(tmp_path / "written.safetensors", adapter, model=shapes_of("SDXL"))
    before, after, _ = fused(pipeline("SDXL"), tmp_path / "written.safetensors")
    for (component, name), update in updates_of(adapter).items():
        weight = before[component][name]
        expected = (weight.double() + delta(update).reshape(weight.shape)).float()
        torch.testing.assert_close(after[component, name], expected, rtol=1e-4, atol=1e-4)
    assert inspect_adapter(tmp_path / "written.safetensors").training["ss_output_name"] == "style"


def test_a_convolution_of_single_pixels_is_one_by_its_factor_or_by_the_model(tmp_path):
    flat = LowRank(torch.ones(2, 4), torch.ones(3, 2))
    four = LowRank(torch.ones(2, 4, 1, 1), torch.ones(3, 2))
    model = ModelShapes({"mid_block.proj_in": (3, 4, 1, 1)})
    for update, given, wanted in ((flat, None, 2), (four, None, 4), (flat, model, 4), (four, model, 4)):
        write_adapter(tmp_path / "lora", Adapter({"mid_block.proj_in": update}), model=given)
        with safe_open(tmp_path / "lora", "pt") as file:
            found = {len(file.get_tensor(name).shape) for name in file.keys()}
        assert found == {wanted}


def test_facts_are_written_and_read(tmp_path):
    facts = AdapterFacts(
        base="SDXL", trigger_words=("kätzchen", "on blue"), training={"ss_steps": "400", "note": "é\n"}
    )
    update = LowRank(torch.ones(2, 4), torch.ones(3, 2))
    write_adapter(tmp_path / "lora", Adapter({"layer": update}), facts)
    found = inspect_adapter(tmp_path / "lora")
    assert found.trigger_words == facts.trigger_words and found.base == "SDXL"
    assert found.training.items() >= facts.training.items()
    again = Adapter({"layer": update}, facts=found)
    write_adapter(tmp_path / "again", again)
    assert inspect_adapter(tmp_path / "again") == found
    write_adapter(tmp_path / "none", again, AdapterFacts())
    assert inspect_adapter(tmp_path / "none").trigger_words == ()


PLAIN = LowRank(torch.ones(2, 4), torch.ones(3, 2))
WRONG = {
    "words": (
        Adapter({}, (), {"<w>": LearnedWord("<w>", (torch.ones(1, 4),))}),
        None,
        "reads no words from a LoRA file, got <w>; write_word",
    ),
    "some DoRA": (
        Adapter({"a": dataclasses.replace(PLAIN, magnitude=torch.ones(3)), "b": PLAIN}),
        None,
        "DoRA on all modules of transformer or on none, got none on b",
    ),
    "no such module": (Adapter({"a": PLAIN}), ModelShapes({"b": (3, 4)}), "transformer.a must fit .* of that name"),
    "no such encoder": (Adapter({}, ({"a": PLAIN},)), ModelShapes({"b": (3, 4)}), "text_encoder.a must fit"),
    "another shape": (Adapter({"a": PLAIN}), ModelShapes({"a": (3, 5)}), r"a must fit .* \[3, 5\], got up \[3, 2\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_diffusers_cannot_hold_is_refused(case, tmp_path):
    adapter, model, message = WRONG[case]
    with pytest.raises(ValueError, match=f"write_adapter: .*{message}"):
        write_adapter(tmp_path / "lora", adapter, model=model)
    assert not (tmp_path / "lora").exists()


def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    write_adapter(tmp_path / "lora", Adapter({"layer": PLAIN}))
    before = (tmp_path / "lora").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(tmp_path / "lora", Adapter({"other": PLAIN}))
    assert (tmp_path / "lora").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError, match="write_adapter: path must be a path, got 3"):
        write_adapter(3, Adapter({"layer": PLAIN}))


def test_a_word_is_what_diffusers_and_we_read(tmp_path):
    word = LearnedWord("<alice-cat>", (torch.randn(2, pipeline("SD1.5").text_encoder.config.hidden_size),))
    path = tmp_path / "word.safetensors"
    assert write_word(path, word) == path.stat().st_size
    found = read_embedding(path, [word.vectors[0].shape[1]])
    assert found.name == word.name and torch.equal(found.vectors[0], word.vectors[0])
    pipe = copy.deepcopy(pipeline("SD1.5"))
    pipe.load_textual_inversion(path)
    rows = pipe.tokenizer.convert_tokens_to_ids(["<alice-cat>", "<alice-cat>_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[rows], word.vectors[0])
    both = LearnedWord("cat", (torch.randn(2, 4), torch.randn(2, 6)))
    write_word(tmp_path / "cat.safetensors", both)
    found = read_embedding(tmp_path / "cat.safetensors", [4, 6])
    assert found.name == "cat" and all(map(torch.equal, found.vectors, both.vectors))
    with pytest.raises(ValueError, match="one or two text encoders, got 3"):
        write_word(path, LearnedWord("cat", (torch.ones(1, 2),) * 3))
