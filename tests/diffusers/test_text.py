"""Prompts: what is encoded is what diffusers encodes, and placeholders never leave a trace."""

import sys
import threading

import pytest
import torch

from keylock_diffusers.encoding import text

CAT = {"<alice-cat>": "cat"}


def vector(seed=0):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_without_placeholders_encodes_as_in_diffusers(pipe):
    prompts = ["a cat on blue", "", "a photo of a zebra, next to a house"]
    theirs, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    ours = text.encode(pipe.text_encoder, [text.tokenize(pipe.tokenizer, prompt) for prompt in prompts])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_is_an_encoder_with_fewer_layers(pipe, clip_skip):
    prompts = [text.tokenize(pipe.tokenizer, "a cat on blue")]
    skipped = text.encode(pipe.text_encoder, prompts, clip_skip=clip_skip)
    if clip_skip:
        assert not torch.equal(skipped, text.encode(pipe.text_encoder, prompts))
    del pipe.text_encoder.encoder.layers[2 - clip_skip :]
    assert torch.equal(skipped, text.encode(pipe.text_encoder, prompts))


def test_an_offloaded_encoder_gives_the_same_encodings(pipe):
    from accelerate import cpu_offload

    prompts = [text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)]
    words = [{"<alice-cat>": vector()}]
    expected = text.encode(pipe.text_encoder, prompts, words)
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    assert pipe.text_encoder.get_input_embeddings().weight.device.type == "meta"
    assert torch.equal(text.encode(pipe.text_encoder, prompts, words), expected)


@pytest.mark.parametrize("super_class", ["cat", "teddy bear"])
def test_an_untrained_placeholder_encodes_as_its_super_class(pipe, super_class):
    prompt = text.tokenize(pipe.tokenizer, "a grinning <alice-cat> on blue", {"<alice-cat>": super_class})
    plain = text.tokenize(pipe.tokenizer, f"a grinning {super_class} on blue")
    last = text.super_class_ids(pipe.tokenizer, super_class)[-1]
    word = pipe.text_encoder.get_input_embeddings().weight[last]
    assert prompt.ids == plain.ids
    with_word = text.encode(pipe.text_encoder, [prompt], [{"<alice-cat>": word}])
    assert torch.equal(with_word, text.encode(pipe.text_encoder, [plain]))


def test_the_learned_word_stands_at_every_occurrence_and_at_the_noun(pipe):
    prompt = text.tokenize(pipe.tokenizer, "<alice-cat> and a <alice-cat>", {"<alice-cat>": "teddy bear"})
    assert [position for position, *_ in prompt.words] == [2, 6]


def test_two_users_of_one_placeholder_stay_apart_in_one_batch(pipe):
    prompt = text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)
    words = [{"<alice-cat>": vector(1)}, {"<alice-cat>": vector(2)}]
    both = text.encode(pipe.text_encoder, [prompt, prompt], words)
    swapped = text.encode(pipe.text_encoder, [prompt, prompt], words[::-1])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both, swapped.flip(0))


def test_a_nan_word_stays_in_its_row(pipe):
    prompt = text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)
    clean = text.encode(pipe.text_encoder, [prompt, prompt], [{"<alice-cat>": vector(1)}, {"<alice-cat>": vector(2)}])
    nan = torch.full((32,), float("nan"))
    poisoned = text.encode(pipe.text_encoder, [prompt, prompt], [{"<alice-cat>": vector(1)}, {"<alice-cat>": nan}])
    assert torch.equal(poisoned[0], clean[0])
    assert poisoned[1].isnan().any()


def test_gradients_reach_the_learned_word_only(pipe):
    prompt = text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)
    word = vector().requires_grad_()
    pipe.text_encoder.requires_grad_(False)
    text.encode(pipe.text_encoder, [prompt], [{"<alice-cat>": word}]).square().sum().backward()
    assert word.grad is not None and word.grad.abs().max() > 0


def test_encoding_leaves_tokenizer_and_encoder_as_they_were(pipe):
    vocabulary, weight = len(pipe.tokenizer), pipe.text_encoder.get_input_embeddings().weight
    before = weight.clone()
    prompt = text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)
    text.encode(pipe.text_encoder, [prompt], [{"<alice-cat>": vector()}])
    with pytest.raises(RuntimeError):
        text.encode(pipe.text_encoder, [prompt], [{"<alice-cat>": torch.zeros(5)}])
    assert len(pipe.tokenizer) == vocabulary
    assert torch.equal(weight, before)
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_another_threads_encoding_does_not_see_the_learned_word(pipe):
    prompt = text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)
    plain = text.encode(pipe.text_encoder, [prompt])
    seen = []

    def other(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(text.encode(pipe.text_encoder, [prompt])))
            thread.start()
            thread.join()

    handle = pipe.text_encoder.register_forward_hook(other)  # runs while the word is in place
    text.encode(pipe.text_encoder, [prompt], [{"<alice-cat>": vector()}])
    handle.remove()
    assert torch.equal(seen[0], plain)


def test_a_pipelines_call_in_another_thread_does_not_pad_or_cut_what_is_tokenized(pipe):
    prompt, stop, interval = "a cat on blue and a dog", threading.Event(), sys.getswitchinterval()
    expected = text.tokenize(pipe.tokenizer, prompt)

    def call():
        while not stop.is_set():
            pipe.tokenizer(["a"], padding="max_length", max_length=4, truncation=True)

    thread = threading.Thread(target=call)
    try:
        sys.setswitchinterval(1e-6)
        thread.start()
        assert all(text.tokenize(pipe.tokenizer, prompt) == expected for _ in range(2000))
        assert all(text.as_given(pipe.tokenizer, prompt).ids == expected.ids for _ in range(500))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_placeholders_may_be_written_in_capitals(pipe):
    lower = text.tokenize(pipe.tokenizer, "<alice-cat> on blue", CAT)
    assert text.tokenize(pipe.tokenizer, "<Alice-CAT> on blue", CAT) == lower


@pytest.mark.parametrize(
    ("prompt", "concepts", "message"),
    [
        ("<bob-cat> on blue", CAT, "<bob-cat> is no concept of this request"),
        ("<bob-cat> on blue", {}, "concepts: none"),
        ("a cat on blue", CAT, "<alice-cat> was given but is not in the prompt"),
        ("a " * 40 + "<alice-cat>", CAT, "<alice-cat> lies beyond the 30 tokens"),
        ("a " * 30 + "<alice-cat>", CAT, "<alice-cat> lies beyond the 30 tokens"),
    ],
)
def test_wrong_placeholders_are_named(pipe, prompt, concepts, message):
    with pytest.raises(ValueError, match=message):
        text.tokenize(pipe.tokenizer, prompt, concepts)


def test_a_placeholder_may_be_the_last_token_that_is_read(pipe):
    assert text.tokenize(pipe.tokenizer, "a " * 29 + "<alice-cat>", CAT).words == ((30, "<alice-cat>", 0),)


def test_a_prompt_that_is_too_long_is_cut_as_in_diffusers(pipe, caplog):
    prompt = "a cat " * 40
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    assert torch.equal(text.encode(pipe.text_encoder, [text.tokenize(pipe.tokenizer, prompt)]), theirs)
    assert "is cut after 30 tokens" in caplog.text


def test_an_empty_super_class_is_refused(pipe):
    with pytest.raises(ValueError, match="super_class must be a word"):
        text.super_class_ids(pipe.tokenizer, "  ")
