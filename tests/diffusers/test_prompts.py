"""Prompts of any length, and weights in them."""

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers import Region, Request, RequestError, Use
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.tokens import extended
from keylock_diffusers.encoding.weights import weighted
from tests.diffusers import compatibility as tiny
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.drawing import APART, COMPANY, ROUNDING, build

STEPS = 3
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
LONG = "a cat on blue and a dog on pink and " * 5 + "a house"
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


def order(prompt, seed=1, **more):
    return Request(prompt, seed=seed, **{"guidance_scale": 4.0, **more})


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (red:1.5) cat", [("a ", 1), ("red", 1.5), (" cat", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[(a)]", [("a", 1.1 / 1.1)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("(a:0)", [("a", 0)]),
        ("(a:-.5)", [("a", -0.5)]),
        ("( a : 1.5 )", [(" a ", 1.5)]),
        (r"\(a\) \[b\]", [("(a) [b]", 1)]),
        ("a) b] (c [d", [("a) b] (c [d", 1)]),
        ("(a] b)", [("a] b", 1.1)]),
        ("a:1.5) b", [("a:1.5) b", 1)]),
        ("at 12:30 (x:y)", [("at 12:30 ", 1), ("x:y", 1.1)]),
        ("(a:1.2)(b:1.2)", [("ab", 1.2)]),
        ("(<alice-cat>:1.3) on blue", [("<alice-cat>", 1.3), (" on blue", 1)]),
    ],
)
def test_weights_are_read(prompt, parts):
    found = weighted(prompt)
    assert [words for words, _ in found] == [words for words, _ in parts]
    assert [weight for _, weight in found] == [weight for _, weight in parts]


def test_a_weight_beyond_all_measure_is_refused(ready):
    with pytest.raises(RequestError, match="a weight must be at most 10000, got 1e9"):
        draw(ready, [order("(a:1e9)")])


def test_a_mean_that_is_chance_is_not_kept(pipe):
    """A layer norm without weights leaves a mean of 0: a quotient of two such numbers says nothing, or is none."""
    prompt = text.tokenize(pipe.tokenizer, weighted("a (cat:1.5)"))
    plain = text.encode(pipe.text_encoder, [text.tokenize(pipe.tokenizer, "a cat")])
    for shift, share in ((0.0, 1.0), (1.0, None)):
        states = plain - plain.mean() + shift
        (made,) = text._weighed(states, [prompt])
        wanted = states[0] * torch.tensor(prompt.weights)[:, None]
        share = share or float(states.mean() / wanted.mean())
        torch.testing.assert_close(made, wanted * share, rtol=1e-5, atol=1e-6)


def test_weighted_tokens_are_multiplied_and_the_mean_stays(pipe):
    prompt = text.tokenize(pipe.tokenizer, weighted("a (cat:1.5) on [blue]"))
    bare = text.tokenize(pipe.tokenizer, "a cat on blue")
    assert prompt.ids == bare.ids
    plain = text.encode(pipe.text_encoder, [bare])[0]
    factors = torch.ones(len(bare.ids), dtype=torch.float64)
    factors[2], factors[4] = 1.5, 1 / 1.1

    def by_hand(plain):
        expected = plain * factors[:, None].to(plain)
        return expected * plain.mean() / expected.mean()

    both = text.encode(pipe.text_encoder, [prompt, bare])
    assert_as_accurate(both[0], by_hand(plain), by_hand(plain.double()))
    assert torch.equal(both[1], plain), "a neighbour's weights changed a row"


def test_every_token_of_a_super_class_has_the_weight_of_its_placeholder(pipe):
    parts = weighted("a (<teddy>:1.5) on blue")
    prompt = text.tokenize(pipe.tokenizer, parts, {"<teddy>": "teddy bear"}, chunks=None)
    assert prompt.weights == (1, 1, 1.5, 1.5, *[1] * 28)
    assert extended(pipe.tokenizer, prompt, 2).weights == (*prompt.weights, *[1] * 32)


def test_a_prompt_whose_weights_are_one_is_the_plain_prompt(ready):
    one, other = draw(ready, [order("a (cat:1) on blue"), order("a cat on blue")])
    assert torch.equal(one, other)
    assert (draw(ready, [order("a (cat:1.8) on blue")])[0] - one).abs().max() > APART


def chunks_of(pipe, prompt):
    """Long prompts, encoded by hand: 30 tokens at a time, each with its own start and end."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    size = tokenizer.model_max_length - 2
    rows = []
    for first in range(0, len(ids), size):
        part = [tokenizer.bos_token_id, *ids[first : first + size], tokenizer.eos_token_id]
        rows.append(part + [tokenizer.pad_token_id] * (size + 2 - len(part)))
    return torch.tensor(rows)


def test_a_long_prompt_is_encoded_in_chunks(pipe):
    prompt = text.tokenize(pipe.tokenizer, LONG, chunks=None)
    rows = chunks_of(pipe, LONG)
    assert prompt.chunks == len(rows) == 2 and list(prompt.ids) == rows.flatten().tolist()
    with torch.no_grad():
        expected = pipe.text_encoder(rows)[0].flatten(0, 1)
        found = text.encode(
            pipe.text_encoder, [prompt, extended(pipe.tokenizer, text.tokenize(pipe.tokenizer, "a"), 2)]
        )
    assert torch.equal(found[0], expected)


def test_a_long_prompt_draws_what_its_encodings_draw(ready):
    negative = text.tokenize(ready.tokenizer, "a car")
    with torch.no_grad():
        positive = text.encode(ready.text_encoder, [text.tokenize(ready.tokenizer, LONG, chunks=None)])[0]
        other = text.encode(ready.text_encoder, [extended(ready.tokenizer, negative, 2)])[0]
    by_text = order(LONG, negative_prompt="a car")
    by_embeds = Request(prompt_embeds=positive, negative_prompt_embeds=other, seed=1, guidance_scale=4.0)
    one, two = draw(ready, [by_text, by_embeds])
    torch.testing.assert_close(one, two, rtol=0, atol=ROUNDING)
    assert (draw(ready, [order(" ".join(LONG.split()[:30]))])[0] - one).abs().max() > APART


def test_long_and_short_prompts_share_a_call_and_each_is_as_if_alone(ready, concept_for):
    alice = concept_for(ready)
    orders = [
        order("a dog"),
        order(LONG, 2),
        order("a dog", 3, negative_prompt=LONG),
        Request(f"{LONG} and <alice-cat>", concepts=[Use(alice, lock="global")], seed=4, guidance_scale=4.0),
    ]
    for one, mixed in zip(orders, draw(ready, orders), strict=True):
        assert (draw(ready, [one])[0] - mixed).abs().max() <= COMPANY


@pytest.mark.parametrize("negative", [{"negative_prompt": LONG}, {"negative_regions": [Region(LEFT, tokens=[1])]}])
def test_without_guidance_a_negative_prompt_of_any_length_changes_nothing(ready, negative):
    for prompt in ("a dog", LONG):
        bare, given = (draw(ready, [order(prompt, guidance_scale=1.0, **more)])[0] for more in ({}, negative))
        assert torch.equal(bare, given)


def test_a_distilled_model_takes_encodings_of_any_length_and_reads_no_negative_prompt():
    torch.manual_seed(0)
    pipe = kd.install(tiny.latent_consistency())
    length = pipe.tokenizer.model_max_length
    embeds = torch.randn(length + 3, pipe.unet.config.cross_attention_dim)
    options = {"original_inference_steps": 20, "height": tiny.SIZE, "width": tiny.SIZE}
    for given in ({"prompt": "a dog"}, {"prompt_embeds": embeds}):
        orders = [Request(**given, seed=1, negative_prompt=negative) for negative in (None, LONG)]
        bare, other = (draw(pipe, [one], **options)[0] for one in orders)
        assert torch.equal(bare, other)


def test_a_concept_beyond_the_tokenizers_length_counts(ready, concept_for):
    alice = concept_for(ready, super_class="teddy bear")
    words = f"{LONG} and <alice-cat> and (<alice-cat>:1.2)"
    prompt = text.tokenize(ready.tokenizer, weighted(words), {"<alice-cat>": "teddy bear"}, chunks=None)
    size = ready.tokenizer.model_max_length
    assert len(prompt.words) == 2 and all(position >= size for position, *_ in prompt.words)
    assert all(first // size == (end - 1) // size for first, end, _ in prompt.spans), "a placeholder was divided"
    with_it, without = draw(
        ready, [Request(words, concepts=[Use(alice, strength=s)], seed=1, guidance_scale=4.0) for s in (1.0, 0.0)]
    )
    assert (with_it - without).abs().max() > APART


def test_a_learned_word_stands_in_its_own_chunk(pipe):
    words = f"{LONG} and <alice-cat>"
    prompt = text.tokenize(pipe.tokenizer, words, {"<alice-cat>": "cat"}, chunks=None)
    learned = {"<alice-cat>": torch.randn(32, generator=torch.Generator().manual_seed(0))}
    size = pipe.tokenizer.model_max_length
    with torch.no_grad():
        plain, own = text.encode(pipe.text_encoder, [prompt] * 2, [{}, learned])
    position = prompt.words[0][0]
    assert position > size and torch.equal(own[:position], plain[:position])
    assert not torch.equal(own[position], plain[position])


def test_a_placeholder_at_the_border_begins_the_next_chunk(pipe):
    prompt = "a " * 29 + "<alice-cat> on blue"
    found = text.tokenize(pipe.tokenizer, prompt, {"<alice-cat>": "teddy bear"}, chunks=None)
    assert found.spans == ((33, 35, "<alice-cat>"),) and found.words == ((34, "<alice-cat>", 0),)
    assert found.content == (*range(1, 30), *range(33, 37)) and found.starts == (0, 32)
    assert text.find(pipe.tokenizer, found, "<alice-cat> on") == ((33, 34, 35),)
    longer = extended(pipe.tokenizer, found, 3)
    assert longer.content == found.content and longer.starts == (0, 32, 64)
    assert sorted([*longer.content, *longer.starts, *longer.ending]) == list(range(96))


@pytest.mark.parametrize("endings", ["own", "outside", "hidden"])
def test_regions_of_words_in_any_chunk(ready, endings):
    far = f"{LONG} and a crying cat"
    regions = [Region(LEFT, "crying cat"), Region(1 - LEFT, "house")]
    rows = [order(far, regions=regions, endings=endings), order("a dog", 2)]
    maps = kd.AttentionMaps(["crying cat"])
    together = draw(ready, rows, record=maps)
    assert (draw(ready, rows[:1])[0] - together[0]).abs().max() <= COMPANY
    for found in maps.images[0].maps["crying cat"].values():
        width = found.shape[-1]
        if width > 1:
            assert (found[..., : width // 2] > 0).all() and not found[..., width // 2 :].any()


def test_the_pooled_encoding_of_a_long_prompt_is_the_first_chunks(monkeypatch):
    pipe = kd.install(build("SDXL", adapters=()))
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["added_cond_kwargs"]["text_embeds"]), with_kwargs=True
    )
    first = " ".join(LONG.split()[:30])
    options = {"height": 16, "width": 16, "num_inference_steps": 1}
    draw(pipe, [order(LONG), order(first)], max_batch=1, **options)
    short, long = sorted(seen, key=lambda rows: float((rows - seen[0]).abs().sum()))
    torch.testing.assert_close(short[1], long[1])  # encoded beside other numbers of rows


def test_given_encodings_beside_a_longer_prompt_are_named(ready):
    embeds = torch.zeros(32, 32)
    with pytest.raises(RequestError, match=r"equally many tokens, got \[32, 64\]"):
        draw(ready, [Request(LONG, negative_prompt_embeds=embeds)])
