"""`keylock train --method lora`: files that diffusers loads, nothing replaced, nothing lost."""

import dataclasses

import pytest

from keylock_diffusers.loras import ModelShapes, read_adapter, read_embedding
from keylock_diffusers.training import loras
from keylock_diffusers.training import training_facts as facts_of
from tests.diffusers.test_cli import fail, run, tiny_model  # noqa: F401
from tests.diffusers.test_training_folder import command, quick, unloaded  # noqa: F401


@pytest.mark.parametrize("words", ["<alice-cat>", "sks cat"])
def test_the_command_writes_a_lora_and_its_word_and_replaces_neither_unasked(
    quick,  # noqa: F811
    capsys,
    monkeypatch,
    tmp_path,
    words,
):
    options = ["--method", "lora", "--rank", 3, "--targets", "to_v, ff.net.2", "--placeholder", words]
    whole = command(tmp_path, *options, names=("a.png", "b.png"))
    said = run(*whole)
    shapes = dataclasses.asdict(ModelShapes.of(quick))
    adapter = read_adapter(tmp_path / "cat.safetensors", **shapes)
    assert {name.rpartition(".")[2] for name in adapter.denoiser} == {"to_v", "2"}
    assert {update.rank for update in adapter.denoiser.values()} == {3} and facts_of(adapter)["steps"] == 2
    assert facts_of(adapter)["learning_rate"] == 2e-3 and "Fewer than 40 steps" in said
    word_file = tmp_path / "cat.embedding.safetensors"
    assert word_file.exists() == (words[0] == "<") == ("for pipe.load_textual_inversion" in said)
    if word_file.exists():
        assert read_embedding(word_file, [32]).name == words
        (tmp_path / "cat.safetensors").unlink()
    file = word_file if word_file.exists() else tmp_path / "cat.safetensors"
    before = file.read_bytes()
    assert f"{file.name} exists already; --overwrite replaces it" in fail(capsys, monkeypatch, *whole)
    assert file.read_bytes() == before and not list(tmp_path.glob(".*"))
    run(*whole, "--overwrite", "--learning-rate", 0.1)
    assert facts_of(read_adapter(tmp_path / "cat.safetensors", **shapes))["learning_rate"] == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dreambooth"], "--method must be one of concept, lora, got 'dreambooth'"),
        (["--rank", 3], "--rank is an option of a LoRA (--method lora), and --method is concept"),
        (["--targets", "all"], "--targets is an option of a LoRA"),
        (["--method", "lora", "--values-rate", 0.1], "--values-rate is an option of a concept, and --method is lora"),
        (["--method", "lora", "--samples-every", 1], "--samples-every is an option of a concept"),
        (["--method", "lora", "--edit", "added"], "--edit is an option of a concept, and --method is lora"),
        (["--method", "lora", "--captions", "c.txt"], "--captions is an option of a key-locked concept"),
        (["--edit", "added", "--captions", "c.txt"], "(--edit perfusion), and --method is concept, --edit added"),
        (["--edit", "added", "--target-gradient", "none"], "--target-gradient is an option of a key-locked concept"),
        (["--edit", "perfusion", "--words", 2], "--words is an option of an added concept (--edit added)"),
        (["--embedding-rate", 0.1], "--embedding-rate is an option of a LoRA and of a key-locked concept"),
        (["--edit", "perfusion", "--start", 0.2], "--start is an option of an added concept (--edit added)"),
        (["--edit", "locked"], "--edit must be one of added, perfusion, got 'locked'"),
        (["--edit", "added", "--words", 17], "words must be a whole number from 1 to 16, got 17"),
        (["--method", "lora", "--targets", "to_q,"], "targets must be names of modules, got '' among them"),
        (["--placeholder", "sks cat"], "placeholder must look like <alice-cat>"),
    ],
)
def test_what_the_command_cannot_do_is_refused_before_the_work(capsys, monkeypatch, tmp_path, options, message):
    unloaded(monkeypatch)
    assert message in fail(capsys, monkeypatch, *command(tmp_path), *options)


def test_a_lora_that_came_meanwhile_is_not_replaced_and_nothing_is_lost(quick, capsys, monkeypatch, tmp_path):  # noqa: F811
    output, learn = tmp_path / "cat.safetensors", loras._Training.learn

    def late(self, *given):
        output.write_bytes(b"mine")
        return learn(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(loras._Training, "learn", late)
        error = fail(capsys, patch, *command(tmp_path, "--method", "lora"))
    assert "exists already" in error and "the same command goes on from there" in error
    assert output.read_bytes() == b"mine" and not (tmp_path / "cat.embedding.safetensors").exists()
    output.unlink()
    monkeypatch.setattr(loras._Training, "learn", lambda *_: pytest.fail("trained anew"))
    assert "for pipe.load_lora_weights" in run(*command(tmp_path, "--method", "lora"))
