"""A batch object: its buffers, what it notices, whose images reach which row."""

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers.routing.images import ImageRouting
from keylock_diffusers.routing.rows import ConceptUse, ImageUse, Row
from tests.diffusers.compatibility import WIDTH, Feature, make, masks


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def two():
    """An installed pipeline with two adapters."""
    pipe, _ = make("SD 1.x", "text only")
    Feature(adapters=("base", "plus")).load(pipe)
    return kd.install(pipe)


TEXTS = random(6, 7, WIDTH, seed=9)


def step(pipe, rows, image_lengths=None):
    """A batch object for `rows` rows, and a U-Net step with it."""
    personalization = kd.Personalization([Row()] * rows, image_lengths=image_lengths)
    latents, text = random(rows, 4, 8, 8, seed=8), TEXTS[:rows].clone()

    def call(unet=None):
        with torch.no_grad():
            return (pipe.unet if unet is None else unet)(
                latents,
                torch.tensor(10),
                text,
                added_cond_kwargs={"image_embeds": [torch.empty(rows, 0, 1)] * 2},
                cross_attention_kwargs={"personalization": personalization},
            ).sample

    call.text = text
    return personalization, call


def test_another_rows_poisoned_images_masks_and_scales_change_nothing(two):
    """The batch object is given what `generate` would refuse."""
    personalization, call = step(two, rows=3)
    uses = [[ImageUse(random(4, WIDTH, seed=n), region=random(16, 16, seed=n))] for n in range(3)]
    personalization.assign([Row(images=row) for row in uses]).prepare(two, TEXTS[:3])
    clean = call()
    nan = float("nan")
    poisons = [
        ImageUse(torch.full((4, WIDTH), nan), region=random(16, 16)),
        ImageUse(random(4, WIDTH), region=torch.full((16, 16), nan)),
        ImageUse(random(4, WIDTH), scale=nan, region=random(16, 16)),
        ImageUse(torch.full((4, WIDTH), 1e30), scale=1e30, region=random(16, 16)),
    ]
    for poison in poisons:
        personalization.assign([Row(images=row) for row in (uses[0], [poison], uses[2])]).prepare(two, TEXTS[:3])
        poisoned = call()
        assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and not torch.equal(poisoned[1], clean[1])


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_every_step_belongs_to_one_of_two_adjoining_schedules(total):
    for cut in (0.0, 0.25, 0.5, 1.0):
        before, after = ImageUse(random(4, 8), end=cut), ImageUse(random(4, 8), start=cut)
        for step in range(total):
            # A step that the cut goes through belongs to neither, as with ControlNets.
            through = step / total < cut < (step + 1) / total
            assert before.active(step, total) + after.active(step, total) == (0 if through else 1)


def test_buffers_stay_where_they_are_for_other_users(two):
    personalization, call = step(two, rows=3, image_lengths=[[4, 4], [16]])

    def users(seed, count):
        return [
            [ImageUse(random(4, WIDTH, seed=seed + n), scale=0.1 * n, region=random(9, 9))] * (n % count)
            for n in range(3)
        ]

    def prepare(seed, count):
        personalization.assign([Row(images=row) for row in users(seed, count)])
        personalization.prepare(two, call.text, latent_size=(8, 8))
        return [tensor.data_ptr() for tensor in personalization.tensors()], call()

    places, first = prepare(0, 3)
    again, second = prepare(50, 2)
    personalization.at_step(0, 4)
    assert again == places == [tensor.data_ptr() for tensor in personalization.tensors()]
    assert not torch.equal(first, second)
    assert prepare(0, 3)[0] == places and torch.equal(call(), first)


def test_a_text_written_in_place_after_prepare_is_noticed(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    call()
    call.text[1, 3] += 1
    with pytest.raises(ValueError, match="was given another text than was prepared"):
        call()
    personalization.prepare(two, call.text)
    call()
    with torch.inference_mode():
        frozen = call.text.clone()
        personalization.prepare(two, frozen)
        streams = [personalization.keys_and_values(layer, 2, frozen) for layer in personalization.kv]
        frozen[0, 0] = 3
        with pytest.raises(ValueError, match="another text"):
            for layer in personalization.kv:
                personalization.keys_and_values(layer, 2, frozen)
        assert len(streams) == len(personalization.kv)


@pytest.mark.parametrize("what", ["image", "region", "concept", "key_text"])
def test_whatever_else_is_written_in_place_is_noticed(two, concept_for, what):
    alice, (_, call) = concept_for(two), step(two, rows=2)
    use = ImageUse(random(4, WIDTH), region=random(8, 8))
    row = Row((ConceptUse(alice, beta=0.5, tau=0.1),), (use,))
    personalization = kd.Personalization([row, Row()])
    key_text = call.text.clone()
    personalization.prepare(two, call.text, key_text)
    first, *_ = personalization.kv
    personalization.keys_and_values(first, 2, call.text)
    written = {"image": use.tokens, "region": use.region, "concept": alice.values, "key_text": key_text}[what]
    written[0] += 1
    with pytest.raises(
        ValueError, match=f"{what if what == 'key_text' else ''}.* was written to after it was prepared"
    ):
        personalization.keys_and_values(first, 2, call.text)
    personalization.prepare(two, call.text, key_text)
    personalization.keys_and_values(first, 2, call.text)


def test_concepts_that_were_written_to_combine_anew_once_prepared_again(two, concept_for):
    alice, bob = concept_for(two), concept_for(two, "<bob-dog>", "dog", seed=2)
    row = Row(tuple(ConceptUse(concept, beta=0.5, tau=0.1, strength=0.6) for concept in (alice, bob)))
    text = TEXTS[:1].clone()
    personalization = kd.Personalization([row]).prepare(two, text)
    before = {name: value.clone() for name, (_, value) in personalization.kv.items()}
    alice.target_input.add_(0.5 * bob.target_input)
    personalization.prepare(two, text)
    anew = kd.Personalization([Row(row.uses)]).prepare(two, text)
    for name, (key, value) in anew.kv.items():
        assert torch.equal(personalization.kv[name][0], key) and torch.equal(personalization.kv[name][1], value)
        assert not torch.equal(value, before[name])


def test_a_failed_prepare_leaves_nothing_of_the_users_before(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    call()
    personalization.assign([Row(images=(ImageUse(random(4, 5)),)), Row()])
    with pytest.raises(ValueError, match=r"image tokens must be \[L, 32\], got \[4, 5\]"):
        personalization.prepare(two, call.text)
    with pytest.raises(ValueError, match="nothing was prepared"):
        call()


def test_images_beside_a_personalization_are_refused(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    attn = next(module for name, module in two.unet.named_modules() if name.endswith("attn2"))
    for more in ({"ip_adapter_masks": [masks(1), None]}, {}):
        states = [random(2, 0 if more else 1, 4, WIDTH)] * 2
        with pytest.raises(ValueError, match="must not be given beside a personalization"):
            attn(random(2, 64, attn.query_dim), (call.text, states), personalization=personalization, **more)


def test_new_users_without_prepare_are_refused(two):
    personalization, call = step(two, rows=2)
    personalization.prepare(two, call.text)
    personalization.assign([Row(images=(ImageUse(random(4, WIDTH)),)), Row()])
    with pytest.raises(ValueError, match="nothing was prepared"):
        call()


def test_streams_are_laid_out_with_the_least_padding():
    def use(length, adapter=0):
        return ImageUse(torch.zeros(length, 8), adapter=adapter)

    routing = ImageRouting([[use(4), use(16)], [use(16, 1)], [use(8)], []])
    assert routing.lengths == ((16, 4), (16,))
    bias = routing.key_bias(torch.float32)
    assert [int((row == 0).sum()) for row in bias] == [20, 16, 8, 0]
    assert ImageRouting([[use(4)], [use(4)]]).key_bias(torch.float32) is None
    fixed = ImageRouting([[use(4)], []], [[16, 4]])
    assert fixed.scales("any", [(0, 1), (0, 1)]) == ((1.0, 0.0), (0.0, 0.0))
    with pytest.raises(
        ValueError, match=r"image_lengths \[4\] of adapter 0 have no place for an image prompt of 16 tokens"
    ):
        ImageRouting([[use(16)]], [[4]])


def test_what_is_prepared_has_the_length_and_dtype_of_the_text_at_hand(concept_for):
    """Whatever lies in the buffers of the users before."""
    pipe, _ = make("SD 1.x", "text only")
    kd.install(pipe)
    used = kd.Personalization([Row((ConceptUse(concept_for(pipe), beta=0.5, tau=0.1),)), Row()])
    for dtype, length in ((torch.float32, 7), (torch.float32, 1), (torch.bfloat16, 1)):
        pipe.to(dtype=dtype)
        new = kd.Personalization([Row((ConceptUse(concept_for(pipe), beta=0.5, tau=0.1),)), Row()])
        for batch in (used, new):
            batch.prepare(pipe, TEXTS[:2, :length].to(dtype))
        for name, pair in used.kv.items():
            for ours, expected in zip(pair, new.kv[name], strict=True):
                assert ours.dtype == expected.dtype == dtype and torch.equal(ours, expected)


def test_a_layer_takes_the_scale_of_the_last_block_that_it_lies_in_and_else_none():
    use = ImageUse(random(4, WIDTH), scale={"down_blocks.0": 0.5, "down_blocks.0.attentions.1": 0.25})
    scales = [
        use.scale_of(f"{name}.attn2") for name in ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "up")
    ]
    assert scales == [0.5, 0.25, 0.0] and ImageUse(random(4, WIDTH), scale=0.7).scale_of("up.attn2") == 0.7
