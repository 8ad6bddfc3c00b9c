"""Training: many concepts together, each as if alone."""

import dataclasses
import errno
import math
import operator
import re

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError

import keylock_diffusers as kd
from keylock_diffusers import files
from keylock_diffusers.concepts import BaseModel, Concept, TextEncoderInfo
from keylock_diffusers.denoisers.unet import cross_attention_layers, text_encoders
from keylock_diffusers.embedded.captions import default_captions
from keylock_diffusers.encoding import text
from keylock_diffusers.files import read_tensors, write_tensors
from keylock_diffusers.masks import soft_mask
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import ConceptUse, Row
from keylock_diffusers.training import (
    ConceptTrainingError,
    Covariance,
    PerfusionConfig,
    Subject,
    covariance,
    train_concepts,
)
from keylock_diffusers.training.captions import word_encodings
from tests.diffusers.accuracy import assert_as_accurate, widened
from tests.diffusers.compatibility import SIZE, make

SMALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "np"}
QUICK = PerfusionConfig(steps=4, batch_size=2, values_rate=0.05, embedding_rate=0.05)


def pictures(seed, count=2):
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def subject(name="alice", seed=1, **changes):
    captions = [f"<{name}-cat> on blue", f"a grinning <{name}-cat> on white"]
    plain = {"placeholder": f"<{name}-cat>", "super_class": "cat", "images": pictures(seed), "captions": captions}
    return Subject(**{**plain, "seed": seed, **changes})


@pytest.fixture
def metric():
    root = torch.randn(32, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Covariance(root @ root.T / 64, {"captions": 0})


def train(pipe, subjects, metric, config=QUICK, **kwargs):
    return train_concepts(pipe, subjects, config, metric=metric, progress=False, **kwargs)


def same(one, other):
    tensors = ("values", "target_input", "direction", "super_class_encoding")
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in tensors) and torch.equal(
        one.word_embeddings[0], other.word_embeddings[0]
    )


def far(one, other):
    """The largest difference of what two concepts learned, relative to the values' size."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(
            (one.values, one.target_input, *one.word_embeddings),
            (other.values, other.target_input, *other.word_embeddings),
            strict=True,
        )
    )


# What concepts learn together may differ by from what each learns alone: 1e-4, and a unit in the last place of the
# file's float16, by which numbers however near differ on both sides of where it rounds. No float64 measures it: a step
# of Adam's is as long as the rate however small a gradient is, so what rounds otherwise where one is nearly 0 errs by
# more than a rounding. test_training_losses measures single steps.
TOGETHER = 1e-4 + 2**-10
# A loss of what the file rounded to float16 from the loss that was shown before, and the size of Adam's first step
# after two such roundings. test_training_losses measures both before they are rounded, by float64.
ROUNDED, FIRST_STEP = 1e-4, 0.05
# How far training in bfloat16, which rounds to 2^-8, may lead away in a few steps, of the largest value.
BFLOAT16 = 0.3
# Of the loss at the start, what forty steps have to get below.
LEARNED = 0.97


def test_trained_together_is_trained_alone(pipe, metric):
    config = PerfusionConfig(steps=20, batch_size=2, values_rate=0.02, embedding_rate=0.02)
    subjects = [subject("alice", 1), subject("bob", 2), subject("carol", 3)]
    together = train(pipe, subjects, metric, config)
    for one, concept in zip(subjects, together, strict=True):
        assert far(concept, train(pipe, [one], metric, config)[0]) <= TOGETHER


def test_a_subject_with_a_nan_picture_stops_alone(pipe, metric, monkeypatch):
    subjects = [subject("alice", 1), subject("bob", 2)]
    clean = train(pipe, subjects, metric)
    from keylock_diffusers.training import learners

    encode = learners.encode_images
    sick = subject("sick", 9)

    def poisoned(pipe, images):
        latents = encode(pipe, images)
        return latents * float("nan") if images is sick.images else latents

    monkeypatch.setattr(learners, "encode_images", poisoned)
    alice, failure, bob = train(pipe, [subjects[0], sick, subjects[1]], metric)
    assert isinstance(failure, ConceptTrainingError)
    assert "<sick-cat>: the loss or its gradient was not finite at step 0" in str(failure)
    assert far(alice, clean[0]) <= TOGETHER and far(bob, clean[1]) <= TOGETHER


def loss_of(pipe, subject, concept, *, step=0, size=2, gate=(0.75, 0.1)):
    """The training loss of one step, written out once more: what the concept draws, weighted by the soft masks."""
    kd.install(pipe)
    generator = torch.Generator().manual_seed(subject.seed * 1_000_003 + step)
    chosen = torch.randint(len(subject.images), (size,), generator=generator)
    times = torch.randint(1000, (size,), generator=generator)
    noise = torch.randn(size, 4, 8, 8, generator=generator)
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(np.asarray(subject.images[n])).permute(2, 0, 1) for n in chosen])
        clean = pipe.vae.encode(pixels.float() / 127.5 - 1).latents
        weights = torch.ones(size, 1, 8, 8)
        if subject.masks is not None:
            wide = [subject.masks[n].resize((64, 64), Image.Resampling.BILINEAR) for n in chosen]  # 8 for each latent
            weights = torch.nn.functional.avg_pool2d(torch.from_numpy(np.stack(wide)).float()[:, None], 8)
            weights = weights / weights.amax((1, 2, 3), keepdim=True)
        words = {subject.placeholder: concept.word_embeddings[0]}
        prompts = [text.tokenize(pipe.tokenizer, subject.captions[n], {subject.placeholder: "cat"}) for n in chosen]
        encodings = text.encode(pipe.text_encoder, prompts, [words] * size)
        personalization = Personalization([Row((ConceptUse(concept, *gate),))] * size).prepare(pipe, encodings)
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        drawn = pipe.unet(noisy, times, encodings, cross_attention_kwargs={"personalization": personalization}).sample
        error = (drawn - pipe.scheduler.get_velocity(clean, noise, times)) ** 2
    kd.uninstall(pipe)
    return float(((error * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)) / 4).mean())


def test_the_loss_is_the_masked_diffusion_loss_of_the_edited_model(pipe, metric):
    still = PerfusionConfig(steps=1, batch_size=2, values_rate=0.0, embedding_rate=0.0)
    left = Image.fromarray(np.repeat(np.array([[200] * 8 + [0] * 8], np.uint8), 16, 0))
    losses = []
    for masks in (None, [left, left]):
        one = subject(masks=masks)
        concept = train(pipe, [one], metric, still)[0]
        losses.append(concept.training["loss"])
        assert losses[-1] == pytest.approx(loss_of(pipe, one, concept), rel=ROUNDED)
    assert losses[0] != losses[1]


def test_training_lowers_the_loss_on_its_own_pictures(pipe, metric):
    still = PerfusionConfig(steps=1, batch_size=4, values_rate=0.0, embedding_rate=0.0)
    moving = PerfusionConfig(steps=40, batch_size=4, values_rate=0.1, embedding_rate=0.02)

    def unseen(concept):
        return np.mean([loss_of(pipe, subject(), concept, step=1000 + n, size=8) for n in range(4)])

    untrained, trained = (unseen(train(pipe, [subject()], metric, config)[0]) for config in (still, moving))
    assert trained < LEARNED * untrained


@pytest.mark.parametrize("interrupted_at", [2, 5])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(pipe, metric, tmp_path, interrupted_at):
    from dataclasses import replace

    subjects, path = [subject("alice", 1), subject("bob", 2)], tmp_path / "run.safetensors"
    config = replace(QUICK, steps=6)
    whole = train(pipe, subjects, metric, config)
    train(pipe, subjects, metric, replace(config, steps=interrupted_at), checkpoint_path=path)
    resumed = train(pipe, subjects, metric, config, checkpoint_path=path)
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(a.training["loss"] == b.training["loss"] for a, b in zip(whole, resumed, strict=True))


def test_a_resumed_run_is_as_patient_as_an_uninterrupted_one(pipe, metric, tmp_path):
    from dataclasses import replace

    path, patience = tmp_path / "run.safetensors", 3
    config = PerfusionConfig(steps=30, batch_size=2, values_rate=0.0, embedding_rate=0.0, patience=patience)
    whole = train(pipe, [subject()], metric, config)[0].training
    best = whole["steps"] - patience  # the steps up to the best one
    assert whole["stopped"] == "converged" and patience < best < 30 - patience
    train(pipe, [subject()], metric, replace(config, steps=best), checkpoint_path=path)
    resumed = train(pipe, [subject()], metric, config, checkpoint_path=path)[0].training
    assert (resumed["steps"], resumed["stopped"]) == (whole["steps"], "converged")


def test_a_subject_that_failed_is_computed_no_more_and_stays_failed(pipe, metric, tmp_path, monkeypatch):
    from dataclasses import replace

    from keylock_diffusers.training import learners

    encode, rows, path = learners.encode_images, [], tmp_path / "run.safetensors"
    sick = subject("sick", 9)
    pipe.unet.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))

    def poisoned(pipe, images):
        return encode(pipe, images) * (float("nan") if images is sick.images else 1)

    monkeypatch.setattr(learners, "encode_images", poisoned)
    for steps in (2, 4):
        failure, bob = train(pipe, [sick, subject("bob", 2)], metric, replace(QUICK, steps=steps), checkpoint_path=path)
        assert isinstance(failure, ConceptTrainingError) and "was not finite at step 0" in str(failure)
        assert bob.training["steps"] == steps
    assert rows == [4, 2, 2, 2]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(pipe, build_tiny, metric, tmp_path):
    path = tmp_path / "run.safetensors"
    train(pipe, [subject()], metric, checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train(pipe, [subject(seed=2)], metric, checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train(pipe, [subject(seed=2, images=subject().images)], metric, checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train(pipe, [subject()], Covariance(2 * metric.matrix, {}), checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train(build_tiny(seed=3), [subject()], metric, checkpoint_path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        train(pipe, [subject()], metric, checkpoint_path=path)


def test_the_first_step_starts_from_the_super_class(pipe, metric):
    still = PerfusionConfig(steps=1, batch_size=2, values_rate=0.0, embedding_rate=0.0)
    concept = train(pipe, [subject()], metric, still)[0]
    prompts = [text.tokenize(pipe.tokenizer, words.replace("<alice-cat>", "cat")) for words in subject().captions]
    places = [text.tokenize(pipe.tokenizer, words, {"<alice-cat>": "cat"}) for words in subject().captions]
    eager, exact = (
        word_encodings(text.encode(encoder, prompts), [(place,) for place in places]).mean(0)
        for encoder in (pipe.text_encoder, widened(pipe.text_encoder))
    )
    assert_as_accurate(concept.super_class_encoding, eager.half(), exact)  # as the file has it
    for name, attn in cross_attention_layers(pipe.unet).items():
        weight = attn.to_v.weight
        assert_as_accurate(concept.values_per_layer()[name], (weight @ eager).half(), weight.double() @ exact)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_target_input_is_a_moving_average_of_the_words_encoding(pipe, metric, decay):
    """With nothing learned the encoding depends on the drawn captions only."""
    config = PerfusionConfig(steps=2, batch_size=2, values_rate=0.0, embedding_rate=0.0, target_decay=decay)
    concept = train(pipe, [subject()], metric, config)[0]
    prompts = [text.tokenize(pipe.tokenizer, words, {"<alice-cat>": "cat"}) for words in subject().captions]
    targets = []
    for encoder in (pipe.text_encoder, widened(pipe.text_encoder)):
        encodings = word_encodings(text.encode(encoder, prompts), [(prompt,) for prompt in prompts])
        target = encodings.mean(0)
        for step in range(2):
            chosen = torch.randint(2, (2,), generator=torch.Generator().manual_seed(1 * 1_000_003 + step))
            target = decay * target + (1 - decay) * encodings[chosen].mean(0)
        targets.append(target)
    assert_as_accurate(concept.target_input, *targets)


def test_the_three_gradients_of_the_target_differ_and_none_is_none(pipe, metric):
    from dataclasses import replace

    def learned(mode):
        # Adam's first step has the size of the rate whatever the gradient; three steps tell gradients apart.
        config = replace(QUICK, steps=3, target_gradient=mode, max_grad_norm=None, target_decay=0.5)
        return train(pipe, [subject()], metric, config)[0].word_embeddings[0]

    modes = {mode: learned(mode) for mode in ("none", "straight-through", "exact")}
    assert not torch.equal(modes["none"], modes["straight-through"])
    assert not torch.equal(modes["none"], modes["exact"])
    assert not torch.equal(modes["straight-through"], modes["exact"])


def test_learning_rates_are_in_units_of_what_is_learned(pipe, metric):
    config = PerfusionConfig(steps=1, batch_size=2, values_rate=0.01, embedding_rate=0.04, max_grad_norm=None)
    still = PerfusionConfig(steps=1, batch_size=2, values_rate=0.0, embedding_rate=0.0)
    moved, start = (train(pipe, [subject()], metric, c)[0] for c in (config, still))
    for learned, initial, rate in (
        (moved.word_embeddings[0].float(), start.word_embeddings[0].float(), 0.04),
        (moved.values.float(), start.values.float(), 0.01),
    ):
        step = (learned - initial).abs().median() / initial.square().mean().sqrt()
        assert step == pytest.approx(rate, rel=FIRST_STEP)


def test_a_converged_subject_stops_early(pipe, metric):
    config = PerfusionConfig(steps=12, batch_size=2, values_rate=0.0, embedding_rate=0.0, patience=2)
    concept = train(pipe, [subject()], metric, config)[0]
    assert concept.training["stopped"] == "converged" and concept.training["steps"] < 12


def test_bf16_learns_nearly_the_same(pipe, metric):
    from dataclasses import replace

    full, half = (train(pipe, [subject()], metric, replace(QUICK, mixed_precision=m))[0] for m in ("no", "bf16"))
    assert 0 < far(half, full) < BFLOAT16


def test_a_bf16_pipeline_trains(pipe, metric):
    concept = train(pipe.to(dtype=torch.bfloat16), [subject()], metric)[0]
    assert isinstance(concept, Concept) and np.isfinite(concept.training["loss"])


def test_the_scheduler_at_hand_does_not_matter(pipe, metric):
    """One that counts in sigmas, or one that has just drawn in a few steps, trains the same."""
    expected = train(pipe, [subject()], metric)[0]
    pipe.scheduler.set_timesteps(3)
    assert same(train(pipe, [subject()], metric)[0], expected)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert same(train(pipe, [subject()], metric)[0], expected)


def test_an_unusable_result_costs_the_others_nothing(pipe, metric):
    wild = PerfusionConfig(steps=1, batch_size=2, values_rate=0.05, embedding_rate=0.05)
    alone = train(pipe, [subject("bob", 2)], metric, wild)[0]
    sick = subject("sick", 9)
    from keylock_diffusers.training import trainer

    begin = trainer._begin

    def extreme(pipe, captions, one, config):
        learner = begin(pipe, captions, one, config)
        if one is sick:
            learner.values.data[0] = 1e6  # beyond float16
        return learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_begin", extreme)
        failure, bob = train(pipe, [sick, subject("bob", 2)], metric, wild)
    assert isinstance(failure, ConceptTrainingError) and "<sick-cat>" in str(failure)
    assert far(bob, alone) <= TOGETHER


def test_pictures_are_turned_as_the_camera_noted_and_transparency_is_white():
    from keylock_diffusers.pictures import upright

    picture = Image.new("RGBA", (4, 2), (10, 20, 30, 0))
    picture.getexif()[0x0112] = 6  # turned by a quarter
    assert upright(picture).size == (2, 4)
    assert upright(picture).getpixel((0, 0)) == (255, 255, 255)
    mask = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    turned = mask.copy()
    turned.getexif()[0x0112] = 6
    assert torch.equal(soft_mask(turned, (4, 4)), soft_mask(mask.transpose(Image.Transpose.ROTATE_270), (4, 4)))


def test_a_masks_weights_are_one_where_the_subject_is_surest():
    mask = Image.fromarray(np.repeat([[100] * 16 + [50] * 16], 32, 0).astype(np.uint8))
    assert soft_mask(mask, (4, 4)).tolist() == [[[1.0, 1.0, 0.5, 0.5]] * 4]


def test_the_pipeline_is_as_before(pipe, metric, tmp_path):
    damaged = tmp_path / "run.safetensors"
    damaged.write_bytes(b"damaged")
    pipe.unet.train()
    before = dict(pipe.unet.attn_processors)
    weights = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    train(pipe, [subject()], metric)
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)
    assert pipe.unet.training and not pipe.vae.training
    assert all(p.requires_grad and torch.equal(p, weights[name]) for name, p in pipe.unet.named_parameters())
    kd.install(pipe)
    ours = dict(pipe.unet.attn_processors)
    with pytest.raises(ValueError, match="of another run|cannot be read"):
        train(pipe, [subject()], metric, checkpoint_path=damaged)
    assert all(pipe.unet.attn_processors[name] is ours[name] for name in ours)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_trains(build_tiny, metric, prediction):
    concept = train(build_tiny(prediction_type=prediction), [subject()], metric)[0]
    assert isinstance(concept, Concept) and np.isfinite(concept.training["loss"])


def test_a_trained_concept_draws_and_fits_its_file(pipe, metric, tmp_path):
    concept = train(pipe, [subject()], metric)[0]
    loaded = Concept.load(tmp_path / "c.safetensors") if concept.save(tmp_path / "c.safetensors") else None
    kd.install(pipe)
    orders = [kd.Request("<alice-cat> on pink", concepts=[c], seed=1) for c in (concept, loaded)]
    first, second = kd.generate(pipe, orders, num_inference_steps=2, output_type="pt")
    assert torch.equal(first, second)


def test_what_training_records_fits_a_file_of_stable_diffusion_1_5(pipe, concept_for, tmp_path):
    metric = covariance(pipe, default_captions(5), cache=tmp_path)
    trained = train(pipe, [subject()], metric)[0]
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    layers = tuple((name, attn.to_v.out_features) for name, attn in cross_attention_layers(unet).items())
    base = BaseModel((TextEncoderInfo("CLIPTextModel", 768, 12, 49408),), layers, 768, trained.base.weights_hash)
    concept = concept_for(base, covariance=trained.covariance, training=trained.training)
    assert concept.nbytes <= 36 * 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "images must not be empty"),
        ({"placeholder": "<alice"}, "placeholder"),
        ({"placeholder": " "}, "placeholder must be a word such as <alice-cat>, or plain words of at most 200"),
        ({"placeholder": "a\ncat"}, "placeholder must be a word"),
        ({"placeholder": "a cat", "super_class": " "}, "super_class"),
        ({"super_class": ""}, "super_class"),
        ({"captions": ["one"]}, "captions must hold one per picture, 2, got 1"),
        ({"masks": pictures(1, 3)}, "masks must hold one per picture, 2, got 3"),
    ],
)
def test_a_wrong_subject_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        subject(**changes)


def truncated(folder):
    """A JPEG whose end is missing, opened as PIL does it: decoded when it is used."""
    Image.effect_noise((99, 99), 50).save(folder / "half.jpg")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:-900])
    return Image.open(folder / "half.jpg")


def on_its_side():
    return Image.new("L", (30, 20), 255)


def photo(folder):
    """As a phone keeps it: turned by a note."""
    note = Image.Exif()
    note[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(folder / "photo.jpg", exif=note)
    return Image.open(folder / "photo.jpg")


def unbounded(folder):
    Image.new("L", (1, 100_000)).save(folder / "thin.png")
    return Image.open(folder / "thin.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda folder: {"images": [*pictures(9, 1), truncated(folder)]},
            r"picture 1 \(.*half.jpg\) cannot be decoded",
        ),
        (
            lambda folder: {"images": [unbounded(folder), *pictures(9, 1)]},
            r"picture 0 \(.*thin.png\) must be at most 16",
        ),
        (lambda folder: {"masks": [Image.new("L", (16, 16), 255), Image.new("L", (16, 16))]}, "mask 1 is empty"),
        (lambda folder: {"masks": [truncated(folder), *halves(1)]}, r"mask 0 \(.*half.jpg\) cannot be decoded"),
        (lambda folder: {"masks": [*halves(1), on_its_side()]}, "mask 1 must have its picture's shape, 16 x 16, got"),
        (
            lambda folder: {"images": [photo(folder)] * 2, "masks": [on_its_side()] * 2},
            r"mask 0 must have its picture's shape, 20 x 30, got 30 x 20 upright",
        ),
        (
            lambda folder: {"images": [Image.new("I", (16, 16), 70_000), *pictures(9, 1)]},
            "picture 0: a picture in mode I must have values in",
        ),
        (lambda folder: {"captions": ["<sick-cat>", "a cat"]}, "the concept <sick-cat> was given but is not in"),
        (lambda folder: {"captions": ["<sick-cat>", "<sick-cat> <bob-cat>"]}, "<bob-cat> is no concept"),
        (lambda folder: {"captions": ["<sick-cat>", "word " * 90 + "<sick-cat>"]}, "<sick-cat>"),
    ],
)
def test_what_is_wrong_with_one_users_pictures_or_words_stops_that_user_alone(pipe, metric, tmp_path, changes, message):
    sick = subject("sick", 9, **changes(tmp_path))
    clean = train(pipe, [subject("alice", 1), subject("bob", 2)], metric)
    alice, failure, bob = train(pipe, [subject("alice", 1), sick, subject("bob", 2)], metric)
    assert isinstance(failure, ConceptTrainingError) and str(failure).startswith("<sick-cat>: ")
    assert re.search(message, str(failure)), str(failure)
    assert far(alice, clean[0]) <= TOGETHER and far(bob, clean[1]) <= TOGETHER
    (alone,) = train(pipe, [sick], metric)
    assert str(alone) == str(failure)


def test_a_grey_picture_of_16_bits_and_a_cut_out_teach_what_they_show(pipe, metric):
    """The same as in 8 bits; a picture that turned white, or a mask of one everywhere, would teach something else."""
    greys = [Image.fromarray(np.asarray(p.convert("L"))) for p in pictures(1)]
    wide = [Image.fromarray(np.asarray(p).astype(np.uint16) * 257) for p in greys]
    wide_masks = [Image.fromarray(np.asarray(m).astype(np.uint16) * 257) for m in halves(2)]
    cut = [Image.merge("RGBA", [*Image.new("RGB", (16, 16), "white").split(), m]) for m in halves(2)]
    (eight,) = train(pipe, [subject(images=greys, masks=halves(2))], metric)
    for images, masks in ((wide, halves(2)), (greys, wide_masks), (greys, cut)):
        assert same(train(pipe, [subject(images=images, masks=masks)], metric)[0], eight)


def halves(count):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return [mask] * count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["a.png", "b.png"]}, "images must be PIL images, got 'a.png' as number 0; open it first"),
        ({"images": "ab"}, "images must be a list of PIL images, got 'ab'"),
        ({"images": None}, "images must be a list of PIL images, got None"),
        ({"images": Image.new("RGB", (8, 8))}, "images must be a list of PIL images"),
        ({"captions": "ab"}, "captions must be a list of texts, got 'ab'"),
        ({"captions": ["<alice-cat>", None]}, "captions must be texts, got None as number 1"),
        ({"masks": [Image.new("L", (8, 8)), "m.png"]}, "masks must be PIL images, got 'm.png' as number 1; open it"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_a_subject_of_other_kinds_is_refused(changes, message):
    one = {field.name: getattr(subject(), field.name) for field in dataclasses.fields(Subject)}
    with pytest.raises((TypeError, ValueError), match=f"^Subject.*: {message}"):
        Subject(**{**one, **changes})


def test_numpys_numbers_are_numbers(pipe, metric):
    config = PerfusionConfig(
        steps=np.int64(4), batch_size=np.int32(2), values_rate=np.float64(0.05), embedding_rate=np.float64(0.05)
    )
    (ours,) = train(pipe, [subject(seed=np.int64(1))], metric, config)
    assert same(ours, train(pipe, [subject()], metric)[0]) and Concept.load(ours.to_bytes()).training["seed"] == 1


def test_arguments_of_other_kinds_are_named(pipe, metric, tmp_path):
    for arguments, message in (
        ((pipe, None), "subjects must be a list, got NoneType"),
        ((pipe, subject()), "subjects must be a list, got Subject"),
        ((pipe, [subject(), "bob"]), "subjects must be Subject objects, got 'bob'"),
        ((None, [subject()]), "pipe must be a Stable Diffusion 1.x, 2.x or XL pipeline .*, got NoneType"),
        ((pipe, [subject()], {"steps": 1}), "config must be a PerfusionConfig or an AddedConfig, got {'steps': 1}"),
    ):
        with pytest.raises(TypeError, match=f"^train_concepts: {message}"):
            train_concepts(*arguments)
    with pytest.raises(TypeError, match="^train_concepts: metric must be a Covariance, got None"):
        train_concepts(pipe, [subject()], PerfusionConfig(), metric=None)
    with pytest.raises(TypeError, match="^train_concepts: metric must be None beside an AddedConfig, got Covariance"):
        train_concepts(pipe, [subject()], metric=metric)
    for path in (3, "", "x" * 999, tmp_path):
        with pytest.raises((TypeError, ValueError), match="checkpoint_path must be a"):
            train(pipe, [subject()], metric, checkpoint_path=path)
    for every in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match=f"checkpoint_every must be a whole number of at least 1, got {every}"):
            train(pipe, [subject()], metric, checkpoint_every=every)
    with pytest.raises(ValueError, match=r"metric must be of this pipeline, \[32, 32\], got \[3, 3\]"):
        train(pipe, [subject()], Covariance(torch.eye(3, dtype=torch.float64), {}))
    for matrix in (torch.rand(4, 4), torch.full((4, 4), math.nan), torch.rand(4, 3)):
        with pytest.raises(ValueError, match="^Covariance: matrix must be"):
            Covariance(matrix.double(), {})


def test_stable_diffusion_xl_learns_in_both_encoders(tmp_path):
    """The metric is of both encodings side by side, and each encoder has a word of its own."""
    pipe = make("SDXL", "text only")[0]
    captions = default_captions()[:80]
    metric = covariance(pipe, captions, cache=tmp_path)
    moments = []
    for encoder in text_encoders(pipe):
        prompts = [text.tokenize(encoder.tokenizer, caption) for caption in captions]
        moments.append(text.encode_rows(encoder, prompts)[0].double())
    kept = torch.tensor([prompt.attention for prompt in prompts]).bool()
    rows = torch.cat(moments, -1)[kept]
    moment = rows.T @ rows / len(rows)
    moment += 1e-3 * moment.diagonal().mean() * torch.eye(len(moment))
    torch.testing.assert_close(metric.matrix, moment, rtol=1e-6, atol=1e-7)
    together = train(pipe, [subject("alice", 1), subject("bob", 2)], metric)
    alone = train(pipe, [subject("bob", 2)], metric)[0]
    for concept in together:
        assert len(concept.word_embeddings) == 2 and concept.base == BaseModel.of(pipe)
        assert [len(vector) for vector in concept.word_embeddings] == [
            encoder.model.config.hidden_size for encoder in text_encoders(pipe)
        ]
    assert far(together[1], alone) <= TOGETHER
    still = train(pipe, [subject("bob", 2)], metric, dataclasses.replace(QUICK, embedding_rate=0.0))[0]
    for learned, begun in zip(alone.word_embeddings, still.word_embeddings, strict=True):
        assert not torch.equal(learned, begun)
    drawn = kd.generate(kd.install(pipe), [kd.Request("<bob-cat> on blue", concepts=[alone], seed=1)], **SMALL)
    assert np.isfinite(drawn[0]).all()


def test_two_text_encoders_need_both_their_tokenizers(pipe, metric):
    pipe.text_encoder_2 = pipe.text_encoder
    pipe.text_encoder.register_forward_hook(lambda *_: pytest.fail("encoded"))
    for ask in (lambda: covariance(pipe, ["a cat"]), lambda: train(pipe, [subject()], metric)):
        with pytest.raises(TypeError, match="pipeline with its tokenizer_2, got StableDiffusionPipeline"):
            ask()


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_a_pipeline_without_a_part_is_refused(pipe, metric, part):
    setattr(pipe, part, None)
    with pytest.raises(TypeError, match=f"XL pipeline with its {part}, got StableDiffusionPipeline"):
        train(pipe, [subject()], metric)


def test_a_caller_may_have_switched_gradients_off_or_another_precision_on(pipe, metric):
    expected = train(pipe, [subject()], metric)[0]
    with torch.no_grad():
        assert same(train(pipe, [subject()], metric)[0], expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert same(train(pipe, [subject()], metric)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(train(pipe, [subject()], metric)[0], expected)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert same(train(pipe, [subject()], metric)[0], expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_the_concepts_so_far_are_given_after_every_step(pipe, metric):
    seen = []

    def look(step, concepts):
        seen.append((step, concepts()))

    (last,) = train(pipe, [subject()], metric, on_step=look)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [concepts[0].training["steps"] for _, concepts in seen] == [1, 2, 3, 4]
    assert same(seen[-1][1][0], last) and not same(seen[0][1][0], last)
    assert same(last, train(pipe, [subject()], metric)[0])
    sick = subject("sick", 9, captions=["", ""])
    train(pipe, [sick, subject()], metric, on_step=look)
    assert isinstance(seen[-1][1][0], ConceptTrainingError) and same(seen[-1][1][1], last)


def test_what_cannot_train_is_refused(pipe, metric):
    with pytest.raises(ValueError, match="subjects must not be empty"):
        train(pipe, [], metric)
    with pytest.raises(ValueError, match="train_concepts: subjects must have a placeholder .*, got 'a cat'"):
        train(pipe, [subject(), subject(placeholder="a cat")], metric)
    scheduler = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="train_concepts: pipe must have a scheduler of a diffusion"):
        train(pipe, [subject()], metric)
    pipe.scheduler = scheduler
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="prediction_type of DDIMScheduler must be one of epsilon, .* got 'flow_pre"):
        train(pipe, [subject()], metric)
    scheduler.register_to_config(prediction_type="epsilon")
    pipe.unet.half()
    with pytest.raises(ValueError, match="float16"):
        train(pipe, [subject()], metric)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True"),
        ({"patience": 0}, "patience must be a whole number of at least 1, got 0"),
        *(
            ({name: value}, f"{name} must be a finite number")
            for name in ("values_rate", "embedding_rate", "beta", "tau", "target_decay", "localize", "max_grad_norm")
            for value in (math.nan, math.inf, "0.5", 10**400)
        ),
        *(({name: math.nan}, f"{name} must be a finite number") for name in ("inference_beta", "inference_tau")),
        *(({name: -0.1}, f"{name} must be a finite number of at least 0") for name in ("tau", "inference_tau")),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0"),
        ({"localization_form": 3}, "localization_form must be one of"),
        ({"localization_form": np.zeros(2)}, "localization_form must be one of"),
        ({"target_gradient": torch.zeros(2)}, "target_gradient must be one of none, straight-through, exact, got a te"),
        ({"mixed_precision": None}, "mixed_precision must be one of no, bf16, got None"),
        ({"target_gradient": "some"}, "target_gradient must be one of"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be"),
        ({"target_decay": 1.0}, r"target_decay must lie in \[0, 1\)"),
        ({"values_rate": -1.0}, "values_rate must be a finite number of at least 0, got -1.0"),
    ],
)
def test_a_wrong_setting_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PerfusionConfig(**changes)


def test_the_covariance_is_the_second_moment_of_the_counted_positions(pipe, tmp_path):
    captions = ["a cat on blue", "a dog next to a house on pink"]
    prompts = [text.tokenize(pipe.tokenizer, words) for words in captions]
    encodings = text.encode(pipe.text_encoder, prompts).double()
    kept = torch.tensor([prompt.attention for prompt in prompts]).bool()
    for positions, rows in (("prompt", encodings[kept]), ("all", encodings.flatten(0, 1))):
        moment = rows.T @ rows / len(rows)
        ridge = 0.01 * moment.diagonal().mean() * torch.eye(32, dtype=torch.float64)
        made = covariance(pipe, captions, positions=positions, ridge=0.01, cache=tmp_path)
        columns = rows.detach().T.tolist()  # which the encoder made in float32: products in float64 are exact
        sums = [[math.fsum(map(operator.mul, one, other)) for other in columns] for one in columns]
        exact = torch.tensor(sums, dtype=torch.float64) / len(rows)
        exact = exact + 0.01 * exact.diagonal().mean() * torch.eye(32, dtype=torch.float64)
        assert_as_accurate(made.matrix, moment + ridge, exact)
        assert made.recipe["positions"] == positions and made.recipe["captions"] == 2


def test_the_covariance_is_taken_from_the_cache_and_never_from_another_encoder(pipe, build_tiny, tmp_path):
    captions = default_captions(70)
    first = covariance(pipe, captions, cache=tmp_path)
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    again = covariance(pipe, captions, cache=tmp_path)
    handle.remove()
    assert len(calls) == 1  # the probe that names the encoder
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(covariance(build_tiny(seed=4), captions, cache=tmp_path).matrix, first.matrix)
    files = sorted(tmp_path.iterdir())
    for file in files:
        file.write_bytes(b"damaged")
    assert torch.equal(covariance(pipe, captions, cache=tmp_path).matrix, first.matrix)


def test_a_cached_covariance_that_somebody_changed_is_made_again(pipe, tmp_path):
    captions = default_captions(70)
    first = covariance(pipe, captions, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    held, facts = read_tensors(file)
    for moment, said in (
        (torch.rand(32, 32, dtype=torch.float64), facts),  # of the right shape, under the right name
        (held["moment"] * 2, facts),
        (held["moment"], {}),
    ):
        write_tensors(file, {"moment": moment}, said)
        assert torch.equal(covariance(pipe, captions, cache=tmp_path).matrix, first.matrix)
        assert read_tensors(file)[1] == facts


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_disk_that_is_full_or_read_only_costs_a_warning(pipe, metric, tmp_path, monkeypatch, caplog, error):
    def full(*_):
        raise error

    whole = train(pipe, [subject()], metric)[0]
    expected = covariance(pipe, ["a cat on blue"], cache=tmp_path / "there").matrix
    monkeypatch.setattr(files, "write_tensors", full)
    made = covariance(pipe, ["a cat on blue"], cache=tmp_path / "cache")
    assert torch.equal(made.matrix, expected)
    assert re.search(r"covariance .*cache.covariance-.* cannot be written .*; the work goes on", caplog.text)
    caplog.clear()
    path = tmp_path / "run.safetensors"
    assert same(train(pipe, [subject()], metric, checkpoint_path=path, checkpoint_every=2)[0], whole)
    assert caplog.text.count(f"checkpoint {path} cannot be written") == 2 and not path.exists()


def test_a_nearly_singular_covariance_warns(pipe, tmp_path, caplog):
    covariance(pipe, ["a cat"], ridge=1e-12, cache=tmp_path)
    assert "condition number" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": []}, "captions must not be empty"),
        ({"positions": "some"}, "positions must be one of"),
        ({"ridge": -1.0}, "ridge must be a finite number of at least 0"),
        ({"ridge": 0.0}, "ridge must be larger for these captions"),
        ({"ridge": math.nan}, "ridge must be a finite number of at least 0"),
        ({"captions": "a cat"}, "captions must be a list of texts, got 'a cat'"),
        ({"captions": None}, "captions must be a list of texts, got None"),
        ({"captions": {"a cat": 1}}, "captions must be a list of texts, got {'a cat': 1}"),
        ({"positions": torch.zeros(2)}, "positions must be one of prompt, all, got a tensor"),
        ({"cache": 3}, "cache must be a path, got 3"),
        ({"cache": ""}, "cache must be a path of names"),
        ({"captions": ["a cat", 3]}, "captions must be texts, got 3 among them"),
        ({"captions": [None]}, "captions must be texts, got None among them"),
    ],
)
def test_a_wrong_covariance_argument_is_refused(pipe, tmp_path, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        covariance(pipe, **{"captions": ["a cat"], "cache": tmp_path, **arguments})


def test_default_captions_are_the_same_every_time():
    assert default_captions(20, seed=1) == default_captions(20, seed=1)
    assert default_captions(20, seed=1) != default_captions(20, seed=2)
