"""Concept banks: ids stay inside, files are whole, and a replaced file is noticed."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import threading
import time
from typing import ClassVar

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keylock_diffusers import files, places
from keylock_diffusers.concepts import (
    BaseModel,
    Concept,
    ConceptBank,
    ConceptFileError,
    KeyLockedConcept,
    TextEncoderInfo,
    UnknownConceptError,
)
from keylock_diffusers.concepts.files import MAX_FILE_BYTES

BASE = BaseModel((TextEncoderInfo("CLIPTextModel", 4, 1, 50),), (("mid_block.attn2", 1024),), 4)


def make_concept(placeholder="<alice-cat>", fill=1.0):
    return KeyLockedConcept(
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


def test_an_unknown_id_names_no_other_and_lists_nothing(root, monkeypatch):
    bank = ConceptBank(root)
    with pytest.raises(UnknownConceptError, match="whose folder does not exist"):
        bank["alice/cat"]
    bank.add("alice/cat", make_concept())
    monkeypatch.setattr(bank._files, "paths", lambda: pytest.fail("listed"))
    for use in (bank.__getitem__, bank.remove, bank.summary):
        with pytest.raises(KeyError) as caught:
            use("alice/cats")
        assert str(caught.value) == "no concept 'alice/cats' in the bank"
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_version_is_that_one_or_unknown(root):
    bank, first, second = ConceptBank(root), make_concept(), make_concept(fill=2.0)
    bank.add("alice/cat", first)
    assert first.version == hashlib.sha256(first.to_bytes()).hexdigest()[:16] != second.version
    named = f"alice/cat@{first.version}"
    assert bank[named] is bank["alice/cat"] and named in bank and bank.get(named) is not None
    bank.add("alice/cat", second, overwrite=True)
    assert named not in bank and f"alice/cat@{second.version}" in bank
    with pytest.raises(UnknownConceptError, match=f"no version {first.version} of alice/cat .* has {second.version}"):
        bank[named]
    with pytest.raises(UnknownConceptError, match="no concept 'bob/cat' in the bank"):
        bank[f"bob/cat@{first.version}"]
    for version in ("", "1a2b", first.version.upper(), f"{first.version}0", f"{first.version}@"):
        with pytest.raises(ValueError, match="after @ its version has 16 digits"):
            bank[f"alice/cat@{version}"]
        assert f"alice/cat@{version}" not in bank
    for use in (bank.remove, bank.summary, lambda bad: bank.add(bad, first)):
        with pytest.raises(ValueError, match="a concept's id looks like alice/cat"):
            use(named)


def test_a_summary_reads_the_header_alone(root):
    bank, concept = ConceptBank(root), make_concept()
    bank.add("alice/cat", concept)
    summary = bank.summary("alice/cat")
    assert (summary.placeholder, summary.super_class, summary.nbytes) == ("<alice-cat>", "cat", concept.nbytes)
    assert summary.edit == "perfusion" and summary.settings == {"beta": concept.beta, "tau": concept.tau}
    data = bytearray(concept.to_bytes())
    data[-1] ^= 1
    changed = bytes(data)
    wide = concept.with_(training={"notes": "x" * 20_000})  # a header longer than the first read
    for content, message in ((changed, None), (wide.to_bytes(), None), (changed[:-1], "past|past the|pass the end")):
        with fsspec.open(f"{root}/alice/cat.safetensors", "wb") as stream:
            stream.write(content)
        if message is None:
            assert bank.summary("alice/cat").nbytes == len(content)
        else:
            with pytest.raises(ConceptFileError, match=f"alice/cat.safetensors: .*({message})"):
                bank.summary("alice/cat")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"\0" * 4096, b"no concept at all" * 99])
def test_a_summary_of_what_is_no_concept_is_refused(root, content):
    with fsspec.open(f"{root}/alice.safetensors", "wb", auto_mkdir=True) as stream:
        stream.write(content)
    bank = ConceptBank(root)
    assert list(bank) == ["alice"]
    with pytest.raises(ConceptFileError, match="alice.safetensors: "):
        bank.summary("alice")


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

    def fail(*_, **__):
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
    (folder / "1" / "2" / "3" / "4").mkdir(parents=True)
    make_concept().save(folder / "1" / "2" / "3" / "4" / "deep.safetensors")
    assert not [path for path in bank._files.paths() if "deep" in path]
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


def test_a_root_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        ConceptBank(tmp_path / "file")
    for wrong in (None, 3, b"concepts", "", "a\0b", "\ud800", "x" * 256, "long/" * 1000):
        for use in (ConceptBank, Concept.load, make_concept().save):
            if use == Concept.load and isinstance(wrong, bytes):
                continue
            with pytest.raises((TypeError, ValueError), match=": path.* must be a path.*, got ") as caught:
                use(wrong)
            assert len(str(caught.value)) < 300
    for wrong in (-1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"cache_size must be a whole number of at least 0, got {wrong}"):
            ConceptBank(tmp_path / "bank", cache_size=wrong)


def test_nothing_may_be_kept_in_memory(root):
    bank = ConceptBank(root, cache_size=0)
    bank.add("alice/cat", make_concept())
    assert bank["alice/cat"].digest == bank["alice/cat"].digest and not bank._cache


def test_a_missing_driver_is_named(monkeypatch):
    def absent(protocol):
        raise ImportError(f"Install {protocol}fs to access it")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", absent)
    with pytest.raises(
        ValueError, match=r"ConceptBank: path_or_url s3://bucket/concepts cannot be opened: Install .*fs"
    ) as caught:
        ConceptBank("s3://key:secret@bucket/concepts?token=abc")
    assert "secret" not in str(caught.value) and "abc" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nosuch://bucket cannot be opened: .*nosuch"):
        ConceptBank("nosuch://bucket")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://bank/concepts", "memory://bank/concepts"),
        ("memory://user:pass@bank/concepts?token=abc", "memory://bank/concepts"),
        ("memory://user:pa/ss@bank/concepts", "memory://bank/concepts"),
        ("memory://bank/a@b", "memory://bank/a@b"),
    ],
)
def test_a_bank_shows_its_protocol_and_no_credentials(url, shown, tmp_path):
    assert repr(ConceptBank(url)) == f"ConceptBank({shown!r})"
    assert repr(ConceptBank(tmp_path)) == f"ConceptBank({str(tmp_path)!r})"


class Secretive(fsspec.AbstractFileSystem):
    """As fsspec's HTTP: a root is the whole URL, credentials included, and a server need not tell a file's size."""

    protocol = "secretive"
    asked: ClassVar[list] = []

    @classmethod
    def _strip_protocol(cls, path):
        return path

    def info(self, path, **_):
        self.asked.append("info")
        return {"name": path, "size": None, "type": "file"}

    def cat_file(self, path, start=None, end=None, **_):
        self.asked.append(end)
        return b"damaged" if "cat" in path else bytes(end)


def test_errors_of_a_files_content_show_no_credentials_and_reading_is_bounded():
    fsspec.register_implementation("secretive", Secretive, clobber=True)
    bank = ConceptBank("secretive://user:secret@host/c/")
    for read in (bank.__getitem__, bank.summary):
        with pytest.raises(ConceptFileError) as caught:
            read("alice/cat")
        assert "secretive://host/c/alice/cat.safetensors: " in str(caught.value)
        with pytest.raises(ConceptFileError, match="larger than a concept file may be") as caught:
            read("alice/dog")
        assert "secret@" not in str(caught.value)
    Secretive.asked.clear()
    with pytest.raises(ConceptFileError):
        bank["alice/cat"]
    assert Secretive.asked[-3:].count("info") == 2 and MAX_FILE_BYTES + 1 in Secretive.asked


def test_a_loop_of_links_is_not_in_the_bank(folder):
    bank = ConceptBank(folder)
    bank.add("alice/cat", make_concept())
    (folder / "x.safetensors").symlink_to("x.safetensors")
    (folder / "y.safetensors").symlink_to("z.safetensors")
    (folder / "z.safetensors").symlink_to("y.safetensors")
    assert list(bank) == ["alice/cat"]
    for loop in ("x", "y"):
        assert loop not in bank
        for use in (bank.__getitem__, bank.summary):
            with pytest.raises(ValueError, match="symbolic link that leads nowhere"):
                use(loop)


def test_a_pipe_is_no_concept_and_not_waited_for(folder):
    bank = ConceptBank(folder)
    folder.mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    assert "pipe" not in bank and list(bank) == []
    for use in (bank.__getitem__, bank.summary):
        with pytest.raises(UnknownConceptError):
            use("pipe")
    with pytest.raises(ConceptFileError, match="not a regular file"):
        Concept.load(folder / "pipe.safetensors")


def test_a_concept_removed_between_two_looks_is_unknown(root, monkeypatch):
    bank = ConceptBank(root)
    for use in (bank.__getitem__, bank.summary):
        bank.add("alice/cat", make_concept())
        name = "read" if use == bank.__getitem__ else "header"
        read = getattr(bank._files, name)

        def late(path, read=read):
            ConceptBank(root).remove("alice/cat")
            return read(path)

        with monkeypatch.context() as patch:
            patch.setattr(bank._files, name, late)
            with pytest.raises(UnknownConceptError):
                use("alice/cat")


def test_what_is_removed_while_others_read_is_never_damaged(folder):
    writer, reader, wrong, end = ConceptBank(folder), ConceptBank(folder, cache_size=0), [], threading.Event()
    concept = make_concept()

    def read(use):
        while not end.is_set():
            try:
                use("alice/cat")
            except UnknownConceptError:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(use,)) for use in (reader.__getitem__, reader.summary)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        writer.add("alice/cat", concept)
        writer.remove("alice/cat")
    end.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_removing_leaves_no_empty_folder_and_no_other_is_touched(folder):
    bank = ConceptBank(folder)
    for concept_id in ("a/b/c/d", "a/b/x", "solo"):
        bank.add(concept_id, make_concept())
    bank.remove("a/b/c/d")
    assert sorted(os.listdir(folder / "a" / "b")) == ["x.safetensors"]
    bank.remove("a/b/x")
    assert sorted(os.listdir(folder)) == ["solo.safetensors"]
    bank.remove("solo")
    assert folder.is_dir() and not os.listdir(folder)


def test_a_folder_that_is_removed_before_the_file_is_made_is_made_again(folder, monkeypatch):
    write, calls = places.write_atomically, []

    def late(*given, **more):
        calls.append(1)
        if len(calls) < 3:
            (folder / "alice").rmdir()
        write(*given, **more)

    monkeypatch.setattr(places, "write_atomically", late)
    ConceptBank(folder).add("alice/cat", make_concept())
    assert list(ConceptBank(folder)) == ["alice/cat"] and len(calls) == 3

    def gone(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "cat")

    monkeypatch.setattr(places, "write_atomically", gone)
    with pytest.raises(FileNotFoundError, match="bank/alice/dog.safetensors"):
        ConceptBank(folder).add("alice/dog", make_concept())


def test_what_has_no_version_is_read_every_time(root, monkeypatch):
    bank = ConceptBank(root)
    bank.add("alice/cat", make_concept())
    monkeypatch.setattr(bank._files, "version", lambda path: None)
    read = bank._files.read
    monkeypatch.setattr(bank._files, "read", lambda path: (read(path)[0], None))
    assert bank["alice/cat"] is not bank["alice/cat"] and not bank._cache


def test_adding_into_a_folder_that_is_being_removed_succeeds(folder):
    bank, concept, failures = ConceptBank(folder), make_concept(), []

    def work(name):
        try:
            for _ in range(60):
                ConceptBank(folder).add(f"alice/{name}", concept)
                ConceptBank(folder).remove(f"alice/{name}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cat", "dog")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and list(bank) == []


def test_what_killed_writers_left_is_swept_and_a_living_writers_is_not(folder):
    bank = ConceptBank(folder)
    bank.add("alice/cat", make_concept())
    rest = ".0123456789abcdef.tmp"
    dead, young, alive, other = (
        folder / "alice" / name for name in (f".cat.0{rest}", f".b{rest}", f".c{rest}", ".d.0.tmp")
    )
    for file in (dead, young, alive, other):
        file.write_bytes(b"half")
        if file != young:
            os.utime(file, (time.time() - 3600,) * 2)
    with open(alive, "rb+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        ConceptBank(folder).add("alice/dog", make_concept())
        assert sorted(os.listdir(folder / "alice")) == sorted(
            [young.name, alive.name, other.name, "cat.safetensors", "dog.safetensors"]
        )
    os.utime(young, (time.time() - 3600,) * 2)
    ConceptBank(folder).remove("alice/dog")
    assert sorted(os.listdir(folder / "alice")) == sorted([other.name, "cat.safetensors"])


def test_a_writer_holds_the_lock_of_what_it_writes(folder, monkeypatch):
    """Between making its file and naming it: `sweep` in another process would find it old and take it."""
    seen, fsync = [], os.fsync

    def slow(descriptor):
        name = next(name for name in os.listdir(folder) if name.endswith(".tmp"))
        os.utime(folder / name, (time.time() - 3600,) * 2)
        opened = os.open(folder, os.O_RDONLY)
        files.sweep(opened)
        os.close(opened)
        seen.append((folder / name).exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    ConceptBank(folder).add("cat", make_concept())
    assert seen == [True] and os.listdir(folder) == ["cat.safetensors"]


@pytest.mark.parametrize("act", ["add", "read", "summary", "remove", "in"])
def test_a_folder_exchanged_for_a_link_under_way_leads_nowhere(folder, tmp_path, monkeypatch, act):
    """At the worst moment: when the folders were looked at, and the file is about to be opened."""
    bank, outside = ConceptBank(folder), tmp_path / "outside"
    bank.add("alice/cat", make_concept())
    outside.mkdir()
    make_concept(fill=9.0).save(outside / "cat.safetensors")
    before = (outside / "cat.safetensors").read_bytes()
    opened = os.open

    def exchange(path, flags, *more, dir_fd=None):
        found = opened(path, flags, *more, dir_fd=dir_fd)
        if path == "alice":
            os.rename(folder / "alice", folder / "gone")
            (folder / "alice").symlink_to(outside)
        return found

    acts = {
        "add": lambda: bank.add("alice/cat", make_concept(fill=3.0), overwrite=True),
        "read": lambda: bank["alice/cat"].values[0] == 1 or pytest.fail("read through a link"),
        "summary": lambda: bank.summary("alice/cat"),
        "remove": lambda: bank.remove("alice/cat"),
        "in": lambda: "alice/cat" in bank,
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", exchange)
        with contextlib.suppress(ValueError):  # the next look at the folder sees the link
            acts[act]()
    assert os.listdir(outside) == ["cat.safetensors"] and (outside / "cat.safetensors").read_bytes() == before


def test_a_full_disk_names_the_concepts_file_and_leaves_none(folder, monkeypatch):
    bank = ConceptBank(folder)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*bank/alice/cat.safetensors'"):
        bank.add("alice/cat", make_concept())
    assert os.listdir(folder / "alice") == []
    with pytest.raises(OSError, match=r"No space left on device: '.*c.safetensors'"):
        make_concept().save(folder / "c.safetensors")
    assert os.listdir(folder) == ["alice"]


def test_a_folder_that_cannot_be_read_hides_no_other(folder, monkeypatch):
    bank, opened = ConceptBank(folder), os.open
    for concept_id in ("alice/cat", "bob/cat"):
        bank.add(concept_id, make_concept())

    def refuse(path, flags, *more, dir_fd=None):
        if path == "alice":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *more, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    assert list(bank) == ["bob/cat"]
    for use in (bank.__getitem__, bank.summary, bank.remove, bank.__contains__):
        with pytest.raises(PermissionError, match="Permission denied: '.*bank/alice/cat.safetensors'"):
            use("alice/cat")


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
