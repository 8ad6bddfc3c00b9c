"""LoRA files: every tool's spelling gives what its tool put in and what diffusers makes of it; nothing is left out."""

import copy
import json
import math
import os
import struct

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from keylock_diffusers.loras import LoraFileError, inspect_adapter, read_adapter
from keylock_diffusers.loras.modules import ModuleNames, _table
from tests.diffusers.lora_files import (
    UNETS,
    Pair,
    compvis,
    delta,
    deltas,
    diffusers_prefix,
    full_size,
    kohya_prefix,
    model_shapes,
    pairs,
    parts,
    pipeline,
    read,
    read_linear,
    trained_name,
    write,
)

MODELS = list(UNETS)
PAIRS = {  # the seven spellings of a pair, in the order down, up
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "old diffusers": ("_lora.down.weight", "_lora.up.weight"),
    "PEFT": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "Mochi": (".lora_A", ".lora_B"),
    "transformers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "PEFT with a name": (".lora_A.default.weight", ".lora_B.default.weight"),
}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def is_attention(component, name):
    return name.endswith(tuple(f".{last}" for last in ATTENTION))


def everything(component, name):
    return True


def of_denoiser(component, name):
    return component < 0


def in_blocks(component, name):
    """What diffusers itself finds in the original implementation's numbering: attention, in SDXL."""
    return component < 0 and ".transformer_blocks." in name


def kohya_name(component, name, model):
    return kohya_prefix(component, model) + trained_name(component, name).replace(".", "_")


def compvis_name(component, name, model, prefix="lora_unet_", joint="_"):
    return prefix + compvis(model)[name].replace(".", joint)


def dotted_name(component, name, model):
    return diffusers_prefix(component) + trained_name(component, name)


def processor_name(component, name, model):
    """As diffusers named attention's projections when they lay in its processors."""
    if component >= 0:
        old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
        parent, _, last = trained_name(component, name).rpartition(".")
        return f"{diffusers_prefix(component)}{parent}.{old[last]}"
    parent, _, last = name.removesuffix(".0").rpartition(".")
    return f"unet.{parent}.processor.{last}"


# name: how the module is spelled, how the pair is, which modules the tool trains, whether alpha is stored, and
# whether diffusers loads every key, so that it can be asked.
FORMATS = {
    "kohya": (kohya_name, "kohya", everything, True, "SD1.5 SDXL"),
    "kohya with original numbering": (compvis_name, "kohya", of_denoiser, True, ""),
    "kohya's attention with original numbering": (compvis_name, "kohya", in_blocks, True, "SDXL"),
    "diffusers, PEFT's pair": (dotted_name, "PEFT", everything, False, "SD1.5 SD2 SDXL"),
    "diffusers": (dotted_name, "diffusers", of_denoiser, False, "SD1.5 SD2 SDXL"),
    "diffusers' processors": (processor_name, "old diffusers", is_attention, False, "SD1.5 SD2"),
    "transformers": (dotted_name, "transformers", lambda c, n: c >= 0, False, "SD1.5 SDXL"),
    "Mochi": (dotted_name, "Mochi", everything, False, ""),
    "PEFT with a name": (dotted_name, "PEFT with a name", everything, False, ""),
    "PEFT": (lambda c, n, m: f"base_model.model.{n}", "PEFT", of_denoiser, False, ""),
    "an old script of PEFT's": (lambda c, n, m: f"unet.base_model.model.{n}", "PEFT", of_denoiser, False, ""),
    "ComfyUI": (lambda c, n, m: compvis_name(c, n, m, "diffusion_model.", "."), "kohya", of_denoiser, True, ""),
    "SimpleTuner's LyCORIS": (lambda c, n, m: "lycoris_" + n.replace(".", "_"), "kohya", of_denoiser, True, ""),
    "OneTrainer": (lambda c, n, m: "lora_transformer_" + n.replace(".", "_"), "kohya", of_denoiser, True, ""),
    "without a prefix": (lambda c, n, m: n, "PEFT", of_denoiser, False, ""),
}


def written(path, form, model, one_alpha=None):
    """A file of a format, and what it should give; every module has an alpha of its own unless there is one for all."""
    spell, pair, wanted, has_alpha, _ = FORMATS[form]
    tensors, expected = {}, {}
    down, up = PAIRS[pair]
    for (component, name), trained in pairs(model, wanted).items():
        base = spell(component, name, model)
        tensors[base + down], tensors[base + up] = trained.down, trained.stored_up()
        alpha = one_alpha or 1.0 + len(name) % 3
        if has_alpha:
            tensors[f"{base}.alpha"] = torch.tensor(alpha)
        expected[component, name] = trained.delta(alpha / trained.rank if has_alpha else 1.0)
    return write(path, tensors), expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_what_was_put_in(form, model, tmp_path):
    path, expected = written(tmp_path / "lora.safetensors", form, model)
    found = deltas(read(path, model))
    assert found.keys() == expected.keys()
    for name, update in found.items():
        torch.testing.assert_close(update, expected[name], rtol=1e-12, atol=1e-12)


def fused(pipe, path):
    """The weights of a copy of a pipeline after diffusers has loaded a file into them."""
    pipe = copy.deepcopy(pipe)
    pipe.load_lora_weights(os.path.dirname(path), weight_name=os.path.basename(path))
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"][: len(parts(pipe))])
    found = {}
    for component, module in parts(pipe).items():
        for name, one in module.named_modules():
            if hasattr(one, "base_layer"):
                found[component, name] = one.base_layer.weight.detach()
    return found


@pytest.mark.parametrize(
    ("form", "model"), [(form, model) for form, fields in FORMATS.items() for model in fields[4].split()]
)
def test_diffusers_makes_the_same_of_a_file_where_it_loads_every_key(form, model, tmp_path):
    # diffusers 0.42 takes the commonest alpha for all: its patterns for the others match no module.
    path, expected = written(tmp_path / "lora.safetensors", form, model, one_alpha=3.0)
    theirs, ours = fused(pipeline(model), path), deltas(read(path, model))
    if form == "kohya":  # names that diffusers knows in the original numbering only
        expected = {name: one for name, one in expected.items() if "add_embedding" not in name[1]}
    assert theirs.keys() == expected.keys()
    modules = parts(pipeline(model))
    for (component, name), weight in theirs.items():
        before = modules[component].get_submodule(name).weight.detach()
        update = ours[component, name].reshape(before.shape)
        torch.testing.assert_close(weight, (before.double() + update).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_the_original_numbering_is_the_one_that_diffusers_converts(model):
    unet, names = parts(pipeline(model))[-1], compvis(model)
    checkpoint = {f"model.diffusion_model.{names[name]}.weight": torch.tensor(n) for n, name in enumerate(names)}
    state = unet.state_dict()
    for name, parameter in state.items():  # what no LoRA names, but the conversion wants to see
        module, _, kind = name.rpartition(".")
        if module not in names and kind == "weight" and ".resnets." in name:
            place = module.replace("norm1", "conv1").replace("norm2", "conv2")
            norm = names[place].replace("in_layers.2", "in_layers.0").replace("out_layers.3", "out_layers.0")
            checkpoint[f"model.diffusion_model.{norm}.weight"] = parameter
    checkpoint |= {key.replace(".weight", ".bias"): torch.tensor(-1) for key in checkpoint}
    for side in ("weight", "bias"):
        checkpoint.setdefault(f"model.diffusion_model.out.0.{side}", torch.tensor(-1))
    config = {**unet.config, "class_embed_type": None, "num_class_embeds": None}
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    for number, name in enumerate(names):
        assert converted[f"{name}.weight"].tolist() == number, name


@pytest.mark.parametrize("model", ["SD 1.5", "SDXL"])
def test_every_name_of_a_published_model_means_one_module(model):
    shapes = full_size(model)
    table = _table(shapes)
    assert len({name for meant in table.values() for name in meant}) == len(shapes)
    assert table["input_blocks_4_1_proj_in"] == ("down_blocks.1.attentions.0.proj_in",)
    assert table["output_blocks_5_2_conv"] == ("up_blocks.1.upsamplers.0.conv",)


def test_two_modules_of_one_name_are_refused():
    with pytest.raises(ValueError, match="a_b_c would mean both a.b_c and a_b.c"):
        ModuleNames({"a.b_c": (1, 1), "a_b.c": (1, 1)}, [])


def test_one_by_one_convolutions_take_linear_factors_and_the_reverse(tmp_path):
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 6, generator=random), torch.randn(5, 2, generator=random)
    for weight in ((5, 6), (5, 6, 1, 1)):
        for four in (False, True):
            pair = [one[:, :, None, None] if four else one for one in (down, up)]
            stored = {"layer.lora_A.weight": pair[0], "layer.lora_B.weight": pair[1]}
            path = write(tmp_path / "lora.safetensors", stored)
            update = read_linear(path, weight)
            assert update.down.shape == (2, *weight[1:]) and update.up.shape == (5, 2)
            torch.testing.assert_close(delta(update), up.double() @ down.double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "joint"),
    [
        ({"attn.to_q": (4, 6), "attn.to_k": (3, 6), "attn.to_v": (5, 6)}, "attn.to_qkv"),
        ({"attn.to_q": (4, 7), "attn.to_k": (3, 6), "attn.to_v": (5, 6)}, "attn.to_kv"),
        ({f"encoder.layers.0.self_attn.{n}_proj": (6, 6) for n in "qkv"}, "transformer_resblocks_0_attn_in_proj"),
    ],
)
def test_a_joint_projection_is_split_by_its_rows(shapes, joint, tmp_path):
    random = torch.Generator().manual_seed(0)
    inside = [n for n in shapes if not (joint == "attn.to_kv" and n == "attn.to_q")]
    rows = [shapes[name][0] for name in inside]
    pair = Pair((sum(rows), 6), 2, random)
    scale = torch.rand(sum(rows), 1, generator=random)
    text = joint.startswith("transformer")
    base = f"lora_te_{joint}" if text else joint
    path = write(
        tmp_path / "lora.safetensors",
        {f"{base}.lora_down.weight": pair.down, f"{base}.lora_up.weight": pair.up, f"{base}.dora_scale": scale},
    )
    adapter = read_adapter(path, denoiser={} if text else shapes, text_encoders=[shapes] if text else [])
    found = adapter.text_encoders[0] if text else adapter.denoiser
    assert list(found) == inside
    torch.testing.assert_close(torch.cat([delta(found[name]) for name in inside]), pair.delta())
    assert torch.equal(torch.cat([found[name].magnitude for name in inside]), scale.flatten())


def test_projections_of_different_inputs_are_not_joined(tmp_path):
    path = write(tmp_path / "lora.safetensors", layer(name="attn.to_qkv", weight=(12, 7)))
    with pytest.raises(LoraFileError, match="2 of 2 keys name nothing in this model: attn.to_qkv"):
        read_adapter(path, denoiser={"attn.to_q": (4, 7), "attn.to_k": (3, 6), "attn.to_v": (5, 6)}, text_encoders=[])


def trained_unet(seed=0, **settings):
    """A tiny U-Net with PEFT's LoRA, whose every tensor is random."""
    unet = copy.deepcopy(pipeline("SD1.5").unet)
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v", "to_out.0", "proj_in", "conv1"], **settings))
    torch.manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return unet


def merged(unet):
    """Every adapted module's weight before and after PEFT has merged the adapter."""
    before = {name: one.base_layer.weight.detach().clone() for name, one in adapted(unet)}
    unet.fuse_lora()
    return before, {name: one.base_layer.weight.detach() for name, one in adapted(unet)}


def adapted(unet):
    return [(name, one) for name, one in unet.named_modules() if hasattr(one, "base_layer")]


def applied(update, weight):
    """What the library's mathematics makes of a weight."""
    changed = weight.double().flatten(1) + delta(update)
    if update.magnitude is not None:
        changed = changed * (update.magnitude.double() / changed.norm(dim=1))[:, None]
    return changed.reshape(weight.shape).float()


SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 7},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "DoRA": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "patterns": {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_q": 5, "conv1": 1}},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_diffusers_saves_comes_back_as_peft_merges_it(settings, tmp_path):
    unet = trained_unet(**SETTINGS[settings])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    adapter = read(tmp_path / "pytorch_lora_weights.safetensors", "SD1.5")
    before, after = merged(unet)
    assert list(adapter.denoiser) == [name for name in model_shapes("SD1.5")[-1] if name in after]
    for name, weight in after.items():
        torch.testing.assert_close(applied(adapter.denoiser[name], before[name]), weight, rtol=1e-4, atol=1e-4)
    assert ("DoRA" in adapter.facts.kinds) == (settings == "DoRA")


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_folder_of_pefts_comes_back_as_peft_merges_it(settings, tmp_path):
    settings = LoraConfig(target_modules=["to_k", "to_q", "conv1"], **SETTINGS[settings])
    model = get_peft_model(copy.deepcopy(pipeline("SD1.5").unet), settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path, "SD1.5")
    base = pipeline("SD1.5").unet
    after = model.merge_and_unload().state_dict()
    before = {name: base.get_submodule(name).weight.detach() for name in model_shapes("SD1.5")[-1]}
    assert adapter.denoiser.keys() == {n for n in before if not torch.equal(after[f"{n}.weight"], before[n])}
    for name, update in adapter.denoiser.items():
        torch.testing.assert_close(applied(update, before[name]), after[f"{name}.weight"], rtol=1e-4, atol=1e-4)


def test_kohyas_dora_is_what_diffusers_converts_to_it(tmp_path):
    """diffusers drops `dora_scale` on loading, but writes it."""
    unet = trained_unet(r=2, lora_alpha=2, use_dora=True)
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    path = write(tmp_path / "lora.safetensors", convert_state_dict_to_kohya(state))
    adapter = read(path, "SD1.5")
    before, after = merged(unet)
    assert adapter.denoiser.keys() == after.keys()
    for name, weight in after.items():
        torch.testing.assert_close(applied(adapter.denoiser[name], before[name]), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_factors_keep_their_dtype_where_it_is_one_to_compute_in(dtype, tmp_path):
    down, up = torch.randn(2, 6).to(dtype), torch.randn(5, 2).to(dtype)
    path = write(tmp_path / "lora.safetensors", {"layer.lora_A.weight": down, "layer.lora_B.weight": up})
    update = read_linear(path, (5, 6))
    kept = {torch.float64: torch.float32, torch.float8_e4m3fn: torch.float16}.get(dtype, dtype)
    assert update.down.dtype == update.up.dtype == kept
    if dtype != torch.float64:
        assert torch.equal(update.down.float(), down.float())


def test_an_alpha_below_zero_turns_the_update_round_as_in_every_tool(tmp_path):
    path = write(tmp_path / "lora.safetensors", {**layer(), "layer.alpha": torch.tensor(-3.0)})
    assert read_linear(path, (5, 6)).scale == -1.5


def layer(rank=2, name="layer", weight=(5, 6)):
    return {f"{name}.lora_A.weight": torch.ones(rank, weight[1]), f"{name}.lora_B.weight": torch.ones(weight[0], rank)}


NAN = torch.tensor(math.nan)
WRONG = {
    "half a pair": ({"layer.lora_A.weight": torch.ones(2, 6)}, "layer: half of LoRA: needs down, up, got down"),
    "alpha alone": ({"layer.alpha": torch.ones(())}, "layer: alpha without the weights that it belongs to"),
    "a tensor twice": (
        {**layer(), "layer.lora_down.weight": torch.ones(2, 6)},
        "one tensor in two spellings: layer.lora_A.weight and layer.lora_down.weight",
    ),
    "a module twice": (
        {**layer(), **layer(name="unet.layer")},
        "denoiser's layer in two spellings: layer and unet.layer",
    ),
    "unknown keys": (
        {**layer(), **{f"other.{n}": torch.ones(1) for n in range(12)}},
        "12 of 14 keys name nothing in this model: other.0.* and 4 more",
    ),
    "a bias": ({**layer(), "layer.diff_b": torch.ones(5)}, "a changed bias is not supported: layer.diff_b"),
    "set_weight": ({"layer.set_weight": torch.ones(5, 6)}, "replaces the model's is not supported: layer.set_weight"),
    "reshape_weight": ({**layer(), "layer.reshape_weight": torch.ones(2)}, "another shape .*: layer.reshape_weight"),
    "a norm": ({"layer.w_norm": torch.ones(5), "layer.b_norm": torch.ones(5)}, "normalisation .*layer.w_norm"),
    "OFT": ({"layer.oft_blocks": torch.ones(2, 2, 2)}, "OFT.* is not supported: layer.oft_blocks"),
    "BOFT": ({"layer.boft_R": torch.ones(2, 2, 2)}, "BOFT.* is not supported: layer.boft_R"),
    "GLoRA": ({"layer.a1.weight": torch.ones(2, 2)}, "GLoRA is not supported: layer.a1.weight"),
    "IA3": ({"layer.weight": torch.ones(6), "layer.on_input": torch.ones(())}, "IA.*3.* supported: layer.on_input"),
    "input-side DoRA": (
        {**layer(), "layer.dora_scale": torch.ones(1, 6)},
        "layer: DoRA over the inputs .*wd_on_output=False.*not supported",
    ),
    "a magnitude's shape": (
        {**layer(), "layer.dora_scale": torch.ones(4, 1)},
        r"1 of 1 modules do not fit this model: layer: dora_scale must be \[5, 1\] .*got \[4, 1\]",
    ),
    "a wrong width": (layer(weight=(5, 7)), r"layer: down must be \[2, 6\], got \[2, 7\]"),
    "a wrong height": (layer(weight=(4, 6)), r"layer: up must be \[5, 2\], got \[4, 2\]"),
    "rank 0": (layer(rank=0), r"down must be \[0, 6\], got \[0, 6\]"),
    "two ranks": (
        {"layer.lora_A.weight": torch.ones(2, 6), "layer.lora_B.weight": torch.ones(5, 3)},
        r"up must be \[5, 2\], got \[5, 3\]",
    ),
    "a scalar": ({"layer.lora_A.weight": torch.ones(()), "layer.lora_B.weight": torch.ones(5, 2)}, "down must be"),
    "NaN": ({**layer(), "layer.lora_A.weight": NAN.expand(2, 6)}, "layer.lora_A.weight holds a NaN or an infinity"),
    "infinity": ({**layer(), "layer.lora_B.weight": torch.full((5, 2), math.inf)}, "layer.lora_B.weight holds a NaN"),
    "alpha NaN": ({**layer(), "layer.alpha": NAN}, "layer.alpha must be finite, got nan"),
    "alpha 0": ({**layer(), "layer.alpha": torch.zeros(())}, "layer.alpha is 0, which kohya's tools read as the rank"),
    "two alphas": ({**layer(), "layer.alpha": torch.ones(2)}, r"alpha must be one number, got \[2\]"),
    "whole numbers": (
        {**layer(), "layer.lora_B.weight": torch.ones(5, 2).long()},
        "floating-point tensor, got torch.int64",
    ),
    "two kinds": (
        {**layer(), "layer.diff": torch.ones(5, 6)},
        "tensors of several kinds for one module: diff, down, up",
    ),
    "nothing": ({}, "must update a module or bring a word"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_by_name(case, tmp_path):
    tensors, message = WRONG[case]
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(LoraFileError, match=f"lora.safetensors: .*{message}"):
        read_linear(path, (5, 6))


def test_a_name_that_could_be_of_either_text_encoder_is_refused(tmp_path):
    shapes = {"encoder.layers.0.mlp.fc1": (5, 6)}
    path = write(tmp_path / "lora.safetensors", layer(name="base_model.model.text_model.encoder.layers.0.mlp.fc1"))
    assert list(read_adapter(path, denoiser={}, text_encoders=[shapes]).text_encoders[0]) == list(shapes)
    with pytest.raises(LoraFileError, match="could be of text_encoder or text_encoder_2, and the name does not say"):
        read_adapter(path, denoiser={}, text_encoders=[shapes, shapes])


@pytest.mark.parametrize(("model", "looks"), [("SDXL", "SDXL"), ("SD 1.5", "Stable Diffusion 1")])
def test_a_file_for_another_base_model_says_which_it_looks_made_for(model, looks, tmp_path):
    other = full_size("SD 1.5" if model == "SDXL" else "SDXL")
    theirs = {name: full_size(model)[name] for name in full_size(model) if name.endswith("attn2.to_k")}
    tensors = {}
    for name, weight in theirs.items():
        tensors |= layer(1, f"unet.{name}", weight)
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(LoraFileError, match=f"(name nothing in|do not fit) this model: .*it looks made for {looks}"):
        read_adapter(path, denoiser=other, text_encoders=[])
    same = {name: other[name] for name in theirs if name in other}
    with pytest.raises(
        LoraFileError, match=rf"{len(same)} of {len(same)} modules do not fit this model: unet\..*down must be"
    ):
        tensors = {key: one for key, one in tensors.items() if key.split(".lora")[0].removeprefix("unet.") in same}
        read_adapter(write(path, tensors), denoiser=other, text_encoders=[])


def raw(header, payload=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + payload


ENTRY = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
DAMAGED = {"layer": (5, 6), "other": (5, 6)}
HOSTILE = {
    "empty": (b"", "no safetensors file: a header of 0 bytes"),
    "a huge header": (struct.pack("<Q", 1 << 62) + b"{}", "does not fit, the file has 10"),
    "cut short": (raw({"layer.lora_A.weight": ENTRY}, b"123"), "take 4 bytes, but 3 follow"),
    "too long": (raw({"layer.lora_A.weight": ENTRY}, b"12345"), "take 4 bytes, but 5 follow"),
    "a huge rank": (
        raw({"layer.lora_A.weight": {**ENTRY, "shape": [1 << 40, 6]}}, b"1234"),
        r"data_offsets \[0, 4\] do not hold",
    ),
    "overlapping": (raw({"a": ENTRY, "b": ENTRY}, b"1234"), "tensor b: overlaps another"),
    "a key twice": (
        raw(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode(), b"1234"),
        "a name occurs twice",
    ),
    "deep": (raw(b"[" * 100_000), ""),
    "a number below zero": (raw({"a": {**ENTRY, "shape": [-1, -1]}}, b"1234"), "shape must be"),
    "an unknown dtype": (raw({"a": {**ENTRY, "dtype": "Q4"}}, b"1234"), "dtype must be one of"),
    "not JSON": (raw(b"\xff{}"), "header is not JSON"),
    "a list": (raw([]), "not a JSON object"),
    "numbers among the texts": (raw({"__metadata__": {"a": 1}}), "must hold texts"),
    "a zip of a pickle": (b"PK\x03\x04" + bytes(100), "a pickle, and reading one runs whatever code"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(100), "a pickle"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("reader", [inspect_adapter, lambda path: read_linear(path, (5, 6))])
def test_hostile_files_are_refused(case, reader, tmp_path):
    path = tmp_path / "lora.safetensors"
    data, message = HOSTILE[case]
    path.write_bytes(data)
    with pytest.raises(LoraFileError, match=f"lora.safetensors: .*{message}"):
        reader(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    tensors = {**layer(), "layer.alpha": torch.ones(()), "layer.dora_scale": torch.ones(5, 1)}
    tensors |= {
        f"other.{name}": one for name, one in {"lokr_w1": torch.ones(5, 2), "lokr_w2": torch.ones(1, 3)}.items()
    }
    whole = bytearray(write(path, tensors, ss_tag_frequency='{"a": {"b": 1}}').read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.sampled_from(b'0123456789"{}[],:._AB\x00\xff'))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for reader in (inspect_adapter, lambda path: read_adapter(path, denoiser=DAMAGED, text_encoders=[])):
        try:
            reader(path)
        except LoraFileError as error:
            assert str(error).startswith(str(path))


def test_a_tensor_of_nothing_and_endless_width_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(raw({"layer.diff": {**ENTRY, "shape": [0, 1 << 62], "data_offsets": [0, 0]}}))
    with pytest.raises(LoraFileError, match=r"diff must be \[5, 6\], got \[0, 4611686018427387904\]"):
        read_linear(path, (5, 6))


def test_pickles_folders_and_pipes_are_refused(tmp_path):
    pickled = tmp_path / "lora.pt"
    torch.save({}, pickled)
    with pytest.raises(LoraFileError, match="a pickle"):
        inspect_adapter(pickled)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(LoraFileError, match="not a regular file"):
        inspect_adapter(tmp_path / "pipe.safetensors")
    with pytest.raises(LoraFileError, match="must hold PEFT's adapter_model.safetensors"):
        inspect_adapter(tmp_path)
    with pytest.raises(FileNotFoundError):
        inspect_adapter(tmp_path / "nowhere.safetensors")


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
WRONG_CONFIGS = {
    "another method": ({**CONFIG, "peft_type": "LOHA"}, "PEFT's 'LOHA' is not supported"),
    "a whole module": ({**CONFIG, "modules_to_save": ["conv_out"]}, "setting modules_to_save = .* is not supported"),
    "an unknown setting": ({**CONFIG, "kasa_config": {"a": 1}}, "setting kasa_config = .* is not supported"),
    "fan_in_fan_out": ({**CONFIG, "fan_in_fan_out": True}, "setting fan_in_fan_out = True is not supported"),
    "biases": ({**CONFIG, "bias": "all"}, "setting bias = 'all' is not supported"),
    "PiSSA": ({**CONFIG, "init_lora_weights": "pissa_niter_4"}, "belongs to weights that the setting changed"),
    "another rank": ({**CONFIG, "r": 3}, "layer: LoRA: PEFT's settings say rank 3, the tensors have 2"),
    "DoRA without magnitudes": (
        {**CONFIG, "use_dora": True},
        "settings say use_dora = True, the file's tensors the opp",
    ),
    "a regular expression": ({**CONFIG, "alpha_pattern": {"(a+)+$": 1}}, "is a regular expression"),
    "no rank": ({**CONFIG, "r": 0}, "r must be a whole number of at least 1, got 0"),
    "a text": ({**CONFIG, "lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
    "not an object": ([], "must be a JSON object"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
@pytest.mark.parametrize("where", ["folder", "header"])
def test_settings_of_pefts_that_change_the_mathematics_are_refused(case, where, tmp_path):
    config, message = WRONG_CONFIGS[case]
    if where == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        write(tmp_path / "adapter_model.safetensors", layer(name="base_model.model.layer"))
        path = tmp_path
    else:
        packed = config if isinstance(config, list) else {f"unet.{name}": value for name, value in config.items()}
        path = tmp_path / "lora.safetensors"
        write(path, layer(name="unet.layer"), lora_adapter_metadata=json.dumps(packed))
    with pytest.raises(LoraFileError, match=message):
        read_linear(path, (5, 6))


def test_what_a_file_says_of_itself_is_read_without_a_model(tmp_path):
    tags = {"10_alice": {"alice cat ": 10, "photo": 12}, "5_more": {"alice cat": 9, "x" * 5000: 1}}
    texts = {
        "ss_tag_frequency": json.dumps(tags),
        "modelspec.trigger_phrase": "alice, in the style of alice",
        "ss_network_dim": "3",
        "ss_training_comment": "y" * 5000,
    }
    path = tmp_path / "lora.safetensors"
    tensors = layer(3, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (640, 2048))
    tensors |= layer(4, "lora_te2_text_model_encoder_layers_0_mlp_fc1", (4, 4))
    tensors |= {"lora_unet_out_2.oft_blocks": torch.ones(1, 2, 2)}
    facts = inspect_adapter(write(path, tensors, **texts))
    assert facts.kinds == ("LoRA",) and facts.base == "SDXL"
    assert facts.layers == {"denoiser": 1, "text_encoder_2": 1}
    assert facts.ranks == {"denoiser": {3: 1}, "text_encoder_2": {4: 1}}
    assert facts.trigger_words[:4] == ("alice", "in the style of alice", "alice cat", "photo")
    assert facts.training["ss_network_dim"] == "3" and len(facts.training["ss_training_comment"]) == 1000
    assert facts.unsupported == ("OFT, an orthogonal change",)


@pytest.mark.parametrize(
    ("tensors", "texts", "base"),
    [
        (layer(1, "unet.down_blocks.0.attn2.to_k", (4, 768)), {}, "Stable Diffusion 1"),
        (layer(1, "unet.down_blocks.0.attn2.to_v", (4, 1024)), {"ss_base_model_version": "x"}, "Stable Diffusion 2"),
        (layer(1, "lora_unet_output_blocks_0_1_attn2_to_k", (4, 2048)), {}, "SDXL"),
        (layer(1, "unet.down_blocks.0.attn1.to_k", (4, 768)), {"ss_base_model_version": "sd_v1"}, "sd_v1"),
        (layer(1, "unet.down_blocks.0.attn1.to_k", (4, 768)), {}, None),
        (layer(1, "lora_te2_text_model_encoder_layers_0_mlp_fc1", (4, 768)), {}, "SDXL"),
    ],
)
def test_the_base_model_is_told_by_the_layers_first(tensors, texts, base, tmp_path):
    assert inspect_adapter(write(tmp_path / "lora.safetensors", tensors, **texts)).base == base


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", '{"a": {"b": "c"}}', "[]", '{"a": 1}'])
def test_damaged_tags_cost_the_words_and_nothing_else(text, tmp_path):
    path = write(tmp_path / "lora.safetensors", layer(), ss_tag_frequency=text)
    assert inspect_adapter(path).trigger_words == ()


def test_facts_come_with_the_adapter_and_updates_are_in_the_models_order(tmp_path):
    path, _ = written(tmp_path / "lora.safetensors", "kohya", "SDXL")
    tensors = load_file(path)
    adapter = read(write(path, dict(reversed(tensors.items())), ss_base_model_version="sdxl"), "SDXL")
    assert list(adapter.denoiser) == list(model_shapes("SDXL")[-1])
    assert adapter.facts == inspect_adapter(path)
    assert adapter.facts.kinds == ("LoCon", "LoRA")
