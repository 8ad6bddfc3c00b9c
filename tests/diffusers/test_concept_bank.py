"""Concept banks: ids stay inside, files are whole, and a replaced file is noticed."""

import os
import pickle
import threading
import uuid

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_diffusers.concepts import (
    BaseModel,
    Concept,
    ConceptBank,
    ConceptFileError,
    TextEncoderInfo,
    UnknownConceptError,
)

BASE = BaseModel((TextEncoderInfo("CLIPTextModel", 4, 1, 50),), (("mid_block.attn2", 1024),), 4)


def make_concept(placeholder="<alice-cat>", fill=1.0):
    return Concept(
        placeholder,
        "cat",
        target_input=torch.tensor([2.0, 0, 0, 0]),
        energy=4.0,
        direction=torch.tensor([0.5, 0, 0, 0]),
        super_class_encoding=torch.ones(4),
        word_embeddings=(torch.ones(4),),
        values=torch.full((1024,), fill),
        base=BASE,
    )


@pytest.fixture(params=["folder", "memory"])
def root(request, tmp_path):
    """A bank's place: a folder, or a file system that fsspec opens."""
    if request.param == "folder":
        yield str(tmp_path / "bank")
        return
    url = f"memory://keylock-{uuid.uuid4().hex}/bank"
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "bank"


def test_add_read_iterate_remove(root):
    bank = ConceptBank(root)
    assert len(bank) == 0 and list(bank) == [] and "alice/cat" not in bank
    concept = make_concept()
    for concept_id in ("bob/dog", "alice/cat", "solo", "a/b/c/d", "v1.2/my_cat-3"):
        bank.add(concept_id, concept)
    assert list(bank) == sorted(["bob/dog", "alice/cat", "solo", "a/b/c/d", "v1.2/my_cat-3"])
    assert len(bank) == 5 and "alice/cat" in bank and "alice" not in bank
    assert bank["alice/cat"].digest == concept.digest
    assert ConceptBank(root)["a/b/c/d"].digest == concept.digest
    bank.remove("alice/cat")
    assert "alice/cat" not in bank and len(bank) == 4
    assert bank.get("alice/cat") is None
    with pytest.raises(UnknownConceptError):
        bank.remove("alice/cat")


def test_an_unknown_id_names_ids_like_it(root):
    bank = ConceptBank(root)
    with pytest.raises(UnknownConceptError, match="which is empty"):
        bank["alice/cat"]
    bank.add("alice/cat", make_concept())
    bank.add("zebra", make_concept())
    with pytest.raises(KeyError) as caught:
        bank["alice/cats"]
    assert str(caught.value) == f"no concept 'alice/cats' in the bank at {bank._files.root}; close to it: alice/cat"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_overwriting_is_asked_for(root):
    bank = ConceptBank(root)
    first, second = make_concept(), make_concept(fill=2.0)
    bank.add("alice/cat", first)
    with pytest.raises(ValueError, match="alice/cat exists already; pass overwrite=True"):
        bank.add("alice/cat", second)
    assert bank["alice/cat"].digest == first.digest
    bank.add("alice/cat", second, overwrite=True)
    assert bank["alice/cat"].digest == second.digest
    with pytest.raises(TypeError, match="must be a Concept, got bytes"):
        bank.add("bob/cat", first.to_bytes())


def test_reading_again_reads_no_file(root, monkeypatch):
    bank = ConceptBank(root)
    bank.add("alice/cat", make_concept())
    concept = bank["alice/cat"]
    monkeypatch.setattr(bank._files, "read", lambda path: pytest.fail("read again"))
    assert bank["alice/cat"] is concept


def test_a_replaced_file_is_noticed(root):
    reader, writer = ConceptBank(root), ConceptBank(root)
    writer.add("alice/cat", make_concept(fill=0.0))
    for fill in range(1, 30):
        writer.add("alice/cat", make_concept(fill=float(fill)), overwrite=True)
        assert reader["alice/cat"].values[0] == fill
    writer.remove("alice/cat")
    with pytest.raises(UnknownConceptError):
        reader["alice/cat"]


def test_the_cache_is_bounded(root):
    bank = ConceptBank(root, cache_size=2)
    for name in ("a", "b", "c"):
        bank.add(name, make_concept())
        bank[name]
    assert list(bank._cache) == ["b", "c"]


BAD_IDS = [
    "", "/", "/etc/passwd", "alice/", "/alice", "alice//cat", "..", "../alice", "alice/../bob", "alice/..", ".",
    ".hidden", "alice/.cat", "a..b", "alice\\cat", "c:\\cat", "c:cat", "~/cat", "Alice/cat", "alice cat",
    "alice/cat\n", "alice\0cat", "a/b/c/d/e", "a" * 101, "alice/cat.safetensors", "x.safetensors/cat",
    "memory://a", "%2e%2e/a", "kätzchen", "\uff41",
]  # fmt: skip


@pytest.mark.parametrize("concept_id", BAD_IDS)
def test_bad_ids_are_refused(root, concept_id):
    bank = ConceptBank(root)
    assert concept_id not in bank
    for use in (bank.__getitem__, bank.remove, lambda bad: bank.add(bad, make_concept()), bank.get):
        with pytest.raises(ValueError, match="a concept's id looks like alice/cat; "):
            use(concept_id)
    assert len(bank) == 0
    with pytest.raises(TypeError, match="must be a string, got NoneType"):
        bank[None]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab./\\~:%\0 A_-"), max_size=12))
def test_any_id_stays_inside(tmp_path_factory, concept_id):
    outside = tmp_path_factory.getbasetemp() / "any-id"
    bank = ConceptBank(outside / "bank" / "root")
    try:
        bank.add(concept_id, make_concept(), overwrite=True)
    except ValueError:
        return
    except (NotADirectoryError, IsADirectoryError):
        return  # "a.safetensors" and "a" may collide with a folder of that name
    assert concept_id in set(bank)
    assert (
        os.path.commonpath([os.path.realpath(bank._files.describe(concept_id)), bank._files.root]) == bank._files.root
    )
    assert os.listdir(outside) == ["bank"] and os.listdir(outside / "bank") == ["root"]


def test_links_do_not_lead_out(folder, tmp_path):
    secret = tmp_path / "outside"
    secret.mkdir()
    make_concept().save(secret / "cat.safetensors")
    bank = ConceptBank(folder)
    bank.add("alice/cat", make_concept())
    (folder / "evil.safetensors").symlink_to(secret / "cat.safetensors")
    (folder / "mallory").symlink_to(secret)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.safetensors").symlink_to(secret / "none")
    for concept_id in ("evil", "mallory/cat", "loop/alice/cat", "dangling"):
        assert concept_id not in bank
        with pytest.raises((ValueError, UnknownConceptError)):
            bank[concept_id]
    for concept_id in ("mallory/cat", "mallory/new"):
        with pytest.raises(ValueError, match="symbolic link"):
            bank.add(concept_id, make_concept(), overwrite=True)
        with pytest.raises(ValueError, match="symbolic link"):
            bank.remove(concept_id)
    bank.add("evil", make_concept(fill=3.0), overwrite=True)  # replaces the link, not what it led to
    assert not (folder / "evil.safetensors").is_symlink()
    assert Concept.load(secret / "cat.safetensors").values[0] == 1
    assert os.listdir(secret) == ["cat.safetensors"]
    assert list(bank) == ["alice/cat", "evil"]


def test_links_inside_are_fine(folder):
    bank = ConceptBank(folder)
    bank.add("alice/cat", make_concept())
    (folder / "shared.safetensors").symlink_to("alice/cat.safetensors")
    assert list(bank) == ["alice/cat", "shared"] and bank["shared"].digest == bank["alice/cat"].digest
    bank.remove("shared")
    assert list(bank) == ["alice/cat"]


def test_a_root_may_be_a_link(folder, tmp_path):
    ConceptBank(folder).add("alice/cat", make_concept())
    (tmp_path / "current").symlink_to(folder)
    bank = ConceptBank(tmp_path / "current")
    assert list(bank) == ["alice/cat"] and bank["alice/cat"].placeholder == "<alice-cat>"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_write_changes_nothing(folder, monkeypatch, overwrite):
    bank = ConceptBank(folder)
    old = make_concept()
    bank.add("alice/cat", old)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="disk full"):
        bank.add("alice/cat" if overwrite else "alice/dog", make_concept(fill=2.0), overwrite=overwrite)
    assert bank["alice/cat"].digest == old.digest
    assert os.listdir(folder / "alice") == ["cat.safetensors"]


def test_what_is_no_concept_is_not_listed(folder):
    bank = ConceptBank(folder)
    bank.add("alice/cat", make_concept())
    for name in (".cat.safetensors.0a1b.tmp", ".hidden.safetensors", "README.md", "Upper.safetensors", ".safetensors"):
        (folder / "alice" / name).write_bytes(b"")
    (folder / "folder.safetensors").mkdir()
    (folder / "file").write_text("")
    assert list(bank) == ["alice/cat"] and len(bank) == 1
    for concept_id in ("folder", "file/cat"):
        assert concept_id not in bank
        with pytest.raises(UnknownConceptError):
            bank[concept_id]
    with pytest.raises(NotADirectoryError):
        bank.add("file/cat", make_concept())


def test_a_damaged_file_is_named(root):
    bank = ConceptBank(root)
    bank.add("alice/cat", make_concept())
    data = make_concept().to_bytes()
    with fsspec.open(f"{root}/alice/cat.safetensors", "wb") as stream:
        stream.write(data[:-1])
    with pytest.raises(ConceptFileError, match="alice/cat.safetensors: "):
        bank["alice/cat"]
    with fsspec.open(f"{root}/alice/cat.safetensors", "wb") as stream:
        stream.write(b"\0" * (17 << 20))
    with pytest.raises(ConceptFileError, match="alice/cat.safetensors: larger than a concept file may be"):
        bank["alice/cat"]


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        ConceptBank(tmp_path / "file")


def test_readers_see_whole_concepts_while_writers_replace_them(root):
    concepts = [make_concept(fill=float(fill)) for fill in range(4)]
    digests = {concept.digest for concept in concepts}
    bank = ConceptBank(root)
    bank.add("alice/cat", concepts[0])
    failures, stop = [], threading.Event()

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def write(first):
        for turn in range(40):
            bank.add("alice/cat", concepts[(first + turn) % 4], overwrite=True)

    def read(mine):
        while not stop.is_set():
            assert mine["alice/cat"].digest in digests
            assert list(mine) == ["alice/cat"]

    readers = [threading.Thread(target=guarded, args=(lambda b=b: read(b),)) for b in (bank, bank, ConceptBank(root))]
    writers = [threading.Thread(target=guarded, args=(lambda k=k: write(k),)) for k in range(2)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures


def test_one_of_many_adds_of_a_new_id_succeeds(folder):
    bank, barrier, outcomes = ConceptBank(folder), threading.Barrier(8), []

    def add(fill):
        barrier.wait()
        try:
            bank.add("alice/cat", make_concept(fill=fill))
            outcomes.append(fill)
        except ValueError:
            pass

    threads = [threading.Thread(target=add, args=(float(fill),)) for fill in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1 and bank["alice/cat"].values[0] == outcomes[0]
    assert os.listdir(folder / "alice") == ["cat.safetensors"]
