"""`kd.sweep`: what a dial does is drawn as `generate` draws it, and laid out where its labels say."""

import numpy as np
import pytest
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers.cli import common, drawn
from keylock_diffusers.generation import sweep as sweeps
from tests.diffusers.test_cli import fail, run

STEPS = {"num_inference_steps": 2}


@pytest.fixture
def bank(ready, concept_for):
    return {"alice/cat": concept_for(ready), "bob/cat": concept_for(ready, "<bob-cat>", seed=2)}


def order(**changes):
    return kd.Request(**{"prompt": "<alice-cat> on blue", "concepts": ["alice/cat"], "seed": 3, **changes})


def pixels(images):
    return np.asarray([np.asarray(image) for image in images], int)


def test_every_picture_is_what_its_request_alone_draws(ready, bank):
    found = kd.sweep(ready, order(), {"beta": [-5.0, 0.5, 5.0]}, bank=bank, **STEPS)
    uses = [kd.Use("alice/cat", beta=beta) for beta in (-5.0, 0.5, 5.0)]
    expected = kd.generate(ready, [order(concepts=[use]) for use in uses], bank=bank, **STEPS)
    assert np.array_equal(pixels(found.images[0]), pixels(expected))
    assert not np.array_equal(found.images[0][0], found.images[0][2])
    assert [request.concepts[0].beta for request in found.requests[0]] == [-5.0, 0.5, 5.0]


def test_all_of_it_is_one_batch(ready, bank, monkeypatch):
    calls, real = [], ready.unet.forward

    def forward(sample, *rest, **named):
        calls.append(len(sample))
        return real(sample, *rest, **named)

    monkeypatch.setattr(ready.unet, "forward", forward)
    kd.sweep(ready, order(num_images=2), {"beta": [0.2, 0.4, 0.6, 0.8, 1.0]}, bank=bank, **STEPS)
    assert calls == [20, 20]  # guidance doubles the rows
    calls.clear()
    kd.sweep(ready, order(), {"beta": [0.2, 0.4, 0.6]}, bank=bank, max_batch=2, **STEPS)
    assert calls == [4, 4, 2, 2]


def test_rows_are_seeds_or_the_second_dial(ready, bank):
    seeds = kd.sweep(ready, order(num_images=2), {"strength": [0.0, 1.0]}, bank=bank, **STEPS)
    assert [[r.seed for r in row] for row in seeds.requests] == [[3, 3], [4, 4]]
    both = kd.sweep(ready, order(), {"tau": [0.1, 0.2, 0.3], "lock": ["local", "global"]}, bank=bank, **STEPS)
    told = [[(r.concepts[0].tau, r.concepts[0].lock) for r in row] for row in both.requests]
    assert told == [[(tau, lock) for tau in (0.1, 0.2, 0.3)] for lock in ("local", "global")]
    assert [len(row) for row in both.images] == [3, 3]


def test_a_dial_turns_every_concept_and_keeps_what_else_they_have(ready, bank):
    uses = [kd.Use("alice/cat", tau=0.3), "bob/cat"]
    asked = order(prompt="<alice-cat> and <bob-cat>", concepts=uses)
    found = kd.sweep(ready, asked, {"beta": [0.4, 0.6]}, bank=bank, **STEPS)
    assert [(use.beta, use.tau) for use in found.requests[0][1].concepts] == [(0.6, 0.3), (0.6, None)]


def test_guidance_needs_no_concepts_and_a_seed_is_drawn_for_all(ready):
    found = kd.sweep(ready, kd.Request("a cat"), {"guidance_scale": [1.0, 4.0]}, **STEPS)
    seeds = {request.seed for request in found.requests[0]}
    assert len(seeds) == 1 and seeds != {None}


def test_the_grid_has_each_picture_under_its_value_and_beside_its_row():
    images = [[Image.new("RGB", (20, 10), (60 * row, 60 * column, 9)) for column in range(3)] for row in range(2)]
    heads = ["beta 0.1", "beta 0.2", "beta 0.3"]
    sheet = np.asarray(sweeps.labelled_grid("a prompt", heads, ["seed 3", "seed 4"], images))
    ys, xs = np.nonzero(sheet[..., 2] == 9)
    assert sheet[..., 2].max() == 255 and len(ys) == 6 * 160 * 80
    left, top = xs.min(), ys.min()
    for row in range(2):
        for column in range(3):
            y, x = top + row * (80 + sweeps._GAP), left + column * (160 + sweeps._GAP)
            assert (sheet[y : y + 80, x : x + 160] == (60 * row, 60 * column, 9)).all()
            head = sheet[sweeps._LINE : 2 * sweeps._LINE, x : x + 160]
            side = sheet[y : y + 80, :left]
            assert (head < 200).any() and (side < 200).any()


def test_labels_are_short():
    said = [("guidance_scale", 7.0), ("lock", "global"), ("beta", 0.1 + 0.2), ("tau", np.float32(0.4)), ("tau", 2)]
    assert [sweeps._label(*one) for one in said] == ["guidance scale 7", "lock global", "beta 0.3", "tau 0.4", "tau 2"]


@pytest.mark.parametrize(
    ("request_", "over", "message"),
    [
        ("a cat", {"beta": [1.0]}, "request must be a Request, got str"),
        (order(), {}, "over must give the values of one or two of beta, tau"),
        (order(), {"seed": [1]}, "got {'seed': \\[1\\]}"),
        (order(), {"beta": []}, "each in a list"),
        (order(), {"beta": 0.5}, "each in a list"),
        (order(), {"lock": "local"}, "each in a list"),
        (order(), {"beta": [1.0], "tau": [1.0], "strength": [1.0]}, "one or two"),
        (order(concepts=(), prompt="a cat"), {"beta": [0.5]}, "must have concepts for beta to act on"),
        (order(num_images=2), {"beta": [0.5], "tau": [0.1]}, "num_images of the request must be 1"),
        (order(num_images="two"), {"beta": [0.5]}, "num_images of the request must be a whole number"),
        (order(seed="7"), {"beta": [0.5]}, "seed of the request must be a whole number"),
        (order(), {"beta": {0.5: 0.6}}, "each in a list"),
        (order(), {"beta": ["high"]}, "beta"),
        (order(), {"lock": ["both"]}, "lock"),
        (order(concepts="alice/cat"), {"beta": [0.5]}, "concepts of the request must be a list"),
    ],
)
def test_what_cannot_be_swept_is_said(ready, bank, request_, over, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kd.sweep(ready, request_, over, bank=bank, **STEPS)


@pytest.mark.parametrize("option", [{"on_error": "return"}, {"on_error": "raise"}, {"output_type": "np"}])
def test_options_that_leave_no_images_are_refused_by_name(ready, bank, option):
    (name,) = option
    with pytest.raises(TypeError, match=f"sweep: {name} cannot be given"):
        kd.sweep(ready, order(), {"beta": [0.5]}, bank=bank, **STEPS, **option)


@pytest.mark.parametrize("images", [[[None, Image.new("RGB", (20, 10), (0, 0, 9))]], [[None, ValueError()]]])
def test_a_picture_that_was_not_drawn_leaves_its_place_empty(images):
    sheet = np.asarray(sweeps.labelled_grid("a prompt", ["a", "b"], ["seed"], images))
    drawn_ = sum(isinstance(image, Image.Image) for image in images[0])
    assert (sheet[..., 2] == 9).sum() == drawn_ * 160 * 80 and sheet.shape[1] > 2 * 160


@pytest.fixture
def place(monkeypatch, ready, bank, tmp_path):
    monkeypatch.setattr(common, "load", lambda model, **options: ready)
    monkeypatch.chdir(tmp_path)
    for name, concept in bank.items():
        kd.ConceptBank("concepts").add(name, concept)
    return tmp_path


SWEEP = ("sweep", "<alice-cat> on blue", "--concept", "alice/cat", "--steps", 2)


def test_the_command_draws_what_the_function_does(place, ready, bank):
    run(*SWEEP, "--beta", "0.2, 0.9", "--tau", "0.2", "--seed", 4, "--rows", 2, "--guidance-scale", 3)
    asked = order(concepts=[kd.Use("alice/cat", tau=0.2)], seed=4, num_images=2, guidance_scale=3.0)
    expected = kd.sweep(ready, asked, {"beta": [0.2, 0.9]}, bank=bank, **STEPS).grid
    assert np.array_equal(Image.open("sweep.png"), expected)
    assert drawn.facts_of(place / "sweep.png")["sweep"]["beta"] == "0.2, 0.9"
    run(*SWEEP, "--beta", "0.2,0.9", "--lock", "local,global", "--output", "below/both.png")
    assert Image.open("below/both.png").height > 2 * 160


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one or two of --beta, --tau, --strength, --lock, --guidance-scale must have several values"),
        (("--beta", "0.5"), "must have several values with commas between them, got 0"),
        (("--beta", "0.5,high"), "--beta must be numbers with commas between them, got '0.5,high'"),
        (("--lock", "local,both"), "lock"),
        (("--beta", "0.5,0.6", "--tau", ","), "--tau must be numbers with commas between them, got ','"),
        (("--beta", "0.5,0.6", "--lock", ""), "--lock must be local, global, or both with commas between them, got ''"),
        (("--beta", "0.5,0.6", "--tau", "0.1,0.2", "--rows", 3), "--rows must be 1 where two options"),
        (("--beta", "0.5,0.6", "--output", "x" * 240 + ".png"), "--output must be a place"),
        (("--beta", "0.5,0.6", "--output", "sweep.jpg"), "--output must be the name of a PNG"),
        (("--beta", "0.5,0.6", "--output", "concepts/alice/cat.safetensors/x.png"), "--output must be a place"),
        (("--beta", "0.5,0.6", "--concept", "carol/cat"), "carol/cat"),
    ],
)
def test_what_the_command_cannot_sweep_is_one_line(place, monkeypatch, capsys, options, message):
    error = fail(capsys, monkeypatch, *SWEEP, *options)
    assert message in error and len(error.strip().splitlines()) == 1
