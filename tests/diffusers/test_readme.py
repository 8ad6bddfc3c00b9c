"""The README: its code runs, and what it says of the demo is what the committed report says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from diffusers import ControlNetModel
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import cli, embedded
from keylock_diffusers.demo import examples, loras, regions
from keylock_diffusers.demo.pictures import USERS
from keylock_diffusers.denoisers.projections import projections, weight_shapes
from keylock_diffusers.loras import Adapter, LowRank, write_adapter
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.test_cli import run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
PAGES = (README, *((ROOT / "docs" / name).read_text() for name in ("install.md", "first-steps.md")))
SHELL = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page, re.S)]
FEW = {"train": ("--steps", 2, "--batch-size", 2), "sweep": ("--steps", 1), "generate": ("--steps", 2)}


@pytest.fixture(scope="module")
def ten_minutes(tmp_path_factory):
    """A folder in which every line of the README's ten minutes was run, with few steps, one after another."""
    folder = tmp_path_factory.mktemp("readme")
    (block,) = [b for b in SHELL if "keylock train" in b]
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KEYLOCK_CACHE", str(folder / "cache"))
        for line in block.splitlines():
            word, command, *rest = shlex.split(line)
            assert word == "keylock"
            said[command] = run(command, *rest, *FEW.get(command, ()))
    return folder, said


def test_every_line_of_the_ten_minutes_is_a_command_that_works(ten_minutes):
    folder, said = ten_minutes
    assert {*said} == {"example", "train", "bank", "sweep", "generate"}
    assert "alice/cat" in said["bank"]
    drawn = {path.name for path in (folder / "outputs").iterdir()}
    assert {"000.png", "001-0.png", "001-1.png", "006.png", "attention.png"} <= drawn
    assert Image.open(folder / "sweep.png").size == Image.open(ROOT / "docs" / "strength.png").size


def test_every_line_of_the_documents_is_a_command_that_stands_alone():
    known = {"example", "train", "bank", "sweep", "generate", "env", "demo", "schema"}
    for line in [line for block in SHELL for line in block.splitlines()]:
        word, *rest = shlex.split(line, comments=True)
        assert word in ("keylock", "make", "python3", "pip", ".") and not {"|", "&&", ";"} & {*rest}
        if word == "keylock":
            assert rest[0] in known and run(rest[0], "--help")
            named = {part for part in rest if part.startswith("--")}
            assert all(name in typer_options(rest[0]) for name in named - {"--help"}), line


def typer_options(command):
    """The options that a command takes, those of its sub-commands among them."""
    found = typer.main.get_command(cli.app).commands[command]
    commands = [found, *getattr(found, "commands", {}).values()]
    return {name for one in commands for parameter in one.params for name in parameter.opts}


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_two_examples_run_as_they_stand(ten_minutes, monkeypatch, number):
    """As they are written, but for the number of steps, in the folder of the ten minutes."""
    monkeypatch.chdir(ten_minutes[0])
    block = BLOCKS[number].replace("=30", "=2")
    names: dict = {}
    exec(block, names)
    assert [image.size for image in names["images"]] == [(128, 128)] * 3
    assert ("load_adapter" in block) == bool(number)


def test_the_documents_file_of_requests_is_the_examples():
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "first-steps.md").read_text(), re.S)
    assert block == examples.requests_json()


def test_the_second_batchs_example_draws_the_demos(concept_for, tmp_path, monkeypatch):
    (block,) = [b for b in BLOCKS if "AttentionMaps" in b]
    monkeypatch.chdir(tmp_path)
    bank = kd.ConceptBank("outputs/demo/concepts")
    for n, user in enumerate(USERS):
        bank.add(f"{user.name.lower()}/cat", concept_for(embedded.load(), user.placeholder, seed=n))
    names: dict = {}
    exec(block.replace("=25", "=1"), names)
    ours, demos = names["requests"], [row.request for row in regions.rows()]
    for one, other in zip(ours, demos, strict=True):
        assert (one.prompt, one.seed, one.guidance_scale) == (other.prompt, other.seed, other.guidance_scale)
        for uses in zip(one.concepts, other.concepts, strict=True):
            assert len({(use.concept, use.strength, use.region is None) for use in uses}) == 1
        for a, b in zip(one.image_prompts, other.image_prompts, strict=True):
            assert a.scale == b.scale and torch.equal(a.region, b.region)
    assert Image.open("regions.png").width == 6 + 3 * 166


def test_the_third_batchs_example_draws_some_of_the_demos(tmp_path, monkeypatch):
    (block,) = [b for b in BLOCKS if "LoraBank" in b]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEYLOCK_CACHE", str(tmp_path / "cache"))
    for n, name in enumerate((loras.STYLE, loras.ON_THE_LEFT, loras.ON_THE_RIGHT)):
        write_adapter(f"outputs/demo/loras/{name}.safetensors", random_adapter(embedded.load(), n))
    names: dict = {}
    exec(block.replace("=25", "=1"), names)
    demos = {row.request.prompt: row.request for row in loras.rows()}
    assert len(names["images"]) == len(names["requests"]) == 5
    for one in names["requests"]:
        other = demos[one.prompt]
        assert (one.seed, one.guidance_scale) == (other.seed, other.guidance_scale)
        for mine, theirs in zip(one.loras, other.loras, strict=True):
            mine, theirs = (use if isinstance(use, kd.Lora) else kd.Lora(use) for use in (mine, theirs))
            assert (mine.lora, mine.strength) == (theirs.lora, theirs.strength)
            assert (mine.region is None) == (theirs.region is None)
            assert mine.region is None or torch.equal(mine.region, theirs.region)


def random_adapter(pipe, seed):
    random = torch.Generator().manual_seed(seed)
    shapes = {name: s for name, s in weight_shapes(projections(pipe.unet)).items() if name.endswith("to_q")}
    pairs = {
        name: (torch.randn(2, k, generator=random), torch.randn(o, 2, generator=random))
        for name, (o, k) in shapes.items()
    }
    return Adapter({name: LowRank(down, up) for name, (down, up) in pairs.items()})


def test_the_example_of_every_kind_of_request_runs(concept_for):
    (block,) = [b for b in BLOCKS if "kd.Control" in b]
    pipe = kd.install(embedded.load())
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 64, 128))
    given = {"photo": Image.new("RGB", (128, 128), "red"), "edges": Image.new("RGB", (128, 128)), "left_half": mask}
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64, 96))
    names: dict = {"kd": kd, "pipe": pipe, "bank": {"alice/cat": concept_for(pipe)}, "controlnet": control, **given}
    exec(block.replace("controlnets=", "num_inference_steps=2, controlnets="), names)
    assert [image.size for image in names["images"]] == [(128, 128)] * 4


def test_the_kernel_example_runs():
    (block,) = [b for b in BLOCKS if "rank_one_linear" in b]
    names: dict = {}
    exec(block, names)
    assert names["y"].shape == (3, 77, 320)
    x, weight = names["x"][2], names["weight"]
    assert_as_accurate(names["y"][2], x @ weight.T, x.double() @ weight.double().T)


def test_the_linked_files_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert not [(page.name, target) for page, target in links if not (page.parent / target).exists()]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target):
    assert f"make {target} " in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_demos_figures_are_those_of_the_committed_report():
    report = json.loads((ROOT / "docs" / "demo-report.json").read_text())
    (size,) = (
        set(report["concepts"].values())
        if len(set(report["concepts"].values())) == 1
        else (max(report["concepts"].values()),)
    )
    assert f"{round(size / 1024)} KB each here" in README
    assert report["pictures_in_batch"] == 16 and "sixteen pictures" in README
    assert report["largest_difference_beside_others"] == 0


def test_every_coat_is_its_users_own_and_comes_from_the_concepts():
    report = json.loads((ROOT / "docs" / "demo-report.json").read_text())
    assert all(int(found.split()[0]) >= 11 for found in report["coats"].values())
    assert all(int(found.split()[0]) <= 5 for found in report["coats_without_concepts"].values())
    assert report["training_seconds"] < 90


def test_the_third_batch_shows_what_the_page_on_loras_says():
    found = json.loads((ROOT / "docs" / "demo-report.json").read_text())["loras"]
    page = (ROOT / "docs" / "lora.md").read_text()
    style = {name: round(distance) for name, distance in found["style"].items()}
    assert f"is {style['everywhere']} of 255 away from that, without it {style['without']}" in page
    assert f"is {style['inside its half']} away from the exact picture inside" in page
    assert f"is {style['outside, from the picture without']} away from what it is without" in page
    assert f"{found['coats']} halves show the coat" in page and f"had, {found['coats_without']} without" in page
    assert found["largest_difference_beside_others"] == 0
