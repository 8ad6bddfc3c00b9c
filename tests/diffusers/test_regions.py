"""Regions: which words are seen from where, and that a row's regions are its own."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Region, Request, RequestError, Use
from keylock_diffusers.embedded.diffusion import build_tokenizer
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.regions import resolve
from keylock_diffusers.masks import inside, read_mask
from keylock_diffusers.requests import ENDINGS
from keylock_diffusers.routing.regions import LIMIT, RegionRouting
from keylock_diffusers.routing.rows import ConceptUse, RegionUse, RowRegions
from tests.diffusers.drawing import ROUNDING, build, picture

STEPS = 3
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
RIGHT = 1 - LEFT
TOKENIZER = build_tokenizer()
SUPER = {"<alice-cat>": "cat", "<bob-dog>": "dog"}


pytestmark = pytest.mark.usefixtures("one_thread")


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


def two(seed=1, prompt="a cat and a dog on blue", **more):
    return Request(prompt, regions=[Region(LEFT, "cat"), Region(RIGHT, "dog")], seed=seed, guidance_scale=4.0, **more)


def words(prompt, super_classes=None):
    return text.tokenize(TOKENIZER, prompt, super_classes)


def spelled(prompt):
    return TOKENIZER.decode(prompt.ids[1 : prompt.ending[0]])


# Words in prompts


@pytest.mark.parametrize(
    ("prompt", "phrase", "places"),
    [
        ("a cat and a dog", "cat", [(2,)]),
        ("a cat and a cat", "cat", [(2,), (5,)]),
        ("a cat with tears of joy", "tears of joy", [(4, 5, 6)]),
        ("a cat", "dog", []),
        ("a cat", "", []),
        ("a cat", "a cat and more", []),
        ("A CAT on blue", "cat", [(2,)]),
    ],
)
def test_a_phrase_is_found_wherever_it_stands(prompt, phrase, places):
    assert text.find(TOKENIZER, words(prompt), phrase) == tuple(places)


def test_a_placeholder_and_its_super_class_are_told_apart():
    prompt = words("a cat and <alice-cat>", {"<alice-cat>": "crying cat"})
    assert text.find(TOKENIZER, prompt, "cat") == ((2,),)
    assert text.find(TOKENIZER, prompt, "<alice-cat>") == ((4, 5),)
    assert text.find(TOKENIZER, prompt, "and <ALICE-cat>") == ((3, 4, 5),)
    assert text.find(TOKENIZER, prompt, "crying") == ()


def test_own_words_stand_in_the_place_of_every_others():
    prompt = words("a cat with tears of joy and a dog next to a house")
    cat, dog, house = ([p for spot in text.find(TOKENIZER, prompt, w) for p in spot] for w in ("cat", "dog", "house"))
    own = text.with_own_words(TOKENIZER, prompt, dog, [*cat, *dog, *house])
    assert spelled(own) == "a dog with tears of joy and a dog next to a dog"
    assert own.attention == prompt.attention and len(own.ids) == len(prompt.ids)
    phrase = [p for spot in text.find(TOKENIZER, prompt, "cat with tears of joy") for p in spot]
    assert spelled(text.with_own_words(TOKENIZER, prompt, phrase, [*phrase, *dog])) == (
        "a cat with tears of joy and a cat with tears of joy next to a house"
    )
    assert spelled(text.with_own_words(TOKENIZER, prompt, [*cat, *dog], cat)) == spelled(prompt)


def test_placeholders_move_with_their_words():
    prompt = words("<alice-cat> and <bob-dog> on blue", {"<alice-cat>": "crying cat", "<bob-dog>": "dog"})
    alice, bob = ([p for spot in text.find(TOKENIZER, prompt, w) for p in spot] for w in ("<alice-cat>", "<bob-dog>"))
    own = text.with_own_words(TOKENIZER, prompt, alice, [*alice, *bob])
    assert spelled(own) == "crying cat and crying cat on blue"
    assert own.words == ((2, "<alice-cat>", 0), (5, "<alice-cat>", 0))
    assert own.spans == ((1, 3, "<alice-cat>"), (4, 6, "<alice-cat>"))
    other = text.with_own_words(TOKENIZER, prompt, bob, [*alice, *bob])
    assert spelled(other) == "dog and dog on blue" and [w for _, w, _ in other.words] == ["<bob-dog>"] * 2


def test_half_a_placeholder_is_no_placeholder():
    prompt = words("<alice-cat> and a dog", {"<alice-cat>": "crying cat"})
    dog = [p for spot in text.find(TOKENIZER, prompt, "dog") for p in spot]
    own = text.with_own_words(TOKENIZER, prompt, dog, [2, *dog])
    assert spelled(own) == "crying dog and a dog" and not own.words and not own.spans


def test_a_wording_that_grows_too_long_is_cut_but_never_a_placeholder(caplog):
    prompt = words("<bob-dog> " + "and a cat " * 9, {"<bob-dog>": "cat with tears of joy"})
    bob = [p for spot in text.find(TOKENIZER, prompt, "<bob-dog>") for p in spot]
    cats = [p for spot in text.find(TOKENIZER, prompt, "cat") for p in spot]
    with pytest.raises(ValueError, match="<bob-dog> lies beyond the 30 tokens"):
        text.with_own_words(TOKENIZER, prompt, bob, [*bob, *cats])
    long = words("a cat with tears of joy " + "and a dog " * 8)
    phrase = [p for spot in text.find(TOKENIZER, long, "cat with tears of joy") for p in spot]
    dogs = [p for spot in text.find(TOKENIZER, long, "dog") for p in spot]
    cut = text.with_own_words(TOKENIZER, long, phrase, [*phrase, *dogs])
    assert len(cut.ids) == 32 and "is cut after 30 tokens" in caplog.text


# Masks and bits


def test_masks_of_any_kind_are_read():
    grey = Image.fromarray(np.array([[0, 255]], np.uint8))
    for mask in (grey, np.array([[0, 255]], np.uint8), torch.tensor([[0.0, 1.0]]), torch.tensor([[False, True]])):
        assert read_mask(mask, "m").tolist() == [[0, 1]]


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (7, 30), (200, 3)])
def test_masks_of_any_aspect_ratio_are_stretched_over_the_picture(shape):
    mask = torch.zeros(shape)
    mask[: max(1, shape[0] // 2)] = 1
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[: 4 if shape[0] == 1 else 2] = True
    assert torch.equal(inside(mask, (4, 6)).view(4, 6), expected)


def test_a_pixel_belongs_to_a_region_that_covers_half_of_it():
    mask = torch.zeros(10, 30)
    for cell, rows in enumerate((4, 5, 6)):
        mask[:rows, 10 * cell : 10 * cell + 10] = 1
    assert inside(mask, (1, 3)).tolist() == [False, True, True]


def test_a_mask_too_small_for_a_layer_keeps_the_pixel_it_covers_most():
    mask = torch.zeros(64, 64)
    mask[10, 50] = 1
    found = inside(mask, (4, 4)).view(4, 4)
    assert found.sum() == 1 and found[0, 3]


def brute_force(row, tokens, size):
    """Who sees what, [N, T], from the definition."""
    masks = [inside(use.mask, size) for use in row.uses]
    outside = ~torch.stack(masks).any(0) if masks else torch.ones(size[0] * size[1], dtype=torch.bool)
    seen = torch.ones(size[0] * size[1], tokens, dtype=torch.bool)
    named = {t for use in row.uses for t in use.tokens}
    for token in range(tokens):
        if token in row.outside:
            seen[:, token] = outside
        if token in named:
            seen[:, token] = torch.stack([m for m, u in zip(masks, row.uses, strict=True) if token in u.tokens]).any(0)
        elif token in row.hidden or (row.tokens is not None and token >= row.tokens):
            seen[:, token] = False
    return seen


def test_the_bitfields_say_who_sees_what():
    top = torch.zeros(8, 8)
    top[:4] = 1
    rows = [
        RowRegions((RegionUse(LEFT, (1, 2)), RegionUse(top, (2, 3))), outside=(5, 6), hidden=(0,), tokens=9),
        RowRegions(),
        RowRegions(tokens=4),
        RowRegions(tuple(RegionUse(torch.rand(5, 5), (n % 9,)) for n in range(LIMIT))),
    ]
    routing = RegionRouting(rows)
    keys, queries = routing.key_regions(10), routing.query_regions((4, 6))
    assert keys.dtype == queries.dtype == torch.int32 and keys.shape == (4, 10) and queries.shape == (4, 24)
    assert (queries < 0).any(), "the last region's bit is the sign"
    for n, row in enumerate(rows):
        assert torch.equal((queries[n][:, None] & keys[n][None]) != 0, brute_force(row, 10, (4, 6))), n


@pytest.mark.parametrize("endings", ENDINGS)
def test_what_each_treatment_of_the_ending_shows(endings):
    prompt = words("a cat and a dog on blue")
    found = resolve([Region(LEFT, "cat"), Region(RIGHT, "dog")], [prompt], 32, [TOKENIZER], endings)
    tokens = 32 * (1 + len(found.own))
    seen = brute_force(found.row, tokens, (2, 2))
    left, ending = 0, list(prompt.ending)
    if endings == "own":
        assert [spelled(own[0]) for own in found.own] == ["a cat and a cat on blue", "a dog and a dog on blue"]
        assert seen[left, 32:64].all() and not seen[left, :32].any() and not seen[left, 64:].any()
        return
    assert not found.own and seen[left, 2] and not seen[left, 5] and seen[left, [0, 1, 3, 4, 6, 7]].all()
    assert bool(seen[left, ending].all()) == (endings == "everywhere")
    part = resolve([Region(LEFT, "cat")], [prompt], 32, [TOKENIZER], endings).row
    seen = brute_force(part, 32, (2, 2))
    assert bool(seen[1, ending].all()) == (endings != "hidden") and not seen[1, 2]


def test_given_encodings_take_positions():
    found = resolve([Region(LEFT, tokens=[3, 4])], None, 9, [TOKENIZER], "own")
    assert found.row.uses[0].tokens == (3, 4) and not found.own and not found.row.outside
    assert resolve([], None, 9, [TOKENIZER], "own").row.tokens == 9


# Pictures


@pytest.mark.parametrize("endings", ENDINGS)
def test_a_mixed_batch_draws_each_as_if_alone_and_permutes_bit_for_bit(ready, concept_for, endings):
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    orders = [
        two(1, endings=endings),
        Request("a house", seed=2),
        Request(
            "<alice-cat> next to <bob-dog>",
            concepts=[Use(alice, region=RIGHT), Use(bob, region=LEFT, lock="global")],
            seed=3,
            endings=endings,
        ),
        two(4, negative_prompt="a car and a house", negative_regions=[Region(LEFT, "car")], endings=endings),
        Request("<alice-cat> on pink", concepts=[alice], seed=5),
    ]
    together = draw(ready, orders)
    for order, image in zip(orders, together, strict=True):
        torch.testing.assert_close(image, draw(ready, [order])[0], rtol=0, atol=ROUNDING)
    order = [3, 0, 4, 1, 2]
    for place, image in zip(order, draw(ready, [orders[n] for n in order]), strict=True):
        assert torch.equal(image, together[place])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_neighbours_regions_concepts_and_poison_change_no_bit(ready, concept_for, dtype):
    ready.to(dtype=dtype)
    large, huge = (
        dataclasses.replace(concept_for(ready, seed=n), values=torch.full_like(concept_for(ready).values, value))
        for n, value in ((3, 1e4), (4, -6e4))
    )
    poison = {"prompt_embeds": torch.full((32, 32), torch.nan), "negative_prompt_embeds": torch.full((32, 32), 1e30)}
    orders = [two(1), Request("a house", seed=2, guidance_scale=4.0)]
    clean = draw(ready, [*orders, Request("a car", seed=3, guidance_scale=4.0)])
    for third in (
        two(9),
        two(9, endings="hidden", negative_regions=()),
        Request("<alice-cat> on blue", concepts=[Use(large, region=LEFT)], seed=4, guidance_scale=4.0),
        Request("<alice-cat> on blue", concepts=[huge], seed=4, guidance_scale=4.0),
        Request(**poison, regions=[Region(LEFT, tokens=[3])], seed=4, guidance_scale=4.0),
        Request("a car and a cat", regions=[Region(LEFT, "car")] * 5, seed=4, guidance_scale=4.0),
    ):
        beside = draw(ready, [*orders, third], on_error="return")
        assert torch.equal(beside[0], clean[0]) and torch.equal(beside[1], clean[1])


def test_two_users_with_the_same_placeholder_in_their_regions_get_their_own(ready, concept_for):
    one, other = concept_for(ready, seed=1), concept_for(ready, seed=2)
    orders = [Request("<alice-cat> on blue", concepts=[Use(c, region=LEFT)], seed=1) for c in (one, other)]
    first, second = draw(ready, orders)
    assert not torch.equal(first, second)
    for order, image in zip(orders, (first, second), strict=True):
        torch.testing.assert_close(image, draw(ready, [order])[0], rtol=0, atol=ROUNDING)


def test_a_region_over_everything_with_endings_everywhere_changes_nothing(ready):
    plain = Request("a cat on blue", seed=1)
    whole = dataclasses.replace(plain, regions=[Region(torch.ones(3, 5), "cat")], endings="everywhere")
    one, other = draw(ready, [plain, whole])
    torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


def test_words_are_not_attended_to_outside_their_region(ready):
    maps = kd.AttentionMaps(["cat", "dog"])
    draw(ready, [two(1), two(2, endings="everywhere"), two(3, endings="outside")], record=maps)
    for recorded in maps.images:
        for layers in recorded.maps.values():
            for maps_of_layer in layers.values():
                width = maps_of_layer.shape[-1]
                if width == 1:
                    continue
                halves = maps_of_layer[..., : width // 2], maps_of_layer[..., width // 2 :]
                seen = [bool((half > 0).all()) for half in halves]
                assert seen in ([True, False], [False, True])
                assert not halves[seen.index(False)].any()


def test_unconditional_rows_see_everything_unless_they_have_regions(ready):
    seen = []
    original = kd.Personalization.visibility

    def watch(self, layer, pixels):
        seen.append(original(self, layer, pixels))
        return seen[-1]

    kd.Personalization.visibility = watch
    try:
        draw(ready, [two(1)])
        without = seen.pop()
        draw(ready, [two(1, negative_prompt="a car", negative_regions=[Region(LEFT, "car")])])
        given = seen.pop()
    finally:
        kd.Personalization.visibility = original
    assert (without[0][0] == 1).all() and (without[1][0, :32] == 1).all() and not without[1][0, 32:].any()
    assert (given[0][0] != 1).any()


def test_concepts_and_image_prompts_take_regions_together(concept_for):
    pipe = kd.install(build())
    alice = concept_for(pipe)
    order = Request(
        "<alice-cat> next to a house",
        concepts=[Use(alice, region=LEFT)],
        image_prompts=[ImagePrompt(picture(1), region=RIGHT)],
        regions=[Region(RIGHT, "house")],
        seed=1,
    )
    options = {"height": 16, "width": 16}
    alone = draw(pipe, [order], **options)[0]
    beside = draw(pipe, [Request("a house", seed=2), order], **options)[1]
    torch.testing.assert_close(alone, beside, rtol=0, atol=ROUNDING)


def test_sdxl_regions():
    pipe = kd.install(build("SDXL"))
    options = {"height": 16, "width": 16}
    orders = [two(1), Request("a house", seed=2, guidance_scale=4.0)]
    with_regions, _ = draw(pipe, orders, **options)
    without = draw(pipe, [dataclasses.replace(orders[0], regions=()), orders[1]], **options)[0]
    assert not torch.equal(with_regions, without)
    torch.testing.assert_close(with_regions, draw(pipe, orders[:1], **options)[0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": [Region(torch.zeros(4, 4), "cat")]}, "mask of a Region must not be empty"),
        ({"regions": [Region(LEFT, "red hat")]}, "the words 'red hat' of a Region are not in the prompt"),
        ({"regions": [Region(LEFT)]}, "give either prompt or tokens of a Region, got neither"),
        ({"regions": [Region(LEFT, "cat", [1])]}, "give either prompt or tokens of a Region, got both"),
        ({"regions": [Region(LEFT, tokens=[32])]}, r"tokens of a Region must be positions from 0 to 31, got \[32\]"),
        ({"regions": [Region(LEFT, tokens=[])]}, "tokens of a Region must be positions"),
        ({"regions": [Region(LEFT, tokens=torch.tensor([1]))]}, "tokens of a Region must be a list, got Tensor"),
        ({"regions": [Region(LEFT[0], "cat")]}, r"mask of a Region must be \[height, width\], got \[8\]"),
        ({"regions": [Region("left", "cat")]}, "mask of a Region must be a picture or a tensor, got str"),
        ({"regions": [Region(LEFT * torch.nan, "cat")]}, "mask of a Region must hold finite numbers"),
        ({"regions": ["left"]}, "regions must be Region objects, got str"),
        ({"regions": Region(LEFT, "cat")}, "regions must be a list, got Region"),
        ({"regions": [Region(LEFT, "cat")] * 31}, "regions must be at most 30, got 31"),
        ({"endings": "nowhere"}, "endings must be one of own, everywhere, outside, hidden, got 'nowhere'"),
        ({"negative_regions": [Region(LEFT, "cat")]}, "the words 'cat' of a Region are not in the prompt"),
        ({"prompt": None, "prompt_embeds": torch.zeros(32, 32), "regions": [Region(LEFT, "cat")]}, "takes tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_is_named_and_fails_alone(ready, changes, message):
    bad = dataclasses.replace(Request("a cat on blue", seed=1), **changes)
    with pytest.raises(RequestError, match=message):
        draw(ready, [bad])
    good, failed = draw(ready, [Request("a house", seed=2), bad], on_error="return")
    assert isinstance(failed, RequestError) and isinstance(good, torch.Tensor)


def test_an_empty_region_of_a_concept_or_an_image_prompt_is_refused(ready, concept_for):
    with pytest.raises(RequestError, match="mask of a Region must not be empty"):
        draw(ready, [Request("<alice-cat>", concepts=[Use(concept_for(ready), region=torch.zeros(4, 4))])])
    with pytest.raises(RequestError, match="region of an image prompt must not be empty"):
        draw(kd.install(build()), [Request("a cat", image_prompts=[ImagePrompt(picture(1), region=torch.zeros(4, 4))])])


def test_a_region_written_to_after_prepare_is_noticed(ready):
    mask = LEFT.clone()
    row = RowRegions((RegionUse(mask, (2,)),))
    with torch.no_grad():
        encodings = text.encode(ready.text_encoder, [words("a cat on blue")])
        batch = kd.Personalization([kd.Row(regions=row)]).prepare(ready, encodings)
        call = {"cross_attention_kwargs": {"personalization": batch}}
        ready.unet(torch.zeros(1, 4, 8, 8), 10, encodings, **call)
        mask.zero_()
        with pytest.raises(ValueError, match="a region of row 0 was written to"):
            ready.unet(torch.zeros(1, 4, 8, 8), 10, encodings, **call)


def test_room_for_more_regions_changes_nothing(ready):
    orders = [two(1), Request("a house", seed=2, guidance_scale=4.0)]
    for one, other in zip(draw(ready, orders), draw(ready, orders, max_regions=4), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)
    with pytest.raises(RequestError, match="must be at most max_regions, 1, got 2"):
        draw(ready, orders, max_regions=1)
    with pytest.raises(ValueError, match="max_regions must be a whole number from 1 to 30, got 0"):
        draw(ready, orders, max_regions=0)


def test_concepts_edit_the_wordings_that_name_them_and_no_other(ready, concept_for):
    """A row that reads its prompt, then a wording with Alice alone, then one with Bob alone."""
    alice, bob = (ConceptUse(concept_for(ready, f"<{n}>", seed=s), 0.6, 0.2) for s, n in enumerate(("alice", "bob"), 1))
    own = (frozenset({"<alice>"}), frozenset({"<bob>"}))
    row = RowRegions((RegionUse(LEFT, tuple(range(6, 18))),), tokens=18, placeholders=own)
    text = torch.randn(1, 18, 32, generator=torch.Generator().manual_seed(3))

    def prepared(*uses, regions=(row,), read=text):
        batch = kd.Personalization([kd.Row(uses, regions=own) for own in regions])
        return batch.prepare(ready, text[:, :6] if read is text else read, read_text=read).kv

    both = prepared(alice, bob)
    wordings = {(0, 6): (alice, bob), (6, 12): (alice,), (12, 18): (bob,)}
    for (first, last), uses in wordings.items():
        alone = prepared(*uses, regions=(RowRegions(tokens=6),), read=text[:, first:last])
        for name in both:
            for ours, expected in zip(both[name], alone[name], strict=True):
                assert torch.equal(ours[:, first:last], expected)


@pytest.mark.parametrize("size", [(8, 16), (16, 8)])
def test_without_a_size_the_picture_has_the_aspect_ratio_of_the_first_mask(ready, size):
    mask = torch.zeros(size)
    mask[: size[0] // 4, : size[1] // 2] = 1
    row = RowRegions((RegionUse(mask, (2,)),))
    batch = kd.Personalization([kd.Row(regions=row)]).prepare(ready, torch.zeros(1, 32, 32))
    pixels, _ = batch.visibility(next(iter(batch.kv)), 32)
    assert torch.equal(pixels, RegionRouting([row]).query_regions((size[0] // 2, size[1] // 2)))


def test_regions_of_the_negative_prompt_alone_have_wordings_of_their_own(ready):
    order = Request(
        "a cat", negative_prompt="a car and a house", negative_regions=[Region(LEFT, "car")], seed=1, guidance_scale=4.0
    )
    drawn = draw(ready, [order])[0]
    torch.testing.assert_close(drawn, draw(ready, [order], max_regions=1)[0], rtol=0, atol=ROUNDING)
    assert not torch.equal(drawn, draw(ready, [dataclasses.replace(order, negative_regions=())])[0])


def test_a_concepts_region_is_that_of_its_word(ready, concept_for):
    alice = concept_for(ready)
    shown = Request("<alice-cat> on blue", concepts=[Use(alice, region=LEFT)], seed=1)
    spelt = Request("<alice-cat> on blue", concepts=[alice], regions=[Region(LEFT, "<alice-cat>")], seed=1)
    everywhere = Request("<alice-cat> on blue", concepts=[alice], seed=1)
    one, other, without = draw(ready, [shown, spelt, everywhere])
    assert torch.equal(one, other) and not torch.equal(one, without)
