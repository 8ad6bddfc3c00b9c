"""LoRAs that are bound to words: at the words' tokens, and where the step before has seen them."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

import keylock_diffusers as kd
from keylock_diffusers import Attention, AttentionMaps, Lora, LoraCapacity, Region, Request, RequestError
from keylock_diffusers.concepts import AddedConcept, BaseModel
from keylock_diffusers.denoisers.projections import reads_text
from keylock_diffusers.generation.batch import Picture
from keylock_diffusers.generation.engine import Settings
from keylock_diffusers.generation.gates import Gates, Several
from keylock_diffusers.loras import Adapter
from keylock_diffusers.masks import area_share
from keylock_diffusers.routing.adapters import AdapterRouting, AdapterUse, BoundTo, store_of
from keylock_diffusers.routing.rows import LoraUse, Row, TextLayout
from tests.diffusers.drawing import COMPANY
from tests.diffusers.lora_files import pipeline
from tests.diffusers.test_loras import LEFT, apart, draw, fused, installed, made, same

MODEL = "SD1.5"
PROMPT = "a cat and a dog on blue"


def order(*loras, text=PROMPT, seed=1, **more):
    return Request(text, seed=seed, guidance_scale=4.0, loras=list(loras), **more)


def to(word="cat", adapter=None, **more):
    return Lora(made(MODEL, 6, scale=0.05) if adapter is None else adapter, region=Attention(word, **more))


def of_pixels(model=MODEL):
    """An adapter of what reads pixels alone."""
    return made(model, 6, scale=0.05, wanted=lambda name: not reads_text(name) and "time_emb" not in name, text=False)


@functools.cache
def peaked(model):
    """A model whose words are seen in some places and not in others."""
    pipe = copy.deepcopy(pipeline(model))
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2.to_q"):
            module.weight.data *= 100
    return kd.install(pipe)


def engine(model=MODEL, **more):
    return kd.Engine(peaked(model), Settings(num_inference_steps=3, height=16, width=16, **more))


def expected(maps, size, threshold=0.4):
    """Where a word is seen by its maps of one step, {layer: [h, w]}: written once more, from the definition."""
    total = 0
    for seen in maps.values():
        total = total + F.interpolate((seen / seen.max().clamp(min=1e-6))[None, None], size, mode="bilinear")
    total = total / len(maps)
    padded = F.pad(total, (1, 1, 1, 1), mode="replicate")[0, 0]
    blurred = sum(padded[y : y + size[0], x : x + size[1]] for y in range(3) for x in range(3)) / 9
    return 1 / (1 + torch.exp(-(blurred / blurred.max() - threshold) / 0.08))


@pytest.mark.parametrize("model", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_pixels_count_as_the_words_map_of_the_step_before_says(model, threshold):
    """In the first step nowhere; then as a LoRA whose region is that map, drawn by hand."""
    adapter = of_pixels(model)
    maps = AttentionMaps(["cat"], every_step=True)
    one = engine(model, record=maps)
    batch = one.load([Picture(one.plan(order(to("cat", adapter, threshold=threshold)))) for _ in range(1)])
    plain = engine(model)
    beside = plain.load([Picture(plain.plan(order()))])
    one.step(batch)
    plain.step(beside)
    same(batch.latents, beside.latents, COMPANY)
    read = batch.readout.picture(0, PROMPT).maps["cat"]
    size = max((seen.shape[1:] for seen in read.values()), key=lambda s: s[0] * s[1])
    seen = expected({layer: steps[-1] for layer, steps in read.items()}, size, threshold)
    assert 0.02 < float(seen.mean()) < 0.98 and float(seen.max() - seen.min()) > 0.3
    drawn = plain.load([Picture(plain.plan(order(Lora(adapter, region=seen))))])
    drawn.latents, drawn.position = beside.latents.clone(), 1
    by_hand = drawn.rows[0].schedule.scheduler
    vars(by_hand).update({n: v for n, v in vars(beside.rows[0].schedule.scheduler).items()})
    one.step(batch)
    plain.step(drawn)
    same(batch.latents, drawn.latents, 1e-4)
    assert apart(batch.latents, _third(plain, beside))
    for kept, own in ((one, batch), (plain, drawn), (plain, beside)):
        kept.release(own)


def _third(plain, beside):
    plain.step(beside)
    return beside.latents


def test_of_the_text_only_the_words_own_tokens_count():
    """All other tokens' keys and values are bit for bit those without it; text encoders read from left to right."""
    text_side = made(MODEL, 6, scale=0.05, wanted=reads_text, text=False)
    of_encoder = Adapter({}, made(MODEL, 6, scale=0.05).text_encoders)
    one = engine()
    rows = [order(), order(to(adapter=text_side)), order(to(adapter=of_encoder)), order(Lora(text_side))]
    batch = one.load([Picture(one.plan(row)) for row in rows])
    cat = one.plan(rows[1]).row.loras[0].bound.places[0]
    assert len(cat) == 1
    others = [position for position in range(batch.text.layout.tokens) if position not in cat]
    first = batch.layout.parts.index("cond") * len(rows)
    for pair in batch.held.personalization.kv.values():
        for side in pair:
            plain, bound, encoder, everywhere = side[first : first + 4]
            assert torch.equal(plain[others], bound[others]) and apart(plain[list(cat)], bound[list(cat)])
            same(bound[list(cat)], everywhere[list(cat)], 1e-5)
            assert torch.equal(plain[: cat[0]], encoder[: cat[0]]) and apart(plain[cat[0] :], encoder[cat[0] :])
            uncond = side[: len(rows)] if first else side[len(rows) :]
            same(uncond[0], uncond[1], 0)
    one.release(batch)


def test_the_word_in_a_text_encoder_reads_as_with_the_adapter_fused():
    """Of an adapter of the last layer's feed-forward part, whose tokens do not see each other."""
    layers = [name for name in made(MODEL, 6).text_encoders[0] if name.endswith("fc2")]
    last = max(layers)
    adapter = Adapter({}, ({last: made(MODEL, 6, scale=0.3).text_encoders[0][last]},))
    one = engine()
    batch = one.load([Picture(one.plan(order(to(adapter=adapter)))), Picture(one.plan(order()))])
    (place,) = one.plan(order(to(adapter=adapter))).row.loras[0].bound.places[0]
    whole = fused(MODEL, adapter).encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0][0]
    found, plain = batch.text.last.read
    same(found[place], whole[place], 1e-5)
    assert apart(found[place], plain[place])
    rest = [position for position in range(len(whole)) if position != place]
    assert torch.equal(found[rest], plain[rest])
    one.release(batch)


def test_the_places_of_a_word_beside_a_concept_of_several_words_that_waits():
    """While its super-class is read in its place, the word stands further to the left."""
    pipe = installed(MODEL)
    base = BaseModel.of(pipe)
    width = base.text_encoders[0].hidden_size
    three = AddedConcept("<mine>", "dog", word_embeddings=(torch.ones(3, width),), base=base, start=1.0)
    last = max(name for name in made(MODEL, 6).text_encoders[0] if name.endswith("fc2"))
    adapter = Adapter({}, ({last: made(MODEL, 6, scale=0.3).text_encoders[0][last]},))
    one = engine()
    rows = [
        order(to(adapter=adapter), text="a <mine> and a cat", concepts=[kd.Use(three)]),
        order(text="a dog and a cat"),
        order(to(adapter=adapter), text="a dog and a cat"),
    ]
    batch = one.load([Picture(one.plan(row)) for row in rows])
    (place,) = one.plan(rows[0]).row.loras[0].bound.places[0]
    (before,) = one.plan(rows[2]).row.loras[0].bound.places[0]
    assert place == before + 2
    waiting = batch.text.phases[0].read
    same(waiting[0][place], waiting[2][before], 0)
    assert apart(waiting[0][place], waiting[1][before])
    one.release(batch)


def test_a_row_is_the_same_to_the_bit_whoever_its_neighbours_are(one_thread):
    """Its maps included, whatever theirs are; other places in the batch differ by rounding."""
    pipe = installed(MODEL)
    room = {
        "lora_capacity": LoraCapacity(8, 4, slots=2, regions=True, convolutions=True),
        "max_regions": 1,
        "on_error": "return",
    }
    mine, none = order(to("cat"), to("dog", made(MODEL, 9, scale=0.05)), seed=5), order(seed=3)
    company = [
        order(to("dog"), Lora(made(MODEL, 7, scale=0.05), 0.5), seed=2, text="a dog"),
        order(seed=7),
        order(Lora(made(MODEL, 8, scale=0.05), region=LEFT), seed=4),
        order(to("blue blue blue", made(MODEL, 7, rank=4, scale=1e18)), text="a blue blue blue", seed=6),
    ]
    drawn = [draw(pipe, [mine, neighbour, none], **room) for neighbour in company]
    for ours, _, plain in drawn[1:]:
        assert torch.equal(ours, drawn[0][0]) and torch.equal(plain, drawn[0][2])
    assert isinstance(drawn[3][1], RequestError)
    moved = draw(pipe, [none, company[0], mine], **room)
    same(moved[2], drawn[0][0])
    assert apart(drawn[0][0], draw(pipe, [dataclasses.replace(mine, loras=())])[0])


def test_a_strength_of_0_is_nothing_and_maps_can_be_recorded_beside_it():
    pipe = installed(MODEL)
    nothing = dataclasses.replace(to(), strength=0.0)
    plain, off, on = draw(pipe, [order(), order(nothing), order(to())])
    same(off, plain)
    assert apart(on, plain)
    maps = AttentionMaps(["dog", "blue"])
    recorded = draw(pipe, [order(), order(nothing), order(to())], record=maps)
    same(recorded[2], on)
    of_plain = AttentionMaps(["dog", "blue"])
    draw(pipe, [order()], record=of_plain)
    for word in ("dog", "blue"):
        same(maps.images[0].mean(word), of_plain.images[0].mean(word))


def test_it_goes_on_when_guidance_is_switched_off_and_waits_until_its_row_joins():
    """A picture that begins later leaves no map before it does."""
    pipe = installed(MODEL)
    seen = []

    def off(pipe_, step, time, kwargs):
        seen.append(step)
        if step == 1:
            pipe_._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    (image,) = draw(
        pipe,
        [order(to())],
        callback_on_step_end=off,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        num_inference_steps=4,
    )
    assert len(seen) == 4 and bool(torch.isfinite(image).all())

    one = kd.Engine(pipe, Settings(num_inference_steps=4, height=16, width=16))
    late = order(to(), image=torch.full((3, 16, 16), 0.5), strength=0.5)
    batch = one.load([Picture(one.plan(late)), Picture(one.plan(order(to(), seed=2)))])
    joins = batch.rows[0].first
    assert joins == 2
    for step in range(4):
        one.step(batch)
        held = {number for number in batch.gates._maps}
        assert held == ({1} if step < joins else {0, 1})
    one.release(batch)


@pytest.mark.parametrize("neighbour", ["bound", "recorded"])
def test_somebody_elses_lora_counts_as_before_whoever_binds_theirs(one_thread, neighbour):
    """Also in the text encoder, whose tokens have weights as soon as one row's count at a word."""
    pipe = installed(MODEL)
    room = {"lora_capacity": LoraCapacity(8, 4, slots=1, regions=True, convolutions=True)}
    mine, none = order(Lora(made(MODEL, 9, scale=0.05))), order(seed=3)
    before = draw(pipe, [mine, order(seed=5), none], **room)
    if neighbour == "recorded":
        room["record"] = AttentionMaps(["cat"])
    after = draw(pipe, [mine, order(to(), seed=5), none], **room)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert apart(before[1], after[1])


def test_blocks_that_are_compiled_one_by_one_are_refused():
    pipe = kd.install(copy.deepcopy(pipeline(MODEL)))
    pipe.unet.compile_repeated_blocks(backend="eager")
    good, bad = draw(pipe, [order(), order(to())], on_error="return")
    assert "bound to words where blocks are compiled one by one" in str(bad) and isinstance(good, torch.Tensor)


WRONG = {
    "absent": (order(to("fox")), "the word 'fox' of a Lora's region is not in the prompt"),
    "no word": (order(to("")), "word of an Attention must be a word of the prompt, got ''"),
    "a number": (order(to(3)), "word of an Attention must be a word of the prompt, got 3"),
    "threshold": (order(to(threshold=2.0)), "threshold of an Attention must lie in [0, 1], got 2.0"),
    "encodings": (
        Request(prompt_embeds=torch.zeros(77, 32), negative_prompt_embeds=torch.zeros(77, 32), loras=[to()]),
        "need one prompt for all text encoders, not encodings",
    ),
    "in an image prompt": (
        order(regions=[Region(Attention("cat"), "cat")]),
        "mask of a Region must be a picture or a tensor, got Attention",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_fails_alone(case):
    request, message = WRONG[case]
    good, bad = draw(installed(MODEL), [order(), request], on_error="return")
    assert isinstance(bad, RequestError) and message in str(bad)
    assert isinstance(good, torch.Tensor)


def test_a_capacity_must_have_room_for_regions():
    (found,) = draw(installed(MODEL), [order(to())], on_error="return", lora_capacity=LoraCapacity(2, 4))
    assert "no room for regions of LoRAs" in str(found)


def test_json_says_it_as_an_object(tmp_path):
    given = {"prompt": PROMPT, "loras": [{"lora": "a/b", "region": {"word": "cat", "threshold": 0.5}}]}
    assert Request.from_json(given).loras[0].region == Attention("cat", 0.5)
    with pytest.raises(TypeError, match="'words' is no field of region of a Lora; did you mean word"):
        Request.from_json({"prompt": PROMPT, "loras": [{"lora": "a/b", "region": {"words": "cat"}}]})


def test_a_word_that_is_bound_is_read_by_itself():
    """Beside another of the same row, and beside words that are recorded: tokens are read together, and told apart."""
    rows = [
        Row(loras=(LoraUse({}, bound=BoundTo("cat", 0.4, ((2, 5),))), LoraUse({}, bound=BoundTo("dog", 0.4, ((3,),))))),
        Row(loras=(LoraUse({}, bound=BoundTo("dog", 0.4, ((4,),))),)),
    ]
    gates = Gates(rows, TextLayout(8, 1), {"layer": (2, 3)}, torch.device("cpu"))
    other = Gates(rows[::-1], TextLayout(8, 1), {"layer": (2, 3)}, torch.device("cpu"))
    both = Several(other, gates)
    tokens, _ = both.wanted("layer", 2, 6)
    assert tokens.tolist() == [[4, -1, -1, 2, 5, 3], [2, 5, 3, 4, -1, -1]] and both.wanted("elsewhere", 2, 6) is None
    read = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    both.receive("layer", read)
    mean = read.mean(1)
    for held, first, places in ((gates, 3, (0, 0, 1)), (other, 0, (0, 1, 1))):
        found = [[(0, 2), (2, 3)], [(0, 1)]] if held is gates else [[(0, 1)], [(0, 2), (2, 3)]]
        spans = [span for row in found for span in row]
        for number, (row, (begin, end)) in enumerate(zip(places, spans, strict=True)):
            expected = mean[row, :, first + begin : first + end].sum(-1)
            torch.testing.assert_close(held._read["layer"][number], expected)


@pytest.mark.parametrize("size", [(2, 3), (5, 4), (1, 1)])
def test_confining_fills_what_was_prepared(size):
    module = torch.nn.Linear(3, 2)
    update = made(MODEL, 1).denoiser
    update = {"layer": next(iter(update.values()))}
    update["layer"] = dataclasses.replace(
        update["layer"], down=torch.ones(1, 3), up=torch.ones(2, 1), scale=1.0, magnitude=None
    )
    routing = AdapterRouting([[AdapterUse(update, bound=BoundTo("cat"))], []], store_of())
    routing.prepare({"layer": module}, torch.device("cpu"), torch.float32, size=lambda name: size)
    held = routing.updates["layer"].token_weights
    assert torch.equal(held[0], torch.zeros_like(held[0])) and torch.equal(held[1], torch.ones_like(held[1]))
    seen = torch.rand(10, 12, generator=torch.Generator().manual_seed(0))
    routing.confine({(0, 0): seen})
    assert held is routing.updates["layer"].token_weights
    torch.testing.assert_close(held[0, 0], area_share(seen, size))
    assert torch.equal(held[1], torch.ones_like(held[1]))
