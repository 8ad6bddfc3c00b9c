"""The base model's fingerprint: the same through casts and adapters, another for another model."""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from keylock_diffusers.concepts import BaseModel, Concept, TextEncoderInfo
from keylock_diffusers.denoisers.unet import base_layer, cross_attention_layers


def make_pipe(seed=0, width=32, hidden=32, vocab=1000):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=hidden,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    )
    return SimpleNamespace(unet=unet, text_encoder=text_encoder)


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def test_layers_come_in_unet_order(pipe):
    layers = cross_attention_layers(pipe.unet)
    blocks = [name.split(".")[0] for name in layers]
    assert blocks == ["down_blocks"] * 2 + ["mid_block"] + ["up_blocks"] * 4
    assert all(name.endswith("attn2") and pipe.unet.get_submodule(name) is attn for name, attn in layers.items())
    base = BaseModel.of(pipe)
    assert [width for _, width in base.layers] == [32, 64, 64, 64, 64, 32, 32]
    assert base.cross_attention_dim == 32
    assert base.text_encoders == (TextEncoderInfo("CLIPTextModel", 32, 2, 1000),)
    assert BaseModel.from_json(json.loads(json.dumps(base.to_json()))) == base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_cast_keeps_the_hash(pipe, dtype):
    cast = copy.deepcopy(pipe)
    for model in (cast.unet, cast.text_encoder):
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    assert BaseModel.of(cast) == BaseModel.of(pipe)


def test_a_fine_tune_has_another_hash(pipe):
    for part in ("unet", "text_encoder"):
        tuned = copy.deepcopy(pipe)
        for weight in getattr(tuned, part).parameters():
            weight.data += 0.01 * weight.data.std(unbiased=False) * torch.randn_like(weight)
        assert BaseModel.of(tuned).other_weights(BaseModel.of(pipe))
    assert BaseModel.of(make_pipe()) == BaseModel.of(pipe) != BaseModel.of(make_pipe(seed=1))


def test_the_hash_is_never_stale():
    pipe = make_pipe()
    before = BaseModel.of(pipe)
    attn = next(iter(cross_attention_layers(pipe.unet).values()))
    attn.to_v.weight.data.neg_()
    assert BaseModel.of(pipe).other_weights(before)


def test_a_loaded_lora_changes_nothing(pipe):
    peft = pytest.importorskip("peft")
    adapted = copy.deepcopy(pipe)
    adapted.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapted.text_encoder
    )
    attn = next(iter(cross_attention_layers(adapted.unet).values()))
    assert base_layer(attn.to_v) is not attn.to_v
    assert BaseModel.of(adapted) == BaseModel.of(pipe)


def test_a_compiled_unet_changes_nothing(pipe):
    compiled = SimpleNamespace(unet=torch.compile(pipe.unet), text_encoder=torch.compile(pipe.text_encoder))
    assert BaseModel.of(compiled) == BaseModel.of(pipe)


def test_weights_that_are_elsewhere_never_differ(pipe, concept_for):
    offloaded = copy.deepcopy(pipe)
    offloaded.unet.to("meta")
    base = BaseModel.of(offloaded)
    assert base.weights_hash == "" and base.layers == BaseModel.of(pipe).layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept_for(BaseModel.of(pipe)).check(offloaded, strict=True)


def test_added_tokens_are_no_other_encoder(pipe, concept_for):
    grown = copy.deepcopy(pipe)
    grown.text_encoder.resize_token_embeddings(1003)
    base = BaseModel.of(grown)
    assert base.text_encoders[0].vocab_size == 1003
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept_for(BaseModel.of(pipe)).check(base, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, "7 layers of another width, such as down_blocks.0.*attn2: 32 there, 16 here"),
        ({"hidden": 16}, "text encoder 0: hidden_size 32 there, 16 here; cross_attention_dim 32 there, 16 here"),
        ({"vocab": 500}, "text encoder 0: vocab_size 1000 there, 500 here"),
    ],
)
def test_another_base_is_refused(pipe, changes, message, tmp_path, concept_for):
    concept = concept_for(BaseModel.of(pipe))
    concept.save(tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match=f"<alice-cat> was made for another base model: {message}"):
        Concept.load(tmp_path / "cat.safetensors", pipe=make_pipe(**changes))


def test_another_set_of_encoders_or_layers_is_refused(pipe, concept_for):
    concept = concept_for(BaseModel.of(pipe))
    two = SimpleNamespace(unet=pipe.unet, text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder)
    with pytest.raises(ValueError, match="1 text encoders there, 2 here"):
        concept.check(two)
    base = BaseModel.of(pipe)
    shorter = BaseModel(base.text_encoders, base.layers[1:], base.cross_attention_dim)
    with pytest.raises(ValueError, match="1 cross-attention layers missing here, such as down_blocks.0"):
        concept.check(shorter)


def test_other_weights_warn_once(pipe, concept_for):
    concept, tuned = concept_for(BaseModel.of(pipe), seed=7), BaseModel.of(make_pipe(seed=1))
    with pytest.raises(ValueError, match="other weights"):
        concept.check(tuned, strict=True)
    with pytest.warns(UserWarning, match="<alice-cat> was made for a base model with other weights"):
        concept.check(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept.check(tuned)
        Concept.load(concept.to_bytes(), pipe=tuned)
    with pytest.warns(UserWarning):
        concept.with_(beta=0.6).check(tuned)
    with pytest.raises(ValueError, match="strict=True needs the pipe"):
        Concept.load(concept.to_bytes(), strict=True)


def test_what_has_no_unet_is_refused(pipe):
    with pytest.raises(TypeError, match="pipeline with a U-Net"):
        BaseModel.of(SimpleNamespace(transformer=None))
    with pytest.raises(TypeError, match="no text encoder"):
        BaseModel.of(SimpleNamespace(unet=pipe.unet))


def test_size_on_stable_diffusion_1_5(concept_for):
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    base = BaseModel.of(SimpleNamespace(unet=unet, text_encoder=text_encoder))
    assert (len(base.layers), base.values_width, base.cross_attention_dim) == (16, 12480, 768)
    assert base.text_encoders == (TextEncoderInfo("CLIPTextModel", 768, 12, 49408),)
    recorded = BaseModel(base.text_encoders, base.layers, base.cross_attention_dim, "f" * 32)
    concept = concept_for(
        recorded,
        super_class="teddy bear",
        covariance={"captions": 100000, "captions_sha256": "0" * 64, "positions": "bos..eos", "ridge": 0.001},
        training={"steps": 400, "batch": 16, "learning_rates": [0.03, 0.006], "beta": 0.75, "tau": 0.1, "seed": 12345},
    )
    assert concept.nbytes <= 36 * 1024
