"""Embedding files of textual inversion: every tool's layout, alone and within a LoRA file."""

import copy
import math

import pytest
import torch

from keylock_diffusers.loras import LoraFileError, inspect_adapter, read_adapter, read_embedding
from tests.diffusers.lora_files import pipeline, read, write

ONE, SEVERAL = torch.arange(6.0), torch.arange(18.0).reshape(3, 6)
LARGE, LARGER = torch.arange(8.0).reshape(2, 4), torch.arange(12.0).reshape(2, 6)

# tensors, widths, the word's name, its vectors
LAYOUTS = {
    "diffusers, one vector": ({"<alice-cat>": ONE}, [6], "<alice-cat>", [ONE[None]]),
    "diffusers, several": ({"<alice-cat>": SEVERAL}, [6], "<alice-cat>", [SEVERAL]),
    "A1111 and kohya": ({"emb_params": SEVERAL}, [6], "alice", [SEVERAL]),
    "A1111's parameters": ({"string_to_param.*": SEVERAL}, [6], "alice", [SEVERAL]),
    "SDXL": ({"clip_g": LARGER, "clip_l": LARGE}, [4, 6], "alice", [LARGE, LARGER]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_layout_gives_its_vectors(layout, dtype, tmp_path):
    tensors, widths, name, vectors = LAYOUTS[layout]
    path = write(tmp_path / "alice.safetensors", {key: one.to(dtype) for key, one in tensors.items()})
    word = read_embedding(path, widths)
    assert word.name == name and len(word.vectors) == len(vectors)
    for ours, theirs in zip(word.vectors, vectors, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("layout", ["diffusers, one vector", "diffusers, several", "A1111 and kohya"])
def test_diffusers_reads_the_same_vectors(layout, tmp_path):
    tensors, *_ = LAYOUTS[layout]
    pipe = copy.deepcopy(pipeline("SD1.5"))
    width = pipe.text_encoder.config.hidden_size
    stored = {key: torch.randn(*one.shape[:-1], width) for key, one in tensors.items()}
    path = write(tmp_path / "alice.safetensors", stored)
    word = read_embedding(path, [width])
    pipe.load_textual_inversion(path.parent, weight_name=path.name, token=None if "<" in word.name else word.name)
    tokens = [word.name, *(f"{word.name}_{n}" for n in range(1, len(word.vectors[0])))]
    rows = pipe.tokenizer.convert_tokens_to_ids(tokens)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[rows], word.vectors[0])


def bundled(layout, name="alice.cat"):
    tensors, *_ = LAYOUTS[layout]
    return {f"bundle_emb.{name}.{key}": one for key, one in tensors.items()}


@pytest.mark.parametrize("layout", ["A1111 and kohya", "A1111's parameters", "SDXL"])
def test_words_within_a_lora_file_are_read_with_it(layout, tmp_path):
    _, widths, _, vectors = LAYOUTS[layout]
    encoders = [{"encoder.layers.0.self_attn.k_proj": (5, width)} for width in widths]
    path = write(tmp_path / "lora.safetensors", bundled(layout))
    adapter = read_adapter(path, denoiser={}, text_encoders=encoders)
    assert adapter.facts.words == inspect_adapter(path).words == ("alice.cat",)
    for ours, theirs in zip(adapter.words["alice.cat"].vectors, vectors, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model", ["SD1.5", "SDXL"])
def test_the_width_of_a_models_words_is_found(model, tmp_path):
    pipe = pipeline(model)
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if model == "SDXL" else [])
    widths = [encoder.config.hidden_size for encoder in encoders]
    layouts = ["clip_l", "clip_g"] if model == "SDXL" else ["emb_params"]
    tensors = {f"bundle_emb.word.{key}": torch.ones(2, width) for key, width in zip(layouts, widths, strict=True)}
    assert len(read(write(tmp_path / "lora.safetensors", tensors), model).words["word"].vectors) == len(widths)


WRONG = {
    "another width": ({"<a>": ONE}, [8], r"'<a>' must have vectors .* of the widths \[8\].*got \[\[6\]\]"),
    "one encoder of two": ({"<a>": ONE}, [6, 8], r"of the widths \[6, 8\]"),
    "two encoders of one": ({"clip_l": LARGE, "clip_g": LARGER}, [4], r"of the widths \[4\]"),
    "half": ({"clip_l": LARGE}, [4, 6], r"of the widths \[4, 6\]"),
    "unlike counts": ({"clip_l": LARGE, "clip_g": torch.ones(3, 6)}, [4, 6], r"as many vectors .*got \[2, 3\]"),
    "two words": ({"<a>": ONE, "<b>": ONE}, [6], "must hold one tensor, or clip_l and clip_g, got 2: <a>, <b>"),
    "nothing": ({}, [6], "got 0"),
    "no vector": ({"<a>": torch.ones(0, 6)}, [6], "must not be empty"),
    "no width": ({"<a>": torch.ones(1, 0)}, [6], "must have vectors"),
    "a scalar": ({"<a>": torch.ones(())}, [6], "must have vectors"),
    "three dimensions": ({"<a>": torch.ones(1, 1, 6)}, [6], "must have vectors"),
    "NaN": ({"<a>": ONE * math.nan}, [6], "<a> holds a NaN or an infinity"),
    "whole numbers": ({"<a>": ONE.long()}, [6], "must be a floating-point tensor"),
    "an unprintable name": ({"a\x1b[2J": ONE}, [6], "must be called by at most 200 printable characters"),
    "a name without end": ({"a" * 1000: ONE}, [6], "must be called by at most 200 printable characters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_by_name(case, tmp_path):
    tensors, widths, message = WRONG[case]
    with pytest.raises(LoraFileError, match=f"alice.safetensors: .*{message}"):
        read_embedding(write(tmp_path / "alice.safetensors", tensors), widths)


def test_pickles_are_refused_by_name_and_by_content(tmp_path):
    for name in ("alice.pt", "alice.bin", "alice.safetensors"):
        torch.save({"string_to_param": {"*": ONE}}, tmp_path / name)
        with pytest.raises(LoraFileError, match="a pickle, and reading one runs whatever code"):
            read_embedding(tmp_path / name, [6])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bundle_emb.word.momentum": ONE}, "1 of 1 keys name nothing in this model: bundle_emb.word.momentum"),
        ({"bundle_emb.emb_params": ONE}, "keys name nothing"),
        ({**bundled("A1111 and kohya"), **bundled("A1111's parameters")}, "has the layouts .*expected one"),
        (bundled("SDXL"), r"'alice.cat' must have vectors"),
    ],
)
def test_a_word_within_a_lora_file_is_understood_or_refused(tensors, message, tmp_path):
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(LoraFileError, match=message):
        read_adapter(path, denoiser={}, text_encoders=[{"encoder.layers.0.self_attn.k_proj": (6, 6)}])
