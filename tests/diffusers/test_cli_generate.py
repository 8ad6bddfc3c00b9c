"""``keylock generate``: nothing that was drawn is lost, every picture says what of, and what is wrong says where."""

import errno
import io
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import keylock_diffusers as kd
from keylock_diffusers import cli, files
from keylock_diffusers.cli import common, drawn, work
from keylock_diffusers.cli import orders as orders_module
from keylock_diffusers.denoisers.projections import projections, weight_shapes
from tests.diffusers.test_cli import fail, run

ORDERS = [
    {"id": "first", "prompt": "<alice-cat> on blue", "concepts": [{"concept": "alice/cat", "beta": 0.6}], "seed": 5},
    {"prompt": "a house", "num_images": 2, "guidance_scale": 3.0},
    {"prompt": "a dog", "image": "photo.png", "strength": 0.9, "seed": 8},
]


@pytest.fixture
def place(monkeypatch, pipe, concept_for, tmp_path):
    """A folder with a bank, a picture and a file of requests, where commands run on a tiny model."""
    monkeypatch.setattr(common, "load", lambda model, **options: pipe)
    monkeypatch.chdir(tmp_path)
    kd.ConceptBank("concepts").add("alice/cat", concept_for(pipe))
    Image.new("RGB", (16, 16), "red").save("photo.png")
    order(ORDERS)
    return tmp_path


def order(requests):
    with open("orders.json", "w") as file:
        json.dump(requests, file)


def generate(*options):
    return run("generate", "orders.json", "--steps", 2, "--max-batch", 2, *options)


def pictures(folder="outputs"):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def stop_after(monkeypatch, count, error):
    """Something happens to the process once so many pictures are written."""
    written = []

    def write(path, *rest):
        if len(written) == count:
            raise error
        written.append(path)
        return real(path, *rest)

    real = drawn.write
    monkeypatch.setattr(drawn, "write", write)


def test_a_picture_says_what_it_was_drawn_from_and_that_draws_it_again(place, pipe):
    generate("--scheduler", "DDIMScheduler")
    bank = kd.ConceptBank("concepts")
    for name in pictures():
        image = Image.open(place / "outputs" / name)
        facts = drawn.facts_of(place / "outputs" / name)
        said, settings = facts["order"], facts["settings"]
        assert facts["version"] == kd.__version__ and image.info["Description"] == said["prompt"]
        assert isinstance(said["seed"], int) and "guidance_scale" in said
        assert settings["scheduler"] == "DDIMScheduler" and (settings["width"], settings["height"]) == image.size
        again = kd.generate(
            pipe, [kd.Request.from_json(said, place)], bank=bank, num_inference_steps=settings["steps"]
        )[0]
        assert np.abs(np.asarray(again, int) - np.asarray(image, int)).max() <= 1
    first = drawn.facts_of(place / "outputs" / "000.png")
    assert first["concepts"] == {"alice/cat": bank["alice/cat"].version}
    seeds = [drawn.facts_of(place / "outputs" / f"001-{n}.png")["order"]["seed"] for n in range(2)]
    assert seeds[1] == seeds[0] + 1  # of one order, whose seed was drawn


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("out of memory"), 1, "RuntimeError: out of memory (KEYLOCK_TRACEBACK=1 shows where)"),
    ],
)
def test_what_was_drawn_stays_and_resume_draws_the_rest(place, monkeypatch, capsys, error, code, said):
    generate("--output", "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, error)
        message = fail(capsys, patch, "generate", "orders.json", "--steps", 2, "--max-batch", 2)
    assert said in message and "Traceback" not in message
    assert "2 of 4 pictures are in outputs" in message and "--resume" in message
    before = pictures()
    assert len(before) == 2
    assert "kept, since their requests are unchanged: 2" in generate("--resume")
    after = pictures()
    assert list(after) == list(pictures("whole"))
    assert all(after[name] == data for name, data in before.items())
    with Image.open("outputs/000.png") as ours, Image.open("whole/000.png") as whole:
        assert ours.tobytes() == whole.tobytes()
    assert "kept, since their requests are unchanged: 4" in generate("--resume")
    assert pictures() == after


def test_the_command_ends_with_the_code_of_an_interrupt(place, monkeypatch):
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["keylock", "generate", "orders.json", "--steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130


def test_a_full_disk_is_named_and_leaves_no_part_of_a_picture(place, monkeypatch, capsys):
    def full(path, data, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(drawn, "write_atomically", full)
    message = fail(capsys, monkeypatch, "generate", "orders.json", "--steps", 2)
    assert "outputs/" in message and "cannot be written: No space left on device" in message
    assert os.listdir("outputs") == []
    monkeypatch.setattr(drawn, "write_atomically", files.write_atomically)
    monkeypatch.setattr(os, "fsync", lambda file: full(None, None))
    message = fail(capsys, monkeypatch, "generate", "orders.json", "--steps", 2)
    assert "No space left on device" in message and os.listdir("outputs") == []


CHANGES = {
    "a prompt": (lambda orders: orders[0].update(prompt="<alice-cat> on green"), (), {"000.png"}),
    "a beta": (lambda orders: orders[0]["concepts"][0].update(beta=0.7), (), {"000.png"}),
    "a seed": (lambda orders: orders[2].update(seed=9), (), {"002.png"}),
    "a name": (lambda orders: orders[0].update(id="other"), (), set()),
    "the steps": (lambda orders: None, ("--steps", 3), {"000.png", "001-0.png", "001-1.png", "002.png"}),
    "the picture": (lambda orders: Image.new("RGB", (16, 16), "blue").save("photo.png"), (), {"002.png"}),
    "one more picture": (lambda orders: orders[1].update(num_images=3), (), {"001-2.png"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_draws_again_what_changed_and_nothing_else(place, what):
    generate()
    before, orders = pictures(), json.loads(json.dumps(ORDERS))
    change, options, expected = CHANGES[what]
    change(orders)
    order(orders)
    generate("--resume", *options)
    after = pictures()
    assert {name for name in after if after[name] not in before.values()} == expected
    assert {*before.values()} <= {*after.values()}


def test_resume_sees_a_concept_that_was_taught_anew(place, pipe, concept_for):
    generate()
    before = pictures()
    kd.ConceptBank("concepts").add("alice/cat", concept_for(pipe, seed=2), overwrite=True)
    generate("--resume")
    assert {name for name, data in pictures().items() if data not in before.values()} == {"000.png"}


def test_pictures_follow_their_orders_to_other_places_in_the_file(place):
    generate()
    before = pictures()
    order([{"prompt": "a taxi", "seed": 1}, *ORDERS[::-1], ORDERS[0]])
    said = generate("--resume")
    after = pictures()
    assert (after["001.png"], after["002-1.png"], after["003.png"]) == tuple(
        before[name] for name in ("002.png", "001-1.png", "000.png")
    )
    assert "unchanged: 4" in said and set(after) == {
        "000.png",
        "001.png",
        "002-0.png",
        "002-1.png",
        "003.png",
        "004.png",
    }
    with Image.open("outputs/004.png") as twin, Image.open("outputs/003.png") as one:
        assert twin.tobytes() == one.tobytes()  # of two equal orders each has its own


@pytest.mark.parametrize("left", [0, 100, -20])
def test_a_picture_that_was_cut_is_drawn_again(place, left):
    """Before its text, in it, and after it."""
    generate()
    data = pictures()["002.png"]
    (place / "outputs" / "002.png").write_bytes(data[:left])
    assert "unchanged: 3" in generate("--resume")
    assert pictures()["002.png"] == data


def test_pictures_of_no_request_are_left_and_named(place):
    os.mkdir("outputs")
    for name in ("007.png", "holiday.png"):
        Image.new("RGB", (8, 8)).save(place / "outputs" / name)
    assert "belong to none of these requests, left as they are: 007.png, holiday.png" in generate()
    assert {"007.png", "holiday.png"} < set(pictures())


@pytest.mark.parametrize("output", ["photo.png", "photo.png/below"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(place, monkeypatch, capsys, output):
    monkeypatch.setattr(common, "load", lambda *model, **options: pytest.fail("the model was loaded"))
    message = fail(capsys, monkeypatch, "generate", "orders.json", "--output", output)
    assert f"--output must be a place that pictures can be written to, got {output}" in message


@pytest.mark.parametrize("kind", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_takes_nothing_is_refused_before_the_work(place, monkeypatch, capsys, kind):
    def refuse(*_):
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(files, "_made", refuse)
    monkeypatch.setattr(common, "load", lambda *model, **options: pytest.fail("the model was loaded"))
    assert os.strerror(kind) in fail(capsys, monkeypatch, "generate", "orders.json")


def test_attention_of_many_pictures_is_in_pages(place, monkeypatch):
    monkeypatch.setattr(work, "_PAGE", 3)
    said = generate("--show-attention", "house", "--show-attention", "cat")
    assert "attention-00.png" in said and "attention-01.png" in said and "left as they are" not in said
    first, second = (Image.open(f"outputs/attention-0{n}.png").height for n in range(2))
    assert first == 3 * second


BAD = {
    "a misspelt field": ({"prompt": "a", "stength": 1}, "did you mean strength?"),
    "not an object": (7, "must be an object, got int"),
    "a file that is not there": ({"prompt": "a", "image": "none.png"}, "none.png"),
    "a picture that is none": ({"prompt": "a", "image": "orders.json"}, "image"),
    "a number as a file": ({"prompt": "a", "mask": 7}, "mask must be the name of a file"),
    "pictures without number": ({"prompt": "a", "num_images": 10**11}, "num_images must be a whole number from 1"),
    "an id that is an object": ({"prompt": "a", "id": {"image": "/dev/zero"}}, "id must be text, got dict"),
    "an id that is no text": ({"prompt": "a", "id": "\ud800"}, "id must be text, got half of a surrogate pair"),
    "a file for a number": (
        {"prompt": "a", "regions": [{"mask": "photo.png", "tokens": {"image": "/dev/zero"}}]},
        "tokens",
    ),
    "a number for a file among tokens": (
        {"prompt": "a", "regions": [{"mask": "photo.png", "tokens": {"mask": 7}}]},
        "tokens",
    ),
    "a negative seed": ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
    "a text as seed": ({"prompt": "a", "seed": "x"}, "seed must be a whole number from 0"),
    "an unknown concept": ({"prompt": "<x> on blue", "concepts": ["bob/cat"]}, "bob/cat"),
    "a concept that is no id": (
        {"prompt": "<x> on blue", "concepts": [{"concept": 5}]},
        "must be an id or a Concept, got int",
    ),
    "words that are not there": ({"prompt": "a", "regions": [{"mask": "photo.png", "prompt": "taxi"}]}, "taxi"),
    "a gate of text": ({"prompt": "<a> b", "concepts": [{"concept": "alice/cat", "beta": "high"}]}, "beta"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_an_error_names_the_request_and_the_argument(place, monkeypatch, capsys, what, resume):
    bad, message = BAD[what]
    generate()
    before = pictures()
    if isinstance(bad, dict):
        bad = {"id": "the bad one", **bad}
    order([ORDERS[2], ORDERS[0], bad])
    error = fail(capsys, monkeypatch, "generate", "orders.json", "--steps", 2, *(["--resume"] if resume else []))
    assert "request 2 (" in error and message in error and len(error.strip().splitlines()) == 1
    assert "the bad one" in error or not isinstance(bad, dict) or "id" in BAD[what][0]
    assert {*before.values()} == {*pictures().values()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[{'prompt': 'a'}]", "must be a list of requests in JSON"),
        ('[{"prompt": "caf\xe9"}]'.encode("latin-1"), "must be UTF-8, got the byte 0xe9 in line 1"),
        (b'[{"seed": NaN}]', "NaN is not allowed"),
        (b'[{"seed": 1, "seed": 2}]', "a name occurs twice"),
        (b"[" * 100_000, "must be a list of requests in JSON"),
        (b"", "must be a list of requests in JSON"),
    ],
)
def test_a_file_that_is_no_json_is_one_line(place, monkeypatch, capsys, data, message):
    (place / "orders.json").write_bytes(data)
    error = fail(capsys, monkeypatch, "generate", "orders.json")
    assert "orders.json: " in error and message in error and len(error.strip().splitlines()) == 1


def test_a_byte_order_mark_is_no_mistake(place):
    (place / "orders.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ORDERS[2:]).encode())
    generate()
    assert list(pictures()) == ["000.png"]


def test_pictures_elsewhere_are_read_only_when_asked_for(place, monkeypatch, capsys):
    os.mkdir("below")
    (place / "below" / "orders.json").write_text(json.dumps([{"prompt": "a", "image": "../photo.png", "seed": 1}]))
    error = fail(capsys, monkeypatch, "generate", "below/orders.json", "--steps", 1)
    assert "must be a file inside below" in error
    run("generate", "below/orders.json", "--steps", 2, "--outside")
    assert list(pictures()) == ["000.png"]


def test_what_a_picture_says_is_of_before_it_was_drawn(place, monkeypatch):
    """Somebody who changes a picture while it is drawn from is not told that the new one was drawn."""
    real = work.generate

    def generate_and_change(*given, **options):
        Image.new("RGB", (16, 16), "blue").save("photo.png")
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(work, "generate", generate_and_change)
        generate()
    before = pictures()
    generate("--resume")
    assert {name for name, data in pictures().items() if data not in before.values()} == {"002.png"}


@pytest.mark.parametrize("option", ["--ip-adapter", "--image-encoder", "--fusion", "--controlnet"])
def test_files_that_are_not_there_are_named_before_the_work(place, monkeypatch, capsys, option):
    monkeypatch.setattr(common, "load", lambda *model, **options: pytest.fail("the model was loaded"))
    error = fail(capsys, monkeypatch, "generate", "orders.json", option, "edges=nowhere")
    assert option in error and "edges=nowhere" in error


def test_the_rest_of_an_order_has_the_seeds_that_follow_the_others(place):
    generate()
    before = pictures()
    os.unlink("outputs/001-0.png")
    more = json.loads(json.dumps(ORDERS))
    more[1]["num_images"] = 4
    order(more)
    generate("--resume")
    seeds = [drawn.facts_of(place / "outputs" / f"001-{n}.png")["order"]["seed"] for n in range(4)]
    assert seeds == [seeds[0] + n for n in range(4)]
    with Image.open("outputs/001-0.png") as again, Image.open(io.BytesIO(before["001-0.png"])) as first:
        assert np.abs(np.asarray(again, int) - np.asarray(first, int)).max() <= 1  # of a batch of another size


A, B, C = ({"prompt": f"a {name}", "seed": seed} for seed, name in enumerate(("house", "dog", "taxi")))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("orders", [[B], [C, B], [C], [B, A], [{**A, "num_images": 2}, C]])
def test_no_run_destroys_a_picture(place, orders, resume):
    order([A, B])
    generate()
    for listed in (orders, [C, A], [B]):
        before = {*pictures().values()}
        order(listed)
        generate(*(["--resume"] if resume else []))
        assert before <= {*pictures().values()}
    assert {drawn.facts_of(place / "outputs" / name)["order"]["prompt"] for name in pictures()} >= {A["prompt"]}
    assert not [name for name in pictures() if name.startswith(".")]


def test_names_are_exchanged_whatever_an_earlier_exchange_left(tmp_path):
    for name in ("000.png", ".001.png", "001.png"):
        (tmp_path / name).write_text(name)
    moves = {"000.png": "001.png", ".001.png": "005.png", "001.png": "000.png"}
    drawn.rename({tmp_path / old: tmp_path / new for old, new in moves.items()})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {new: old for old, new in moves.items()}


def test_what_a_picture_says_may_hold_any_text_of_the_command_line(tmp_path):
    drawn.write(tmp_path / "a.png", Image.new("RGB", (8, 8)), "a", {"model": "\udcff"})
    assert drawn.facts_of(tmp_path / "a.png")["model"] == "\udcff"


def test_what_is_no_regular_file_is_no_picture_of_ours(place):
    os.mkdir("outputs")
    os.mkfifo("outputs/000.png")
    os.symlink("nowhere", "outputs/002.png")
    generate("--resume")
    assert drawn.facts_of(place / "outputs" / "000.png") and drawn.facts_of(place / "outputs" / "002.png")


def test_pictures_are_hashed_once_an_order(place, monkeypatch):
    opened, real = [], orders_module._digest
    monkeypatch.setattr(orders_module, "_digest", lambda file: opened.append(file) or real(file))
    order([{"prompt": "a dog", "num_images": 3, "image": "photo.png", "strength": 0.9, "seed": 8}])
    generate()
    assert opened == [str(place / "photo.png")]


def test_a_picture_exchanged_for_a_link_is_not_followed(place):
    (listed,) = orders_module.read(place / "orders.json")[2:]
    os.unlink("photo.png")
    os.symlink("/etc/passwd", "photo.png")
    with pytest.raises(OSError, match="photo.png"):
        orders_module.Identity({}, {}, None).of(listed, 0)


def test_an_earlier_sheet_of_attention_stays(place):
    generate("--show-attention", "house")
    sheet = pictures()["attention.png"]
    assert "none was to be drawn" in generate("--resume", "--show-attention", "house")
    assert pictures()["attention.png"] == sheet
    order([*ORDERS, {"prompt": "a house on blue", "seed": 1}])
    assert "attention.png: of the pictures that were drawn now only" in generate(
        "--resume", "--show-attention", "house"
    )
    assert pictures()["attention.1.png"] == sheet != pictures()["attention.png"]


def test_what_pillow_notes_of_a_picture_is_not_printed_beside_our_line(place):
    """In a process of its own: pytest keeps warnings to itself."""
    header = struct.pack(">IIBBBBB", 12_000, 9_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (place / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    note = b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01"  # nine entries, and less than one
    Image.new("RGB", (8, 8)).save("noted.jpg", exif=note)
    order([{"prompt": "a", "image": name} for name in ("noted.jpg", "large.png")])
    command = [sys.executable, "-m", "keylock_diffusers.cli", "generate", "orders.json"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert ended.returncode == 1 and "must have at most 64000000 pixels" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr


def test_an_embedding_is_a_file_beside_the_orders_and_another_one_draws_anew(place, capsys, monkeypatch):
    one, other = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": one}, place / "badhand.safetensors")
    held = {"prompt": "a cat", "negative_prompt": "ugly badhand", "embeddings": [{"source": "badhand.safetensors"}]}
    order([{**held, "seed": 1}])
    generate()
    before = pictures()
    assert "kept, since their requests are unchanged: 1" in generate("--resume")
    save_file({"emb_params": other}, place / "badhand.safetensors")
    assert "unchanged: 1" not in generate("--resume") and pictures() != before
    order([{**held, "embeddings": [{"source": "gone.safetensors"}]}])
    error = fail(capsys, monkeypatch, "generate", "orders.json", "--steps", 2)
    assert "request 0" in error and "source" in error and "gone.safetensors" in error


def adapter_file(path, pipe, seed=0):
    shapes = weight_shapes(projections(pipe.unet))
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in [name for name in shapes if name.endswith(("to_q", "to_v"))]:
        outer, inner = shapes[name]
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, inner, generator=random) * 0.3
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(outer, 2, generator=random) * 0.3
    save_file(tensors, path)
    return path


def test_orders_name_loras_by_id_and_by_file_and_a_changed_one_is_drawn_again(place, pipe, capsys, monkeypatch):
    bank = kd.LoraBank("loras", cache="cache")
    bank.add("bob/style", adapter_file(place / "bob.safetensors", pipe))
    adapter_file(place / "own.safetensors", pipe, seed=1)
    plain = {"prompt": "a dog", "seed": 8, "guidance_scale": 3.0}
    order([
        plain,
        {**plain, "loras": ["bob/style"]},
        {**plain, "loras": [{"lora": "own.safetensors", "strength": -0.5, "end": 0.5, "region": "photo.png"}]},
    ])  # fmt: skip
    generate()
    before = pictures()
    assert len(set(before.values())) == 3
    facts = [drawn.facts_of(place / "outputs" / name) for name in before]
    assert "loras" not in facts[0] and facts[1]["loras"] == {"bob/style": bank.version("bob/style")}
    bank.add("bob/style", adapter_file(place / "bob.safetensors", pipe, seed=2), overwrite=True)
    generate("--resume")
    after = pictures()
    assert [name for name in before if after[name] != before[name]] == ["001.png"]
    adapter_file(place / "own.safetensors", pipe, seed=3)
    generate("--resume")
    assert pictures()["002.png"] != before["002.png"] and pictures()["001.png"] == after["001.png"]
    order([{**plain, "loras": ["carol/style"]}])
    assert "no LoRA 'carol/style' in the bank" in fail(capsys, monkeypatch, "generate", "orders.json", "--steps", 2)
    order([{**plain, "loras": [{"lora": "../own.safetensors"}]}])
    assert "must be a file inside" in fail(capsys, monkeypatch, "generate", "orders.json")
