"""Training of concepts that add at their own words: the loss against its equations, and each as if alone."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers.concepts import AddedConcept, BaseModel, Concept
from keylock_diffusers.denoisers.unet import cross_attention_layers, text_encoders
from keylock_diffusers.masks import soft_mask
from keylock_diffusers.training import (
    AddedConfig,
    ConceptTrainingError,
    Covariance,
    LoraTrainingConfig,
    PerfusionConfig,
    Subject,
    train_concepts,
    train_loras,
)
from tests.diffusers.compatibility import SIZE, make
from tests.diffusers.test_training import TOGETHER, pictures, subject

QUICK = AddedConfig(
    words=3,
    embeddings=True,
    encodings=2,
    keys=None,
    values=None,
    timestep_power=1.0,
    views=0.0,
    spread=0.3,
    steps=4,
    batch_size=2,
    encodings_rate=0.05,
    keys_rate=0.05,
    values_rate=0.05,
    embedding_rate=0.05,
)
ROUNDED = 1e-5  # a loss as training notes it, to six places
HALF = Image.fromarray(np.repeat(np.array([[200] * 8 + [0] * 8], np.uint8), 16, 0))


def train(pipe, subjects, config=QUICK, **kwargs):
    return train_concepts(pipe, subjects, config, progress=False, **kwargs)


def tensors(concept):
    return concept.encodings, concept.keys, concept.values, *concept.word_embeddings


def same(one, other):
    return all(map(torch.equal, tensors(one), tensors(other)))


def far(one, other):
    """The largest difference of what two concepts learned, relative to each tensor's size."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs if a.numel())


def masked(name="alice", seed=1, **changes):
    return subject(name, seed, masks=[HALF, HALF], **changes)


@torch.no_grad()
def first_lesson(pipe, one):
    """What the first step of three pictures shows of a masked subject: which, times, noisy latents, target, weights."""
    random = torch.Generator().manual_seed(1 * 1_000_003)
    chosen = torch.randint(2, (3,), generator=random)
    times = torch.randint(1000, (3,), generator=random)
    noise = torch.randn(3, 4, 8, 8, generator=random)
    pixels = torch.stack([torch.from_numpy(np.array(one.images[n])).permute(2, 0, 1) for n in chosen])
    clean = pipe.vae.encode(pixels.float() / 127.5 - 1).latents
    weights = soft_mask(HALF, (8, 8), "mask").expand(3, 1, 8, 8)
    noisy, target = (said(clean, noise, times) for said in (pipe.scheduler.add_noise, pipe.scheduler.get_velocity))
    return chosen, times, noisy, target, weights


def test_the_loss_is_that_of_what_is_drawn_and_of_what_strays(pipe):
    """One step, with everything in it written out once more; all three words are still the noun, as the file has it."""
    one = masked()
    table = pipe.text_encoder.get_input_embeddings().weight
    table.data = table.data.half().float()
    still = dataclasses.replace(
        QUICK, steps=1, batch_size=3, encodings_rate=0.0, keys_rate=0.0, values_rate=0.0, embedding_rate=0.0
    )
    losses = {}
    for prior in (0.0, 2.0):
        (concept,) = train(pipe, [one], dataclasses.replace(still, prior=prior, spread=0.0))
        losses[prior] = concept.training["loss"]
    chosen, times, noisy, target, weights = first_lesson(pipe, one)
    with torch.no_grad():
        found = []
        for words in (3, 1):
            said = [one.captions[n].replace("<alice-cat>", " ".join(["cat"] * words)) for n in chosen]
            ids = pipe.tokenizer(said, padding="max_length", return_tensors="pt").input_ids
            states = pipe.text_encoder(ids).last_hidden_state
            found.append(pipe.unet(noisy, times, states).sample)
    drawn = ((found[0] - target) ** 2 * weights).sum((1, 2, 3)) / (4 * weights.sum((1, 2, 3)))
    strayed = ((found[0] - found[1]) ** 2 * (1 - weights)).mean((1, 2, 3))
    assert losses[0.0] == pytest.approx(float(drawn.mean()), rel=ROUNDED)
    assert losses[2.0] == pytest.approx(float((drawn + 2 * strayed).mean()), rel=ROUNDED)
    assert float(strayed.mean()) > 10 * ROUNDED * float(drawn.mean())


def test_keys_values_and_words_all_learn_and_are_what_is_drawn(ready):
    (concept,) = train(ready, [subject()], dataclasses.replace(QUICK, keys=1, values=2, steps=6))
    assert isinstance(concept, AddedConcept) and concept.base == BaseModel.of(ready)
    width = sum(width for _, width in concept.base.layers)
    assert list(concept.keys.shape) == [1, width] and list(concept.values.shape) == [2, width]
    assert list(concept.encodings.shape) == [2, 32] and concept.encodings.abs().max() > 0
    for name, _ in concept.base.layers:
        for side in ("keys", "values"):
            assert concept.per_layer(side)[name].abs().max() > 0
    with torch.no_grad():
        noun = ready.text_encoder.get_input_embeddings().weight[
            ready.tokenizer("cat", add_special_tokens=False).input_ids[0]
        ]
    assert all(not torch.allclose(word.float(), noun, atol=1e-3) for word in concept.word_embeddings[0])
    assert Concept.load(concept.to_bytes()).digest == concept.digest


def test_it_learns_the_pictures(pipe):
    moving = dataclasses.replace(QUICK, steps=60, batch_size=4, prior=0.0)
    (concept,) = train(pipe, [subject()], moving)
    first, *_, last = concept.training["loss_quarters"]
    assert last < 0.97 * first


def test_trained_together_is_trained_alone(pipe):
    config = dataclasses.replace(QUICK, steps=12)
    subjects = [masked("alice", 1), subject("bob", 2), masked("carol", 3)]
    together = train(pipe, subjects, config)
    for one, concept in zip(subjects, together, strict=True):
        assert far(concept, train(pipe, [one], config)[0]) <= TOGETHER


def test_a_subject_that_cannot_be_learned_stops_alone(pipe):
    sick = subject("sick", 9, captions=["no word of it", "<sick-cat>"])
    alice, failure, bob = train(pipe, [subject("alice", 1), sick, subject("bob", 2)])
    assert isinstance(failure, ConceptTrainingError) and "<sick-cat>" in str(failure)
    clean = train(pipe, [subject("alice", 1), subject("bob", 2)])
    assert far(alice, clean[0]) <= TOGETHER and far(bob, clean[1]) <= TOGETHER


@pytest.mark.parametrize("interrupted_at", [2, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(pipe, tmp_path, interrupted_at):
    subjects, path = [masked("alice", 1), subject("bob", 2)], tmp_path / "run.safetensors"
    config = dataclasses.replace(QUICK, steps=6)
    whole = train(pipe, subjects, config)

    def stop(step, _):
        if step == interrupted_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pipe, subjects, config, checkpoint_path=path, checkpoint_every=1, on_step=stop)
    resumed = train(pipe, subjects, config, checkpoint_path=path)
    assert all(map(same, whole, resumed))
    longer = dataclasses.replace(config, steps=8)  # whose rates fall otherwise
    with pytest.raises(ValueError, match="another run|other"):
        train(pipe, subjects, longer, checkpoint_path=path)


@pytest.fixture
def times_seen(pipe, monkeypatch):
    """The times that the U-Net is asked of."""
    seen = []
    forward = pipe.unet.forward

    def noted(noisy, times, *args, **kwargs):
        seen.extend(times.tolist())
        return forward(noisy, times, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", noted)
    return seen


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_a_power_takes_more_of_the_noisy_times(pipe, times_seen, power):
    """Of T (1 - u^p) the mean is T p / (p + 1), and a share q^(1 / p) lies in the noisiest share q."""
    train(pipe, [subject()], dataclasses.replace(QUICK, steps=40, batch_size=16, prior=0.0, timestep_power=power))
    times = torch.tensor(times_seen) / 1000
    assert len(times) == 640 and times.min() >= 0 and times.max() < 1
    assert float(times.mean()) == pytest.approx(power / (power + 1), abs=0.04)
    assert float((times > 0.9).float().mean()) == pytest.approx(0.1 ** (1 / power), abs=0.06)


def test_it_learns_on_the_times_of_the_steps_that_remain(pipe, times_seen):
    (concept,) = train(pipe, [subject()], dataclasses.replace(QUICK, steps=8, batch_size=8, start=0.3))
    assert concept.start == 0.3 and 500 < max(times_seen) < 700 and len(times_seen) == 2 * 64


def test_layers_may_be_chosen(pipe):
    names = list(cross_attention_layers(pipe.unet))
    chosen = [name for name in names if name.startswith("up_blocks")]
    (concept,) = train(pipe, [subject()], dataclasses.replace(QUICK, layers=["up_blocks"]))
    assert list(concept.layers) == chosen and 0 < len(chosen) < len(names)
    with pytest.raises(ValueError, match="AddedConfig: layers must be of this U-Net, got"):
        train(pipe, [subject()], dataclasses.replace(QUICK, layers=["elsewhere"]))


@pytest.mark.parametrize("form", ["balanced", "normalised", "mse"])
def test_attention_of_all_its_words_can_be_localized(pipe, form):
    localized = dataclasses.replace(QUICK, localize=0.5, localization_form=form)
    (concept,), (plain,) = train(pipe, [masked()], localized), train(pipe, [masked()])
    assert not same(concept, plain)
    twice = masked("bob", 2, captions=["<bob-cat> on blue", "<bob-cat> and a <bob-cat>"])
    (beside, bob) = train(pipe, [masked(), twice], dataclasses.replace(localized, batch_size=4))
    assert isinstance(beside, AddedConcept) and isinstance(bob, AddedConcept)
    (failure,) = train(pipe, [subject()], localized)
    assert isinstance(failure, ConceptTrainingError) and "localize needs masks" in str(failure)


def test_stable_diffusion_xl_learns_in_both_encoders():
    pipe = make("SDXL", "text only")[0]
    alice, bob = train(pipe, [masked("alice", 1), subject("bob", 2)])
    assert far(bob, train(pipe, [subject("bob", 2)])[0]) <= TOGETHER
    sizes = [encoder.model.config.hidden_size for encoder in text_encoders(pipe)]
    assert [list(words.shape) for words in alice.word_embeddings] == [[3, size] for size in sizes]
    order = kd.Request("a <alice-cat> on blue", concepts=[alice], seed=1)
    small = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "np"}
    assert np.isfinite(kd.generate(kd.install(pipe), [order], **small)[0]).all()


def test_the_prior_noisier_times_and_views_are_offered_to_every_method(pipe):
    """Without a mask there is no outside for the prior; with one, what is learned is another thing."""
    root = torch.randn(32, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    metric = Covariance(root @ root.T / 64, {"captions": 0})
    perfusion = PerfusionConfig(steps=3, batch_size=2, values_rate=0.05, embedding_rate=0.05)
    lora = LoraTrainingConfig(steps=3, batch_size=2, learning_rate=1e-2)

    def locked(subject, **changes):
        config = dataclasses.replace(perfusion, **changes)
        (concept,) = train_concepts(pipe, [subject], config, metric=metric, progress=False)
        return concept.values

    def low_rank(subject, **changes):
        (adapter,) = train_loras(pipe, [subject], dataclasses.replace(lora, **changes), progress=False)
        return torch.cat([update.up.flatten() for update in adapter.denoiser.values()])

    def added(subject, **changes):
        return train(pipe, [subject], dataclasses.replace(QUICK, **changes))[0].values

    plain = Subject("sks cat", "", pictures(1), ["sks cat on blue", "a grinning sks cat"], [HALF, HALF], seed=1)
    for learn in (locked, low_rank, added):
        assert torch.equal(learn(subject(), prior=0.0), learn(subject(), prior=3.0))
        assert not torch.equal(learn(masked(), prior=0.0), learn(masked(), prior=3.0))
        for changes in ({"timestep_power": 2.0}, {"views": 0.5}):
            assert not torch.equal(learn(masked()), learn(masked(), **changes))
    assert not torch.equal(low_rank(plain, prior=0.0), low_rank(plain, prior=3.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": 0}, "words must be a whole number from 1 to 16, got 0"),
        ({"keys": 17}, "keys must be a whole number from 0 to 16, got 17"),
        ({"values": -1}, "values must be a whole number from 0 to 16, got -1"),
        ({"embeddings": 1}, "embeddings must be True or False, got 1"),
        ({"layers": "some"}, "layers must be a list, got str"),
        ({"layers": [3]}, "layers must be names of modules, got 3"),
        ({"start": 1.1}, r"start must lie in \[0, 1\], got 1.1"),
        ({"views": -1}, r"views must lie in \[0, 1\], got -1"),
        ({"timestep_power": 0.5}, "timestep_power must be a finite number of at least 1, got 0.5"),
        ({"prior": -1}, "prior must be a finite number of at least 0, got -1"),
        ({"spread": float("nan")}, "spread must be a finite number of at least 0, got nan"),
        ({"warmup": 0}, "warmup must be a whole number of at least 1, got 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, or None, got 0"),
    ],
)
def test_what_is_no_configuration_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"AddedConfig: {message}"):
        dataclasses.replace(AddedConfig(), **changes)


def test_only_key_locked_concepts_have_a_metric(pipe):
    with pytest.raises(TypeError, match="metric must be None beside an AddedConfig, got Covariance"):
        train(pipe, [subject()], metric=Covariance(torch.eye(32, dtype=torch.float64), {}))
    with pytest.raises(TypeError, match="metric must be a Covariance, got None"):
        train_concepts(pipe, [subject()], PerfusionConfig(steps=1), progress=False)
