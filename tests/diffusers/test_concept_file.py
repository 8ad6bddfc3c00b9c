"""Concept files: what is saved comes back, what does not fit is refused, and no file can do harm."""

import copy
import io
import json
import os
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from keylock_diffusers.concepts import (
    BaseModel,
    Concept,
    ConceptFileError,
    KeyLockedConcept,
    TextEncoderInfo,
)
from keylock_diffusers.concepts.files import pack, read_header, read_tensors

BASE = BaseModel(
    text_encoders=(
        TextEncoderInfo("CLIPTextModel", 6, 2, 100),
        TextEncoderInfo("CLIPTextModelWithProjection", 3, 1, 100),
    ),
    layers=(("down_blocks.0.attn2", 4), ("mid_block.attn2", 7)),
    cross_attention_dim=5,
    weights_hash="0123abcd",
)


def make_concept(base=BASE, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return torch.randn(size, generator=generator)

    target_input = draw(base.cross_attention_dim)
    metric = target_input * (draw(base.cross_attention_dim).abs() + 0.5)  # a diagonal C^-1
    energy = float(metric @ target_input)
    fields = {
        "placeholder": "<alice-cat>",
        "super_class": "cat",
        "target_input": target_input,
        "energy": energy,
        "direction": metric / energy,
        "super_class_encoding": draw(base.cross_attention_dim),
        "word_embeddings": tuple(draw(encoder.hidden_size) for encoder in base.text_encoders),
        "values": draw(base.values_width),
        "base": base,
        "covariance": {"captions": 512, "positions": "bos..eos", "ridge": 1e-3},
        "training": {"steps": 400, "learning_rates": [0.03, 0.006], "loss": None},
    }
    return KeyLockedConcept(**{**fields, **changes})


CONCEPT = make_concept()
DATA = CONCEPT.to_bytes()
FIELDS = read_header(DATA, "test").fields
TENSORS = read_tensors(DATA, read_header(DATA, "test"), "test")
HEADER_BYTES = struct.unpack_from("<Q", DATA)[0]


def with_header(edit):
    """The file with its header changed and nothing else."""
    header = json.loads(DATA[8 : 8 + HEADER_BYTES])
    edit(header)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + DATA[8 + HEADER_BYTES :]


def refused_or_equal(data):
    """The promise of every fuzz test: a file gives the concept that was saved, or a ConceptFileError."""
    try:
        concept = Concept.load(data)
    except ConceptFileError as error:
        assert str(error).startswith("concept file: ")
        return
    assert concept.digest == CONCEPT.digest


# What is saved comes back


def test_round_trip(tmp_path):
    path = tmp_path / "cat.safetensors"
    size = CONCEPT.save(path)
    loaded = Concept.load(path)
    assert size == path.stat().st_size == CONCEPT.nbytes
    assert path.read_bytes() == loaded.to_bytes() == DATA
    assert loaded.digest == CONCEPT.digest and loaded.base == BASE
    for name in ("placeholder", "super_class", "energy", "beta", "tau", "covariance", "training"):
        assert getattr(loaded, name) == getattr(CONCEPT, name)
    for name in ("target_input", "direction", "super_class_encoding", "values"):
        assert torch.equal(getattr(loaded, name), getattr(CONCEPT, name))
    assert all(map(torch.equal, loaded.word_embeddings, CONCEPT.word_embeddings))
    assert loaded.target_input.dtype == loaded.direction.dtype == torch.float32
    assert loaded.values.dtype == loaded.super_class_encoding.dtype == torch.float16


def test_the_file_is_plain_safetensors(tmp_path):
    CONCEPT.save(tmp_path / "cat.safetensors")
    with safe_open(tmp_path / "cat.safetensors", "pt") as file:
        assert set(file.keys()) == TENSORS.keys()
        assert torch.equal(file.get_tensor("values"), CONCEPT.values)


def test_values_per_layer_are_views():
    parts = CONCEPT.values_per_layer()
    assert list(parts) == ["down_blocks.0.attn2", "mid_block.attn2"]
    assert torch.equal(torch.cat(list(parts.values())), CONCEPT.values)
    assert all(
        part.untyped_storage().data_ptr() == CONCEPT.values.untyped_storage().data_ptr() for part in parts.values()
    )


def test_a_concept_keeps_copies():
    mean = CONCEPT.target_input.clone()
    facts = {"losses": [1.0]}
    concept = CONCEPT.with_(target_input=mean, training=facts)
    mean.zero_()
    facts["losses"].append(2.0)
    assert torch.equal(concept.target_input, CONCEPT.target_input)
    assert concept.training == {"losses": [1.0]}
    assert concept.digest != CONCEPT.digest and copy.deepcopy(concept).digest == concept.digest


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    CONCEPT.save(path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_concept(seed=1).save(path)
    assert path.read_bytes() == DATA
    assert os.listdir(tmp_path) == ["cat.safetensors"]


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Concept.load(tmp_path / "none.safetensors")


# What a concept may be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder": "<Alice-Cat>"}, "write <alice-cat>"),
        ({"placeholder": "alice"}, "must look like <alice-cat>"),
        ({"placeholder": "<-a>"}, "must look like"),
        ({"placeholder": "<a>\n"}, "must look like"),
        ({"placeholder": f"<{'a' * 63}>"}, "at most 64"),
        ({"placeholder": None}, "must be a string, got NoneType"),
        ({"super_class": " cat"}, "super_class must be one or more words"),
        ({"super_class": ""}, "super_class must be one or more words"),
        ({"super_class": "a <b>"}, "must not hold a placeholder"),
        ({"target_input": torch.zeros(4)}, r"target_input must be \[5\], got \[4\]"),
        ({"target_input": [0.0] * 5}, "must be a floating-point tensor, got list"),
        ({"values": torch.zeros(11, dtype=torch.int64)}, "got torch.int64 tensor"),
        ({"values": torch.full((11,), 1e6)}, "values torch.float16 cannot hold"),
        ({"values": torch.full((11,), float("nan"))}, "must be finite, got NaN"),
        ({"word_embeddings": (torch.zeros(6),)}, "one per text encoder, 2, got 1"),
        ({"word_embeddings": (torch.zeros(6), torch.zeros(6))}, r"word_embeddings\[1\] must be \[3\], got \[6\]"),
        ({"energy": 0.0}, "energy must be positive"),
        ({"energy": float("inf")}, "energy must be finite"),
        ({"energy": 10**400}, "energy must be finite"),
        ({"energy": True}, "energy must be a number, got bool"),
        ({"tau": float("nan")}, "tau must be finite"),
        ({"direction": torch.ones(5)}, r"direction . target_input must be 1, got"),
        ({"training": {"loss": float("nan")}}, "training must be JSON"),
        ({"training": {"log": "x" * 70000}}, "training must be at most 65536 bytes"),
        ({"covariance": [1]}, "covariance must be a mapping, got list"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_concept(**changes)


def test_the_base_must_be_a_base_model():
    with pytest.raises(TypeError, match="base must be a BaseModel, got dict"):
        CONCEPT.with_(base={})


@pytest.mark.parametrize(
    "changes", [{"tau": 0}, {"tau": -0.1}, {"super_class": "teddy bear"}, {"super_class": "Kätzchen"}]
)
def test_unusual_but_valid(changes):
    assert Concept.load(make_concept(**changes).to_bytes()).super_class == changes.get("super_class", "cat")


# Damaged and hostile files


def test_truncation_at_every_byte():
    for length in range(len(DATA)):
        with pytest.raises(ConceptFileError):
            Concept.load(DATA[:length])
    with pytest.raises(ConceptFileError, match="follow the header"):
        Concept.load(DATA + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(DATA) * 8 - 1), min_size=1, max_size=4, unique=True))
def test_flipped_bits(bits):
    data = bytearray(DATA)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    refused_or_equal(data)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(DATA)))
def test_lying_header_length(length):
    refused_or_equal(struct.pack("<Q", length) + DATA[8:])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(data):
    refused_or_equal(data)
    refused_or_equal(struct.pack("<Q", len(data)) + data)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F16", "F32", "F64", "BF16", "I64", "../../etc/passwd", "<a>", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*TENSORS, "__metadata__", "new"]),
    st.sampled_from(["dtype", "shape", "data_offsets", None]),
    json_values,
)
def test_lying_tensor_entries(name, part, value):
    def edit(header):
        if part is None or name not in header:
            header[name] = value
        else:
            header[name][part] = value

    refused_or_equal(with_header(edit))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*FIELDS, "new"]), json_values)
def test_fields_of_any_type(name, value):
    """Fields that a checksum vouches for are judged too: the concept is valid or the file is refused."""
    try:
        data = pack({**FIELDS, name: value}, TENSORS)
    except ValueError:
        return  # not JSON
    try:
        concept = Concept.load(data)
    except ConceptFileError:
        return
    assert Concept.load(concept.to_bytes()).digest == concept.digest


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*FIELDS["base"], "new"]), st.integers(0, 3), json_values)
def test_base_of_any_type(name, depth, value):
    base = copy.deepcopy(FIELDS["base"])
    if name == "layers" and isinstance(value, str) and depth:
        base[name] += value
    elif depth == 0 or not isinstance(base.get(name), list):
        base[name] = value
    elif depth == 1:
        base[name][0] = value
    else:
        base[name][0][depth - 2] = value
    try:
        data = pack({**FIELDS, "base": base}, TENSORS)
    except ValueError:
        return
    try:
        concept = Concept.load(data)
    except ConceptFileError:
        return
    assert Concept.load(concept.to_bytes()).digest == concept.digest


@pytest.mark.parametrize("name", sorted(TENSORS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensors(name, value):
    tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
    tensors[name][-1] = value
    with pytest.raises(ConceptFileError, match="must be finite"):
        Concept.load(pack(FIELDS, tensors))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 4}, "format_version must be 1 or 2 or 3, which this release reads, got 4"),
        ({"format_version": 2}, "the fields must be .*missing or unknown: "),
        ({"format_version": True}, "format_version must be 1"),
        ({"format_version": None}, "format_version must be 1"),
        ({"colour": "red"}, "missing or unknown: \\['colour'\\]"),
        ({"energy": "1"}, "energy must be a number, got str"),
        ({"base": []}, "base must be an object"),
        ({"base": {**FIELDS["base"], "layers": "a=4  b=7"}}, "layers must be name=width"),
        ({"base": {**FIELDS["base"], "layers": "a=4 a=7"}}, "layers must have distinct names"),
        ({"base": {**FIELDS["base"], "layer_suffix": "/.."}}, "a layer's name must be dotted words"),
        ({"placeholder": "<../..>"}, "placeholder must look like"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConceptFileError, match=message):
        Concept.load(pack({**FIELDS, **fields}, TENSORS))


def test_missing_extra_and_misshapen_tensors():
    fewer = {name: tensor for name, tensor in TENSORS.items() if name != "values"}
    with pytest.raises(ConceptFileError, match="missing or unknown: \\['values'\\]"):
        Concept.load(pack(FIELDS, fewer))
    with pytest.raises(ConceptFileError, match="missing or unknown: \\['../evil'\\]"):
        Concept.load(pack(FIELDS, {**TENSORS, "../evil": torch.zeros(1)}))
    with pytest.raises(ConceptFileError, match=r"tensor values must be F16 \[11\], got F16 \[12\]"):
        Concept.load(pack(FIELDS, {**TENSORS, "values": torch.zeros(12, dtype=torch.float16)}))
    with pytest.raises(ConceptFileError, match=r"tensor direction must be F32 \[5\], got F16 \[5\]"):
        Concept.load(pack(FIELDS, {**TENSORS, "direction": torch.zeros(5, dtype=torch.float16)}))


def test_huge_shapes_allocate_nothing():
    huge = with_header(lambda header: header["values"].update(shape=[1 << 50], data_offsets=[0, 1 << 51]))
    many = {**FIELDS, "base": {**FIELDS["base"], "cross_attention_dim": 1 << 24}}
    long_header = struct.pack("<Q", 1 << 62) + DATA[8:]
    nested = b'{"a":' * 100_000
    for data in (huge, pack(many, TENSORS), long_header, struct.pack("<Q", len(nested)) + nested):
        tracemalloc.start()
        with pytest.raises(ConceptFileError):
            Concept.load(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(data) + (1 << 18)


def test_names_that_occur_twice():
    text = DATA[8 : 8 + HEADER_BYTES].decode().rstrip()
    entry = json.dumps(json.loads(text)["values"])
    doubled = f'{text[:-1]},"values":{entry}}}'.encode()
    with pytest.raises(ConceptFileError, match="occurs twice"):
        Concept.load(struct.pack("<Q", len(doubled)) + doubled + DATA[8 + HEADER_BYTES :])


def test_other_files_are_refused(tmp_path):
    pickled = io.BytesIO()
    torch.save({"values": CONCEPT.values}, pickled)
    with pytest.raises(ConceptFileError, match="does not fit"):
        Concept.load(pickled.getvalue())
    with pytest.raises(ConceptFileError, match="not a regular file"):
        Concept.load(tmp_path)
    large = tmp_path / "large.safetensors"
    with open(large, "wb") as stream:
        stream.truncate(17 << 20)
    with pytest.raises(ConceptFileError, match="large.safetensors: larger than a concept file may be"):
        Concept.load(large)
