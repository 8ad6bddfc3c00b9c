"""Concepts whose words are their super-class's noun as it is read: text encoders read the plain prompt."""

import dataclasses

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers import Request, Use
from keylock_diffusers.concepts import AddedConcept, BaseModel, Concept, ConceptFileError
from keylock_diffusers.concepts.bank import ConceptBank
from keylock_diffusers.concepts.files import pack, read_header, read_tensors
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.tokens import plain
from keylock_diffusers.generation.batch import Picture
from keylock_diffusers.generation.engine import Settings
from keylock_diffusers.training import AddedConfig, train_concepts
from tests.diffusers.compatibility import SIZE, make
from tests.diffusers.drawing import APART, ROUNDING
from tests.diffusers.test_added import BASE, draw, largest, order
from tests.diffusers.test_added_training import ROUNDED, far, first_lesson, masked, same, tensors
from tests.diffusers.test_cli import run
from tests.diffusers.test_training import TOGETHER, subject

QUICK = AddedConfig(words=3, steps=4, batch_size=2, keys=1, values=2)


@pytest.fixture
def nouns_for(added_for):
    def made(model, *args, **changes):
        return added_for(model, *args, **{"encodings": 3, "keys": 1, "values": 2, **changes}).with_(word_embeddings=())

    return made


def train(pipe, subjects, config=QUICK, **kwargs):
    return train_concepts(pipe, subjects, config, progress=False, **kwargs)


def read(pipe, *orders):
    """What rows read [T, D] in their last phase."""
    engine = kd.Engine(pipe, Settings(num_inference_steps=2, height=SIZE, width=SIZE))
    batch = engine.load([Picture(engine.plan(one)) for one in orders])
    found = batch.text.last.read
    engine.release(batch)
    return found


# The file


def test_a_file_gives_back_what_was_saved(nouns_for):
    concept = nouns_for(BASE, start=0.25)
    found = Concept.load(concept.to_bytes())
    assert isinstance(found, AddedConcept) and found.digest == concept.digest
    assert (found.words, found.word_embeddings, found.start) == (3, (), 0.25)
    assert all(torch.equal(getattr(found, part), getattr(concept, part)) for part in ("encodings", "keys", "values"))
    assert b"word_embedding" not in concept.to_bytes() and read_header(concept.to_bytes(), "f").fields["words"] == 3
    two = concept.with_(encodings=None)
    assert two.words == 2 and Concept.load(two.to_bytes()).digest == two.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encodings": None, "keys": None, "values": None}, "words in encodings, keys and values must be a whole"),
        ({"encodings": torch.zeros(17, 5)}, "must be a whole number from 1 to 16, got 17"),
        ({"encodings": torch.zeros(3, 4)}, r"encodings must be \[3, 5\], got \[3, 4\]"),
        ({"word_embeddings": (torch.zeros(3, 6),)}, "word_embeddings must hold one per text encoder, 2, got 1"),
    ],
)
def test_what_is_no_concept_is_refused(nouns_for, change, message):
    with pytest.raises(ValueError, match=message):
        nouns_for(BASE).with_(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": 4}, "words must be as many as the most of encodings, keys, values, got 4"),
        ({"words": 2}, "encodings must be a whole number from 0 to 2, got 3"),
        ({"format_version": 2}, "missing or unknown: .'word_embedding.0', 'word_embedding.1'."),
        ({"format_version": 4}, "format_version must be 1 or 2 or 3, which this release reads, got 4"),
    ],
)
def test_a_file_that_says_something_else_is_refused(nouns_for, change, message):
    data = nouns_for(BASE).to_bytes()
    header = read_header(data, "file")
    flat = {name: tensor.flatten() for name, tensor in read_tensors(data, header, "file").items()}
    with pytest.raises(ConceptFileError, match=message):
        Concept.load(pack({**header.fields, **change}, flat))


def test_it_has_no_words_to_write_as_an_embedding(ready, nouns_for, tmp_path):
    ConceptBank(tmp_path / "bank").add("alice/cat", nouns_for(ready))
    command = ["bank", "words", "alice/cat", "--output", tmp_path / "word.safetensors", "--bank", tmp_path / "bank"]
    with pytest.raises(ValueError, match="alice/cat: the concept has no words of its own"):
        run(*command)
    assert not (tmp_path / "word.safetensors").exists()


# What is read


@pytest.mark.parametrize("prompt", ["<a> on blue", "a grinning <a> and a <b>, and again <a>", "<a> " * 30])
def test_a_noun_is_read_in_all_places_of_its_words(pipe, prompt):
    names = {"<a>": "teddy bear", "<b>": "dog"}
    said = text.tokenize(
        pipe.tokenizer, prompt, {n: c for n, c in names.items() if n in prompt}, nouns={"<a>": 3, "<b>": 2}, chunks=None
    )
    found, at = plain(pipe.tokenizer, said, {"<a>", "<b>"} & {n for *_, n, _ in said.words}, {"<a>"})
    for position, name, number in said.words:
        assert (
            at[position] == at[position - number] if name == "<a>" else number == 0 or not found.attention[at[position]]
        )
    once = [at[position] for position, name, number in said.words if number == 0]
    others = [at[p] for p in range(len(said.ids)) if p not in {position for position, *_ in said.words}]
    assert len({*once, *others}) == len(once) + len(others)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_all_other_tokens_are_the_plain_prompts_to_the_bit(ready, nouns_for, strength):
    concept = nouns_for(ready)
    both = [order("a <alice-cat> and a dog", Use(concept, strength=strength)), order("a cat and a dog")]
    found, plainly = read(ready, *both)
    noun = text.tokenize(ready.tokenizer, "a <a> and a dog", {"<a>": "cat"}).words[0][0]
    for word in range(3):
        torch.testing.assert_close(
            found[noun + word], plainly[noun] + strength * concept.encodings[word].float(), rtol=0, atol=1e-6
        )
    assert torch.equal(found[:noun], plainly[:noun])
    assert torch.equal(found[noun + 3 :], plainly[noun + 1 : len(plainly) - 2])


def test_two_users_words_do_not_read_each_other(ready, nouns_for):
    one, two = nouns_for(ready, "<a>"), nouns_for(ready, "<b>", "dog", seed=7)
    prompt = "a <a> and a <b> on blue"
    both, first = read(ready, order(prompt, one, two), order("a <a> and a dog on blue", one))
    said = text.tokenize(ready.tokenizer, prompt, {"<a>": "cat", "<b>": "dog"}, nouns={"<a>": 3, "<b>": 3})
    second = min(position for position, name, _ in said.words if name == "<b>")
    assert torch.equal(both[:second], first[:second])
    assert torch.equal(both[second + 3 :], first[second + 1 : -2])


def test_a_picture_is_that_of_encodings_made_by_hand(ready, nouns_for):
    concept = nouns_for(ready, keys=0, values=0)
    concept = concept.with_(encodings=8 * concept.encodings)
    tokenized = text.tokenize(ready.tokenizer, "a <a> on blue", {"<a>": "cat"})
    noun = tokenized.words[0][0]
    with torch.no_grad():
        states = text.encode(ready.text_encoder, [tokenized], [{}])[0]
        negative = text.encode(ready.text_encoder, [text.tokenize(ready.tokenizer, "")])[0]
    words = states[noun] + 0.7 * concept.encodings.float()
    states = torch.cat([states[:noun], words, states[noun + 1 :]])[: len(states)]
    given = Request(prompt_embeds=states, negative_prompt_embeds=negative, seed=1, guidance_scale=4.0)
    asked = order("a <alice-cat> on blue", Use(concept, strength=0.7))
    found, expected, bare = draw(ready, asked, given, order("a cat on blue"))
    assert largest(found, expected) <= ROUNDING < APART < largest(found, bare)


@pytest.mark.parametrize("words", [1, 3])
def test_at_strength_zero_and_before_it_starts_the_picture_is_the_super_classs(ready, nouns_for, words, one_thread):
    concept = nouns_for(ready, words=words, encodings=words, keys=words, values=words)
    absent, late, whole = (
        order("a <alice-cat> on blue", Use(concept, **more)) for more in ({"strength": 0.0}, {"start": 1.0}, {})
    )
    found = draw(ready, order("a cat on blue"), absent, late, whole)
    assert largest(found[1], found[0]) <= ROUNDING and largest(found[2], found[0]) <= ROUNDING
    assert largest(found[3], found[0]) > APART


def test_stable_diffusion_xl_reads_its_own_pooled_text(nouns_for):
    pipe = kd.install(make("SDXL", "text only")[0])
    concept = nouns_for(pipe)
    bare, found = (order("a cat on blue"), order("a <alice-cat> on blue", concept))
    engine = kd.Engine(pipe, Settings(num_inference_steps=2, height=SIZE, width=SIZE))
    batch = engine.load([Picture(engine.plan(one)) for one in (bare, found)])
    pooled = batch.text.last.pooled["cond"]
    assert torch.equal(pooled[0], pooled[1])
    engine.release(batch)
    one, other = draw(pipe, bare, found)
    assert largest(one, other) > APART


# Training


@pytest.mark.parametrize(("spread", "rounded"), [(0.0, ROUNDED), (0.5, 100 * ROUNDED)])  # what moves is kept in float16
def test_the_loss_is_that_of_copies_of_the_noun(pipe, spread, rounded):
    """One step that has learned nothing yet, with three words that stay where they are or are moved from the start."""
    one = masked()
    still = dataclasses.replace(
        QUICK,
        steps=1,
        batch_size=3,
        encodings_rate=0.0,
        keys_rate=0.0,
        values_rate=0.0,
        spread=spread,
        prior=0.0,
        timestep_power=1.0,
        views=0.0,
    )
    (concept,) = train(pipe, [one], still)
    assert bool(concept.encodings.any()) == (spread > 0) and not concept.keys.any() and not concept.values.any()
    chosen, times, noisy, target, weights = first_lesson(pipe, one)
    with torch.no_grad():
        states = []
        for n in chosen:
            said = text.tokenize(pipe.tokenizer, one.captions[n], {"<alice-cat>": "cat"})
            plainly = text.encode(pipe.text_encoder, [said], [{}])[0]
            noun = said.words[0][0]
            words = plainly[noun] + concept.encodings.float()
            states.append(torch.cat([plainly[:noun], words, plainly[noun + 1 :]])[: len(plainly)])
        drawn = pipe.unet(noisy, times, torch.stack(states)).sample
    expected = ((drawn - target) ** 2 * weights).sum((1, 2, 3)) / (4 * weights.sum((1, 2, 3)))
    assert concept.training["loss"] == pytest.approx(float(expected.mean()), rel=rounded)


def test_it_learns_and_leaves_the_text_encoder_alone(ready, monkeypatch):
    calls = []
    run_encoder = type(ready.text_encoder).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return run_encoder(self, *args, **kwargs)

    monkeypatch.setattr(type(ready.text_encoder), "forward", counted)
    (concept,) = train(ready, [masked()], dataclasses.replace(QUICK, steps=6))
    assert len(calls) == 1  # before the first step
    assert concept.words == 3 and not concept.word_embeddings
    assert all(tensor.abs().max() > 0 for tensor in tensors(concept))
    assert concept.base == BaseModel.of(ready)


def test_trained_together_is_trained_alone_and_resumed_as_never_stopped(pipe, tmp_path):
    config = dataclasses.replace(QUICK, steps=8)
    subjects = [masked("alice", 1), subject("bob", 2)]
    together = train(pipe, subjects, config)
    for one, concept in zip(subjects, together, strict=True):
        assert far(concept, train(pipe, [one], config)[0]) <= TOGETHER

    def stop(step, _):
        if step == 3:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(pipe, subjects, config, checkpoint_path=path, checkpoint_every=1, on_step=stop)
    assert all(map(same, together, train(pipe, subjects, config, checkpoint_path=path)))


def test_stable_diffusion_xl_learns_it():
    pipe = kd.install(make("SDXL", "text only")[0])
    (concept,) = train(pipe, [masked()], dataclasses.replace(QUICK, steps=2))
    assert list(concept.encodings.shape) == [3, pipe.unet.config.cross_attention_dim]
    (drawn,) = draw(pipe, order("a <alice-cat> on blue", concept))
    assert bool(torch.isfinite(drawn).all())


def test_a_word_of_which_nothing_is_learned_is_no_word():
    with pytest.raises(ValueError, match="words must be at most 2, of which encodings, keys or values are learned"):
        AddedConfig(encodings=0, keys=1, values=2)
