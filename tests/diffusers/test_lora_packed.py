"""Packed adapters: exactly what was read, without a copy; what is damaged or foreign is nothing."""

import json
import os
import struct

import pytest
import torch

from keylock_diffusers.loras import Adapter, AdapterFacts, LearnedWord, LowRank, ModelShapes, packed
from keylock_diffusers.loras.packed import packed_key, read_packed, write_packed
from tests.diffusers.lora_files import model_shapes, pairs, read, write

FACTS = AdapterFacts(
    ("DoRA", "LoRA"),
    "SDXL",
    {"denoiser": 3},
    {"denoiser": {2: 1, 3: 2}},
    ("kätzchen", "a, b"),
    ("<w>",),
    {"ss_name": "style"},
    ("OFT",),
)


def shapes_of(model="SD1.5"):
    found = dict(model_shapes(model))
    return ModelShapes(found.pop(-1), tuple(found.values()))


def mixed():
    """Every dtype, a convolution, magnitudes, a truncation, two encoders and words."""

    def update(inner, outer, rank, dtype, **more):
        return LowRank(torch.randn(rank, *inner).to(dtype), torch.randn(outer, rank).to(dtype), **more)

    denoiser = {
        "z.half": update((6,), 5, 2, torch.float16, scale=1 / 3),
        "a.wide": update((6,), 7, 3, torch.float32, scale=-0.1, residual=0.125),
        "b.conv": update((3, 2, 2), 5, 2, torch.bfloat16, magnitude=torch.rand(5)),
    }
    encoders = ({}, {"q": update((4,), 4, 1, torch.float16, magnitude=torch.rand(4))})
    word = LearnedWord("<w>", (torch.randn(2, 6), torch.randn(2, 8).half()))
    return Adapter(denoiser, encoders, {"<w>": word}, FACTS)


def same(one, other):
    """Bit for bit, orders included."""
    for ours, theirs in zip((one.denoiser, *one.text_encoders), (other.denoiser, *other.text_encoders), strict=True):
        assert list(ours) == list(theirs)
        for a, b in zip(ours.values(), theirs.values(), strict=True):
            assert (a.scale, a.residual, a.rank) == (b.scale, b.residual, b.rank)
            tensors = ((a.up, b.up), (a.down, b.down), *(((a.magnitude, b.magnitude),) * (b.magnitude is not None)))
            assert (a.magnitude is None) == (b.magnitude is None)
            assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)
    assert list(one.words) == list(other.words)
    for a, b in zip(one.words.values(), other.words.values(), strict=True):
        assert a.name == b.name
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.vectors, b.vectors, strict=True))
    assert one.facts == other.facts
    return True


def test_what_is_packed_comes_back_bit_for_bit(tmp_path):
    path, adapter = tmp_path / "folder" / "packed.safetensors", mixed()
    write_packed(path, adapter, "key")
    found = read_packed(path, "key")
    assert same(found, adapter) and same(read_packed(path, "key"), adapter)
    assert all(update.up.t().is_contiguous() and update.down.is_contiguous() for update in found.denoiser.values())
    assert os.listdir(path.parent) == ["packed.safetensors"]
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("model", ["SD1.5", "SDXL"])
def test_a_file_that_was_read_comes_back_bit_for_bit(model, tmp_path):
    prefix = ("unet.", "text_encoder.", "text_encoder_2.")
    tensors = {}
    for (component, name), pair in pairs(model).items():
        tensors[f"{prefix[component + 1]}{name}.lora_A.weight"] = pair.down
        tensors[f"{prefix[component + 1]}{name}.lora_B.weight"] = pair.stored_up()
        tensors[f"{prefix[component + 1]}{name}.alpha"] = torch.tensor(3.0)
    adapter = read(write(tmp_path / "lora.safetensors", tensors, ss_name="style"), model)
    write_packed(tmp_path / "packed", adapter, "key")
    assert same(read_packed(tmp_path / "packed", "key"), adapter)


def test_words_alone_are_packed_too(tmp_path):
    adapter = Adapter({}, (), {"<w>": LearnedWord("<w>", (torch.ones(1, 4),))})
    write_packed(tmp_path / "packed", adapter, "key")
    assert same(read_packed(tmp_path / "packed", "key"), adapter)


def test_tensors_are_views_of_the_file_and_writing_changes_it_not(tmp_path):
    path, adapter = tmp_path / "packed", mixed()
    write_packed(path, adapter, "key")
    before = path.read_bytes()
    found = read_packed(path, "key")
    storages = {update.up.untyped_storage().data_ptr() for update in found.denoiser.values()}
    storages |= {update.down.untyped_storage().data_ptr() for update in found.denoiser.values()}
    assert len(storages) == 1
    found.denoiser["z.half"].up.zero_()
    assert path.read_bytes() == before
    os.unlink(path)
    kept = found.denoiser["a.wide"]
    assert torch.equal(kept.up, adapter.denoiser["a.wide"].up) and torch.isfinite(kept.down).all()


def test_numbers_are_not_looked_at_again(tmp_path, monkeypatch):
    from keylock_diffusers.loras import adapter as module

    made = Adapter({"layer": LowRank(torch.ones(2, 3), torch.ones(4, 2))})
    write_packed(tmp_path / "packed", made, "key")
    monkeypatch.setattr(module, "_finite", lambda *_: pytest.fail("looked at"))
    assert read_packed(tmp_path / "packed", "key").denoiser["layer"].rank == 2


def test_the_hash_is_checked_once_and_again_when_the_file_changed(tmp_path, monkeypatch):
    path, hashed, sha256 = tmp_path / "packed", [], packed.hashlib.sha256
    for content in (mixed(), Adapter({"layer": LowRank(torch.ones(2, 3), torch.ones(4, 2))})):
        write_packed(path, content, "key")
        with monkeypatch.context() as patch:
            patch.setattr(packed.hashlib, "sha256", lambda data: hashed.append(1) or sha256(data))
            for _ in range(3):
                assert same(read_packed(path, "key"), content)
    assert len(hashed) == 2


def test_a_file_of_something_else_is_nothing(tmp_path):
    path = tmp_path / "packed"
    assert read_packed(path, "key") is None
    write_packed(path, mixed(), "key")
    assert read_packed(path, "another key") is None
    write(path, {"layer.lora_A.weight": torch.ones(2, 3)})
    assert read_packed(path, "key") is None
    write(path, {"float32": torch.ones(2)}, keylock_adapter="[]", sha256="0" * 64)
    assert read_packed(path, "key") is None
    path.unlink()
    path.mkdir()
    assert read_packed(path, "key") is None
    os.mkfifo(tmp_path / "pipe")
    assert read_packed(tmp_path / "pipe", "key") is None


def test_every_byte_counts(tmp_path):
    path = tmp_path / "packed"
    write_packed(path, mixed(), "key")
    data = path.read_bytes()
    (header,) = struct.unpack_from("<Q", data)
    for place in [*range(0, header + 8, 7), *range(header + 8, len(data), 11), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert read_packed(path, "key") is None, place
    for end in (0, 7, header, header + 9, len(data) - 1):
        path.write_bytes(data[:end])
        assert read_packed(path, "key") is None, end
    path.write_bytes(data + b"\0")
    assert read_packed(path, "key") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('["float16",[2,5],true,1]', '["float16",[2,9],true,1]'),  # more than there is
        ('["float16",[2,5],true,1]', '["float16",[2,5],true,2]'),
        ('["float16",[2,5],true,1]', '["float16",[2,3],true,1]'),  # less
        ('["float16",[2,5],true,1]', '["float16",[2,5],true,0]'),
        ('["float16",[2,5],true,1]', '["float17",[2,5],true,1]'),
        ('["float16",[2,5],true,1]', '["float16",[-2,-5],true,1]'),
        ('["float16",[2,5],true,1]', "[]"),
        ('["float16",[2,5],true,1]', "7"),
        ('["z.half",0,', '["z.half",99,'),
        ('["z.half",0,', '["z.half","a",'),
        ('"updates":', '"update":'),
        ('"facts":{', '"facts":{"other":1,'),
        ('"ranks":{', '"ranks":{"x":7,'),
    ],
)
def test_a_file_with_a_right_hash_and_a_wrong_index_is_nothing(old, new, tmp_path, monkeypatch):
    class Forger:
        """Stands for json in the module that writes the index."""

        @staticmethod
        def dumps(fields, **options):
            text = json.dumps(fields, **options)
            assert old in text
            return text.replace(old, new, 1)

    monkeypatch.setattr(packed, "json", Forger)
    write_packed(tmp_path / "packed", mixed(), "key")
    assert read_packed(tmp_path / "packed", "key") is None


def test_a_key_is_of_everything_that_a_packed_adapter_is_made_of():
    model, other = ModelShapes({"a": (2, 3), "b": (4, 5)}), ModelShapes({"a": (2, 3), "b": (4, 6)})
    keys = {
        packed_key("1", model, None),
        packed_key("2", model, None),
        packed_key("1", other, None),
        packed_key("1", ModelShapes({"a": (2, 3)}, ({"b": (4, 5)},)), None),
        packed_key("1", ModelShapes({"b": (4, 5), "a": (2, 3)}), None),
        packed_key("1", model, 0.0),
        packed_key("1", model, 0.1),
    }
    assert len(keys) == 7
    assert packed_key("1", ModelShapes({"a": (2, 3), "b": (4, 5)}), 0.1) == packed_key("1", model, 0.1)


def test_shapes_are_those_of_a_pipelines_linears_and_convolutions():
    from tests.diffusers.lora_files import pipeline

    for model in ("SD1.5", "SDXL"):
        found = ModelShapes.of(pipeline(model))
        assert found.components == model_shapes(model) and list(found.denoiser) == list(model_shapes(model)[-1])
        assert found.fingerprint == shapes_of(model).fingerprint
    with pytest.raises(ValueError, match="neither a U-Net nor a transformer"):
        ModelShapes.of(object())
