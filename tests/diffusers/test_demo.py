"""The demo's path on the embedded model, end to end, with few steps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import Concept
from keylock_diffusers.demo import grid, loras, pictures, regions, story
from keylock_diffusers.embedded import render
from keylock_diffusers.loras import inspect_adapter
from tests.diffusers.drawing import COMPANY

OTHER_FREETYPE = 8  # grey levels, of a pixel at an edge: FreeType's versions may round it differently


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    few = {"steps": 2, "batch_size": 2}
    trainings = {"training": replace(story.TRAINING, **few), "lora_training": replace(loras.TRAINING, **few)}
    return output, story.run(output, steps=2, progress=False, **trainings)


def test_it_leaves_three_grids_a_report_and_files(report):
    output, measured = report
    assert Image.open(output / "grid.png").size == (822, 870)
    assert Image.open(output / "regions.png").size == (822, 950)
    assert Image.open(output / "loras.png").size == (654, 7 * 190)
    assert json.loads((output / "report.json").read_text()) == measured
    files = sorted(p.relative_to(output).as_posix() for p in output.rglob("*/*/*.safetensors"))
    assert files == [
        *(f"concepts/{name}/cat.safetensors" for name in ("alice", "bob", "carol")),
        *(f"loras/{name}.safetensors" for name in ("alice/cat", "carol/cat", "studio/sepia")),
    ]
    for user in pictures.USERS:
        assert Concept.load(output / f"concepts/{user.name.lower()}/cat.safetensors").placeholder == user.placeholder
        assert measured["concepts"][user.name] <= 36 * 1024


def test_neighbours_change_nothing_and_company_only_rounding(report):
    _, measured = report
    assert measured["pictures_in_batch"] == 16
    assert measured["largest_difference_beside_others"] == 0
    assert measured["largest_difference_alone"] <= COMPANY * 255
    assert measured["regions"] == {"pictures_in_batch": 5, "left_out": [], "largest_difference_beside_others": 0}


def test_loras_are_files_whose_batch_is_nobody_elses_affair(report):
    output, measured = report
    found = measured["loras"]
    assert found["pictures_in_batch"] == 7 and found["largest_difference_beside_others"] == 0
    for name, size in found["files"].items():
        path = output / "loras" / f"{name}.safetensors"
        assert path.stat().st_size == size and [*inspect_adapter(path).ranks["denoiser"]] == [loras.TRAINING.rank]
    assert all("of 8" in found[key] for key in ("coats", "coats_without"))


def test_what_is_measured_is_the_distance_from_the_exact_style():
    """On pictures that are the style, in a half or everywhere, or not at all."""
    batch = loras.rows()
    random = np.random.default_rng(0)
    plain = [random.random((128, 128, 3), np.float32) for _ in range(12)]
    half = np.where((np.arange(128) < 64)[None, :, None], 1, 0)

    def draw(requests):
        made = []
        for picture, request in zip(plain, requests, strict=True):
            regional = any(isinstance(lora, kd.Lora) for lora in request.loras)
            made.append(np.where(half if regional else bool(request.loras), loras.sepia(picture), picture))
        return made

    found = loras._measured(draw, batch)
    assert found["style"]["everywhere"] == found["style"]["inside its half"] == 0
    assert found["style"]["outside, from the picture without"] == 0 and found["style"]["without"] > 20


def test_the_third_batch_has_a_style_regions_a_concept_a_schedule_a_slider_and_nothing():
    batch = [row.request for row in loras.rows()]
    assert [len(r.loras) for r in batch] == [0, 1, 1, 2, 1, 1, 1]
    assert [len(r.concepts) for r in batch] == [0, 0, 0, 0, 1, 0, 0]
    assert all(lora.region is not None for n in (2, 3) for lora in batch[n].loras)
    assert batch[5].loras[0].start == 0.5 and batch[6].loras[0].strength < 0


def test_a_mosaic_shows_four():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    made = grid.mosaic([red, blue, blue, red, blue])
    assert [made.getpixel(at) for at in ((20, 20), (100, 20), (20, 100), (100, 100))] == [
        (255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0),
    ]  # fmt: skip


def test_coats_and_expressions_are_counted_for_every_scene(report):
    _, measured = report
    for key in ("coats", "coats_without_concepts", "expressions"):
        assert list(measured[key]) == [scene.label for scene in story.SCENES]
        assert all("of 12" in found for found in measured[key].values())


def test_the_users_own_pictures_have_their_own_coats():
    """The judge of coats, on pictures whose coat is known."""
    cells, images = [], []
    for user in pictures.USERS:
        for image in pictures.load(user)[0]:
            cells.append((story.SCENES[0], user, 0))
            images.append(np.asarray(image, np.float32) / 255)
    assert story._coats(cells, images)[story.SCENES[0].label] == "12 of 12"
    mixed = [(scene, pictures.USERS[(n + 1) % 3], 0) for n, (scene, _, _) in enumerate(cells)]
    assert story._coats(mixed, images)[story.SCENES[0].label] != "12 of 12"


def test_a_cat_beside_something_else_is_judged_by_its_half():
    image = np.full((128, 128, 3), 1.0)
    for user, column in ((pictures.USERS[1], 2), (pictures.USERS[2], 66)):
        image[30:90, column : column + 60] = (
            np.asarray(pictures.load(user)[0][1].resize((60, 60)), float) / 255
        )  # on white
    left = np.broadcast_to(np.arange(128) < 64, (128, 128))
    assert pictures.wearer(image, left) == "Bob" and pictures.wearer(image, ~left) == "Carol"
    assert pictures.wearer(np.ones((128, 128, 3))) is None


def test_the_second_batch_has_a_concept_an_image_prompt_both_two_regions_and_nothing():
    batch = [row.request for row in regions.rows()]
    held = [(len(r.concepts), len(r.image_prompts)) for r in batch]
    assert held == [(1, 0), (0, 1), (1, 1), (2, 0), (0, 0)]
    assert batch[1].image_prompts[0].region is not None
    assert all(use.region is not None for n in (2, 3) for use in batch[n].concepts)


@pytest.mark.skipif(not render.FONT.exists(), reason="drawing the users' pictures needs fonts-noto-color-emoji")
def test_the_shipped_pictures_are_what_the_script_draws():
    drawn, shipped = pictures.draw_image_prompt(), pictures.image_prompt()
    assert np.abs(np.asarray(drawn, int) - np.asarray(shipped, int)).max() <= OTHER_FREETYPE
    for user in pictures.USERS:
        for (image, mask), shipped, cut in zip(pictures.draw(user), *pictures.load(user), strict=True):
            assert np.abs(np.asarray(image, int) - np.asarray(shipped, int)).max() <= OTHER_FREETYPE
            assert np.abs(np.asarray(mask, int) - np.asarray(cut, int)).max() <= OTHER_FREETYPE
