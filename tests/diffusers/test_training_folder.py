"""What surrounds training: folders of pictures, samples, advice, and `keylock train`, which loses no work."""

import errno
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import keylock_diffusers as kd
import keylock_diffusers.cli.drawn  # noqa: F401 (bound before what it writes with is replaced)
from keylock_diffusers import cli, files
from keylock_diffusers.cli import common
from keylock_diffusers.concepts import AddedConcept, Concept
from keylock_diffusers.training import (
    PerfusionConfig,
    PictureFolder,
    Samples,
    Subject,
    advice,
    checkpoint,
    train_concepts,
)
from keylock_diffusers.training.added import AddedTraining
from keylock_diffusers.training.advice import quarters
from tests.diffusers.test_cli import fail, run, tiny_model  # noqa: F401
from tests.diffusers.test_training import metric, pictures, same, subject  # noqa: F401
from tests.diffusers.test_training_loop import ctrl_c  # noqa: F401


def fill(folder, *names):
    """Files by name: pictures, masks, captions, and whatever else."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if name.lower().endswith(".txt"):
            (folder / name).write_text("<alice-cat> on blue")
        elif "-mask." in name.lower():
            Image.new("L", (16, 16), 255).save(folder / name, "PNG")
        elif name.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")):
            Image.new("RGB", (16, 16), "red").save(folder / name, "GIF" if name.endswith(".gif") else "PNG")
        else:
            (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.png"], "1 picture, no captions, no masks"),
        (["a.png", "a.txt", "b.JPG", "b.TXT"], "2 pictures, 2 captions, no masks"),
        (["a.png", "a-mask.png", "b.webp", "b-mask.jpg"], "2 pictures, no captions, 2 masks"),
        (["a.jpeg", "a-MASK.webp", ".hidden"], "1 picture, no captions, 1 mask"),
        (["a.png", "b.gif"], "1 picture, no captions, no masks; left out, as no .*: b.gif"),
        (
            ["a.png", "b.txt", "hockey-mask.png"],
            "1 picture, no captions, no masks; left out, .*: b.txt, hockey-mask.png",
        ),
        (["a.png", "notes.md", "b.bmp", "c.heic"], "left out, .*: b.bmp, c.heic, notes.md"),
        (["a.png", *(f"{n}.gif" for n in range(9))], "0.gif, .*, 7.gif, ..."),
    ],
)
def test_what_was_taken_of_a_folder_is_said(tmp_path, names, said):
    folder = PictureFolder.read(fill(tmp_path / "f", *names))
    assert re.fullmatch(f".*{said}", str(folder)), str(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "f holds no pictures"),
        (["a.gif"], "f holds no pictures"),
        (["a-mask.png"], "f holds no pictures"),
        (["a.png", "b.png", "b.txt"], "a.png has no caption, but other pictures of .*f have one"),
        (["a.png", "a-mask.png", "b.png"], "b.png has no mask, but other pictures of .*f have one"),
        (["a.png", "a-mask.png", "a-mask.jpg"], "f holds 2 masks for the name a; rename one"),
        (["a.png", "a.jpg", "a-mask.png"], "f holds 2 pictures for the name a; rename one, and its mask"),
        (["a.png", "a.txt", "a.TXT"], "f holds 2 captions for the name a"),
    ],
)
def test_a_folder_that_leaves_a_choice_is_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        PictureFolder.read(fill(tmp_path / "f", *names))


def test_pictures_of_a_folder_are_opened_one_at_a_time(tmp_path):
    folder = fill(tmp_path / "f", "a.png", "a-mask.png", "b.png", "b-mask.png")
    made = PictureFolder.read(folder).subject("<alice-cat>", "cat", seed=3)
    assert isinstance(made, Subject) and (len(made.images), len(made.masks), made.seed) == (2, 2, 3)
    assert made.images[0] is not made.images[0] and len(made.images[:1]) == 1
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    held = [made.images[n % 2] for n in range(50)]
    assert before is None or len(os.listdir("/proc/self/fd")) == before, len(held)


def broken(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-30])


def thin(folder, name):
    Image.new("L", (1, 9000)).save(folder / name, "PNG")


def eps(folder, name):
    (folder / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def pipe_of(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def latin(folder, name):
    (folder / name).write_bytes("<alice-cat> in K\u00f6ln".encode("latin-1"))


def long(folder, name):
    (folder / name).write_text("<alice-cat> " * 9000)


def wordless(folder, name):
    (folder / name).write_text("a cat on blue")


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (broken, "a.png", "a.png cannot be"),
        (thin, "b.jpg", "b.jpg must be at most 16 times"),
        (eps, "a.png", "a.png must be a picture in PNG, JPEG or WEBP, and its content is not"),
        (pipe_of, "a.png", "a.png: not a regular file"),
        (broken, "b-mask.png", "b-mask.png cannot be"),
        (pipe_of, "a-mask.png", "a-mask.png: not a regular file"),
        (pipe_of, "a.txt", "a.txt: not a regular file"),
        (latin, "b.txt", "b.txt must be text in UTF-8, and byte 16 is not"),
        (long, "a.txt", "a.txt must have at most 65536 bytes"),
        (wordless, "b.txt", "b.txt must hold a caption with <alice-cat>, got 'a cat on blue'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_before_training(tmp_path, spoil, name, message):
    folder = fill(tmp_path / "f", "a.png", "a.txt", "a-mask.png", "b.jpg", "b.txt", "b-mask.png")
    spoil(folder, name)
    with pytest.raises(ValueError, match=f"{folder}/{message}"):
        PictureFolder.read(folder).subject("<alice-cat>", "cat")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    folder = fill(tmp_path / "f", "a.png")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf<alice-cat> on blue\r\n")
    assert PictureFolder.read(folder).subject("<alice-cat>", "cat").captions == ["<alice-cat> on blue"]


def test_a_placeholder_that_is_none_is_named_before_its_captions(tmp_path):
    folder = fill(tmp_path / "f", "a.png")
    (folder / "a.txt").write_text("<Alice-Cat> on blue")
    with pytest.raises(ValueError, match="placeholder"):
        PictureFolder.read(str(folder)).subject("<Alice-Cat>", "cat")


def test_a_name_that_is_too_long_to_be_written_is_found_before_the_work(tmp_path):
    files.require_place(tmp_path / ("x" * 230), "--output")
    with pytest.raises(ValueError, match="--output: .* cannot be written: File name too long"):
        files.require_place(tmp_path / ("x" * 240), "--output")
    assert os.listdir(tmp_path) == []


def test_a_lock_goes_with_what_it_was_held_for(tmp_path):
    with pytest.raises(RuntimeError), files.held(tmp_path / "a") as mine:
        assert mine
        raise RuntimeError
    assert os.listdir(tmp_path) == []


# Samples and advice


def test_samples_show_the_super_class_and_the_concept_so_far_and_change_nothing(pipe, metric, tmp_path):  # noqa: F811
    kd.install(pipe)
    path = tmp_path / "samples.png"
    config = PerfusionConfig(steps=4, batch_size=2, values_rate=0.05, embedding_rate=0.05)
    samples = Samples(pipe, subject(), path, 2, seeds=(0, 1), num_inference_steps=2)
    options = {"metric": metric, "progress": False}
    (shown,) = train_concepts(pipe, [subject()], config, **options, on_step=samples)
    assert same(shown, train_concepts(pipe, [subject()], config, **options)[0])
    heads = [head for head, _ in samples._columns]
    assert heads == ["cat", "step 2", "step 4"]
    assert Image.open(path).width > 3 * 160 and Image.open(path).height > 2 * 160
    order = [kd.Request("cat on blue", seed=seed) for seed in (0, 1)]
    order += [kd.Request("<alice-cat> on blue", concepts=[shown], seed=seed) for seed in (0, 1)]
    drawn = kd.generate(pipe, order, num_inference_steps=2, max_batch=2)
    for column, ours in ((samples._columns[0], drawn[:2]), (samples._columns[2], drawn[2:])):
        for one, other in zip(column[1], ours, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_samples_that_cannot_be_drawn_or_written_do_not_stop_training(pipe, metric, tmp_path, caplog):  # noqa: F811
    config = PerfusionConfig(steps=2, batch_size=2)
    samples = Samples(pipe, subject(), tmp_path / "none" / "samples.png", 1, num_inference_steps=1)
    (made,) = train_concepts(pipe, [subject()], config, metric=metric, progress=False, on_step=samples)
    assert isinstance(made, Concept) and caplog.text.count("samples: step") == 2
    sick = subject(captions=["a cat", "a cat"])
    samples = Samples(pipe, sick, tmp_path / "samples.png", 1)
    train_concepts(pipe, [sick, subject()], config, metric=metric, progress=False, on_step=samples)
    assert not (tmp_path / "samples.png").exists()
    samples = Samples(pipe, subject(), tmp_path / "samples.png", 2, place=1)
    (made,) = train_concepts(pipe, [subject()], config, metric=metric, progress=False, on_step=samples)
    assert isinstance(made, Concept) and "samples: step 2 has none: list index" in caplog.text
    with pytest.raises(ValueError, match="Samples: place must be a whole number of at least 0, got -1"):
        Samples(pipe, subject(), tmp_path / "samples.png", 1, place=-1)
    with pytest.raises(ValueError, match="Samples: every must be a whole number of at least 1, got 0"):
        Samples(pipe, subject(), tmp_path / "samples.png", 0)


def course(*means, noise=0.02, length=100):
    """Losses that go from mean to mean in four quarters, and scatter."""
    random = np.random.default_rng(0)
    return [float(mean + noise * random.standard_normal()) for mean in means for _ in range(length)]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (course(0.2, 0.3, 0.4, 0.5), "The loss rose from 0.2.* half the learning rates"),
        (course(0.2, 0.2, 0.2, 0.2), "did not fall measurably"),
        (course(0.2, 0.2, 0.199, 0.195, noise=0.5), "did not fall measurably"),
        (course(0.4, 0.35, 0.3, 0.25), "still falling: more steps"),
        (course(0.4, 0.3, 0.1, 0.1), "fell from 0.4.* may be known by heart"),
        (course(0.4, 0.32, 0.3, 0.3), "falls no more"),
        (course(0.4, 0.3, 0.2, 0.1, length=9), "Fewer than 40 steps say nothing"),
        ([], "Fewer than 40 steps say nothing"),
    ],
)
def test_advice_is_what_the_losses_say(losses, said):
    assert re.search(said, advice({"pictures": 4, **quarters(losses)}))


def test_quarters_are_means_and_their_standard_errors():
    losses = torch.rand(43, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = quarters(losses.tolist())
    parts = [losses[:10], losses[10:20], losses[20:30], losses[30:]]
    assert made["loss_quarters"] == pytest.approx([float(part.mean()) for part in parts], abs=1e-5)
    assert made["loss_errors"] == pytest.approx([float(part.std() / len(part) ** 0.5) for part in parts], abs=1e-6)


def test_a_concept_keeps_the_course_of_its_losses_over_an_interruption(pipe, metric, tmp_path):  # noqa: F811
    path = tmp_path / "run.safetensors"
    options = {"metric": metric, "progress": False}
    config = PerfusionConfig(steps=42, batch_size=1)
    (whole,) = train_concepts(pipe, [subject()], config, **options)
    assert len(whole.training["loss_quarters"]) == len(whole.training["loss_errors"]) == 4
    train_concepts(pipe, [subject()], PerfusionConfig(steps=20, batch_size=1), **options, checkpoint_path=path)
    (resumed,) = train_concepts(pipe, [subject()], config, **options, checkpoint_path=path)
    assert resumed.training["loss_quarters"] == whole.training["loss_quarters"]


# The command


def test_a_request_may_name_a_version(pipe, concept_for, tmp_path):
    bank, concept = kd.ConceptBank(tmp_path), concept_for(pipe)
    bank.add("alice/cat", concept)
    kd.install(pipe)
    named, plain = (
        kd.Request("<alice-cat>", concepts=[name], seed=1) for name in (f"alice/cat@{concept.version}", "alice/cat")
    )
    options = {"bank": bank, "num_inference_steps": 1, "output_type": "pt"}
    assert torch.equal(*(kd.generate(pipe, [one], **options)[0] for one in (named, plain)))
    bank.add("alice/cat", concept_for(pipe, seed=2), overwrite=True)
    with pytest.raises(kd.RequestError, match=f"no version {concept.version} of alice/cat"):
        kd.generate(pipe, [named], **options)


def command(tmp_path, *more, output="cat.safetensors", names=("a.png", "a.txt", "b.png", "b.txt")):
    return [
        *("train", fill(tmp_path / "f", *names), "--placeholder", "<alice-cat>", "--super-class", "cat"),
        *("--output", tmp_path / output, "--steps", 2, "--batch-size", 1, *more),
    ]


@pytest.fixture
def quick(tiny_model, monkeypatch, tmp_path):  # noqa: F811
    """Few captions for the metric, and a cache of its own."""
    monkeypatch.setenv("KEYLOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("keylock_diffusers.embedded.captions.default_captions", lambda: ["a cat on blue", "a dog"])
    return tiny_model


def unloaded(monkeypatch):
    monkeypatch.setattr(common, "load", lambda *_, **__: pytest.fail("the model was loaded before"))


def test_train_says_what_it_took_and_what_came_of_it(quick, tmp_path):
    said = run(*command(tmp_path, "--samples-every", 1, names=("a.png", "a.txt", "b.gif")))
    assert "1 picture, 1 caption, no masks; left out, as no PNG, JPEG or WEBP picture" in said and "b.gif" in said
    made = Concept.load(tmp_path / "cat.safetensors")
    assert f"version {made.version}" in said and "Fewer than 40 steps" in said
    assert Image.open(tmp_path / "cat.safetensors.samples.png").width > 2 * 160
    assert sorted(os.listdir(tmp_path)) == ["cat.safetensors", "cat.safetensors.samples.png", "f"]


def test_train_never_replaces_a_concept_unasked(quick, capsys, monkeypatch, tmp_path):
    (tmp_path / "cat.safetensors").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        unloaded(patch)
        error = fail(capsys, patch, *command(tmp_path))
    assert "cat.safetensors exists already; --overwrite replaces it" in error
    assert (tmp_path / "cat.safetensors").read_bytes() == b"mine"
    run(*command(tmp_path, "--overwrite"))
    assert Concept.load(tmp_path / "cat.safetensors")


def test_one_that_came_meanwhile_is_not_replaced_either_and_nothing_is_lost(quick, capsys, monkeypatch, tmp_path):
    output = tmp_path / "cat.safetensors"
    save = checkpoint.save

    def late(path, *given, **more):
        output.write_bytes(b"mine")
        return save(path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", late)
        error = fail(capsys, patch, *command(tmp_path))
    assert "exists already" in error and "the same command goes on from there" in error
    assert output.read_bytes() == b"mine"
    output.unlink()
    monkeypatch.setattr("keylock_diffusers.training.added.AddedTraining.learn", lambda *_: pytest.fail("trained anew"))
    run(*command(tmp_path))
    assert Concept.load(output)


@pytest.mark.parametrize(
    ("output", "message"),
    [("f", "--output must be a file, got the folder"), ("file/cat.safetensors", "--output: .* cannot be written")],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(capsys, monkeypatch, tmp_path, output, message):
    (tmp_path / "file").write_text("")
    unloaded(monkeypatch)
    assert re.search(message, fail(capsys, monkeypatch, *command(tmp_path, output=output)))


def test_a_full_output_disk_says_so_leaves_no_file_and_loses_nothing(quick, capsys, monkeypatch, tmp_path):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        patch.setattr(files, "write_tensors", lambda *_: None)
        error = fail(capsys, patch, *command(tmp_path))
    assert "No space left on device" in error and "it is lost" in error
    assert not (tmp_path / "cat.safetensors").exists()
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_train_goes_on_with_the_same_command(request, quick, capsys, monkeypatch, tmp_path, number):
    """SIGTERM also where nobody can press Ctrl-C: a process in the background ignores it."""
    learn, done = AddedTraining.learn, []

    def interrupted(*given):
        done.append(given[-1])
        if len(done) == 2:
            signal.raise_signal(number)
        return learn(*given)

    monkeypatch.setattr(AddedTraining, "learn", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    if number == signal.SIGTERM:
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))
    else:
        request.getfixturevalue("ctrl_c")
    monkeypatch.setattr(sys, "argv", ["keylock", *map(str, command(tmp_path, "--steps", 4))])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert "keylock: training concepts was stopped; what 2 steps have learned is in" in said
    assert "Traceback" not in said and not (tmp_path / "cat.safetensors").exists()
    run(*command(tmp_path, "--steps", 4))
    assert done == [0, 1, 2, 3] and Concept.load(tmp_path / "cat.safetensors").training["steps"] == 4
    assert sorted(os.listdir(tmp_path)) == ["cat.safetensors", "f"]


def test_a_checkpoint_of_ones_own_stays(quick, tmp_path):
    run(*command(tmp_path, "--checkpoint", tmp_path / "run.safetensors"))
    assert (tmp_path / "run.safetensors").exists()


def test_what_went_wrong_in_training_is_one_line_and_leaves_no_checkpoint(quick, capsys, monkeypatch, tmp_path):
    error = fail(capsys, monkeypatch, *command(tmp_path, "--values-rate", 1e30))
    assert "not finite" in error and len(error.strip().splitlines()[-1]) < 300
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({}, ["--dtype", "float16"], "--dtype must be float32 or bfloat16"),
    ],
)
def test_a_model_that_cannot_be_taught_is_refused_before_it_is_loaded(
    capsys, monkeypatch, tmp_path, parts, options, message
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **parts}))
    (tmp_path / "captions.txt").write_text("a cat")
    unloaded(monkeypatch)
    options = ["--model", tmp_path / "model", *options]
    assert message in fail(capsys, monkeypatch, *command(tmp_path, *options))


def test_train_makes_an_added_concept_without_captions_for_a_metric(quick, monkeypatch, tmp_path):
    monkeypatch.setattr("keylock_diffusers.training.covariance", lambda *_, **__: pytest.fail("made a metric"))
    options = [
        "--words",
        2,
        "--values",
        1,
        "--keys-rate",
        0.01,
        "--prior",
        0.5,
        "--start",
        0.2,
        "--samples-every",
        1,
    ]
    said = run(*command(tmp_path, *options, names=("a.png", "a.txt", "a-mask.png")))
    made = Concept.load(tmp_path / "cat.safetensors")
    assert isinstance(made, AddedConcept) and (made.words, made.start, len(made.keys)) == (2, 0.2, 1)
    assert made.training["keys_rate"] == 0.01 and made.training["prior"] == 0.5
    assert "samples.png: samples" in said and f"version {made.version}" in said
    bank = ["--bank", tmp_path / "bank"]
    run("bank", "add", "alice/cat", tmp_path / "cat.safetensors", *bank)
    shown = json.loads(run("bank", "show", "alice/cat", *bank))
    assert (shown["edit"], shown["words"], shown["start"]) == ("added", 2, 0.2) and "covariance" not in shown


def of_users(tmp_path, *more, output="learned"):
    place = tmp_path / "users"
    place.mkdir(exist_ok=True)
    for name in ("alice", "carol"):
        fill(place / name, "a.png", "b.png")
    return [
        *(
            "train",
            place,
            "--users",
            "--placeholder",
            "<{}-pet>",
            "--super-class",
            "cat",
            "--output",
            tmp_path / output,
        ),
        *("--steps", 2, "--batch-size", 1, *more),
    ]


@pytest.mark.parametrize("options", [["--edit", "added"], ["--edit", "perfusion"], ["--method", "lora"]])
def test_many_users_learn_in_one_run_and_one_ones_folder_costs_the_others_nothing(quick, tmp_path, options):
    whole = of_users(tmp_path, *options)
    fill(tmp_path / "users" / "bob", "a.png")
    broken(tmp_path / "users" / "bob", "a.png")
    (tmp_path / "users" / "dave").mkdir()
    (tmp_path / "users" / "carol" / "super-class.txt").write_text("dog\n")
    result = CliRunner().invoke(cli.app, [*map(str, whole)])
    assert result.exit_code == 1, result.output
    lines = result.output.splitlines()
    assert any("alice: 2 pictures, 2 steps, finished" in line for line in lines)
    assert any(line.startswith("bob: not learned: ") and "a.png" in line for line in lines)
    assert any(line.startswith("dave: not learned: ") and "holds no pictures" in line for line in lines)
    assert "2 of 4 users' subjects were not learned" in result.stderr and "super-class.txt" not in result.output
    made = {file.name for file in (tmp_path / "learned").iterdir()}
    words = {"alice.embedding.safetensors", "carol.embedding.safetensors"} if "lora" in options else set()
    assert made == {"alice.safetensors", "carol.safetensors", *words}
    if "lora" in options:
        return
    carol = Concept.load(tmp_path / "learned" / "carol.safetensors")
    assert (carol.placeholder, carol.super_class) == ("<carol-pet>", "dog")
    alone = [
        "--placeholder",
        "<carol-pet>",
        "--super-class",
        "dog",
        "--output",
        tmp_path / "one.safetensors",
        "--seed",
        2,
    ]
    run("train", tmp_path / "users" / "carol", *alone, "--steps", 2, "--batch-size", 1, *options)
    one = Concept.load(tmp_path / "one.safetensors")
    for name, tensor in carol.tensors.items():
        torch.testing.assert_close(tensor.float(), one.tensors[name].float(), rtol=1e-2, atol=1e-3)


def test_masks_can_be_made_where_there_are_none(quick, capsys, monkeypatch, tmp_path):
    options = ["--edit", "added", "--auto-masks", "attention"]
    learned = []
    for name, more in (("bare", []), ("made", options[2:]), ("given", options[2:])):
        names = ("a.png", "a.txt") if name != "given" else ("a.png", "a.txt", "a-mask.png")
        place = tmp_path / name
        place.mkdir()
        run(*command(place, *options[:2], *more, names=names))
        learned.append(Concept.load(place / "cat.safetensors"))
    assert not torch.equal(learned[0].values, learned[1].values)
    assert torch.equal(learned[0].values, learned[2].values)  # whose mask is white everywhere
    result = CliRunner().invoke(cli.app, [*map(str, of_users(tmp_path, *options, "--localize", 0.1))])
    assert result.exit_code == 0 and "alice: 2 pictures, 2 steps, finished" in result.output, result.output
    (tmp_path / "x").mkdir()
    assert "is no CLIPSeg model" in fail(capsys, monkeypatch, *command(tmp_path / "x", "--auto-masks", tmp_path / "x"))


def test_users_whose_files_are_there_are_refused_before_the_work(quick, capsys, monkeypatch, tmp_path):
    run(*of_users(tmp_path))
    before = (tmp_path / "learned" / "alice.safetensors").read_bytes()
    unloaded(monkeypatch)
    assert "alice.safetensors exists already" in fail(capsys, monkeypatch, *of_users(tmp_path))
    assert (tmp_path / "learned" / "alice.safetensors").read_bytes() == before
    for options, message in (
        (["--samples-every", 1], "it cannot be given with --users"),
        (["--placeholder", "<a-cat>"], "--placeholder must hold {} for a user's name"),
        (["--localize", 0.1], "--localize needs masks"),
    ):
        assert message in fail(capsys, monkeypatch, *of_users(tmp_path, *options, output="other"))
    (tmp_path / "none").mkdir()
    empty = ["train", tmp_path / "none", "--users", "--placeholder", "<{}>", "--output", tmp_path / "o"]
    assert "holds no users' folders" in fail(capsys, monkeypatch, *empty)


def test_an_earlier_strip_of_samples_stays(quick, tmp_path):
    (tmp_path / "cat.safetensors.samples.png").write_bytes(b"mine")
    assert "samples.1.png: samples" in run(*command(tmp_path, "--samples-every", 1))
    assert (tmp_path / "cat.safetensors.samples.png").read_bytes() == b"mine"
    assert "samples" not in run(*command(tmp_path, "--overwrite"))


def test_a_mask_that_is_empty_is_one_plain_line(quick, capsys, monkeypatch, tmp_path):
    Image.new("L", (16, 16)).save(fill(tmp_path / "f", "a.png", "a.txt") / "a-mask.png")
    error = fail(capsys, monkeypatch, *command(tmp_path, names=("a.png", "a.txt")))
    assert "is empty" in error and "ConceptTrainingError" not in error and "KEYLOCK_TRACEBACK" not in error


def test_models_of_ones_own_need_captions(quick, capsys, monkeypatch, tmp_path):
    """What the embedded model draws says nothing of what another's texts are like."""
    locked = ["--edit", "perfusion"]
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda *_: {})
    with monkeypatch.context() as patch:
        unloaded(patch)
        assert "--captions must name a text file" in fail(
            capsys, patch, *command(tmp_path, *locked, "--model", "somewhere")
        )
        (tmp_path / "captions.txt").write_bytes(b"\xff")
        error = fail(
            capsys, patch, *command(tmp_path, *locked, "--model", "x/y", "--captions", tmp_path / "captions.txt")
        )
        assert "captions.txt must be text in UTF-8" in error
        assert "--localize needs masks" in fail(capsys, patch, *command(tmp_path, "--localize", 1e-3))
    (tmp_path / "captions.txt").write_bytes("\ufeffa cat on blue\r\n\r\na dog\r\n".encode())
    asked = {}
    monkeypatch.setattr(common, "load", lambda model, **options: asked.update(options) or quick)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--variant", "fp16", "--scheduler", "DDIMScheduler"]
    run(*command(tmp_path, *locked, "--captions", tmp_path / "captions.txt", "--model", "x/y", *options))
    assert asked == {"dtype": "bfloat16", "device": "cpu", "variant": "fp16", "scheduler": "DDIMScheduler"}
    recipe = json.loads(json.dumps(Concept.load(tmp_path / "cat.safetensors").covariance))
    assert recipe["captions"] == 2
