"""LoRA banks: ids stay inside, files are read once and packed, memory is bounded, and replaced files are noticed."""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import pickle
import random
import sys
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save

from keylock_diffusers import files as writing
from keylock_diffusers.loras import (
    AdapterPool,
    LoraBank,
    LoraExistsError,
    LoraFileError,
    ModelShapes,
    UnknownLoraError,
    read_adapter,
    store,
)
from keylock_diffusers.loras import (
    bank as bank_module,
)
from tests.diffusers.test_concept_bank import BAD_IDS
from tests.diffusers.test_lora_packed import same
from tests.diffusers.test_lora_pool import together

MODEL = ModelShapes({"layer": (5, 6), "conv": (4, 3, 2, 2)}, ({"q_proj": (8, 8)},))
OTHER = ModelShapes({"layer": (5, 6), "conv": (4, 3, 2, 2), "more": (2, 2)}, ({"q_proj": (8, 8)},))
BYTES = 4 * 2 * (5 + 6 + 4 + 12 + 8 + 8)  # of an adapter below


def content(fill=None, rank=2, alpha=None, **texts):
    """A LoRA file of every component; random unless every number is to be one."""

    def made(*shape):
        return torch.randn(*shape) if fill is None else torch.full(shape, float(fill))

    tensors = {
        "unet.layer.lora_A.weight": made(rank, 6),
        "unet.layer.lora_B.weight": made(5, rank),
        "unet.conv.lora_A.weight": made(rank, 3, 2, 2),
        "unet.conv.lora_B.weight": made(4, rank, 1, 1),
        "text_encoder.q_proj.lora_A.weight": made(rank, 8),
        "text_encoder.q_proj.lora_B.weight": made(8, rank),
    }
    if alpha is not None:
        tensors |= {f"{key.removesuffix('.lora_A.weight')}.alpha": torch.tensor(alpha) for key in list(tensors)[::2]}
    return save(tensors, texts or None)


def fill_of(adapter):
    """The number that all of an adapter is."""
    found = {float(x) for u in adapter.denoiser.values() for t in (u.up, u.down) for x in t.flatten().tolist()}
    assert len(found) == 1, "of two files"
    return found.pop()


def put(root, path, data):
    with fsspec.open(f"{root}/{path}", "wb", auto_mkdir=True) as stream:
        stream.write(data)


def peft_folder(path, alpha=3.0, **settings):
    path.mkdir(parents=True)
    tensors = {"base_model.model.layer.lora_A.weight": torch.randn(2, 6)}
    tensors["base_model.model.layer.lora_B.weight"] = torch.randn(5, 2)
    (path / "adapter_model.safetensors").write_bytes(save(tensors))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["layer"], **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def file(tmp_path):
    """Writes a LoRA file beside the bank."""

    def make(*given, **named):
        path = tmp_path / f"{uuid.uuid4().hex}.safetensors"
        path.write_bytes(content(*given, **named))
        return path

    return make


@pytest.fixture
def open_bank(tmp_path):
    return lambda root, **named: LoraBank(root, **{"cache": tmp_path / "cache", **named})


def read(path, model=MODEL, **named):
    return read_adapter(path, denoiser=model.denoiser, text_encoders=model.text_encoders, **named)


def test_add_load_iterate_remove(root, open_bank, file):
    bank, path = open_bank(root), file(alpha=3.0)
    assert len(bank) == 0 and list(bank) == [] and "alice/style" not in bank and not bank.exists()
    for lora_id in ("bob/dog", "alice/style", "solo", "a/b/c/d", "v1.2/my_style-3"):
        bank.add(lora_id, path)
    assert list(bank) == sorted(["bob/dog", "alice/style", "solo", "a/b/c/d", "v1.2/my_style-3"])
    assert len(bank) == 5 and "alice/style" in bank and "alice" not in bank and bank.exists()
    assert same(bank.load("alice/style", MODEL), read(path))
    assert bank.load("alice/style", MODEL) is bank.load("alice/style", MODEL)
    assert same(open_bank(root).load("a/b/c/d", MODEL), read(path))
    assert bank.summary("alice/style") == read(path).facts
    bank.remove("alice/style")
    assert "alice/style" not in bank and len(bank) == 4
    for use in (bank.remove, bank.summary, lambda name: bank.load(name, MODEL)):
        with pytest.raises(UnknownLoraError, match="no LoRA 'alice/style' in the bank"):
            use("alice/style")


def test_an_unknown_id_names_no_other_and_nothing_is_listed(root, open_bank, file, monkeypatch):
    bank = open_bank(root)
    with pytest.raises(UnknownLoraError, match="whose folder does not exist"):
        bank.load("alice/style", MODEL)
    bank.add("alice/style", file())
    monkeypatch.setattr(bank._files._files, "paths", lambda: pytest.fail("listed"))
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("listed"))
    for use in (bank.remove, bank.summary, lambda name: bank.load(name, MODEL)):
        with pytest.raises(KeyError) as caught:
            use("alice/styles")
        assert str(caught.value) == "no LoRA 'alice/styles' in the bank"
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert bank.load("alice/style", MODEL) and "alice/style" in bank


@pytest.mark.parametrize("lora_id", [*BAD_IDS, "alice/adapter_model", "adapter_model"])
def test_bad_ids_are_refused(root, open_bank, file, lora_id):
    bank, path = open_bank(root), file()
    assert lora_id not in bank
    for use in (lambda bad: bank.load(bad, MODEL), bank.remove, bank.summary, lambda bad: bank.add(bad, path)):
        with pytest.raises(ValueError, match="a LoRA's id looks like alice/style; "):
            use(lora_id)
    assert len(bank) == 0
    for wrong in (None, 3, Path("alice/style")):
        assert wrong not in bank
        with pytest.raises(TypeError, match=f"LoRA's id must be a string, got {type(wrong).__name__}"):
            bank.load(wrong, MODEL)


def test_a_version_is_that_one_or_unknown(root, open_bank, file):
    bank, first, second = open_bank(root), file(), file()
    bank.add("alice/style", first)
    version = hashlib.sha256(first.read_bytes()).hexdigest()[:16]
    named = f"alice/style@{version}"
    assert named in bank and bank.load(named, MODEL) is bank.load("alice/style", MODEL)
    bank.add("alice/style", second, overwrite=True)
    other = hashlib.sha256(second.read_bytes()).hexdigest()[:16]
    assert named not in bank and f"alice/style@{other}" in bank
    for _ in range(2):  # before it is in memory, and after
        with pytest.raises(UnknownLoraError, match=f"no version {version} of alice/style .* has {other}"):
            bank.load(named, MODEL)
        bank.load("alice/style", MODEL)
    for wrong in ("", "1a2b", version.upper(), f"{version}0", f"{version}@"):
        with pytest.raises(ValueError, match="after @ its version has 16 digits"):
            bank.load(f"alice/style@{wrong}", MODEL)
        assert f"alice/style@{wrong}" not in bank
    for use in (bank.remove, bank.summary, lambda bad: bank.add(bad, first)):
        with pytest.raises(ValueError, match="a LoRA's id looks like alice/style"):
            use(named)


def test_a_peft_folder_is_one_lora(root, open_bank, tmp_path):
    source = peft_folder(tmp_path / "source")
    bank = open_bank(root)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        put(root, f"alice/style/{name}", (source / name).read_bytes())
        put(root, f"a/b/c/d/{name}", (source / name).read_bytes())
    assert list(bank) == ["a/b/c/d", "alice/style"] and len(bank) == 2 and "alice/style" in bank
    found = bank.load("alice/style", MODEL)
    assert same(found, read(source)) and found.denoiser["layer"].scale == 1.5
    assert bank.summary("alice/style") == found.facts
    digests = [hashlib.sha256((source / name).read_bytes()).hexdigest() for name in os.listdir(source)[::-1]]
    both = {hashlib.sha256("".join(order).encode()).hexdigest()[:16] for order in (digests, digests[::-1])}
    assert any(f"alice/style@{version}" in bank for version in both)
    with pytest.raises(LoraExistsError, match="alice/style exists already"):
        bank.add("alice/style", source)
    # Of its two files either changes it.
    config = json.loads((source / "adapter_config.json").read_text()) | {"lora_alpha": 5}
    put(root, "alice/style/adapter_config.json", json.dumps(config).encode())
    assert bank.load("alice/style", MODEL).denoiser["layer"].scale == 2.5
    put(root, "alice/style/adapter_config.json", b"{" + b" " * (1 << 16) + b"}")
    with pytest.raises(LoraFileError, match=r"alice/style/adapter_config.json: more than 65536 bytes"):
        bank.load("alice/style", MODEL)
    put(root, "alice/style/adapter_config.json", b"[]")
    with pytest.raises(LoraFileError, match=r"adapter_config.json: must be a JSON object"):
        bank.load("alice/style", MODEL)
    bank.remove("alice/style")
    assert list(bank) == ["a/b/c/d"]
    fs, path = fsspec.core.url_to_fs(root)
    fs.rm(f"{path}/a/b/c/d/adapter_config.json")
    with pytest.raises(UnknownLoraError):  # half a folder
        bank.load("a/b/c/d", MODEL)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {}, "alpha_pattern": {"layer": 7}}])
def test_a_peft_folder_that_is_added_becomes_one_file_that_says_the_same(root, open_bank, tmp_path, settings):
    source, bank = peft_folder(tmp_path / "source", **settings), open_bank(root)
    bank.add("alice/style", source)
    found = bank.load("alice/style", MODEL)
    assert found.denoiser["layer"].scale == read(source).denoiser["layer"].scale
    assert torch.equal(found.denoiser["layer"].up, read(source).denoiser["layer"].up)
    fs, path = fsspec.core.url_to_fs(root)
    assert [name.rpartition("/")[2] for name in fs.find(path)] == ["style.safetensors"]


def test_a_file_counts_before_a_folder_and_replaces_it(folder, open_bank, file):
    bank, path = open_bank(folder), file()
    peft_folder(folder / "alice" / "style")
    bank.add("alice/style", path, overwrite=True)
    assert not (folder / "alice" / "style").exists() and list(bank) == ["alice/style"]
    peft_folder(folder / "alice" / "style")
    assert same(bank.load("alice/style", MODEL), read(path)) and list(bank) == ["alice/style"]
    bank.remove("alice/style")
    assert not os.listdir(folder)


def test_overwriting_is_asked_for(root, open_bank, file):
    bank = open_bank(root)
    bank.add("alice/style", file(1))
    with pytest.raises(ValueError, match="LoraBank.add: alice/style exists already; pass overwrite=True"):
        bank.add("alice/style", file(2))
    assert fill_of(bank.load("alice/style", MODEL)) == 1
    bank.add("alice/style", file(2), overwrite=True)
    assert fill_of(bank.load("alice/style", MODEL)) == 2


@pytest.mark.parametrize("wrong", [b"", b"\x80\x02pickle", b"PK\x03\x04torch", b"\0" * 64, content()[:-1]])
def test_what_is_no_lora_is_not_added(root, open_bank, tmp_path, wrong):
    bank, path = open_bank(root), tmp_path / "wrong.safetensors"
    path.write_bytes(wrong)
    with pytest.raises(LoraFileError, match=r"wrong.safetensors: "):
        bank.add("alice/style", path)
    assert len(bank) == 0
    put(root, "alice/style.safetensors", wrong)
    for use in (lambda name: bank.load(name, MODEL), bank.summary):
        with pytest.raises(LoraFileError, match=r"alice/style.safetensors: "):
            use("alice/style")
    with pytest.raises(FileNotFoundError):
        bank.add("bob", tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="LoraBank.add: path must be a path, got 3"):
        bank.add("bob", 3)


def test_a_file_that_is_too_large_is_refused(root, open_bank, file, monkeypatch):
    bank, path = open_bank(root), file()
    bank.add("alice/style", path)
    small = bank_module.KIND.__class__(**{**vars(store.KIND), "most_bytes": 100})
    monkeypatch.setattr(store, "KIND", small)
    with pytest.raises(LoraFileError, match=r"larger than a LoRA file may be \(100 bytes\)"):
        bank.add("bob", path)
    with pytest.raises(LoraFileError, match=r"alice/style.safetensors: larger than a LoRA file may be"):
        open_bank(root).load("alice/style", MODEL)


def test_a_replaced_file_is_noticed_and_who_holds_the_former_may_use_it(root, open_bank, file):
    reader, writer = open_bank(root), open_bank(root)
    writer.add("alice/style", file(0.5))
    pool = reader.pool(MODEL.denoiser, "cpu", torch.float32)
    for fill in range(1, 8):
        before = reader.load("alice/style", MODEL)
        held = pool.hold([before.denoiser])
        was = fill_of(before)
        writer.add("alice/style", file(fill), overwrite=True)
        assert fill_of(reader.load("alice/style", MODEL)) == fill
        assert fill_of(before) == was and (held.tables("layer")[0][held.first[0]] == was).all()
        held.release()
        assert pool.stats().resident == 0  # nobody can ask for the former again
    writer.remove("alice/style")
    with pytest.raises(UnknownLoraError):
        reader.load("alice/style", MODEL)


def test_a_file_that_was_only_touched_is_the_same_adapter(folder, open_bank, file):
    bank = open_bank(folder)
    bank.add("alice/style", file())
    found = bank.load("alice/style", MODEL)
    os.utime(folder / "alice" / "style.safetensors", (1, 1))
    assert bank.load("alice/style", MODEL) is found


def test_reading_again_reads_no_file(root, open_bank, file, monkeypatch):
    bank = open_bank(root)
    bank.add("alice/style", file())
    found = bank.load("alice/style", MODEL)
    monkeypatch.setattr(bank._files._files, "read", lambda path: pytest.fail("read again"))
    monkeypatch.setattr(bank_module, "read_packed", lambda *_, **__: pytest.fail("read again"))
    assert bank.load("alice/style", MODEL) is found


def test_the_cache_serves_the_next_process(root, open_bank, file, monkeypatch, tmp_path):
    first = open_bank(root)
    first.add("alice/style", file())
    expected = first.load("alice/style", MODEL)
    assert first.stats().packed == 1 and len(os.listdir(tmp_path / "cache")) == 1
    monkeypatch.setattr(bank_module, "read_opened", lambda *_: pytest.fail("read anew"))
    second = open_bank(root)
    assert same(second.load("alice/style", MODEL), expected) and second.stats().packed == 0
    second.add("bob/same", _written(tmp_path, root))  # the same content under another id
    assert same(second.load("bob/same", MODEL), expected)


def _written(tmp_path, root):
    with fsspec.open(f"{root}/alice/style.safetensors", "rb") as stream:
        (tmp_path / "copy.safetensors").write_bytes(stream.read())
    return tmp_path / "copy.safetensors"


def test_the_cache_tells_models_and_allowed_errors_apart(root, open_bank, file, tmp_path):
    bank = open_bank(root)
    bank.add("alice/style", file())
    assert bank.load("alice/style", MODEL) is not bank.load("alice/style", OTHER)
    open_bank(root, max_error=0.1).load("alice/style", MODEL)
    assert len(os.listdir(tmp_path / "cache")) == 3


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "foreign", "a folder", "not readable"])
def test_a_damaged_cache_is_made_again(root, open_bank, file, tmp_path, damage):
    bank = open_bank(root)
    bank.add("alice/style", file())
    bank.add("bob", file())
    bank.load("alice/style", MODEL)
    (packed,) = (tmp_path / "cache").iterdir()
    good = packed.read_bytes()
    data = bytearray(good)
    data[-3] ^= 4
    if damage == "a folder":
        packed.unlink()
        packed.mkdir()
    elif damage == "not readable":
        packed.unlink()
        packed.symlink_to(packed)
    elif damage == "foreign":
        bank.load("bob", MODEL)
        (other,) = (path for path in (tmp_path / "cache").iterdir() if path != packed)
        packed.write_bytes(other.read_bytes())
    else:
        packed.write_bytes({"a byte": data, "cut": good[:-9], "empty": b""}[damage])
    assert same(open_bank(root).load("alice/style", MODEL), read(_written(tmp_path, root)))
    if damage != "a folder":
        assert packed.read_bytes() == good


@pytest.mark.parametrize("broken", ["full disk", "read-only", "a file"])
def test_without_a_cache_everything_works_and_one_warning_says_so(
    folder, open_bank, file, tmp_path, caplog, broken, monkeypatch
):
    bank = open_bank(folder)
    paths = [file(), file()]
    for name, path in zip(("alice/style", "bob/style"), paths, strict=True):
        bank.add(name, path)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC if broken == "full disk" else errno.EROFS, "no")

    if broken == "a file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setattr(os, "fsync" if broken == "full disk" else "mkdir", fail)
    with caplog.at_level(logging.WARNING):
        for name, path in zip(("alice/style", "bob/style"), paths, strict=True):
            assert same(bank.load(name, MODEL), read(path))
            assert bank.load(name, MODEL) is bank.load(name, MODEL)
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text and bank.stats().packed == 0
    assert broken == "a file" or not (tmp_path / "cache").exists() or not os.listdir(tmp_path / "cache")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path, folder, file):
    monkeypatch.setenv("KEYLOCK_CACHE", str(tmp_path / "own"))
    assert LoraBank(folder)._cache == tmp_path / "own" / "loras"
    monkeypatch.delenv("KEYLOCK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    bank = LoraBank(folder)
    bank.add("alice/style", file())
    bank.load("alice/style", MODEL)
    assert len(os.listdir(tmp_path / "xdg" / "keylock" / "loras")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert LoraBank(folder)._cache == tmp_path / "home" / ".cache" / "keylock" / "loras"


def test_memory_is_bounded_and_the_least_recently_used_goes(root, open_bank, file):
    bank = open_bank(root, host_bytes=2 * BYTES + 7)
    for name in "abc":
        bank.add(name, file())
    first = bank.load("a", MODEL)
    assert bank.stats()[:2] == (1, BYTES)
    bank.load("b", MODEL)
    assert bank.load("a", MODEL) is first
    second = bank.load("b", MODEL)
    bank.load("a", MODEL)
    pool = bank.pool(MODEL.denoiser, "cpu", torch.float32)
    pool.hold([second.denoiser]).release()
    bank.load("c", MODEL)  # b goes, here and there
    assert bank.stats()[:5] == (2, 2 * BYTES, 3, 3, 1) and pool.stats().resident == 0
    assert bank.load("a", MODEL) is first and bank.load("b", MODEL) is not second
    none = open_bank(root, host_bytes=0)
    assert none.load("a", MODEL) is not none.load("a", MODEL) and none.stats()[:2] == (0, 0)


def test_what_has_no_version_is_read_every_time(root, open_bank, file, monkeypatch):
    bank = open_bank(root)
    bank.add("a", file())
    read_file = bank._files._files.read
    monkeypatch.setattr(bank._files._files, "version", lambda path: None)
    monkeypatch.setattr(bank._files._files, "read", lambda path: (read_file(path)[0], None))
    assert bank.load("a", MODEL) is not bank.load("a", MODEL) and bank.stats().adapters == 0


def test_pools_are_the_same_for_the_same_arguments(open_bank, folder):
    bank = open_bank(folder, device_bytes=1000)
    pool = bank.pool(MODEL.denoiser, "cpu", torch.float32)
    assert isinstance(pool, AdapterPool)
    assert bank.pool(dict(MODEL.denoiser), torch.device("cpu"), torch.float32) is pool
    assert len({id(bank.pool(MODEL.denoiser, "cpu", torch.float32, rows)) for rows in (None, 1, 2)}) == 3
    assert bank.pool(MODEL.denoiser, "cpu", torch.float16) is not pool
    assert bank.pool(OTHER.denoiser, "cpu", torch.float32) is not pool
    assert len(bank.stats().pools) == 5
    with pytest.raises(ValueError, match="more than max_bytes = 1000"):
        bank.pool(MODEL.denoiser, "cpu", torch.float32, rows=100)


def test_wrong_arguments_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="LoraBank: path_or_url must be a folder, got the file"):
        LoraBank(tmp_path / "file")
    with pytest.raises(TypeError, match="LoraBank: path_or_url must be a path"):
        LoraBank(None)
    with pytest.raises(ValueError, match="LoraBank: path_or_url nosuch://bucket cannot be opened"):
        LoraBank("nosuch://bucket")
    for name, wrong in (("host_bytes", -1), ("device_bytes", 0), ("max_error", 2)):
        with pytest.raises(ValueError, match=f"LoraBank: {name} must .* got {wrong}"):
            LoraBank(tmp_path, **{name: wrong})
    with pytest.raises(TypeError, match="LoraBank: cache must be a path, got 3"):
        LoraBank(tmp_path, cache=3)
    assert repr(LoraBank("memory://user:secret@x/y")) == "LoraBank('memory://x/y')"


def test_links_do_not_lead_out(folder, open_bank, file, tmp_path):
    secret = tmp_path / "outside"
    peft_folder(secret / "folder")
    (secret / "style.safetensors").write_bytes(content(7))
    bank = open_bank(folder)
    bank.add("alice/style", file(1))
    (folder / "evil.safetensors").symlink_to(secret / "style.safetensors")
    (folder / "mallory").symlink_to(secret)
    (folder / "peft").symlink_to(secret / "folder")
    (folder / "half").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "half" / name).symlink_to(secret / "folder" / name)
    for lora_id in ("evil", "mallory/style", "mallory/folder", "peft", "half"):
        assert lora_id not in bank
        for use in (lambda name: bank.load(name, MODEL), bank.summary):
            with pytest.raises(ValueError, match="symbolic link"):
                use(lora_id)
    with pytest.raises(ValueError, match="symbolic link"):
        bank.add("mallory/style", file(2), overwrite=True)
    with pytest.raises(ValueError, match="symbolic link"):
        bank.remove("mallory/style")
    bank.add("evil", file(3), overwrite=True)  # replaces the link, not what it led to
    bank.add("peft", file(3), overwrite=True)
    assert sorted(os.listdir(secret)) == ["folder", "style.safetensors"]
    assert sorted(os.listdir(secret / "folder")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (secret / "style.safetensors").read_bytes() == content(7)
    assert list(bank) == ["alice/style", "evil", "peft"]
    (folder / "inside.safetensors").symlink_to("alice/style.safetensors")
    assert fill_of(bank.load("inside", MODEL)) == 1


def test_a_failed_write_changes_nothing(folder, open_bank, file, monkeypatch):
    bank = open_bank(folder)
    bank.add("alice/style", file(1))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", full)
        for overwrite, name in ((True, "alice/style"), (False, "alice/new")):
            with pytest.raises(OSError, match=r"No space left on device: '.*bank/alice/.*safetensors'"):
                bank.add(name, file(2), overwrite=overwrite)
    assert os.listdir(folder / "alice") == ["style.safetensors"]
    assert fill_of(bank.load("alice/style", MODEL)) == 1


def test_a_lora_for_another_model_is_refused_and_the_next_one_read(root, open_bank, file):
    bank = open_bank(root)
    bank.add("alice/style", file())
    wrong = ModelShapes({"layer": (5, 7), "conv": (4, 3, 2, 2)}, MODEL.text_encoders)
    for _ in range(2):
        with pytest.raises(LoraFileError, match=r"alice/style.safetensors: 1 of 3 modules do not fit .* \[2, 7\]"):
            bank.load("alice/style", wrong)
    assert bank.load("alice/style", MODEL) and bank.stats().adapters == 1


@pytest.fixture
def often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_an_adapter_is_read_once_whoever_asks(root, open_bank, file, monkeypatch, often):
    bank, reads, found = open_bank(root), [], []
    for name in ("a", "b"):
        bank.add(name, file())
    read_opened = bank_module.read_opened
    monkeypatch.setattr(bank_module, "read_opened", lambda *given: reads.append(1) or read_opened(*given))
    together(8, lambda number: found.append((number % 2, bank.load("ab"[number % 2], MODEL))))
    assert len(reads) == 2 and len({id(adapter) for _, adapter in found}) == 2
    assert bank.stats()[2:4] == (6, 2) and not bank._turns


def test_a_reading_that_takes_long_keeps_nobody_else_waiting(root, open_bank, file, monkeypatch):
    bank, begun, go = open_bank(root), threading.Event(), threading.Event()
    for name in ("slow", "ready", "new"):
        bank.add(name, file())
    bank.load("ready", MODEL)
    read_opened = bank_module.read_opened

    def wait(file, *given):
        if "slow" in file.source:
            begun.set()
            assert go.wait(30)
        return read_opened(file, *given)

    monkeypatch.setattr(bank_module, "read_opened", wait)
    reading = threading.Thread(target=bank.load, args=("slow", MODEL))
    reading.start()
    assert begun.wait(30)
    for name in ("ready", "new", "ready"):
        bank.load(name, MODEL)
    bank.add("more", file())
    bank.remove("ready")
    go.set()
    reading.join()
    assert bank.load("slow", MODEL) and bank.stats().adapters == 2


@pytest.mark.parametrize("rows", [None, 24])
def test_eight_threads_generate_while_adapters_come_and_go(root, open_bank, file, often, rows):
    """Whatever was loaded is whole, stays what it was while it is held, and bounds are kept."""
    bank = open_bank(root, host_bytes=5 * BYTES, device_bytes=None if rows else 1 << 20)
    paths = {fill: file(fill) for fill in range(1, 9)}
    names = [f"user/{n}" for n in range(6)]
    for number, name in enumerate(names):
        bank.add(name, paths[number + 1])
    pool = bank.pool(MODEL.denoiser, "cpu", torch.float32, rows)

    def work(number):
        chance = random.Random(number)
        for _ in range(25):
            name = chance.choice(names)
            if number < 2:
                with contextlib.suppress(UnknownLoraError):
                    if chance.random() < 0.3:
                        bank.remove(name)
                    else:
                        bank.add(name, paths[chance.randint(1, 8)], overwrite=True)
                continue
            with contextlib.suppress(UnknownLoraError):
                adapter = bank.load(name, MODEL)
                fill = fill_of(adapter)
                with pool.hold([adapter.denoiser]) as held:
                    for _ in range(2):
                        for module in MODEL.denoiser:
                            for table in held.tables(module):
                                assert (table[held.first[0] : held.first[0] + 2] == fill).all()
            assert bank.stats().bytes <= 5 * BYTES

    together(8, work)
    assert pool.stats().held == 0 and not bank._turns
    gc.collect()
