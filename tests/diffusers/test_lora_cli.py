"""``keylock lora``: what it prints, and one line and a nonzero exit for bad input."""

import copy
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from keylock_diffusers import cli
from keylock_diffusers.cli import common
from keylock_diffusers.loras import LoraBank, ModelShapes, read_adapter, read_embedding
from tests.diffusers.lora_files import delta, model_shapes, pairs, pipeline, write
from tests.diffusers.test_cli import fail, run
from tests.diffusers.test_lora_bank import peft_folder
from tests.diffusers.test_lora_files import kohya_name
from tests.diffusers.test_lora_writing import fused, updates_of

TEXTS = {
    "ss_output_name": "watercolour",
    "modelspec.trigger_phrase": "watercolour, soft light",
    "ss_comment": "long " * 100,
    "evil\x1b[31m": "\x1b]0;title\x07 red\nnext line",
}


def kohya(path, model="SD1.5", rank=2, **texts):
    """A file of kohya's, every layer with an alpha of its own."""
    tensors = {}
    for (component, name), pair in pairs(model, rank=rank).items():
        base = kohya_name(component, name, model)
        tensors |= {f"{base}.lora_down.weight": pair.down, f"{base}.lora_up.weight": pair.stored_up()}
        tensors[f"{base}.alpha"] = torch.tensor(1.0 + len(name) % 3)
    return write(path, tensors, **texts)


def shapes_of(model):
    found = dict(model_shapes(model))
    return ModelShapes(found.pop(-1), tuple(found.values()))


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(common, "load", lambda model, **options: pipeline(model))


def test_a_file_is_added_listed_inspected_and_removed(tmp_path):
    file, bank = kohya(tmp_path / "style.safetensors", **TEXTS), tmp_path / "bank"
    layers = {
        name: len(found) for name, found in zip(("denoiser", "text"), model_shapes("SD1.5").values(), strict=True)
    }
    said = run("lora", "add", file, "--id", "alice/style", "--bank", bank)
    assert said.startswith("alice/style: LoCon+LoRA for ") and f"{layers['denoiser']} layers in denoiser" in said
    run("lora", "add", peft_folder(tmp_path / "folder"), "--id", "b/peft", "--bank", bank)
    listed = run("lora", "list", "--bank", bank).splitlines()
    assert [line.split()[0] for line in listed] == ["alice/style", "b/peft"]
    assert "rank 2 to 3" in listed[0] and listed[0].endswith("watercolour, soft light")
    assert len({line.index("rank") for line in listed}) == 1
    rows = json.loads(run("lora", "list", "--json", "--bank", bank))
    assert rows[0]["trigger_words"] == ["watercolour", "soft light"] and rows[1]["ranks"] == {"denoiser": {"2": 1}}
    of_file, of_id = (run("lora", "inspect", name, "--bank", bank) for name in (file, "alice/style"))
    assert of_file == of_id
    assert f"layers         {layers['denoiser']} in denoiser, {layers['text']} in text_encoder\n" in of_file
    assert "denoiser: 3 (" in of_file and "text_encoder: 2\n" in of_file
    facts = json.loads(run("lora", "inspect", "alice/style", "--json", "--bank", bank))
    assert facts["training"]["evil\x1b[31m"] == TEXTS["evil\x1b[31m"]
    run("lora", "remove", "alice/style", "--bank", bank)
    assert list(LoraBank(bank)) == ["b/peft"]


def test_what_is_printed_of_a_header_moves_no_cursor_and_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = run("lora", "inspect", kohya(tmp_path / "style.safetensors", **TEXTS))
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert max(map(len, said.splitlines())) <= 80
    assert "]0;title red next line" in said and "lo..." in said and said.count("long") < 70


def test_what_cannot_be_used_is_said(tmp_path):
    file = write(tmp_path / "oft.safetensors", {"lora_unet_x.oft_blocks": torch.ones(2, 2, 2)})
    said = run("lora", "add", file, "--id", "oft", "--bank", tmp_path / "bank")
    assert "not supported for an unknown model" in said and "cannot be used, since it holds OFT, an orthogonal" in said
    assert "unsupported  OFT, an orthogonal change\n" in run("lora", "inspect", file)
    assert "not supported" in run("lora", "list", "--bank", tmp_path / "bank")


def test_a_bank_is_listed_whatever_is_in_it(tmp_path, capsys, monkeypatch):
    bank = tmp_path / "bank"
    for name in ("a", "b", "c"):
        run("lora", "add", kohya(tmp_path / "f.safetensors"), "--id", name, "--bank", bank)
    (bank / "b.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(sys, "argv", ["keylock", "lora", "list", "--bank", str(bank)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 1 and [line.split()[0] for line in said.out.splitlines()] == ["a", "c"]
    assert "b.safetensors: " in said.err and "1 of 3 cannot be read" in said.err
    page = CliRunner().invoke(cli.app, ["lora", "list", "--bank", str(bank), "--limit", "1"])
    assert page.stdout.split()[0] == "a" and "2 more: go on with --after a" in page.stderr


@pytest.mark.parametrize("form", ["SD1.5", "SDXL"])
def test_diffusers_loads_what_is_converted(form, model, tmp_path):
    file, output = kohya(tmp_path / "kohya.safetensors", form, ss_output_name="style"), tmp_path / "out.safetensors"
    said = run("lora", "convert", file, output, "--model", form)
    assert said.startswith(f"{output}: {output.stat().st_size} bytes, LoCon+LoRA for ")
    before, after, _ = fused(pipeline(form), output)
    shapes = shapes_of(form)
    expected = read_adapter(file, denoiser=shapes.denoiser, text_encoders=shapes.text_encoders)
    assert after.keys() == updates_of(expected).keys()
    for (component, name), update in updates_of(expected).items():
        weight = before[component][name]
        changed = (weight.double() + delta(update).reshape(weight.shape)).float()
        torch.testing.assert_close(after[component, name], changed, rtol=1e-4, atol=1e-4)
    assert "style" in run("lora", "inspect", output)


def test_words_are_written_beside_it(model, tmp_path, capsys, monkeypatch):
    name, weight = next((n, s) for n, s in model_shapes("SD1.5")[-1].items() if len(s) == 2)
    width = pipeline("SD1.5").text_encoder.config.hidden_size
    tensors = {
        f"unet.{name}.diff": torch.randn(weight),
        "bundle_emb.<my style>.emb_params": torch.randn(2, width),
        "bundle_emb.~/.emb_params": torch.randn(1, width),
    }
    file, output = write(tmp_path / "lora.safetensors", tensors), tmp_path / "new" / "out.safetensors"
    said = run("lora", "convert", file, output, "--model", "SD1.5")
    words = sorted(path.name for path in output.parent.iterdir() if path != output)
    assert words == ["out.1-mystyle.safetensors", "out.2-word.safetensors"]
    found = read_embedding(output.parent / words[0], [width])
    assert found.name == "<my style>" and torch.equal(found.vectors[0], tensors["bundle_emb.<my style>.emb_params"])
    assert said.count("the learned word") == 2 and "LoRA for" in said
    output.unlink()
    assert "out.1-mystyle.safetensors, for a learned word, exists already; --overwrite" in fail(
        capsys, monkeypatch, "lora", "convert", file, output, "--model", "SD1.5"
    )
    assert not output.exists()


def test_what_a_truncation_leaves_out_is_said(monkeypatch, tmp_path, capsys):
    wide = copy.deepcopy(pipeline("SD1.5"))
    wide.unet.mid_block.attentions[0].proj_in = torch.nn.Linear(160, 160)
    monkeypatch.setattr(common, "load", lambda model, **options: wide)
    file = write(tmp_path / "lora.safetensors", {"unet.mid_block.attentions.0.proj_in.diff": torch.randn(160, 160)})
    convert = ["lora", "convert", file, tmp_path / "out.safetensors", "--model", "any"]
    assert "of a rank above 128; the best of rank 128 errs by 0." in fail(capsys, monkeypatch, *convert)
    assert not (tmp_path / "out.safetensors").exists()
    said = run(*convert, "--max-error", 0.9)
    assert "1 layers are cut to rank 128, which leaves out up to 0." in said


def test_bad_input_ends_with_a_message_and_no_traceback(capsys, monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)
    file, bank = kohya(tmp_path / "style.safetensors"), tmp_path / "bank"
    (tmp_path / "there.safetensors").write_text("")
    run("lora", "add", file, "--id", "a", "--bank", bank)
    for arguments, message in {
        ("add", file, "--id", "a", "--bank", bank): "a exists already; --overwrite replaces it",
        ("add", file, "--id", "../a", "--bank", bank): "a LoRA's id looks like alice/style",
        ("add", "none.safetensors", "--id", "b", "--bank", bank): "none.safetensors",
        ("add", tmp_path / "there.safetensors", "--id", "b", "--bank", bank): "no safetensors file",
        ("list", "--bank", tmp_path / "typo"): f"there is no bank at {tmp_path / 'typo'}",
        ("list", "--bank", "nosuch://x"): "nosuch",
        ("inspect", "b", "--bank", bank): "no LoRA 'b' in the bank",
        ("inspect", "b.safetensors"): "b.safetensors",
        ("remove", "b", "--bank", bank): "no LoRA 'b' in the bank",
        ("convert", file, "there.safetensors", "--model", "SD1.5"): "OUTPUT: there.safetensors exists already",
        ("convert", file, tmp_path, "--model", "SD1.5"): "OUTPUT must be a file",
        ("convert", file, "new.safetensors", "--model", "SDXL"): "keys name nothing in this model",
        ("convert", "none.safetensors", "new.safetensors", "--model", "SDXL"): "none.safetensors",
    }.items():
        said = fail(capsys, monkeypatch, "lora", *arguments)
        assert message in said and len(said.strip().splitlines()) == 1 and "Traceback" not in said
    run("lora", "add", file, "--id", "a", "--bank", bank, "--overwrite")
    run("lora", "convert", file, "there.safetensors", "--model", "SD1.5", "--overwrite")
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("command", [[], ["add"], ["list"], ["inspect"], ["convert"], ["remove"]])
def test_every_command_has_help_a_person_can_follow(command):
    output = run("lora", *command, "--help")
    assert "Usage" in output and len(output.splitlines()) > 4
