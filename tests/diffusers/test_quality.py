"""The benchmark of quality: nobody is judged by what they showed, and right answers score as right answers."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

import keylock_diffusers as kd
from benchmarks.quality import fusion, report, weights
from benchmarks.quality.judges import COATED, CoatEncoder, half
from benchmarks.quality.methods import BATCH, METHODS, ROWS, steps_of
from benchmarks.quality.users import DECOYS, TEST, TUNE, Order
from keylock_diffusers.embedded import render
from keylock_diffusers.embedded.glyphs import INDEX
from keylock_diffusers.training import AddedConfig

needs_font = pytest.mark.skipif(not render.FONT.exists(), reason="the package fonts-noto-color-emoji is not installed")


def test_users_of_the_test_are_not_those_that_settings_are_chosen_on():
    assert (len(TEST), len(TUNE), len(DECOYS)) == (24, 10, 40)
    coats = [user.coat for user in (*TEST, *TUNE)] + list(DECOYS)
    assert len(set(coats)) == len(coats)
    assert len({user.name for user in (*TEST, *TUNE)}) == 34
    of_cats = [{words for user in group if user.kind == "cat" for words in user.asked} for group in (TEST, TUNE)]
    assert not of_cats[0] & of_cats[1]


@pytest.mark.parametrize("user", [*TEST, *TUNE], ids=lambda user: user.name)
def test_what_is_asked_is_known_to_the_judges_and_was_not_shown(user):
    assert len(user.orders) == 12
    for order in user.orders:
        assert [part.own for part in order.parts].count(True) == 1
        for part in order.parts:
            assert part.glyph in INDEX
            assert not part.own or part.glyph in COATED[user.kind]
    if user.kind in ("cat", "face"):
        asked = {part.glyph for order in user.orders for part in order.parts if part.own}
        shown = {"cat": {"cat", "grinning cat", "crying cat", "smirking cat"}}.get(
            user.kind, {"grinning face", "winking face", "crying face", "thinking face"}
        )
        assert len(asked - shown) >= 3


def test_coats_are_drawn_in_their_two_colours():
    for coat in (user.coat for user in TEST):
        seen = coat.paint(64)
        assert seen.shape == (64, 64, 3) and seen.min() >= 0 and seen.max() <= 255
        if coat.pattern not in ("fade", "strands"):
            assert {tuple(pixel) for pixel in seen.reshape(-1, 3).astype(int)} <= set(coat.colours)


def test_an_order_says_what_stands_where():
    order = Order.of("a fox next to a kissing {} on pink", "cat")
    assert [tuple(part) for part in order.parts] == [("fox", False), ("kissing cat", True)]
    assert order.background == "pink"


def test_half_of_a_picture_is_judged_without_the_other():
    image = np.full((128, 128, 3), 200, np.uint8)
    image[40:80, 8:56] = 10
    image[40:80, 72:120] = 90
    left, right = half(image, False), half(image, True)
    assert {*np.unique(left)} == {10, 200} and {*np.unique(right)} == {90, 200}
    assert np.array_equal(left[:, 32:96], image[:, :64]) and np.array_equal(right[:, 32:96], image[:, 64:])


def test_a_budget_pays_for_what_a_step_costs():
    costs = {
        AddedConfig(prior=0.0): 3,
        AddedConfig(): 4,
        weights.WeightsConfig(): 6,
        weights.WeightsConfig(prior=1.0): 7,
    }
    assert all(steps_of(ROWS[30], config) == ROWS[30] // (cost * BATCH) for config, cost in costs.items())
    for method in METHODS.values():
        assert not method.trains or len(method.tried) >= 11  # and the one that it begins with


def scored(method="m", two=(), **users):
    """A row of scores, of each user's pictures."""
    pictures = [{"user": user, "prompt": "p", "seed": n, **each} for user, own in users.items() for n, each in own]
    facts = {"key": method, "method": method, "settings": {}, "changes": {}, "rows": 7, "bytes": 1, "seconds": 1.0}
    return {**facts, **report.summary(pictures, two)}


def test_the_bootstrap_goes_over_users_and_in_pairs():
    def facts(values):
        return scored(**{f"u{n}": [(seed, {"who": v}) for seed in range(3)] for n, v in enumerate(values)})

    one, other = facts([0.9, 0.8, 0.7, 0.6]), facts([0.7, 0.6, 0.5, 0.4])
    mean, low, high = report.difference(one, other, "who")
    assert mean == pytest.approx(0.2) and low == pytest.approx(0.2) and high == pytest.approx(0.2)
    mean, low, high = report.difference(facts([1.0, 0.0, 1.0, 0.0]), facts([0.0] * 4), "who")
    assert mean == 0.5 and low < 0.25 and high > 0.75
    assert json.loads(json.dumps(report.means(one)))["who"] == pytest.approx(0.75)
    assert report.table([one]).count("\n") == 2 and "who 0.75" in report.line(one)


def test_a_users_scores_are_means_of_the_pictures_that_have_them():
    pictures = [(0, {"who": 1.0, "other": 30.0}), (1, {"who": 0.0}), (2, {"who": 0.0, "other": 34.0})]
    row = scored(two=[{"in place": 1.0, "swapped": 0.0}, {"in place": 0.0, "swapped": 1.0}], u=pictures)
    assert row["users"] == {"u": {"who": 0.3333, "other": 32.0}}
    assert row["two users"] == {"in place": 0.5, "swapped": 0.5} and report.means(row)["in place"] == 0.5
    assert scored(u=pictures)["two users"] == {} and np.isnan(report.means(scored(u=pictures))["swapped"])


def test_errors_are_shares_of_what_no_personalisation_leaves():
    def facts(**scores):
        return scored(u=[(seed, scores) for seed in (0, 1)])

    floors = {"floor colour": 10.0, "nothing colour": 50.0, "floor pattern": 5.0, "nothing pattern": 25.0}
    plain = facts(colour=50.0, pattern=25.0, **floors)
    assert report.of_nothing(plain, plain) == {"colour": 1.0, "pattern": 1.0}
    assert report.of_nothing(facts(colour=10.0, pattern=5.0), plain) == {"colour": 0.0, "pattern": 0.0}
    assert report.of_nothing(facts(colour=20.0, pattern=15.0), plain) == {"colour": 0.25, "pattern": 0.5}
    assert np.isnan(report.of_nothing(plain, None)["colour"])


def test_a_folder_of_scores_becomes_a_table_a_plot_and_a_contact_sheet(tmp_path):
    from PIL import Image

    names, users = ["no personalisation", "LoRA rank 4, with a word", "added"], TEST[:2]
    rows = []
    for place, (name, who) in enumerate(zip(names, (0.0, 0.5, 1.0), strict=True)):
        own = [(seed, {"who": who, "expression": 0.5}) for seed in range(3)]
        rows.append({**scored(name, **{user.name: own for user in users}), "bytes": 1000 * place})
        Image.new("RGB", (3 * 66, 2 * 66), (80 * place, 0, 0)).save(tmp_path / f"{name}.jpg")
    kept = tmp_path / report.SCORES
    kept.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert report.read(tmp_path) == rows[::-1] and report.read(tmp_path / "none") == []
    report.write(tmp_path, users, list(METHODS), 3)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == names
    assert "+0.50 (+0.50 to +0.50)" in lines[4] and "| 1.00 |" in lines[4] and "nan" not in lines[2]
    assert (tmp_path / "bytes.svg").read_text().count("<circle") == 4
    assert Image.open(tmp_path / "excerpt.jpg").size == (260 + 66, 3 * 66 + 8)
    sheet = Image.open(tmp_path / "contact-sheet.jpg")
    seen = [sheet.getpixel((sheet.width - 9, place)) for place in (2 * 66 + 9, 3 * 66 + 8 + 9)]
    assert np.abs(np.subtract(seen, [(160, 0, 0), (0, 0, 0)])).max() < 6


def test_the_coat_encoder_gives_unit_vectors():
    torch.manual_seed(0)
    found = CoatEncoder()(torch.randn(3, 3, 128, 128))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@needs_font
def test_a_right_answer_is_a_right_answer_and_the_plain_one_is_none():
    from benchmarks.quality.scores import Scores, right_answer
    from keylock_diffusers import embedded

    scores = Scores(embedded.load().vae, TUNE)
    found = []
    for user, number in itertools.product(TUNE[:3], (0, 6)):
        order = user.orders[number]
        for coat in (user.coat, None):
            image = right_answer(dataclasses.replace(user, coat=coat), order)
            found.append((coat is not None, scores.of(image, user, order), len(order.parts)))
    right = [scored for wears, scored, _ in found if wears]
    wrong = [scored for wears, scored, _ in found if not wears]
    assert np.mean([scored["who"] for scored in right]) >= 0.8 > 0.2 >= np.mean([scored["who"] for scored in wrong])
    assert max(scored["error"] for scored in right) < 1 < 15 < min(scored["error"] for scored in wrong)
    assert np.mean([scored["expression"] for scored in right]) >= 0.8 and all(scored["background"] for scored in right)
    for _, scored, parts in found:
        assert (parts == 2) == ("other" in scored)
        assert scored.get("other", 0.0) < 1 and not scored.get("leak")
    swapped = render.compose(
        [(render.named("cat", TUNE[1].coat), 4, 40, 58), (render.named("cat", TUNE[0].coat), 66, 40, 58)], "white"
    )[0]
    order = Order.of("a {} and a cat on white", "cat")
    assert scores.both(swapped, order, (TUNE[0].coat, TUNE[1].coat)) == {"in place": 0.0, "swapped": 1.0}
    assert scores.both(swapped, order, (TUNE[1].coat, TUNE[0].coat)) == {"in place": 1.0, "swapped": 0.0}


@needs_font
@pytest.mark.parametrize(("targets", "word"), [(("attn2.to_k", "attn2.to_v"), True), ((), False)])
def test_baselines_train_weights_of_their_own_and_put_the_models_back(targets, word, monkeypatch):
    from keylock_diffusers import embedded

    monkeypatch.setattr(weights, "_CLASS_PICTURES", 1)
    pipe = kd.install(embedded.load())
    before = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    subject = TUNE[0].subject(placeholder=None if word else "sks cat")
    config = weights.WeightsConfig(steps=1, batch_size=1, learning_rate=0.1, prior=1.0, views=0.5, targets=targets)
    found = weights.train_weights(pipe, subject, config)
    assert set(found.changed) == {name for name in before if not targets or any(target in name for target in targets)}
    assert len(found.words) == word and found.nbytes == 2 * sum(
        value.numel() for value in (*found.changed.values(), *found.words)
    )
    now = dict(pipe.unet.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    half = found.scaled(pipe, 0.5)
    for name, value in half.changed.items():
        torch.testing.assert_close(value, (before[name] + found.changed[name]) / 2)
    with found.within(pipe):
        assert all(torch.equal(now[name], value) for name, value in found.changed.items())
        assert any(not torch.equal(now[name], before[name]) for name in found.changed)
    assert all(torch.equal(now[name], value) for name, value in before.items())


@needs_font
def test_a_subject_is_cut_out_and_drawn_as_large_as_alone():
    for number in range(12):
        picture = render.draw(5, number, pairs=1.0)
        for place, label in enumerate(picture.labels):
            seen = fusion.alone(picture, place, number)
            ground = seen[0, 0].astype(int)
            shown = np.abs(seen.astype(int) - ground).max(-1) > 12
            rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
            assert max(np.ptp(rows), np.ptp(columns)) <= 104
            assert fusion.word(label) in picture.caption.split()
