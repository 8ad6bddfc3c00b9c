"""The localization loss: equal to the loss on stored maps, gradients included, and wired into training."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers.concepts import Concept
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.testing import UNETS
from keylock_diffusers.training import (
    ConceptTrainingError,
    Localization,
    localization_layers,
    localization_loss,
    train_concepts,
)
from keylock_diffusers.training.localization import FORMS
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.compatibility import unet
from tests.diffusers.drawing import random
from tests.diffusers.losses import Keeping, localization
from tests.diffusers.test_training import QUICK, TOGETHER, far, metric, same, subject  # noqa: F401

TOKENS = torch.tensor([[3, 5], [2, -1], [-1, -1]])


def masks(height=24, width=40):
    """Soft ones, of another aspect ratio than the latents."""
    return F.interpolate(random(3, 2, 5, 5).sigmoid(), (height, width), mode="bilinear")


def eager(model, latents, text, form, sizes):
    """FastComposer's loss, and Break-A-Scene's, of every row, from maps that were all kept."""
    processors = {name: Keeping() for name in cross_attention_layers(model)}
    for name, processor in processors.items():
        model.get_submodule(name).set_processor(processor)
    model(latents, 10, text)
    present = [[n for n, token in enumerate(row) if token >= 0] for row in TOKENS.tolist()]
    return localization(
        {name: processors[name].kept for name in sizes},
        [[int(row[n]) for n in objects] for row, objects in zip(TOKENS, present, strict=True)],
        [[row[n].to(latents) for n in objects] for row, objects in zip(masks(), present, strict=True)],
        sizes,
        form,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unet(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("chosen", "size"), [("default", (8, 12)), ("all", (8, 12)), ("all", (7, 9))])
def test_it_equals_the_loss_on_stored_maps_with_gradients(model, form, chosen, size):
    as_single = copy.deepcopy(model).float()
    layers = localization_layers(model) if chosen == "default" else list(cross_attention_layers(model))
    latents = random(3, 4, *size).double()
    given = None if chosen == "default" else layers
    collected = Localization(model, TOKENS, masks().double(), size, form=form, layers=given)
    sizes = {name: collected.size_of(name) for name in layers}
    text = random(3, 7, 32, seed=2).double().requires_grad_()
    expected = eager(model, latents, text, form, sizes)
    (gradient,) = torch.autograd.grad(expected.mean(), text)
    single = eager(as_single, latents.float(), text.float(), form, sizes)
    (single_gradient,) = torch.autograd.grad(single.mean(), text)
    for name in cross_attention_layers(model):
        model.get_submodule(name).set_processor(kd.processors.CrossAttnProcessor(name))
    model(latents, 10, text, cross_attention_kwargs={"readout": collected})
    found = localization_loss(collected, per_row=True)
    # Masks and the loss are computed in float32 whatever the model's type.
    assert_as_accurate(found, single, expected)
    (ours,) = torch.autograd.grad(localization_loss(collected), text)
    assert_as_accurate(ours, single_gradient.float(), gradient, largest=False)
    assert found[2] == 0 and torch.equal(localization_loss(collected), found.mean())


def test_the_default_layers_are_fastcomposers_eleven_on_stable_diffusion():
    with torch.device("meta"):
        names = localization_layers(UNet2DConditionModel(**UNETS["SD 1.5"]))
    blocks = [".".join(name.split(".")[:2]) if "mid" not in name else "mid_block" for name in names]
    assert len(names) == 11
    assert list(dict.fromkeys(blocks)) == ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2"]


@pytest.mark.parametrize("whole", [True, False])
def test_masks_over_everything_or_nothing_give_finite_losses(model, whole):
    full = torch.full((3, 2, 4, 4), 1.0 if whole else 0.0)
    for name in cross_attention_layers(model):
        model.get_submodule(name).set_processor(kd.processors.CrossAttnProcessor(name))
    for form in FORMS:
        localization = Localization(model, TOKENS, full, (8, 8), form=form)
        text = random(3, 7, 32).double().requires_grad_()
        model(random(3, 4, 8, 8).double(), 10, text, cross_attention_kwargs={"readout": localization})
        loss = localization_loss(localization)
        loss.backward()
        assert loss.isfinite() and text.grad.isfinite().all()


def test_a_row_of_nan_leaves_the_others_losses_and_gradients(model):
    for name in cross_attention_layers(model):
        model.get_submodule(name).set_processor(kd.processors.CrossAttnProcessor(name))
    latents, text = random(3, 4, 8, 8).double(), random(3, 7, 32).double()
    poisoned = text.clone()
    poisoned[0] = torch.nan
    seen = []
    for given in (text, poisoned):
        given.requires_grad_()
        localization = Localization(model, TOKENS, masks(), (8, 8))
        model(latents, 10, given, cross_attention_kwargs={"readout": localization})
        rows = localization_loss(localization, per_row=True)
        rows[1:].sum().backward()
        seen.append((rows[1:].detach(), given.grad[1:]))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS.float()}, r"tokens must be int \[B, M\], got torch.float32"),
        ({"masks": torch.ones(3, 1, 4, 4)}, "masks must be"),
        ({"form": "l2"}, "form must be one of balanced, normalised, mse, got 'l2'"),
        ({"layers": ["nowhere"]}, r"layers must be cross-attention layers of the U-Net, got \['nowhere'\]"),
        ({"layers": []}, "layers must be cross-attention layers"),
    ],
)
def test_wrong_arguments_are_named(model, changes, message):
    arguments = {"tokens": TOKENS, "masks": masks(), "latent_size": (8, 8), **changes}
    with pytest.raises(ValueError, match=message):
        Localization(model, **arguments)


def test_what_was_not_run_or_runs_on_other_shapes_is_named(model):
    localization = Localization(model, TOKENS, masks(), (8, 8))
    with pytest.raises(ValueError, match="has not been run with the readout"):
        localization_loss(localization)
    layer = localization.layers[0]
    with pytest.raises(ValueError, match="made for 3 rows and"):
        localization.wanted(layer, 2, 16)
    assert localization.wanted("another", 2, 16) is None


# In the trainer


def halves(count=2):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return [mask] * count


@pytest.mark.parametrize("form", FORMS)
def test_concepts_learn_otherwise_with_the_loss_and_each_as_if_alone(pipe, metric, form):  # noqa: F811
    subjects = [subject("alice", 1, masks=halves()), subject("bob", 2, masks=halves())]
    config = dataclasses.replace(QUICK, localize=5.0, localization_form=form)
    options = {"metric": metric, "progress": False}
    alice, bob = train_concepts(pipe, subjects, config, **options)
    plain, _ = train_concepts(pipe, subjects, QUICK, **options)
    assert not same(alice, plain) and alice.training["localize"] == 5.0
    (alone,) = train_concepts(pipe, subjects[1:], config, **options)
    assert far(bob, alone) <= TOGETHER


def test_the_loss_needs_masks(pipe, metric):  # noqa: F811
    subjects = [subject(), subject("bob", 2, masks=halves())]
    config = dataclasses.replace(QUICK, localize=1e-3)
    failure, bob = train_concepts(pipe, subjects, config, metric=metric, progress=False)
    assert isinstance(failure, ConceptTrainingError) and isinstance(bob, Concept)
    assert str(failure) == "<alice-cat>: localize needs masks, and the subject has none"
    with pytest.raises(ValueError, match="localization_form must be one of"):
        dataclasses.replace(QUICK, localization_form="l2")
