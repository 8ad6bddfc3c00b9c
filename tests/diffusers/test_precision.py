"""What a caller has set for all of torch: autocast, a default dtype, gradients switched off."""

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers import AttentionMaps, Region, Request
from keylock_diffusers.training import (
    AdapterConfig,
    Covariance,
    FusionConfig,
    PerfusionConfig,
    train_concepts,
    train_image_adapter,
    train_subject_fusion,
)
from tests.diffusers.drawing import APART, ROUNDING, build
from tests.diffusers.test_training import subject
from tests.diffusers.test_training_losses import adapter_examples, fusion_examples

DTYPES = [torch.float64, torch.float16, torch.bfloat16]


def order(seed=1, text="a cat on blue", **more):
    return Request(text, seed=seed, guidance_scale=4.0, **more)


def draw(pipe, *orders, **kwargs):
    return kd.generate(pipe, list(orders), num_inference_steps=3, output_type="pt", **kwargs)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_counts_as_in_the_pipelines_own_call(ready, concept_for, dtype):
    edited = order(text="a <alice-cat> on blue", concepts=[concept_for(ready)])
    exact, unedited = draw(ready, edited, order())
    with torch.autocast("cpu", dtype=dtype):
        found, other = draw(ready, edited, order())
        arguments = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
        own = ready("a cat on blue", generator=torch.Generator().manual_seed(1), **arguments).images[0].float()
    # Twice what the dtype itself loses of a picture that no code of ours drew.
    lost = float((own - unedited).abs().max()) + ROUNDING
    assert float((other.float() - own).abs().max()) <= 2 * lost
    assert float((found.float() - exact).abs().max()) <= 2 * lost
    assert float((exact - unedited).abs().max()) > max(APART, 4 * lost)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_default_dtype_changes_no_picture(ready, concept_for, default_dtype, dtype):
    concepts = [concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)]
    orders = [
        order(text="a <alice-cat> and a <bob-dog>", concepts=concepts, subject_start=0.4),
        order(2, regions=[Region(torch.eye(8), "cat")]),
    ]
    expected, maps = AttentionMaps(["on"]), AttentionMaps(["on"])
    right = draw(ready, *orders, record=expected)
    default_dtype(dtype)
    for one, other in zip(draw(ready, *orders, record=maps), right, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    assert torch.equal(maps.images[1].mean("on"), expected.images[1].mean("on"))


@pytest.fixture
def trained(pipe):
    """What each trainer makes of one run, as tensors by name."""
    adapted, root = build(adapters=()), torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    metric = Covariance(root.double() @ root.double().T / 64, {"captions": 0})
    examples, fused = adapter_examples(), fusion_examples()

    def concept():
        (made,) = train_concepts(
            pipe, [subject()], PerfusionConfig(steps=2, batch_size=2), metric=metric, progress=False
        )
        return {"values": made.values, "words": made.word_embeddings[0], "target": made.target_input}

    def adapter():
        return train_image_adapter(adapted, examples, AdapterConfig(steps=1, batch_size=2), progress=False).state_dict()

    def fusion():
        return train_subject_fusion(adapted, fused, FusionConfig(steps=1, batch_size=2), progress=False).state_dict()

    return {"concept": concept, "adapter": adapter, "fusion": fusion}


@pytest.mark.parametrize(
    "switched_off", [lambda: torch.set_grad_enabled(False), torch.inference_mode], ids=["no gradients", "inference"]
)
def test_training_has_gradients_though_they_are_switched_off(trained, switched_off):
    for train in trained.values():
        right = train()
        with switched_off():
            found = train()
            assert not torch.is_grad_enabled()
        assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_default_dtype_changes_no_training(trained, default_dtype, dtype):
    right = {kind: train() for kind, train in trained.items()}
    default_dtype(dtype)
    for kind, train in trained.items():
        found = train()
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in right[kind].items()}
        # What begins at random is drawn by torch in the default dtype.
        assert kind != "concept" or all(torch.equal(found[name], right[kind][name]) for name in found)
