"""How far pictures still follow other words while a subject is learned, and the end of what no longer does."""

import dataclasses

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import keylock_diffusers as kd
from keylock_diffusers import cli
from keylock_diffusers.concepts import AddedConcept, Concept
from keylock_diffusers.embedded.prompts import FOLLOWED
from keylock_diffusers.training import (
    AddedConfig,
    LoraTrainingConfig,
    PerfusionConfig,
    PromptFollowing,
    following,
    train_concepts,
    train_loras,
    training_facts,
)
from tests.diffusers.test_cli import fail, run, tiny_model  # noqa: F401
from tests.diffusers.test_training import metric, pictures, same, subject  # noqa: F401
from tests.diffusers.test_training_folder import command, of_users, quick, unloaded  # noqa: F401

FEW = {"prompts": ("a {} on red", "a {} and a dog"), "num_inference_steps": 2}
PLAIN = AddedConfig(words=1, encodings=1, keys=1, values=1, steps=1, batch_size=1)


def drawn_by(answer):
    """A `generate` whose latents are what `answer` says of a request."""

    def generate(pipe, requests, **options):
        assert options["output_type"] == "latent" and all(request.guidance_scale == 1 for request in requests)
        return [torch.as_tensor(answer(request), dtype=torch.float16) for request in requests]

    return generate


def measured(monkeypatch, answer, **options):
    """What `PromptFollowing` makes of latents [2] that depend on a request."""
    monkeypatch.setattr(following, "generate", drawn_by(answer))
    watch = PromptFollowing(None, [subject()], 1, **options)
    concept = object.__new__(AddedConcept)
    monkeypatch.setattr(following, "Request", lambda prompt, **more: _Asked(prompt, **more))
    assert watch(1, lambda: [concept]) == []
    return watch.measured[0][1]


class _Asked:
    def __init__(self, prompt, seed, guidance_scale, concepts=()):
        self.prompt, self.seed, self.guidance_scale, self.own = prompt, seed, guidance_scale, bool(concepts)


def test_it_is_the_share_of_what_words_change_in_the_super_classs_pictures(monkeypatch):
    """By the definition, in float64, over latents that are anything."""
    random = np.random.default_rng(0)
    known = {}

    def answer(request):
        return known.setdefault((request.prompt, request.seed, request.own), random.standard_normal(5).round(2))

    prompts, seeds = ("a {} on red", "{} with a hat", "two of {}"), (3, 4, 7)
    found = measured(monkeypatch, answer, prompts=prompts, seeds=seeds)
    above = below = 0.0
    for seed in seeds:
        for prompt in prompts:
            own, plain = (
                known[prompt.format(word), seed, word != "cat"] - known[f"a {word}", seed, word != "cat"]
                for word in ("<alice-cat>", "cat")
            )
            above, below = above + own @ plain, below + plain @ plain
    assert found == pytest.approx(above / below, abs=2e-3)


@pytest.mark.parametrize(("share", "says"), [(1.0, 1.0), (0.25, 0.25), (0.0, 0.0), (-0.5, -0.5)])
def test_a_subject_that_follows_by_a_share_has_it_whatever_it_looks_like(monkeypatch, share, says):
    words = {"on red": (4.0, 0.0), "and a dog": (0.0, 2.0), "by night": (0.0, 0.0)}  # the last says nothing to anybody

    def answer(request):
        change = next((np.array(change) for word, change in words.items() if word in request.prompt), np.zeros(2))
        return request.seed + (5.0 + share * change if request.own else change)

    assert measured(monkeypatch, answer, prompts=tuple("a {} " + word for word in words)) == says


def test_words_that_change_nothing_at_all_are_no_division_by_zero(monkeypatch):
    assert measured(monkeypatch, lambda request: np.ones(2) * request.own) == 0


def test_what_has_learned_nothing_follows_wholly_and_what_is_overdone_does_not(pipe):
    kd.install(pipe)
    watch = PromptFollowing(pipe, [subject()], 1, prompts=FOLLOWED)
    (plain,) = train_concepts(pipe, [subject()], AddedConfig(**vars(PLAIN) | NO_RATES), progress=False, on_step=watch)
    assert watch.measured == [{1: pytest.approx(1.0, abs=1e-3)}]
    watch(2, lambda: [dataclasses.replace(plain, values=200.0 + plain.values)])
    assert watch.measured[0][2] < 0.5


NO_RATES = {"encodings_rate": 0.0, "keys_rate": 0.0, "values_rate": 0.0}


@pytest.mark.parametrize("edit", ["added", "perfusion", "lora"])
def test_one_that_follows_too_little_stops_alone_with_what_it_had_learned(pipe, metric, edit, monkeypatch):  # noqa: F811
    """The others learn what they learn without it."""
    config = {
        "added": AddedConfig(steps=6, batch_size=1),
        "perfusion": PerfusionConfig(steps=6, batch_size=1),
        "lora": LoraTrainingConfig(steps=6, batch_size=1, rank=1),
    }[edit]
    subjects = [
        subject("alice", 1),
        subject("carol", 3, captions=["a cat", "a cat"]),  # which cannot be used
        subject("bob", 2),
    ]
    train = train_loras if edit == "lora" else train_concepts
    options = {"metric": metric} if edit == "perfusion" else {}
    watch = PromptFollowing(pipe, subjects, 2, least=0.5, **FEW)
    shares = iter([0.9, 0.8, 0.1, 0.7, 0.6])  # alice and bob after 2 steps, after 4, and bob after 6
    monkeypatch.setattr(watch, "_following", lambda *_: next(shares))
    alice, carol, bob = train(pipe, subjects, config, progress=False, on_step=watch, **options)
    assert isinstance(carol, Exception)
    assert watch.measured == [{2: 0.9, 4: 0.1}, {}, {2: 0.8, 4: 0.7, 6: 0.6}]
    assert facts(alice) == (4, "overtrained") and facts(bob) == (6, "finished")
    plain = train(pipe, subjects, config, progress=False, **options)
    torch.testing.assert_close(tensors(bob), tensors(plain[2]), rtol=1e-3, atol=1e-6)  # of more rows: rounding
    assert not all(map(torch.equal, tensors(alice), tensors(plain[0])))


def facts(learned):
    found = learned.training if isinstance(learned, Concept) else training_facts(learned)
    return found["steps"], found["stopped"]


def tensors(learned):
    if isinstance(learned, Concept):
        return [*learned.tensors.values()]
    return [side for one in learned.denoiser.values() for side in (one.down, one.up)]


def test_measuring_changes_nothing_of_what_is_learned_and_failing_to_neither(pipe, metric, monkeypatch, caplog):  # noqa: F811
    config = PerfusionConfig(steps=2, batch_size=1)
    watch = PromptFollowing(pipe, [subject()], 1, **FEW)
    options = {"metric": metric, "progress": False}
    (plain,) = train_concepts(pipe, [subject()], config, **options)
    assert same(train_concepts(pipe, [subject()], config, **options, on_step=watch)[0], plain)
    assert [*watch.measured[0]] == [1, 2] and not caplog.text
    monkeypatch.setattr(following, "generate", lambda *_, **__: 1 / 0)
    watch = PromptFollowing(pipe, [subject()], 1, least=1.0, **FEW)
    assert same(train_concepts(pipe, [subject()], config, **options, on_step=watch)[0], plain)
    assert watch.measured == [{}] and "<alice-cat>: step 2 was not measured: " in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be a whole number of at least 1, got 0"),
        ({"least": "much"}, ValueError, "least must be a finite number, got 'much'"),
        ({"prompts": "a {}"}, TypeError, "prompts must be a list, got str"),
        ({"prompts": ("a cat",)}, ValueError, r"prompts must each hold one \{\}, got 'a cat'"),
        ({"prompts": ("{} and {}",)}, ValueError, r"prompts must each hold one \{\}, got '{} and {}'"),
        ({"prompts": ()}, ValueError, "prompts must not be empty"),
        ({"seeds": ()}, ValueError, "seeds must not be empty"),
        ({"subjects": []}, ValueError, "subjects must not be empty"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, error, message):
    given = {"subjects": [subject()], "every": 1} | options
    with pytest.raises(error, match=f"PromptFollowing: {message}"):
        PromptFollowing(None, given.pop("subjects"), given.pop("every"), **given)


def test_train_says_how_far_words_count_and_stops_by_it(quick, tmp_path):  # noqa: F811
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {} on red\n\n a {} and a dog\n")
    said = run(*command(tmp_path, "--steps", 3, "--following-every", 1, "--following-prompts", prompts))
    assert "Of what other words change in the super-class's pictures, they change here: " in said
    assert [word in said for word in ("at step 1,", "at step 2,", "at step 3.")] == [True] * 3
    said = run(*command(tmp_path, "--steps", 3, "--following-every", 1, "--least-following", 1, "--overwrite"))
    assert "at step 2" not in said


def test_of_many_users_each_has_a_figure(quick, tmp_path):  # noqa: F811
    result = CliRunner().invoke(cli.app, [*map(str, of_users(tmp_path, "--following-every", 1))])
    assert result.output.count(", other words count ") >= 2


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ((), "a {}", "--following-prompts needs --following-every or --least-following"),
        (("--least-following", 0.5), "a cat", "must hold prompts, one a line, with {} once in each"),
        (("--following-every", 5), "\n", "must hold prompts, one a line, with {} once in each"),
    ],
)
def test_prompts_that_are_none_are_refused_before_the_work(capsys, monkeypatch, tmp_path, options, text, message):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(text)
    unloaded(monkeypatch)
    given = command(tmp_path, *options, "--following-prompts", prompts)
    assert message in fail(capsys, monkeypatch, *given)
