"""The README: its code runs, and what it says of the demo is what the committed report says."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import embedded
from keylock_diffusers.demo import regions
from keylock_diffusers.demo.pictures import USERS
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.compatibility import save_adapter

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_drop_in_example_runs(concept_for, tmp_path, monkeypatch):
    (block,) = [b for b in BLOCKS if "kd.ConceptBank" in b and "AttentionMaps" not in b]
    monkeypatch.chdir(tmp_path)
    pipe = embedded.load()
    bank = kd.ConceptBank("concepts")
    bank.add("alice/cat", concept_for(pipe))
    bank.add("bob/dog", concept_for(pipe, "<bob-dog>", "dog", seed=2))
    here = block.replace("path/to/sd15", str(embedded.BASE_MODEL)).replace('.to("cuda")', "").replace("=30", "=2")
    names: dict = {}
    exec(here, names)
    assert [image.size for image in names["images"]] == [(64, 64)] * 3


def test_the_image_prompts_example_runs(concept_for, tmp_path, monkeypatch):
    (block,) = [b for b in BLOCKS if "load_ip_adapter" in b]
    monkeypatch.chdir(tmp_path)
    pipe = embedded.load()
    save_adapter(tmp_path / "path" / "to" / "ip-adapter", pipe)
    region = torch.zeros(64, 64)
    region[:, :32] = 1
    picture = Image.new("RGB", (40, 30), "red")
    names: dict = {"kd": kd, "pipe": pipe, "photo": picture, "painting": picture, "left_half": region}
    exec(block, names)
    images = kd.generate(
        pipe, names["requests"], bank={"alice/cat": concept_for(pipe)}, num_inference_steps=2, output_type="pt"
    )
    assert torch.stack(list(images)).isfinite().all()


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
            assert len({use if isinstance(use, str) else use.concept for use in uses}) == 1
        for a, b in zip(one.image_prompts, other.image_prompts, strict=True):
            assert a.scale == b.scale and torch.equal(a.region, b.region)
    assert Image.open("regions.png").width == 6 + 3 * 166


def test_the_example_of_every_kind_of_request_runs(concept_for):
    (block,) = [b for b in BLOCKS if "kd.Control" in b]
    pipe = kd.install(embedded.load())
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    given = {"photo": Image.new("RGB", (64, 64), "red"), "edges": Image.new("RGB", (64, 64)), "left_half": mask}
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    names: dict = {"kd": kd, "pipe": pipe, "bank": {"alice/cat": concept_for(pipe)}, "controlnet": control, **given}
    exec(block.replace("controlnets=", "num_inference_steps=2, controlnets="), names)
    assert [image.size for image in names["images"]] == [(64, 64)] * 4


def test_the_kernel_example_runs():
    (block,) = [b for b in BLOCKS if "rank_one_linear" in b]
    names: dict = {}
    exec(block, names)
    assert names["y"].shape == (3, 77, 320)
    x, weight = names["x"][2], names["weight"]
    assert_as_accurate(names["y"][2], x @ weight.T, x.double() @ weight.double().T)


def test_the_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


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


def test_every_coat_is_its_users_own_and_comes_from_the_learned_values():
    report = json.loads((ROOT / "docs" / "demo-report.json").read_text())
    assert all(int(found.split()[0]) >= 11 for found in report["coats"].values())
    assert all(int(found.split()[0]) <= 5 for found in report["coats_without_learned_values"].values())
    assert report["training_seconds"] < 90
