"""What each trainer learns from one step, against its loss written out: see `tests.diffusers.losses`."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image

from keylock_diffusers import SubjectFusion
from keylock_diffusers.training import (
    AdapterConfig,
    AdapterExample,
    Covariance,
    FusionConfig,
    FusionExample,
    FusionSubject,
    Localization,
    PerfusionConfig,
    Subject,
    train_concepts,
    train_image_adapter,
    train_subject_fusion,
)
from keylock_diffusers.training.localization import FORMS
from tests.diffusers import accuracy, losses
from tests.diffusers.compatibility import WIDTH
from tests.diffusers.drawing import build, picture, random
from tests.diffusers.losses import (
    LOCALIZED,
    SIDE,
    ConceptStep,
    Model,
    adamw,
    adapter_loss,
    clipped,
    drawn,
    fusion_loss,
)

assert_as_accurate = functools.partial(accuracy.assert_as_accurate, largest=False)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ROOT = random(WIDTH, 64, seed=3).double()
METRIC = Covariance(ROOT @ ROOT.T / 64, {"captions": 0})
STEP = PerfusionConfig(steps=1, batch_size=3, max_grad_norm=None, target_decay=0.5)


@pytest.fixture(name="optimizers")
def _optimizers():
    with losses.optimizers() as made:
        yield made


def both(build_tiny, prediction):
    """A pipeline, and its modules for the written-out loss in float32 and in float64."""
    pipe = build_tiny(prediction_type=prediction)
    return pipe, Model(pipe, torch.float32), Model(pipe, torch.float64)


# Concepts


def subject(name="alice", seed=1, masked=True, **changes):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 255, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)) for _ in range(2)]
    masks = [Image.fromarray(rng.integers(0, 200, (8 * SIDE, 8 * SIDE), dtype=np.uint8)) for _ in range(2)]
    captions = [f"<{name}-cat> on blue", f"a grinning <{name}-cat> on white"]
    plain = {"captions": captions, "masks": masks if masked else None, "seed": seed, **changes}
    return Subject(f"<{name}-cat>", "cat", images, **plain)


def learn(pipe, subjects, config, **options):
    return train_concepts(pipe, subjects, config, metric=METRIC, progress=False, **options)


def assert_shown(concept, eager, exact):
    """The loss that is shown, of five decimals, is as near as plain torch's loss of five decimals."""
    assert_as_accurate(torch.tensor(concept.training["loss"]), torch.tensor(round(float(eager), 5)), exact)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_a_concept_learns_the_masked_loss_of_the_edited_model(build_tiny, optimizers, prediction, masked):
    pipe, single, double = both(build_tiny, prediction)
    one, config = subject(masked=masked), dataclasses.replace(STEP, tau=0.2, beta=0.6)
    (concept,) = learn(pipe, [one], config)
    (optimizer,) = optimizers
    eager, exact = (ConceptStep(model, pipe, one, config, METRIC.matrix) for model in (single, double))
    # By default the target input passes nothing back.
    fixed = [step.average(step.now(step.start[0])) for step in (eager, exact)]
    assert_as_accurate(
        optimizer.gradients[0],
        *(step.gradients(lambda now, t=target: t) for step, target in zip((eager, exact), fixed, strict=True)),
    )
    assert_as_accurate(optimizer.before[0], eager.start, exact.start)
    assert_shown(concept, *(step.loss(*step.start)[0] for step in (eager, exact)))


@pytest.mark.parametrize("form", FORMS)
def test_a_concept_learns_to_be_seen_inside_its_mask(build_tiny, optimizers, form):
    pipe, single, double = both(build_tiny, "epsilon")
    config = dataclasses.replace(STEP, localize=3.0, localization_form=form, target_gradient="exact")
    learn(pipe, [subject()], config)
    eager, exact = (ConceptStep(model, pipe, subject(), config, METRIC.matrix) for model in (single, double))
    assert_as_accurate(optimizers[0].gradients[0], eager.gradients(), exact.gradients())


def test_concepts_learned_together_have_gradients_of_their_own(build_tiny, optimizers):
    pipe, single, double = both(build_tiny, "epsilon")
    config = dataclasses.replace(STEP, localize=3.0, target_gradient="exact")
    subjects = [subject("alice", 1), subject("bob", 2)]
    learn(pipe, subjects, config)
    for one, optimizer in zip(subjects, optimizers, strict=True):
        eager, exact = (ConceptStep(model, pipe, one, config, METRIC.matrix) for model in (single, double))
        assert_as_accurate(optimizer.gradients[0], eager.gradients(), exact.gradients())


def passed_back(step, mode):
    """What i* is, as a function of this step's mean encoding of the word, for each treatment of its gradient."""
    fixed = step.now(step.start[0])
    return {
        "none": lambda now: step.average(fixed),
        "straight-through": lambda now: step.average(fixed) + now - fixed,
        "exact": step.average,
    }[mode]


@pytest.mark.parametrize("mode", ["none", "straight-through", "exact"])
def test_the_gradient_through_the_target_input_is_the_finite_difference(build_tiny, optimizers, mode):
    """Of the loss itself where it is exact; else of the loss in which i* is what the mode takes it for."""
    pipe, single, double = both(build_tiny, "epsilon")
    config = dataclasses.replace(STEP, target_gradient=mode)
    learn(pipe, [subject()], config)
    eager, exact = (ConceptStep(model, pipe, subject(), config, METRIC.matrix) for model in (single, double))
    word, values = exact.start
    by_hand, width = passed_back(exact, mode), 1e-5
    with torch.no_grad():
        slopes = torch.stack(
            [
                (
                    exact.loss(word + width * axis, values, by_hand)[0]
                    - exact.loss(word - width * axis, values, by_hand)[0]
                )
                / (2 * width)
                for axis in torch.eye(len(word), dtype=word.dtype)
            ]
        )
    assert_as_accurate(optimizers[0].gradients[0][:1], eager.gradients(passed_back(eager, mode))[:1], [slopes])


def test_concepts_take_adamws_steps_without_decay_at_rates_in_units_of_what_is_learned(pipe, optimizers):
    config = dataclasses.replace(STEP, steps=3, values_rate=0.02, embedding_rate=0.05)
    learn(pipe, [subject()], config)
    (optimizer,) = optimizers
    sizes = [float(tensor.double().square().mean().sqrt()) for tensor in optimizer.before[0]]
    rates = [[0.05 * sizes[0], 0.02 * sizes[1]]] * 3
    single = [tensor.square().mean().sqrt() for tensor in optimizer.before[0]]
    eager, exact = torch.stack(single) * torch.tensor([0.05, 0.02]), torch.tensor(rates[0], dtype=torch.float64)
    for given in optimizer.rates:
        assert_as_accurate(torch.tensor(given), eager, exact)
    after = adamw(optimizer.before[0], optimizer.gradients, rates, betas=(0.9, 0.999))
    for found, expected in zip([*optimizer.before[1:], optimizer.learned], after, strict=True):
        for ours, right in zip(found, expected, strict=True):
            # Each step rounds once, and its update once.
            assert (ours.double() - right).abs().max() <= 3 * torch.finfo(torch.float32).eps * right.abs().max()


@pytest.mark.parametrize("limit", [1e-3, 1e4])
def test_each_concepts_gradients_are_clipped_together(pipe, optimizers, limit):
    subjects = [subject("alice", 1), subject("bob", 2)]
    learn(pipe, subjects, STEP)
    learn(pipe, subjects, dataclasses.replace(STEP, max_grad_norm=limit))
    for whole, cut in zip(optimizers[:2], optimizers[2:], strict=True):
        assert sum(tensor.square().sum() for tensor in whole.gradients[0]) > 1e-3**2, "the smaller limit cuts"
        exact = clipped([gradient.double() for gradient in whole.gradients[0]], limit)
        torchs = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in whole.gradients[0]]
        for parameter, gradient in zip(torchs, whole.gradients[0], strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(torchs, limit)
        assert_as_accurate(cut.gradients[0], [parameter.grad for parameter in torchs], exact)


def test_steps_are_clipped_to_a_norm_of_one_unless_told_otherwise():
    assert PerfusionConfig().max_grad_norm == 1.0


# Nothing moves, and i* is the average of the step at hand.
STILL = dataclasses.replace(STEP, values_rate=0.0, embedding_rate=0.0, target_decay=0.0)


def smoothed(pipe, steps, dtype=torch.float64):
    """The loss that is shown after each of so many steps."""
    model, found = Model(pipe, dtype), []
    for number in range(steps):
        step = ConceptStep(model, pipe, subject(), STILL, METRIC.matrix, step=number)
        loss = float(step.loss(*step.start)[0])
        found.append(0.95 * found[-1] + 0.05 * loss if found else loss)
    return found


def test_the_loss_that_is_shown_is_smoothed(pipe):
    shown = (torch.tensor(smoothed(pipe, 3, dtype)[-1]) for dtype in (torch.float32, torch.float64))
    (concept,) = learn(pipe, [subject()], dataclasses.replace(STILL, steps=3))
    assert_shown(concept, *shown)


@pytest.mark.parametrize("patience", [1, 3])
def test_a_concept_stops_when_its_smoothed_loss_has_not_improved_for_so_many_steps(pipe, patience):
    found = smoothed(pipe, 12)
    best = [found.index(min(found[: step + 1])) for step in range(12)]
    stop = next(step for step in range(12) if step - best[step] >= patience)
    (concept,) = learn(pipe, [subject()], dataclasses.replace(STILL, steps=12, patience=patience))
    assert concept.training["steps"] == stop + 1 < 12 and concept.training["stopped"] == "converged"


# Image adapters


def adapter_examples():
    return [
        AdapterExample(random(4, SIDE, SIDE, seed=n), caption, random(WIDTH, seed=10 + n))
        for n, caption in enumerate(("a cat on blue", "a dog", "a house next to a car"))
    ]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_adapter_learns_the_loss_of_decoupled_attention(build_tiny, optimizers, prediction, seed):
    pipe, single, double = both(build_tiny, prediction)
    config = AdapterConfig(
        steps=2, batch_size=8, learning_rate=1e-2, drop_text=0.2, drop_image=0.15, drop_both=0.3, seed=seed
    )
    examples = adapter_examples()
    made = train_image_adapter(pipe, examples, config, progress=False)
    (optimizer,) = optimizers
    edges = np.cumsum([config.drop_text, config.drop_image, config.drop_both])
    shares = [share for step in range(2) for share in drawn(examples, config, step).share]
    assert set(np.digitize(shares, edges)) == {0, 1, 2, 3}, "rows of every kind"
    names = [name for name, _ in made.named_parameters()]
    for step in range(2):
        gradients = []
        for model in (single, double):
            held = zip(names, optimizer.before[step], strict=True)
            weights = {name: tensor.to(model.dtype).requires_grad_() for name, tensor in held}
            loss = adapter_loss(model, drawn(examples, config, step), config, weights)
            gradients.append(clipped(torch.autograd.grad(loss, list(weights.values())), 1.0))
        assert_as_accurate(optimizer.gradients[step], *gradients)


def test_pictures_are_learned_as_their_latents_mode_in_the_autoencoders_scale():
    pipe = build(adapters=())
    shown, prompt = picture(1), random(WIDTH)
    config = AdapterConfig(steps=2, batch_size=1, learning_rate=1e-2)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pixels = pipe.image_processor.preprocess(shown.resize((side, side), Image.Resampling.LANCZOS))
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels).latent_dist.mode()[0]
    assert pipe.vae.config.scaling_factor != 1
    learned = [
        train_image_adapter(pipe, [AdapterExample(image, "a cat", prompt)], config, progress=False).state_dict()
        for image in (shown, encoded * pipe.vae.config.scaling_factor)
    ]
    for name, tensor in learned[0].items():
        assert torch.equal(tensor, learned[1][name]), name


# Subject fusion


def fusion_examples():
    """Captions with a phrase of several tokens, a word that stands twice, and a subject without a mask."""
    soft = [random(1, SIDE, SIDE, seed=20 + n).sigmoid() for n in range(3)]

    def named(words, seed, mask=None):
        return FusionSubject(words, random(WIDTH, seed=seed), mask)

    return [
        FusionExample(
            random(4, SIDE, SIDE, seed=1),
            "a cat with tears of joy",
            [named("tears of joy", 11, soft[0]), named("cat", 12)],
        ),
        FusionExample(
            random(4, SIDE, SIDE, seed=2),
            "a dog and a dog next to a house",
            [named("house", 13, soft[1]), named("dog", 14, soft[2])],
        ),
        FusionExample(random(4, SIDE, SIDE, seed=3), "a car", []),
    ]


PLACES = {"tears of joy": [6], "cat": [2], "house": [9], "dog": [2, 5]}  # the start token is 0


@pytest.mark.parametrize(
    ("prediction", "localize", "form"),
    [(prediction, 0.0, "balanced") for prediction in PREDICTIONS] + [("epsilon", 2.0, form) for form in FORMS],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_fusion_learns_the_loss_of_fused_words_seen_inside_their_masks(
    build_tiny, optimizers, prediction, localize, form, seed
):
    pipe, single, double = both(build_tiny, prediction)
    torch.manual_seed(4)
    start, examples = SubjectFusion(WIDTH), fusion_examples()
    config = FusionConfig(
        steps=2,
        batch_size=8,
        learning_rate=1e-2,
        warmup=0,
        drop_text=0.2,
        drop_subjects=0.2,
        localize=localize,
        localization_form=form,
        seed=seed,
    )
    train_subject_fusion(pipe, examples, config, start=start, progress=False)
    shares = [share for step in range(2) for share in drawn(examples, config, step).share]
    assert set(np.digitize(shares, [0.2, 0.4])) == {0, 1, 2}, "rows of every kind"
    for step in range(2):
        gradients = []
        for model in (single, double):
            module = copy.deepcopy(start).to(model.dtype)
            with torch.no_grad():
                for parameter, held in zip(module.parameters(), optimizers[0].before[step], strict=True):
                    parameter.copy_(held)
            drawn_now = drawn(examples, config, step)
            loss = fusion_loss(model, drawn_now, config, module, lambda _row, one: PLACES[one.prompt])
            gradients.append(clipped(torch.autograd.grad(loss, list(module.parameters())), 1.0))
        assert_as_accurate(optimizers[0].gradients[step], *gradients)


def test_the_layers_that_are_localized_are_those_written_out(pipe):
    tokens, masks = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, SIDE, SIDE)
    assert tuple(Localization(pipe.unet, tokens, masks, (SIDE, SIDE)).layers) == LOCALIZED


@pytest.mark.parametrize("trainer", ["concepts", "adapter", "fusion"])
def test_nothing_but_what_is_learned_gets_a_gradient(pipe, trainer):
    if trainer == "concepts":
        learn(pipe, [subject()], STEP)
    elif trainer == "adapter":
        config = AdapterConfig(steps=1, batch_size=2)
        train_image_adapter(pipe, adapter_examples(), config, progress=False)
    else:
        train_subject_fusion(pipe, fusion_examples(), FusionConfig(steps=1, batch_size=2), progress=False)
    assert all(p.grad is None for module in (pipe.unet, pipe.text_encoder, pipe.vae) for p in module.parameters())
