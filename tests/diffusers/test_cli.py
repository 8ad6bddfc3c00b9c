"""The command line: what it does, and one line and a nonzero exit for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import keylock_diffusers as kd
from keylock_diffusers import cli
from keylock_diffusers.cli import common
from keylock_diffusers.demo import pictures
from tests.diffusers.compatibility import image_encoder, save_adapter
from tests.diffusers.test_oracles import controlnet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_model(monkeypatch, pipe):
    monkeypatch.setattr(common, "load", lambda model, **options: pipe)
    return pipe


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(capsys, monkeypatch, *arguments):
    """Runs the command as the console script does; returns what it prints on standard error."""
    monkeypatch.setattr(sys, "argv", ["keylock", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["generate"], ["bank"], ["bank", "add"], ["env"]])
def test_every_command_has_help_a_person_can_follow(command):
    output = run(*command, "--help")
    assert "Usage" in output and len(output.splitlines()) > 4


def test_pictures_become_a_concept_a_bank_and_a_drawing(tiny_model, tmp_path):
    user = pictures.USERS[0]
    folder, file, bank, output = (tmp_path / name for name in ("cat", "cat.safetensors", "bank", "drawn"))
    folder.mkdir()
    for number, (image, mask) in enumerate(zip(*pictures.load(user), strict=True)):
        image.save(folder / f"{number}.png")
        mask.save(folder / f"{number}-mask.png")
        (folder / f"{number}.txt").write_text(pictures.CAPTIONS[number].format("<alice-cat>"))
    said = run(
        *("train", folder, "--placeholder", "<alice-cat>", "--super-class", "cat", "--output", file),
        *("--steps", 2, "--batch-size", 2),
    )
    assert f"{file.stat().st_size} bytes" in said
    assert kd.Concept.load(file).training["pictures"] == 4
    run("bank", "add", "alice/cat", file, "--bank", bank)
    assert "<alice-cat>" in run("bank", "list", "--bank", bank)
    assert json.loads(run("bank", "show", "alice/cat", "--bank", bank))["super_class"] == "cat"
    orders = [
        {"prompt": "<alice-cat> on blue", "concepts": [{"concept": "alice/cat", "strength": 0.9}], "seed": 1},
        {"prompt": "a house", "seed": 2, "num_images": 2},
    ]
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    run("generate", tmp_path / "orders.json", "--bank", bank, "--output", output, "--steps", 2)
    assert sorted(p.name for p in output.iterdir()) == ["000.png", "001-0.png", "001-1.png"]
    assert Image.open(output / "000.png").size == (16, 16)
    run("bank", "remove", "alice/cat", "--bank", bank)
    assert "alice" not in run("bank", "list", "--bank", bank)


def test_image_prompts_are_read_beside_the_request_file(tiny_model, pipe, capsys, monkeypatch, tmp_path):
    save_adapter(tmp_path, pipe)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "left.png")
    prompts = [{"image": "photo.png", "scale": 0.5, "region": "left.png"}, {"image": ["photo.png", "photo.png"]}]
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps([{"prompt": "a cat", "image_prompts": prompts}, {"prompt": "a dog"}]))
    adapter = ["--ip-adapter", tmp_path / "models" / "ip-adapter_sd15.safetensors"]
    encoder = ["--image-encoder", tmp_path / "models" / "image_encoder"]
    run("generate", orders, "--output", tmp_path / "drawn", "--steps", 2, *adapter, *encoder)
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["000.png", "001.png"]
    error = fail(capsys, monkeypatch, "generate", orders, "--ip-adapter", tmp_path / "none.safetensors")
    assert "--ip-adapter: there is no file" in error
    orders.write_text(json.dumps([{"prompt": "a cat", "image_prompts": [{"image": "none.png"}]}]))
    assert "none.png" in fail(capsys, monkeypatch, "generate", orders)


def test_regions_subjects_and_attention(tiny_model, pipe, capsys, monkeypatch, tmp_path):
    for name, module in image_encoder().items():
        pipe.register_modules(**{name: module})
    kd.SubjectFusion(32).save(tmp_path / "fusion.safetensors")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    left = Image.new("L", (16, 16))
    left.paste(255, (0, 0, 8, 16))
    left.save(tmp_path / "left.png")
    order = {
        "prompt": "a cat and a dog",
        "negative_prompt": "a house",
        "regions": [{"mask": "left.png", "prompt": "cat"}],
        "negative_regions": [{"mask": "left.png", "tokens": [2]}],
        "subjects": [{"prompt": "dog", "image": "photo.png"}],
        "subject_start": 0.5,
        "endings": "outside",
    }
    orders, output = tmp_path / "orders.json", tmp_path / "drawn"
    orders.write_text(json.dumps([order, {"prompt": "a dog", "num_images": 2}]))
    options = ["--output", output, "--steps", 2, "--fusion", tmp_path / "fusion.safetensors"]
    run("generate", orders, *options, "--show-attention", "cat", "--show-attention", "dog")
    assert sorted(p.name for p in output.iterdir()) == ["000.png", "001-0.png", "001-1.png", "attention.png"]
    assert Image.open(output / "attention.png").width > 3 * 160
    error = fail(capsys, monkeypatch, "generate", orders, *options, "--show-attention", "taxi")
    assert "the word 'taxi' is in none of the prompts" in error
    orders.write_text(json.dumps([{**order, "regions": [{"mask": "left.png", "prompt": "taxi"}]}]))
    error = fail(capsys, monkeypatch, "generate", orders, *options)
    assert "the words 'taxi' of a Region are not in the prompt" in error


def test_a_super_class_shows_the_attention_of_its_concepts_placeholders(tiny_model, concept_for, tmp_path):
    kd.ConceptBank(tmp_path / "bank").add("alice/cat", concept_for(tiny_model))
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps([{"prompt": "<alice-cat> on blue", "concepts": ["alice/cat"], "seed": 1}]))
    options = ("--bank", tmp_path / "bank", "--output", tmp_path / "drawn", "--steps", 1)
    run("generate", orders, *options, "--show-attention", "cat")
    assert Image.open(tmp_path / "drawn" / "attention.png").width > 2 * 160


def test_control_images_and_pictures_to_begin_from(tiny_model, capsys, monkeypatch, tmp_path):
    for name in ("photo.png", "edges.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    controlnet().save_pretrained(tmp_path / "net")
    orders = tmp_path / "orders.json"
    controls = [{"name": "edges", "image": "edges.png", "scale": 0.5}]
    orders.write_text(json.dumps([{"prompt": "a cat", "image": "photo.png", "strength": 0.8, "controls": controls}]))
    options = ("--output", tmp_path / "drawn", "--steps", 2)
    run("generate", orders, *options, "--controlnet", f"edges={tmp_path / 'net'}")
    assert Image.open(tmp_path / "drawn" / "000.png").size == (16, 16)
    error = fail(capsys, monkeypatch, "generate", orders, *options)
    assert "a ControlNet given to generate (none), got 'edges'" in error
    error = fail(capsys, monkeypatch, "generate", orders, *options, "--controlnet", "edges")
    assert "--controlnet must be NAME=FOLDER of a ControlNet, got 'edges'" in error


def test_env_reports_the_build(capsys):
    assert "native" in run("env")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bank", "remove", "bob/dog"], "no concept 'bob/dog' in the bank"),
        (["bank", "add", "alice/cat", "nothing.safetensors"], "nothing.safetensors"),
        (["generate", "orders.json"], "orders.json"),
        (["train", "nowhere", "--placeholder", "<a>", "--super-class", "cat", "--output", "x"], "is not a folder"),
        (["demo", "--steps", "0"], "steps"),
        (["paint"], "paint"),
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = fail(capsys, monkeypatch, *arguments)
    assert message in error and "Traceback" not in error


def test_an_id_cannot_lead_out_of_the_bank(capsys, monkeypatch, tmp_path, pipe, concept_for):
    monkeypatch.chdir(tmp_path)
    concept_for(pipe).save(tmp_path / "cat.safetensors")
    error = fail(capsys, monkeypatch, "bank", "add", "../x", "cat.safetensors", "--bank", tmp_path / "bank")
    assert "a concept's id looks like alice/cat" in error
    assert not (tmp_path / "x.safetensors").exists()


def test_a_bank_is_listed_whatever_is_in_it(capsys, monkeypatch, tmp_path, pipe, concept_for):
    bank, long = kd.ConceptBank(tmp_path), f"{'a' * 90}/{'b' * 60}"
    concept = concept_for(pipe)
    for name, words in ((long, "cat [/]"), ("bob/cat", "[bold red]cat"), ("carol/cat", "cat"), ("dave/cat", "cat")):
        bank.add(name, concept.with_(super_class=words))
    file = tmp_path / "carol" / "cat.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(sys, "argv", ["keylock", "bank", "list", "--bank", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 1
    assert [line.split()[0] for line in said.out.splitlines()] == [long, "bob/cat", "dave/cat"]
    assert "cat [/]" in said.out and "[bold red]cat" in said.out
    assert "carol/cat: " in said.err and "1 of 4 cannot be read" in said.err

    result = CliRunner().invoke(cli.app, ["bank", "list", "--json", "--bank", str(tmp_path)])
    rows = json.loads(result.stdout)
    assert [row["id"] for row in rows] == [long, "bob/cat", "carol/cat", "dave/cat"]
    assert (
        rows[0]["super_class"] == "cat [/]" and rows[0]["nbytes"] == (tmp_path / f"{long}.safetensors").stat().st_size
    )
    assert "carol" in rows[2]["error"] and "placeholder" not in rows[2]

    file.write_bytes(concept.to_bytes()[:-1] + b"\x7f")  # which the header alone does not show
    assert "carol/cat" in run("bank", "list", "--bank", tmp_path)
    assert "carol/cat" in fail(capsys, monkeypatch, "bank", "list", "--check", "--bank", tmp_path)

    file.unlink()
    page = ["bank", "list", "--bank", str(tmp_path), "--limit", "1", "--after"]
    result = CliRunner().invoke(cli.app, [*page, long])
    assert result.stdout.split()[0] == "bob/cat" and "1 more: go on with --after bob/cat" in result.stderr
    result = CliRunner().invoke(
        cli.app, ["bank", "list", "--limit", "1", "--after", "bob/cat", "--bank", str(tmp_path)]
    )
    assert result.stdout.split()[0] == "dave/cat" and "more" not in result.stderr


def test_a_misspelt_bank_is_no_empty_one(capsys, monkeypatch, tmp_path):
    assert f"there is no bank at {tmp_path / 'typo'}" in fail(
        capsys, monkeypatch, "bank", "list", "--bank", tmp_path / "typo"
    )
    assert run("bank", "list", "--bank", tmp_path) == ""
    assert "nosuch" in fail(capsys, monkeypatch, "bank", "list", "--bank", "nosuch://bucket")


def test_adding_says_which_version_it_is_and_replaces_nothing_unasked(capsys, monkeypatch, tmp_path, pipe, concept_for):
    concept, bank = concept_for(pipe), tmp_path / "bank"
    concept.save(tmp_path / "c.safetensors")
    add = ["bank", "add", "alice/cat", tmp_path / "c.safetensors", "--bank", bank]
    assert run(*add) == f"alice/cat@{concept.version}\n"
    assert json.loads(run("bank", "show", f"alice/cat@{concept.version}", "--bank", bank))["version"] == concept.version
    assert fail(capsys, monkeypatch, *add) == "keylock: alice/cat exists already; --overwrite replaces it\n"
    run(*add, "--overwrite")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must be a list of requests, got dict"),
        ("[1]", "orders.json"),
        ('[{"prompt": "a", "colour": 1}]', "colour"),
        ("[", "orders.json"),
        ('[{"prompt": "<x> on blue"}]', "request 0 ('<x> on blue'): "),
    ],
)
def test_a_bad_request_file_is_named(capsys, monkeypatch, tmp_path, tiny_model, content, message):
    monkeypatch.chdir(tmp_path)
    Path("orders.json").write_text(content)
    error = fail(capsys, monkeypatch, "generate", "orders.json")
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("missing", ["1.txt", "1-mask.png"])
def test_captions_and_masks_are_for_all_pictures_or_none(capsys, monkeypatch, tmp_path, tiny_model, missing):
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        Image.new("L", (8, 8), 255).save(tmp_path / f"{number}-mask.png")
        (tmp_path / f"{number}.txt").write_text("<a> on blue")
    (tmp_path / missing).unlink()
    error = fail(
        capsys, monkeypatch, "train", tmp_path, "--placeholder", "<a>", "--super-class", "cat", "--output", "x"
    )
    assert "1.png has no" in error


def test_the_console_script_is_the_module():
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    done = subprocess.run(
        [sys.executable, "-m", "keylock_diffusers.cli", "--help"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0 and "generate" in done.stdout
