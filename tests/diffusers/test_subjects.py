"""Subject fusion and delayed subject conditioning."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import keylock_diffusers as kd
from keylock_diffusers import FusedSubject, Region, Request, RequestError, SubjectFusion, Use
from keylock_diffusers.encoding.fusion import FusionUse, fuse
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import ConceptUse, Row
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.compatibility import WIDTH, image_encoder
from tests.diffusers.drawing import ROUNDING, picture, random

STEPS = 4
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    return SubjectFusion(WIDTH).eval()


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


def published():
    """Weights by the names of FastComposer's published file."""
    shapes = {
        "mlp1.layernorm.weight": (64,),
        "mlp1.layernorm.bias": (64,),
        "mlp1.fc1.weight": (32, 64),
        "mlp1.fc1.bias": (32,),
        "mlp1.fc2.weight": (32, 32),
        "mlp1.fc2.bias": (32,),
        "mlp2.layernorm.weight": (32,),
        "mlp2.layernorm.bias": (32,),
        "mlp2.fc1.weight": (32, 32),
        "mlp2.fc1.bias": (32,),
        "mlp2.fc2.weight": (32, 32),
        "mlp2.fc2.bias": (32,),
        "layer_norm.weight": (32,),
        "layer_norm.bias": (32,),
    }
    return {name: random(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}


def test_it_computes_fastcomposers_fusion_from_the_published_names():
    weights = published()
    words, images = random(3, 32, seed=50), random(3, 32, seed=51)

    def mlp(name, x):
        part = {key.removeprefix(f"{name}."): t.to(x) for key, t in weights.items() if key.startswith(name)}
        x = F.layer_norm(x, x.shape[-1:], part["layernorm.weight"], part["layernorm.bias"])
        x = F.gelu(F.linear(x, part["fc1.weight"], part["fc1.bias"]))
        return F.linear(x, part["fc2.weight"], part["fc2.bias"])

    def fused(w, i):
        hidden = mlp("mlp1", torch.cat([w, i], -1)) + w
        hidden = mlp("mlp2", hidden) + hidden
        return F.layer_norm(hidden, (32,), *(weights[f"layer_norm.{name}"].to(w) for name in ("weight", "bias")))

    eager, exact = fused(words, images), fused(words.double(), images.double())
    assert_as_accurate(SubjectFusion.load(weights)(words, images), eager, exact)


@pytest.mark.parametrize("prefix", ["", "postfuse_module."])
def test_it_loads_from_a_file_of_its_own_or_of_a_whole_model(tmp_path, prefix):
    weights = {f"{prefix}{name}": tensor for name, tensor in published().items()}
    if prefix:
        weights["unet.conv_in.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    made = SubjectFusion.load(tmp_path / "model.safetensors")
    again = tmp_path / "again.safetensors"
    assert made.save(again, torch.float32) == again.stat().st_size
    for name, tensor in SubjectFusion.load(again).state_dict().items():
        assert torch.equal(tensor, published()[name])
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer_norm.weight"), r"layer_norm.weight \[D\] must be among the weights"),
        (lambda w: w.pop("mlp2.fc1.bias"), r"mlp2.fc1.bias must be \[32\], got nothing"),
        (lambda w: w.update({"mlp1.fc1.weight": torch.zeros(32, 32)}), r"mlp1.fc1.weight must be \[32, 64\]"),
        (lambda w: w.update(more=torch.zeros(1)), r"more must be absent, got \[1\]"),
        (lambda w: w["mlp1.fc1.bias"].fill_(torch.nan), "mlp1.fc1.bias must be finite"),
    ],
)
def test_wrong_weights_are_named(change, message):
    weights = published()
    change(weights)
    with pytest.raises(ValueError, match=message):
        SubjectFusion.load(weights)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SubjectFusion.load(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        SubjectFusion.load(tmp_path / "bad.safetensors")


def test_fusing_reaches_its_tokens_alone_with_gradients(fusion):
    text = random(3, 7, WIDTH).requires_grad_()
    rows = [[FusionUse((2, 4), random(WIDTH, seed=1))], [], [FusionUse((0,), random(WIDTH, seed=2))]]
    fused = fuse(fusion, text, rows)
    changed = (fused != text).any(-1)
    assert changed.nonzero().tolist() == [[0, 2], [0, 4], [2, 0]]
    alone = fuse(fusion, text[2:], rows[2:])
    assert torch.equal(fused[2], alone[0])
    fused.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    assert torch.equal(text.grad[1], 2 * text[1])
    assert fuse(fusion, text, [[], [], []]) is text


def test_a_mixed_batch_with_subjects_draws_each_as_if_alone(ready, fusion, concept_for):
    alice = concept_for(ready)
    orders = [
        Request("a dog on blue", subjects=[FusedSubject("dog", embeds=random(WIDTH, seed=1))], seed=1),
        Request("a house", seed=2),
        Request(
            "<alice-cat> and a dog",
            concepts=[Use(alice, region=1 - LEFT)],
            subjects=[FusedSubject("dog", embeds=random(WIDTH, seed=2), region=LEFT)],
            subject_start=0.5,
            seed=3,
        ),
    ]
    together = draw(ready, orders, fusion=fusion)
    for order, image in zip(orders, together, strict=True):
        torch.testing.assert_close(image, draw(ready, [order], fusion=fusion)[0], rtol=0, atol=ROUNDING)
    poisoned = dataclasses.replace(orders[0], subjects=[FusedSubject("dog", embeds=torch.full((WIDTH,), torch.nan))])
    beside = draw(ready, [poisoned, *orders[1:]], fusion=fusion, on_error="return")
    assert isinstance(beside[0], kd.RequestError)
    assert torch.equal(beside[1], together[1]) and torch.equal(beside[2], together[2])
    plain = dataclasses.replace(orders[0], subjects=())
    assert not torch.equal(draw(ready, [plain])[0], draw(ready, orders[:1], fusion=fusion)[0])


def test_a_subjects_picture_goes_through_the_image_encoder(ready, fusion):
    for name, module in image_encoder().items():
        setattr(ready, name, module)
        ready.register_modules(**{name: module})
    subject = FusedSubject("dog", image=picture(1))
    embeds = ready.encode_image(picture(1), "cpu", 1)[0][0]
    one, other = (
        draw(ready, [Request("a dog", subjects=[s], seed=1)], fusion=fusion)[0]
        for s in (subject, FusedSubject("dog", embeds=embeds))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (FusedSubject("house", embeds=torch.zeros(WIDTH)), "the words 'house' of a FusedSubject are not in the prompt"),
        (FusedSubject("dog"), "give either image or embeds of a FusedSubject, got neither"),
        (FusedSubject("dog", embeds=torch.zeros(5)), r"encoding of a FusedSubject must be \[32\], got \[5\]"),
        (FusedSubject("dog", image=picture(1)), "needs the pipeline's image_encoder"),
        (FusedSubject("dog", embeds=torch.zeros(WIDTH), region=LEFT * 0), "must not be empty"),
        ("dog", "subjects must be FusedSubject objects, got str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_in_a_subject_is_named(ready, fusion, subject, message):
    with pytest.raises(RequestError, match=message):
        draw(ready, [Request("a dog", subjects=[subject])], fusion=fusion)


def test_a_module_of_another_width_is_refused(ready):
    with pytest.raises(ValueError, match="fusion must be as wide as the text, 32, got 16"):
        draw(ready, [Request("a dog")], fusion=SubjectFusion(16))


def test_other_mistakes_are_named(ready, fusion):
    subject = FusedSubject("dog", embeds=torch.zeros(WIDTH))
    for order, options, message in [
        (Request("a dog", subjects=[subject]), {}, "subjects need a fusion module"),
        (Request("a dog", subjects=[subject, subject]), {"fusion": fusion}, "fused into the same word 'dog'"),
        (Request("a dog", subject_start=1.5), {}, r"subject_start must lie in \[0, 1\], got 1.5"),
        (
            Request(prompt_embeds=torch.zeros(32, WIDTH), subjects=[subject]),
            {"fusion": fusion},
            "subjects need a prompt",
        ),
    ]:
        with pytest.raises(RequestError, match=message):
            draw(ready, [order], **options)


# Delayed subject conditioning


def test_a_subject_that_never_starts_is_its_super_class(ready, concept_for):
    alice = concept_for(ready)
    never = Request("<alice-cat> on blue", concepts=[alice], subject_start=1.0, seed=1)
    plain = Request("a house", seed=2)
    drawn = draw(ready, [never, plain])
    expected = draw(ready, [Request("cat on blue", seed=1), plain])
    torch.testing.assert_close(drawn[0], expected[0], rtol=0, atol=ROUNDING)
    assert torch.equal(drawn[1], expected[1])


def test_a_subject_is_fused_into_the_last_token_of_its_words(ready, fusion):
    """Drawn from the prompt's encodings, of which that one token's is the module's answer."""
    embeds = random(WIDTH, seed=1)
    order = Request("a cat with tears of joy", subjects=[FusedSubject("tears of joy", embeds=embeds)], seed=1)
    positive, negative = ready.encode_prompt(order.prompt, "cpu", 1, True, "")
    positive = positive.clone()
    positive[0, 6] = fusion(positive[0, [6]], embeds[None])[0]
    given = Request(prompt_embeds=positive[0], negative_prompt_embeds=negative[0], seed=1)
    plain = dataclasses.replace(order, subjects=())
    with torch.no_grad():
        fused, by_hand, without = draw(ready, [order, given, plain], fusion=fusion)
    assert torch.equal(fused, by_hand) and not torch.equal(fused, without)


def test_a_subjects_region_is_that_of_its_words(ready, fusion):
    subject = FusedSubject("dog", embeds=random(WIDTH, seed=1))
    shown = Request("a dog on blue", subjects=[dataclasses.replace(subject, region=LEFT)], seed=1)
    spelt = Request("a dog on blue", subjects=[subject], regions=[Region(LEFT, "dog")], seed=1)
    everywhere = Request("a dog on blue", subjects=[subject], seed=1)
    one, other, without = draw(ready, [shown, spelt, everywhere], fusion=fusion)
    assert torch.equal(one, other) and not torch.equal(one, without)


@pytest.mark.parametrize("region", [None, LEFT])
def test_a_picture_that_never_starts_leaves_its_word_plain(ready, fusion, region):
    """In the prompt, and in the wordings that regions have of their own."""
    regions = [] if region is None else [Region(region, "dog")]
    never = Request(
        "a dog on blue",
        subjects=[FusedSubject("dog", embeds=random(WIDTH, seed=1))],
        regions=regions,
        subject_start=1.0,
        seed=1,
    )
    plain = dataclasses.replace(never, subjects=(), subject_start=0.0)
    late, expected = draw(ready, [never, plain], fusion=fusion)
    assert torch.equal(late, expected)
    assert not torch.equal(draw(ready, [dataclasses.replace(never, subject_start=0.5), plain], fusion=fusion)[0], late)


def test_a_subject_that_starts_at_once_is_the_plain_concept(ready, concept_for):
    alice = concept_for(ready)
    order = Request("<alice-cat> on blue", concepts=[alice], seed=1)
    late = dataclasses.replace(order, subject_start=0.5, seed=2)
    alone, _ = draw(ready, [order, order])
    beside, _ = draw(ready, [order, late])
    assert torch.equal(alone, beside)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.2, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_it_counts_from_step_one_minus_alpha_times_steps_on(ready, concept_for, start, first):
    """Steps count from 0; of 4, alpha = 0.75 leaves the first without its subject."""
    alice = concept_for(ready)
    use = ConceptUse(alice, 0.7, 0.15)
    text, early = random(2, 32, 32), random(2, 32, 32, seed=1)
    with torch.no_grad():
        batch = Personalization([Row((use,), start=start), Row()])
        batch.prepare(ready, early if first == STEPS else text, earlier=[(early, early)], steps=STEPS)
        late = Personalization([Row((use,)), Row()]).prepare(ready, text).kv
        before = (
            Personalization([Row(), Row()])
            .prepare(ready, torch.cat([early[:1], (early if first == STEPS else text)[1:]]))
            .kv
        )
    held = {name: (key, value) for name, (key, value) in batch.kv.items()}
    for step in range(STEPS):
        batch.at_step(step, STEPS)
        expected = before if step < first else late
        for name, pair in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(batch.kv[name], pair, strict=True)), (step, name)
            assert all(a is b for a, b in zip(batch.kv[name], held[name], strict=True)), "buffers stay where they are"


def test_rows_with_different_starts_draw_each_as_if_alone(ready, concept_for):
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    orders = [
        Request("<alice-cat> on blue", concepts=[alice], subject_start=0.25, seed=1),
        Request("<bob-dog> on pink", concepts=[Use(bob, lock="global")], subject_start=0.75, seed=2),
        Request("<alice-cat> and <bob-dog>", concepts=[alice, Use(bob, region=LEFT)], seed=3),
    ]
    together = draw(ready, orders)
    for order, image in zip(orders, together, strict=True):
        torch.testing.assert_close(image, draw(ready, [order])[0], rtol=0, atol=ROUNDING)


def test_rows_that_change_a_picture_start_at_a_share_of_their_own_steps(ready, concept_for):
    changed = {"image": Image.new("RGB", (16, 16), "red"), "strength": 0.5}
    late = Request("<alice-cat> on blue", concepts=[concept_for(ready)], subject_start=0.5, seed=2, **changed)
    never = dataclasses.replace(late, subject_start=1.0)

    def beside(strength, row):
        return draw(ready, [Request("a dog", seed=1, **{**changed, "strength": strength}), row])[1]

    alike = beside(0.5, late)
    assert torch.equal(alike, beside(1.0, late)), "it counts the steps of its neighbour"
    assert not torch.equal(alike, beside(0.5, never))


def test_wrong_starts_and_texts_are_named(ready):
    text = torch.zeros(2, 32, 32)
    for build, message in [
        (lambda: Row(start=2.0), r"start must lie in \[0, 1\]"),
        (
            lambda: Personalization([Row(start=0.5), Row()]).prepare(ready, text, steps=2),
            "earlier must hold the texts of 1 phases before the rows' last, got 0",
        ),
        (
            lambda: Personalization([Row(), Row()]).prepare(
                ready, text, read_text=torch.zeros(2, 64, 32), key_text=text
            ),
            r"key_text must be \[2, 64, 32\], got \[2, 32, 32\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
