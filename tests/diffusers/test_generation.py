"""generate: many users' requests in one batch, each as if alone."""

import threading

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

import keylock_diffusers as kd
from keylock_diffusers import Request, RequestError, Use
from keylock_diffusers.encoding import text
from tests.diffusers.drawing import APART, BARELY_APART, COMPANY, ROUNDING

STEPS = 3


pytestmark = pytest.mark.usefixtures("one_thread")


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


@pytest.fixture
def mixed(ready, concept_for):
    """Requests of different users: no concept, one, two combined, other gates, guidance and negative prompts."""
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    return [
        Request("<alice-cat> on blue", concepts=[alice], seed=1),
        Request("a house", seed=2, guidance_scale=3.0),
        Request("<alice-cat> and <bob-dog>", concepts=[alice, Use(bob, strength=0.5, lock="global")], seed=3),
        Request("<bob-dog> on pink", concepts=[Use(bob, beta=0.3, tau=0.5)], seed=4, negative_prompt="a car"),
    ]


def test_the_unet_is_called_once_per_step_for_all_users(ready, mixed):
    calls = []
    handle = ready.unet.register_forward_hook(lambda *_: calls.append(1))
    draw(ready, mixed)
    handle.remove()
    assert len(calls) == STEPS


def test_permuting_requests_permutes_pictures_bit_for_bit(ready, mixed):
    straight = draw(ready, mixed)
    order = [2, 0, 3, 1]
    for place, picture in zip(order, draw(ready, [mixed[n] for n in order]), strict=True):
        assert torch.equal(picture, straight[place])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_poisoned_neighbour_changes_nothing(ready, mixed, concept_for, poison, threads):
    torch.set_num_threads(threads)
    clean = draw(ready, mixed)
    sick = concept_for(ready, "<sick-cat>")
    for name in ("values", "target_input", "direction", "super_class_encoding"):
        broken = torch.full_like(getattr(sick, name).float(), poison)
        object.__setattr__(sick, name, broken)  # past the checks that refuse it
    object.__setattr__(sick, "word_embeddings", (torch.full((32,), poison),))
    neighbours = [*mixed]
    neighbours[2] = Request("<sick-cat>", concepts=[sick], seed=3)
    beside = draw(ready, neighbours, on_error="return")
    for place in (0, 1, 3):
        assert torch.equal(beside[place], clean[place])
    assert isinstance(beside[2], RequestError) and "infinite or no numbers" in str(beside[2])
    with pytest.raises(RequestError, match=r"^request 2 \('<sick-cat>'\): its numbers") as raised:
        draw(ready, neighbours)
    assert raised.value.index == 2 and raised.value.images[2] is raised.value
    for place in (0, 1, 3):
        assert torch.equal(raised.value.images[place], clean[place])


def test_two_users_with_the_same_placeholder_get_their_own(ready, concept_for):
    one, two = concept_for(ready, seed=1), concept_for(ready, seed=2)
    orders = [Request("<alice-cat>", concepts=[c], seed=5) for c in (one, two)]
    first, second = draw(ready, orders)
    assert not torch.equal(first, second)
    swapped = draw(ready, orders[::-1])
    assert torch.equal(first, swapped[1]) and torch.equal(second, swapped[0])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_plain_request_is_the_plain_pipelines_picture(pipe, guidance):
    stock = pipe(
        "a house on blue",
        guidance_scale=guidance,
        negative_prompt="a cat",
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images[0]
    kd.install(pipe)
    order = Request("a house on blue", guidance_scale=guidance, negative_prompt="a cat", seed=3)
    torch.testing.assert_close(draw(pipe, [order])[0], stock, rtol=0, atol=ROUNDING)


def test_alone_and_in_company_differ_by_rounding_at_most(ready, mixed):
    for order, picture in zip(mixed, draw(ready, mixed), strict=True):
        assert (draw(ready, [order])[0] - picture).abs().max() <= COMPANY


def test_each_row_has_its_own_guidance(ready):
    weak, strong = Request("a cat", seed=1, guidance_scale=2.0), Request("a cat", seed=1, guidance_scale=9.0)
    first, second = draw(ready, [weak, strong])
    assert (first - second).abs().max() > APART
    assert torch.equal(draw(ready, [weak, weak])[1], first)
    unguided = Request("a cat", seed=1, guidance_scale=1.0)
    mixed = draw(ready, [weak, unguided])
    assert torch.equal(mixed[1], draw(ready, [unguided])[0])


def test_images_of_one_request_take_the_following_seeds(ready):
    three = draw(ready, [Request("a cat", seed=5, num_images=3), Request("a dog", seed=1)])
    assert len(three[0]) == 3
    singles = draw(ready, [Request("a cat", seed=5 + n) for n in range(3)] + [Request("a dog", seed=1)])
    for n in range(3):
        assert torch.equal(three[0][n], singles[n])


def test_no_seed_draws_anew_each_time(ready):
    assert not torch.equal(draw(ready, [Request("a cat")])[0], draw(ready, [Request("a cat")])[0])


def test_max_batch_splits_and_keeps_the_order(ready, mixed):
    calls = []
    handle = ready.unet.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    split = draw(ready, mixed, max_batch=3)
    handle.remove()
    assert calls == [6] * STEPS + [2] * STEPS
    for ours, whole in zip(split, draw(ready, mixed), strict=True):
        assert (ours - whole).abs().max() <= COMPANY


def test_prompt_embeddings_stand_in_for_prompts(ready):
    positive, negative = ready.encode_prompt("a cat", "cpu", 1, True, "a car")
    by_text = Request("a cat", negative_prompt="a car", seed=1)
    by_embeds = Request(prompt_embeds=positive[0], negative_prompt_embeds=negative[0], seed=1)
    first, second = draw(ready, [by_text, by_embeds])
    assert torch.equal(first, second)


def test_strength_zero_is_the_prompt_with_the_learned_word_alone(ready, concept_for):
    alice = concept_for(ready)
    off = Request("<alice-cat> on blue", concepts=[Use(alice, strength=0.0)], seed=1)
    word_only = alice.with_(values=torch.zeros_like(alice.values))
    other = Request("<alice-cat> on blue", concepts=[Use(word_only, strength=0.0)], seed=1)
    on = Request("<alice-cat> on blue", concepts=[alice], seed=1)
    pictures = draw(ready, [off, other, on])
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_global_lock_draws_another_picture_than_local(ready, concept_for):
    alice = concept_for(ready)
    local, globally = (Request("<alice-cat>", concepts=[Use(alice, lock=lock)], seed=1) for lock in ("local", "global"))
    first, second = draw(ready, [local, globally])
    assert (first - second).abs().max() > BARELY_APART


def test_the_bank_answers_for_ids(ready, concept_for, tmp_path):
    bank = kd.ConceptBank(tmp_path)
    bank.add("alice/cat", concept_for(ready))
    by_id, by_value = draw(
        ready,
        [Request("<alice-cat>", concepts=[c], seed=1) for c in ("alice/cat", bank["alice/cat"])],
        bank=bank,
    )
    assert torch.equal(by_id, by_value)


def test_two_calls_may_interleave(ready, mixed):
    expected = draw(ready, mixed[:2]), draw(ready, mixed[2:])
    results, barrier = {}, threading.Barrier(2)

    def work(name, orders):
        barrier.wait()
        results[name] = draw(ready, orders, callback_on_step_end=lambda *_: barrier.wait() and {} or {})

    threads = [threading.Thread(target=work, args=(n, mixed[2 * n : 2 * n + 2])) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        for ours, theirs in zip(results[n], expected[n], strict=True):
            assert torch.equal(ours, theirs)


def test_schedulers_are_copied_and_stochastic_ones_keep_rows_apart(ready, mixed):
    scheduler = EulerAncestralDiscreteScheduler.from_config(ready.scheduler.config)
    first = draw(ready, mixed, scheduler=scheduler)
    assert scheduler.num_inference_steps is None and ready.scheduler.num_inference_steps is None
    again = draw(ready, mixed[::-1], scheduler=scheduler)[::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_a_bad_request_fails_alone_and_by_name(ready, mixed):
    bad = Request("<nobody> on blue", seed=1)
    calls = []
    handle = ready.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(RequestError, match=r"request 1 \('<nobody> on blue'\): .*<nobody> is no concept") as caught:
        draw(ready, [mixed[0], bad])
    assert caught.value.index == 1 and not calls
    handle.remove()
    returned = draw(ready, [mixed[0], bad, mixed[1]], on_error="return")
    assert isinstance(returned[1], RequestError)
    for ours, alone in zip((returned[0], returned[2]), draw(ready, mixed[:2]), strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "give either prompt or prompt_embeds"),
        (Request("a cat", prompt_embeds=torch.zeros(32, 32)), "give either prompt or prompt_embeds"),
        (Request(prompt_embeds=torch.zeros(32, 5)), r"prompt_embeds must be \[T, 32\], got \[32, 5\]"),
        (Request(prompt_embeds=torch.zeros(32, 32), concepts=["a"]), "concepts need a prompt"),
        (Request("a cat", num_images=0), "num_images must be a whole number from 1 to 64, got 0"),
        (Request("a <x>", concepts=["alice/cat"]), "'alice/cat' is an id, but generate was given no bank"),
        (Request("a <x>", concepts=[3]), "a concept must be an id or a Concept, got int"),
        (Request("a cat", negative_prompt="<alice-cat>"), "<alice-cat> is no concept"),
        (
            Request("a cat", negative_prompt="x", negative_prompt_embeds=torch.zeros(32, 32)),
            "give negative_prompt or negative_prompt_embeds, not both",
        ),
        (Request(prompt_embeds=torch.zeros(9, 32)), "equally many tokens, got .9, 32."),
        (Request("a cat", negative_prompt_embeds=torch.zeros(9, 32)), "equally many tokens, got .9, 32."),
        (Request(prompt_embeds=[1]), "prompt_embeds must be a tensor, got list"),
        (Request(7), "prompt must be text, got int"),
        (Request("a cat", guidance_scale="7"), "guidance_scale must be a finite number, got '7'"),
        (Request("a cat", guidance_scale=float("nan")), "guidance_scale must be a finite number, got nan"),
        (Request("a cat", seed="7"), "seed must be a whole number from 0 to"),
        (Request("a cat", seed=2**64), "seed must be a whole number from 0 to"),
        ("a cat", "must be a Request, got str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_in_a_request_is_named(ready, request_, message):
    with pytest.raises(RequestError, match=message):
        draw(ready, [request_])


def test_a_gate_without_temperature_is_linear_and_has_no_threshold(ready, concept_for):
    alice = concept_for(ready, tau=0.0)
    uses = [alice, Use(alice, beta=5.0), Use(alice, tau=0.15), Use(alice, strength=0.0)]
    linear, shifted, soft, absent = draw(ready, [Request("<alice-cat>", concepts=[use], seed=1) for use in uses])
    assert torch.equal(linear, shifted)
    assert not torch.equal(linear, soft) and not torch.equal(linear, absent)


def test_mistakes_in_the_use_of_a_concept_are_named(ready, concept_for, build_tiny, tmp_path):
    alice = concept_for(ready)
    for use, message in [
        (Use(alice, lock="both"), 'lock must be "local" or "global"'),
        (Use(alice, tau=float("nan")), "tau of <alice-cat> must be a finite number, got nan"),
        (Use(alice, tau=-0.1), "tau of <alice-cat> must be at least 0, got -0.1"),
        (Use(alice, strength="strong"), "strength of <alice-cat> must be a finite number"),
    ]:
        with pytest.raises(RequestError, match=message):
            draw(ready, [Request("<alice-cat>", concepts=[use])])
    with pytest.raises(RequestError, match="same placeholder"):
        draw(ready, [Request("<alice-cat>", concepts=[alice, concept_for(ready, seed=9)])])
    with pytest.raises(RequestError, match="no concept 'bob/dog' in the bank"):
        draw(ready, [Request("<bob-dog>", concepts=["bob/dog"])], bank=kd.ConceptBank(tmp_path))
    stranger = concept_for(build_tiny(seed=5))
    with pytest.raises(RequestError, match="weights"):
        draw(ready, [Request("<alice-cat>", concepts=[stranger])], strict=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"on_error": "ignore"}, ValueError, "on_error"),
        ({"generator": None}, TypeError, "generator belongs to each Request"),
    ],
)
def test_each_mistake_in_the_call_is_named(ready, arguments, error, message):
    with pytest.raises(error, match=message):
        draw(ready, [Request("a cat", seed=1)], **arguments)


def test_a_replaced_processor_is_found_before_the_first_step(pipe):
    with pytest.raises(RuntimeError, match="down_blocks.0.attentions.0.transformer_blocks.0.attn2"):
        draw(pipe, [Request("a cat")])


def test_no_requests_no_pictures(ready):
    assert draw(ready, []) == []


def test_a_loras_scale_reaches_what_is_prepared(pipe):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora)
    order = Request("a cat on blue", seed=1, guidance_scale=4.0)

    def stock(scale):
        return pipe(
            "a cat on blue",
            guidance_scale=4.0,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            cross_attention_kwargs={"scale": scale},
        ).images[0]

    expected = {scale: stock(scale) for scale in (0.0, 0.5)}
    assert (expected[0.0] - expected[0.5]).abs().max() > APART
    kd.install(pipe)
    for scale, picture in expected.items():
        ours = draw(pipe, [order], cross_attention_kwargs={"scale": scale})[0]
        torch.testing.assert_close(ours, picture, rtol=0, atol=ROUNDING)


def test_half_precision_pipelines_draw(ready, mixed, concept_for):
    half = kd.install(ready).to(dtype=torch.bfloat16)
    pictures = draw(half, mixed[:2])
    assert all(p.isfinite().all() for p in pictures)
    assert torch.equal(draw(half, [mixed[0], Request("a dog", seed=8)])[0], pictures[0])


def test_a_uses_gate_counts_instead_of_the_concepts_own(ready, concept_for):
    alice = concept_for(ready, beta=0.7, tau=0.15)
    orders = [
        Request("<alice-cat> on blue", concepts=[concept], seed=1)
        for concept in (
            Use(alice, beta=0.3, tau=0.5),
            alice.with_(beta=0.3, tau=0.5),
            Use(alice, beta=0.3),
            alice.with_(beta=0.3),
            Use(alice, tau=0.5),
            alice.with_(tau=0.5),
            alice,
        )
    ]
    pictures = draw(ready, orders)
    for given, own in ((0, 1), (2, 3), (4, 5)):
        assert torch.equal(pictures[given], pictures[own])
    assert not any(torch.equal(pictures[n], pictures[6]) for n in range(6))


def test_a_concept_reaches_the_conditional_half_alone(ready, concept_for):
    """In the first step the unconditional half is what it is without the concept."""
    halves = []
    handle = ready.unet.register_forward_hook(lambda _module, _inputs, output: halves.append(output[0].chunk(2)))
    for concepts in ([concept_for(ready)], []):
        prompt = "<alice-cat> on blue" if concepts else "cat on blue"
        draw(ready, [Request(prompt, concepts=concepts, seed=1, negative_prompt="a car")], num_inference_steps=1)
    handle.remove()
    (unconditional, conditional), (same, other) = halves
    assert torch.equal(unconditional, same) and not torch.equal(conditional, other)


def test_a_globally_locked_prompts_keys_read_the_super_class_and_locally_locked_words(ready, concept_for, monkeypatch):
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    seen, prepare = [], kd.Personalization.prepare

    def watched(self, pipe, text, key_text=None, **kwargs):
        seen.append(key_text)
        return prepare(self, pipe, text, key_text, **kwargs)

    monkeypatch.setattr(kd.Personalization, "prepare", watched)
    concepts = [Use(alice, lock="global"), bob]
    draw(ready, [Request("<alice-cat> and <bob-dog>", concepts=concepts, seed=1, guidance_scale=1.0)])
    prompt = text.tokenize(ready.tokenizer, "cat and <bob-dog>", {"<bob-dog>": "dog"})
    with torch.no_grad():
        expected = text.encode(ready.text_encoder, [prompt], [{"<bob-dog>": bob.word_embeddings[0]}])
    assert torch.equal(seen[0], expected)


def test_clip_skip_leaves_out_layers_of_the_prompt_and_not_of_the_negative_one(ready):
    """As diffusers does it, whose own call cannot with every release of transformers."""
    ids = [ready.tokenizer(words, padding="max_length", return_tensors="pt").input_ids for words in ("a cat", "a dog")]
    with torch.no_grad():
        states = ready.text_encoder(ids[0], output_hidden_states=True).hidden_states
        model = getattr(ready.text_encoder, "text_model", ready.text_encoder)
        positive, negative = model.final_layer_norm(states[-2])[0], ready.text_encoder(ids[1]).last_hidden_state[0]
    skipped, by_hand = (
        draw(ready, [order], **options)[0]
        for order, options in (
            (Request("a cat", negative_prompt="a dog", seed=1), {"clip_skip": 1}),
            (Request(prompt_embeds=positive, negative_prompt_embeds=negative, seed=1), {}),
        )
    )
    assert torch.equal(skipped, by_hand)
    assert not torch.equal(skipped, draw(ready, [Request("a cat", negative_prompt="a dog", seed=1)])[0])


def test_a_loras_scale_reaches_the_text_encoder_and_is_gone_afterwards(pipe):
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, pipe.text_encoder)
    options = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "pt"}

    def stock(**more):
        return pipe("a cat on blue", generator=torch.Generator().manual_seed(1), **options, **more).images[0]

    expected = {scale: stock(cross_attention_kwargs={"scale": scale}) for scale in (0.25, 2.0)}
    unscaled = stock()
    kd.install(pipe)
    order = Request("a cat on blue", seed=1, guidance_scale=4.0)
    for scale, picture in expected.items():
        ours = draw(pipe, [order], cross_attention_kwargs={"scale": scale})[0]
        torch.testing.assert_close(ours, picture, rtol=0, atol=ROUNDING)
        assert (ours - unscaled).abs().max() > APART
    torch.testing.assert_close(draw(pipe, [order])[0], unscaled, rtol=0, atol=ROUNDING)


def test_a_textual_inversion_of_several_vectors_is_spelled_out_as_by_the_pipeline(pipe):
    pipe.tokenizer.add_tokens(["<hat>", "<hat>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    torch.nn.init.normal_(pipe.text_encoder.get_input_embeddings().weight[-2:].detach())
    prompt, options = "a cat in <hat>", {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "pt"}
    expected = pipe(prompt, generator=torch.Generator().manual_seed(1), **options).images[0]
    kd.install(pipe)
    spelt = draw(pipe, [Request(prompt, seed=1, guidance_scale=4.0)])[0]
    torch.testing.assert_close(spelt, expected, rtol=0, atol=ROUNDING)
    ids = [*pipe.tokenizer("a cat in").input_ids[:-1], *pipe.tokenizer.convert_tokens_to_ids(["<hat>", "<hat>_1"])]
    asked = text.tokenize(pipe.tokenizer, text.converted(pipe, pipe.tokenizer, prompt))
    assert list(asked.ids[: len(ids)]) == ids
