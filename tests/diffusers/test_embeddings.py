"""Learned words per row: each row is what a pipeline draws into which diffusers loaded that user's file alone."""

import copy
import dataclasses
import json
import unicodedata
from pathlib import Path

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers import Embedding, Region, Request, RequestError, RequestLimits, Use
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.learned import LearnedWords
from keylock_diffusers.encoding.names import split
from keylock_diffusers.encoding.weights import weighted
from keylock_diffusers.generation.batch import Picture
from keylock_diffusers.generation.engine import Engine, Settings
from keylock_diffusers.loras import LearnedWord
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.compatibility import SIZE, STEPS, WIDTH
from tests.diffusers.drawing import APART, COMPANY, ROUNDING, build, draw, random
from tests.diffusers.lora_files import write

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = {"SD 1.x": 1, "SDXL": 2}  # and how many text encoders each has
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
LONG = "a cat on blue and a dog on pink and " * 3


def vectors(count, seed=0):
    return random(count, WIDTH, seed=seed) * 0.5


def word(name="<bad-hand>", count=2, seed=0, encoders=1):
    return LearnedWord(name, tuple(vectors(count, seed + 100 * n) for n in range(encoders)))


def order(prompt="a house", seed=1, **more):
    return Request(prompt, seed=seed, **{"guidance_scale": 4.0, **more})


@pytest.fixture(scope="module", params=FAMILIES)
def ready(request):
    """A pipeline of each family that nobody changes: copy it to load something."""
    return kd.install(build(request.param, adapters=()))


@pytest.fixture(scope="module")
def one():
    return kd.install(build("SD 1.x", adapters=()))


def encoders_of(pipe):
    return [(pipe.tokenizer, pipe.text_encoder)] + (
        [(pipe.tokenizer_2, pipe.text_encoder_2)] if hasattr(pipe, "text_encoder_2") else []
    )


def loaded(pipe, path, name):
    """A copy of the pipeline into which diffusers loaded a file; in small letters, since of several vectors it reads
    the first alone where a name has capitals."""
    from safetensors.torch import load_file

    pipe = copy.deepcopy(pipe)
    tensors = load_file(path)
    for n, (tokenizer, encoder) in enumerate(encoders_of(pipe)):
        given = tensors[("clip_l", "clip_g")[n]] if len(tensors) > 1 else dict(tensors)
        pipe.load_textual_inversion(given, token=name.lower(), tokenizer=tokenizer, text_encoder=encoder)
    return pipe


def encoded(pipe, orders):
    """What the rows of one batch read: [B, T, D] of both halves, and the pooled encodings."""
    engine = Engine(pipe, Settings(num_inference_steps=STEPS, height=SIZE, width=SIZE))
    with torch.no_grad():
        made = engine.load([Picture(engine.plan(one)) for one in orders]).text.last
    return {"cond": made.read, "uncond": made.uncond, **{f"pooled {half}": p for half, p in made.pooled.items()}}


@torch.no_grad()
def theirs(pipe, one):
    """The same of one request, by the pipeline itself."""
    second = {}
    if hasattr(pipe, "text_encoder_2"):
        second = {"prompt_2": one.prompt_2, "negative_prompt_2": one.negative_prompt_2}
    said = {"prompt": one.prompt, "negative_prompt": one.negative_prompt, **second}
    said = {name: words and words.lower() for name, words in said.items()}
    found = pipe.encode_prompt(**said, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return dict(zip(("cond", "uncond", "pooled cond", "pooled uncond"), found, strict=len(found) == 4))


def files(encoders, folder):
    """A file of each layout that a model of so many text encoders has, with what the prompts call its word."""
    if encoders == 2:
        made = {
            "<bad-hand>": {"clip_l": vectors(3, 1), "clip_g": vectors(3, 2)},
            "EasyNegative": {"clip_l": vectors(1, 3), "clip_g": vectors(1, 4)},
        }
    else:
        made = {
            "<one>": {"<one>": vectors(1, 1)[0]},
            "<bad-hand>": {"<bad-hand>": vectors(3, 2)},
            "EasyNegative": {"emb_params": vectors(2, 3)},
            "badhandv4": {"string_to_param.*": vectors(1, 4)},
        }
    return {name: write(folder / f"{n}.safetensors", tensors) for n, (name, tensors) in enumerate(made.items())}


def test_each_row_of_a_mixed_batch_is_a_pipeline_with_that_users_file_alone(ready, tmp_path):
    encoders = len(encoders_of(ready))
    made = files(encoders, tmp_path)
    other = {"clip_l": vectors(2, 7), "clip_g": vectors(2, 8)} if encoders == 2 else {"emb_params": vectors(2, 7)}
    users = [*made.items(), ("<bad-hand>", write(tmp_path / "other.safetensors", other))]  # two of one name
    orders = [
        order(f"a cat, {name} on blue", negative_prompt="a house", embeddings=[Embedding(path, name)])
        for name, path in users
    ]
    orders += [
        order("a cat", negative_prompt=f"a dog, {name}, x, {name.upper()}", embeddings=[Embedding(path, name)])
        for name, path in users
    ]
    if encoders == 2:
        name, path = users[0]
        seconds = {"prompt_2": f"oil of {name}", "negative_prompt_2": f"{name}"}
        orders.append(order("a cat", negative_prompt="a dog", embeddings=[Embedding(path, name)], **seconds))
    owners = [*users, *users, users[0]]
    orders.append(order("a cat", negative_prompt="a house"))  # of nobody's
    ours = encoded(ready, orders)
    alone = [*(loaded(ready, path, name) for name, path in owners[: len(orders) - 1]), ready]
    for row, (one, pipe) in enumerate(zip(orders, alone, strict=True)):
        eager, exact = theirs(pipe, one), theirs(copy.deepcopy(pipe).to(torch.float64), one)
        assert {*eager} == {*ours}
        for half, states in ours.items():
            assert_as_accurate(states[row], eager[half][0], exact[half][0])
    # And what is drawn.
    pictures = draw(ready, orders)
    for row in (0, len(users), len(orders) - 1):
        own = {"prompt": orders[row].prompt.lower(), "negative_prompt": orders[row].negative_prompt.lower()}
        options = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "height": SIZE, "width": SIZE}
        plain = alone[row](**own, **options, generator=torch.Generator().manual_seed(1), output_type="np").images[0]
        torch.testing.assert_close(pictures[row], torch.as_tensor(plain), rtol=0, atol=COMPANY)
    assert (pictures[0] - pictures[len(users) - 1]).abs().max() > APART


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_are_cast_to_the_encoders_dtype(ready, dtype, tmp_path):
    encoders = len(encoders_of(ready))
    name, path = next(iter(files(encoders, tmp_path).items()))
    one = order(f"a cat, {name}", negative_prompt=f"{name}", embeddings=[Embedding(path, name)])
    pipe = loaded(ready, path, name)
    exact = theirs(copy.deepcopy(pipe).to(torch.float64), one)
    found, eager = encoded(copy.deepcopy(ready).to(dtype), [one]), theirs(pipe.to(dtype), one)
    for half, states in eager.items():
        assert found[half].dtype == dtype
        assert_as_accurate(found[half][0], states[0], exact[half][0])


def by_hand(pipe, pieces, learned):
    """Encodings [T, D] of chunks whose pieces are texts and vectors, through the embeddings themselves."""
    table, tokenizer, rows = pipe.text_encoder.get_input_embeddings(), pipe.tokenizer, []
    for chunk in pieces:
        ids, places = [tokenizer.bos_token_id], {}
        for piece in chunk:
            if piece is learned:
                places |= {len(ids) + n: vector for n, vector in enumerate(learned)}
                ids += [tokenizer.eos_token_id - 1] * len(learned)
            else:
                ids += tokenizer(piece, add_special_tokens=False).input_ids
        ids.append(tokenizer.eos_token_id)
        rows.append((ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids)), places))
    made = []
    for ids, places in rows:

        def put(_module, _inputs, output, places=places):
            return torch.stack([places.get(n, vector).to(vector) for n, vector in enumerate(output[0])])[None]

        handle = table.register_forward_hook(put)
        with torch.no_grad():
            made.append(pipe.text_encoder(torch.tensor([ids]))[0][0])
        handle.remove()
    return torch.cat(made)


@pytest.mark.parametrize("count", [1, 4, 20])
def test_a_word_is_not_divided_between_chunks_where_it_fits_one(one, count):
    learned = vectors(count)
    start, end = LONG[: LONG.index("pink")].strip(), "and a house"
    length = len(one.tokenizer(start, add_special_tokens=False).input_ids)
    room = one.tokenizer.model_max_length - 2
    filling = " ".join(["a"] * (room - length - count + 1))  # one vector too many for the first chunk
    held = [order(f"{start} {filling} <w> {end}", embeddings=[Embedding(LearnedWord("<w>", (learned,)))])]
    pieces = [[f"{start} {filling}"], [learned, end]]
    exact = by_hand(copy.deepcopy(one).to(torch.float64), pieces, learned)
    assert_as_accurate(encoded(one, held)["cond"][0], by_hand(one, pieces, learned), exact)


def test_a_word_longer_than_a_chunk_goes_on_in_the_next(one):
    size = one.tokenizer.model_max_length
    tokens = text.tokenize(one.tokenizer, "a <w> cat and a dog", words={"<w>": 40}, chunks=None)
    assert [(position, n) for position, _, n in tokens.words] == [(n + 2 + 2 * (n >= 29), n) for n in range(40)]
    (found,) = text.find(one.tokenizer, tokens, "a <w> cat")
    assert len(found) == 42 and {*found} <= {*tokens.content} and found[-1] == 2 + 40 + 2
    assert text.find(one.tokenizer, tokens, "dog")[0][0] > size
    own = text.with_own_words(one.tokenizer, tokens, [p for p, *_ in tokens.words], [tokens.content[-1]], chunks=None)
    assert [n for *_, n in own.words] == [*range(40)] * 2
    with pytest.raises(ValueError, match="<w> lies beyond the 30 tokens"):
        text.tokenize(one.tokenizer, "a <w>", words={"<w>": 40})
    whole = text.with_own_words(one.tokenizer, tokens, [found[0]], [found[-1]], chunks=None)
    assert whole.words == tokens.words and whole.spans == tokens.spans


def test_every_token_of_a_word_has_its_weight(one):
    words = {"EasyNegative": 3}
    prompt = text.tokenize(one.tokenizer, weighted("a (easynegative:1.5) on [blue]"), words=words, chunks=None)
    assert prompt.weights[:7] == (1, 1, 1.5, 1.5, 1.5, 1, 1 / 1.1) and {*prompt.weights[7:]} == {1}
    learned = word("EasyNegative", 3)
    heavy, plain = (
        encoded(one, [order(negative_prompt=said, embeddings=[Embedding(learned)])])["uncond"][0]
        for said in ("a (EasyNegative:1.5) on [blue]", "a EasyNegative on blue")
    )
    factors = torch.tensor(prompt.weights, dtype=torch.float64)[:, None]

    def scaled(plain):
        expected = plain * factors.to(plain)
        return expected * plain.mean() / expected.mean()

    assert_as_accurate(heavy, scaled(plain), scaled(plain.double()))


def test_two_users_of_one_name_and_their_neighbours_stay_apart_to_the_bit(ready):
    encoders = len(encoders_of(ready))

    def rows(seed, scale=1.0, count=2):
        given = word(count=count, seed=seed, encoders=encoders).vectors
        huge = LearnedWord("<bad-hand>", tuple(v * scale for v in given))
        return [
            order("a cat", negative_prompt="<bad-hand>", embeddings=[Embedding(word(encoders=encoders))]),
            order("<bad-hand> cat", negative_prompt="<bad-hand>", embeddings=[Embedding(huge)], seed=2),
            order("a cat", seed=3),
        ]

    before = draw(ready, rows(1))
    assert (before[1] - draw(ready, rows(2))[1]).abs().max() > APART
    for other in (rows(2), rows(3, count=1), rows(4, scale=1e30)):
        after = draw(ready, other, on_error="return")
        assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert isinstance(after[1], RequestError) or after[1].isfinite().all()
    turned = draw(ready, rows(1)[::-1])[::-1]
    assert all(map(torch.equal, turned, before))


def test_nothing_is_left_behind(ready):
    before = [(len(tokenizer), copy.deepcopy(encoder.state_dict())) for tokenizer, encoder in encoders_of(ready)]
    draw(ready, [order("<bad-hand>", embeddings=[Embedding(word(encoders=len(before)))])])
    for (size, state), (tokenizer, encoder) in zip(before, encoders_of(ready), strict=True):
        assert len(tokenizer) == size and not encoder.get_input_embeddings()._forward_hooks
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("said", "names", "found"),
    [
        ("a BADHAND, x", ["badhand"], ["badhand"]),
        ("badhandv4 badhand-5 my_badhand ubadhand badhand2", ["badhand"], []),
        ("(badhand) badhand: badhand's", ["badhand"], ["badhand"] * 3),
        ("badhand badhand-5", ["badhand", "badhand-5"], ["badhand", "badhand-5"]),
        ("x<bad>y <BAD>", ["<bad>"], ["<bad>"] * 2),
        ("a <hand> hand", ["hand"], ["hand"]),
        ("a <hand>", ["hand", "<hand>"], ["<hand>"]),
        ("a.b axb", ["a.b"], ["a.b"]),
        ("a.b a", ["a", "a.b"], ["a.b", "a"]),
        ("aaa .* a+", [".*", "a+"], [".*", "a+"]),
        (r"^$ \d (?i) [x] x|y", [r"\d", "(?i)", "[x]", "x|y", "^$"], ["^$", r"\d", "(?i)", "[x]", "x|y"]),
        ("ÉCOLE e\u0301cole", ["école"], ["école"] * 2),
        ("手 悪い手", ["手"], ["手"]),
        ("\U0001f4a9 x", ["\U0001f4a9"], ["\U0001f4a9"]),
        ("x" * 199 + " " + "x" * 200, ["x" * 200], ["x" * 200]),
        ("two words", ["two words"], ["two words"]),
        ("", ["a"], []),
    ],
)
def test_names_are_found_as_words_of_their_own(said, names, found):
    pieces = list(split(said, names))
    assert [name for _, name in pieces if name] == found
    assert "".join(piece for piece, _ in pieces) == unicodedata.normalize("NFC", said)


HOSTILE = (*r".* (?P<x> \ a|b [ ] ( $ {9} <|endoftext|> <a><b> 手 💩".split(), "x" * 200)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_names(one, name):
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in name)
    spelled = order(negative_prompt=f"a {escaped} cat", embeddings=[Embedding(word(), name)])
    plain = order(negative_prompt="a <bad-hand> cat", embeddings=[Embedding(word())])
    assert torch.equal(encoded(one, [spelled])["uncond"], encoded(one, [plain])["uncond"])
    with pytest.raises(RequestError, match="is in none of the prompts as a word of its own"):
        draw(one, [order(negative_prompt="a cat", embeddings=[Embedding(word(), name)])])


def test_a_file_without_a_name_is_called_as_the_file_is(one, tmp_path):
    path = write(tmp_path / "EasyNegative.safetensors", {"emb_params": vectors(2)})
    by_file, by_word = (
        encoded(one, [order(negative_prompt="EasyNegative", embeddings=[source])])
        for source in (Embedding(path), Embedding(word("x"), "easynegative"))
    )
    assert torch.equal(by_file["uncond"], by_word["uncond"])
    spaced = write(tmp_path / "bad hand.safetensors", {"emb_params": vectors(2)})
    with pytest.raises(RequestError, match="name of an Embedding must be without spaces, got 'bad hand'"):
        draw(one, [order(negative_prompt="bad hand", embeddings=[Embedding(spaced)])])


WIDE = LearnedWord("<bad-hand>", (torch.ones(1, WIDTH + 1),))
WRONG = {
    "a path as text": ([Embedding("bad.safetensors")], "source: an embedding must be a Path or a LearnedWord, got 'b"),
    "no embedding": ([word()], "embeddings must be Embedding objects, got LearnedWord"),
    "no list": ("<bad-hand>", "embeddings must be a list, got str"),
    "a name that is no text": ([Embedding(word(), 7)], "name of an Embedding must be text, got int"),
    "no name": ([Embedding(word(), "")], "must be called by at most 200 printable characters, got ''"),
    "a long name": ([Embedding(word(), "x" * 201)], "at most 200 printable characters"),
    "an unprintable name": ([Embedding(word(), "a\x1b[2J")], "at most 200 printable characters"),
    "half a letter": ([Embedding(word(), "\ud800")], "at most 200 printable characters"),
    "a name of two words": ([Embedding(word(), "bad hand")], "must be without spaces, got 'bad hand'"),
    "one name twice": ([Embedding(word()), Embedding(word(seed=1), "<BAD-hand>")], "another embedding is called '<BAD"),
    "a concept's name": ([Embedding(word(), "<Alice-cat>")], "a concept or another .* is called '<Alice-cat>' too"),
    "in no prompt": ([Embedding(word()), Embedding(word(), "bad")], "'bad' is in none of the prompts as a word of its"),
    "in brackets": ([Embedding(word()), Embedding(word(), "(x)")], r"'\(x\)' is in none .* brackets .* written \\\( "),
    "another width": ([Embedding(WIDE)], r"of the widths \[32\].*got \[\[1, 33\]\]"),
    "two encoders": ([Embedding(word(encoders=2))], r"of the widths \[32\].*got \[\[2, 32\], \[2, 32\]\]"),
    "too many vectors": ([Embedding(word(count=1_025))], "must have at most 1024 vectors"),
    "too many in all": ([Embedding(word(count=1_000))], "a prompt must have at most 1024 tokens, got more"),
    "too many words": ([Embedding(word())] * 65, "embeddings must be at most 64, got 65"),
    "no file": ([Embedding(Path("no.safetensors"))], "No such file"),
    "a folder": ([Embedding(Path("."))], "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_costs_the_others_nothing(one, concept_for, case):
    given, message = WRONG[case]
    bad = order("<bad-hand> <alice-cat> <bad-hand>", concepts=[concept_for(one)], embeddings=given, id="the bad one")
    with pytest.raises(RequestError, match=message) as caught:
        draw(one, [bad])
    assert caught.value.id == "the bad one" and len(str(caught.value)) < 500
    good = order("a <bad-hand>", embeddings=[Embedding(word())])
    drawn = draw(one, [good, bad], on_error="return")
    assert isinstance(drawn[1], RequestError) and torch.equal(drawn[0], draw(one, [good])[0])


def test_a_file_is_not_read_where_its_header_says_too_much(one, tmp_path, monkeypatch):
    from keylock_diffusers.tensor_file import TensorFile

    path = write(tmp_path / "bad.safetensors", {"emb_params": vectors(9)})
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(RequestError, match=r"must have at most 8 vectors of the widths \[32\], got \[9, 32\]"):
        draw(one, [order("bad", embeddings=[Embedding(path)])], limits=RequestLimits(tokens=8))


def test_without_text_there_is_nothing_for_a_word_to_stand_in(one):
    embeds = torch.zeros(32, 32)
    given = {"prompt": None, "prompt_embeds": embeds, "embeddings": [Embedding(word())]}
    with pytest.raises(RequestError, match="'<bad-hand>' is in none of the prompts"):
        draw(one, [order(**given, negative_prompt_embeds=embeds)])
    freed = copy.copy(one)
    freed.text_encoder = None
    with pytest.raises(RequestError, match="text encoder is not loaded"):
        draw(freed, [order("<bad-hand>", embeddings=given["embeddings"])])
    with pytest.raises(RequestError, match="a prompt must have at most 31 tokens, got more"):
        draw(one, [order("<bad-hand>", embeddings=given["embeddings"])], limits=RequestLimits(tokens=31))
    both = [
        order(**given, negative_prompt="<bad-hand>"),
        order("<bad-hand>", embeddings=[Embedding(word(count=3, seed=1))]),  # whose prompt fills in for the encodings
    ]
    apart = encoded(one, [order("<bad-hand>", negative_prompt="<bad-hand>", embeddings=given["embeddings"])])
    together = encoded(one, both)
    assert torch.equal(together["cond"][0], embeds)
    torch.testing.assert_close(together["uncond"][0], apart["uncond"][0])


def test_a_placeholder_that_nobody_knows_is_named_with_what_there_is(one):
    with pytest.raises(RequestError, match=r"<bob> is no concept .* no embedding \(concepts: none; embeddings: <bad-"):
        draw(one, [order("<bob>", negative_prompt="<bad-hand>", embeddings=[Embedding(word())])])


def test_a_concept_and_a_word_stand_in_one_prompt(one, concept_for):
    alice = concept_for(one)
    said = "<alice-cat> with <bad-hand> on blue"
    both = order(said, concepts=[alice], embeddings=[Embedding(word())])
    tokens = text.tokenize(one.tokenizer, said, {"<alice-cat>": "cat"}, {"<bad-hand>": 2})
    learned = {"<alice-cat>": alice.word_embeddings[0], "<bad-hand>": word().vectors[0]}
    with torch.no_grad():
        expected = text.encode(one.text_encoder, [tokens] * 2, [learned] * 2)[0]
        without = text.encode(one.text_encoder, [tokens] * 2, [{"<bad-hand>": learned["<bad-hand>"]}] * 2)[0]
    engine = Engine(one, Settings(num_inference_steps=STEPS, height=SIZE, width=SIZE))
    waiting = dataclasses.replace(both, subject_start=0.5)
    early, late = engine.load([Picture(engine.plan(waiting))]).text.phases
    torch.testing.assert_close(late.read[0], expected)
    torch.testing.assert_close(early.read[0], without)
    alone = order("<alice-cat> with hands on blue", concepts=[alice])
    assert (draw(one, [both])[0] - draw(one, [alone])[0]).abs().max() > APART


def test_a_region_and_a_map_may_name_a_word(one):
    held = {"embeddings": [Embedding(word(count=3))]}
    said = "a cat with <bad-hand> and a dog"
    regions = [Region(LEFT, "<Bad-hand>"), Region(1 - LEFT, "dog")]
    engine = Engine(one, Settings(num_inference_steps=STEPS, height=SIZE, width=SIZE))
    plan = engine.plan(order(said, regions=regions, **held))
    (first,), (second,) = plan.wordings.prompts[1:]
    assert [n for *_, n in first.words] == [0, 1, 2] * 2 and not second.words, "a region's own wording"
    maps = kd.AttentionMaps(["<bad-hand>", "with <bad-hand>"])
    draw(one, [order(said, regions=regions, **held), order("a dog")], record=maps)
    assert [*maps.images[0].maps] == ["<bad-hand>", "with <bad-hand>"] and not maps.images[1].maps
    seen = [m for m in maps.images[0].maps["<bad-hand>"].values() if m.shape[-1] > 1]
    for found in seen:
        width = found.shape[-1]
        assert (found[..., : width // 2] > 0).all() and not found[..., width // 2 :].any()
    assert seen
    for endings in ("everywhere", "outside", "hidden"):
        plan = engine.plan(order(said, regions=regions, endings=endings, **held))
        assert len(plan.row.regions.uses[0].tokens) == 3
    negative = [Region(LEFT, "<bad-hand>")]
    plan = engine.plan(order(negative_prompt="ugly <bad-hand>", negative_regions=negative, **held))
    assert [n for *_, n in plan.negative_wordings.prompts[1][0].words] == [0, 1, 2]


@pytest.mark.parametrize("name", ["<hat>", "<hat>_1", "<shoe>"])
def test_words_that_diffusers_loaded_stand_beside_a_requests_own(one, name, tmp_path):
    """Those of a request hide the pipeline's of the same name; the pipeline's are spelled out around them."""
    of_all = {"<hat>": vectors(2, seed=9)}
    pipe = copy.deepcopy(one)
    pipe.load_textual_inversion(dict(of_all))
    path = write(tmp_path / "own.safetensors", {"emb_params": vectors(3, seed=4)})
    reference = copy.deepcopy(pipe)
    reference.load_textual_inversion({"<own>": vectors(3, seed=4)})
    said = f"a cat {name} on <hat> and <shoe>" if name != "<hat>" else "a cat <hat> on blue"
    said = said.replace("<shoe>", "blue") if name != "<shoe>" else said
    ours = encoded(kd.install(pipe), [order(said, embeddings=[Embedding(path, name)])])["cond"][0]
    them = order(said.replace(name, "<own>"))
    assert_as_accurate(
        ours, theirs(reference, them)["cond"][0], theirs(copy.deepcopy(reference).to(torch.float64), them)["cond"][0]
    )


def test_bundled_words_are_used_where_they_stand_and_hidden_by_the_requests_own():
    limits = RequestLimits(embeddings=3)
    mine, theirs_, other = word("<a>"), word("<A>", seed=1), word("<b>", seed=2)
    words = LearnedWords.of([Embedding(mine)], ["<c>"], [WIDTH], limits, [theirs_, other])
    assert words.lengths == {"<a>": 2, "<b>": 2} and words.asked == ("<a>",)
    assert torch.equal(words.vectors["<a>"][0], mine.vectors[0])
    assert LearnedWords.of([], ["<a>"], [WIDTH], limits, [theirs_, other]).lengths == {"<b>": 2}
    same = LearnedWords.of([], [], [WIDTH], limits, [theirs_, word("<a>", seed=1)])
    assert same.lengths == {"<A>": 2} and not same.unclear
    unclear = LearnedWords.of([], [], [WIDTH], limits, [theirs_, mine])
    tokenizer = build("SD 1.x", adapters=()).tokenizer
    unclear.check([text.tokenize(tokenizer, "a cat", words=unclear.lengths)])
    with pytest.raises(ValueError, match="two of its LoRA files bring different words '<A>'"):
        unclear.check([text.tokenize(tokenizer, "an <a>", words=unclear.lengths)])
    with pytest.raises(ValueError, match="embeddings must be at most 3 with those of its LoRA files, got 1 and 3"):
        LearnedWords.of([Embedding(mine)], [], [WIDTH], limits, [theirs_, other, other])
    with pytest.raises(ValueError, match=r"'<b>' must have at most 1024 vectors of the widths \[33\]"):
        LearnedWords.of([], [], [WIDTH + 1], limits, [other])


def test_json_names_files_of_its_folder(one, tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir()
    write(folder / "badhand.safetensors", {"emb_params": vectors(2)})
    said = {"prompt": "a cat", "negative_prompt": "badhand", "seed": 1, "guidance_scale": 4.0}
    said["embeddings"] = [{"source": "badhand.safetensors"}]
    made = Request.from_json(json.loads(json.dumps(said)), folder)
    assert made.embeddings[0].source == folder / "badhand.safetensors" and made.embeddings[0].name is None
    by_word = order("a cat", negative_prompt="badhand", embeddings=[Embedding(word("badhand"))])
    assert torch.equal(draw(one, [made])[0], draw(one, [by_word])[0])
    write(tmp_path / "outside.safetensors", {"emb_params": vectors(2)})
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for source, error, message in [
        ("../outside.safetensors", ValueError, "source must be a file inside"),
        ("link.safetensors", ValueError, "source must be a file inside"),
        (str(tmp_path / "outside.safetensors"), ValueError, "source must be a file inside"),
        ("no.safetensors", FileNotFoundError, "source: No such file"),
        (".", ValueError, "source .*: not a regular file"),
        (7, TypeError, "source must be the name of a file, got int"),
        (None, TypeError, "source must be the name of a file, got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            Request.from_json({**said, "embeddings": [{"source": source}]}, folder)
    with pytest.raises(ValueError, match="source must be None where no folder of files was given"):
        Request.from_json(said)
    outside = {**said, "embeddings": [{"source": "../outside.safetensors", "name": "badhand"}]}
    assert Request.from_json(outside, folder, outside=True).embeddings[0].name == "badhand"
    with pytest.raises(TypeError, match=r"embeddings\[0\] must be an object, got str"):
        Request.from_json({**said, "embeddings": ["badhand.safetensors"]}, folder)


def test_alone_and_in_company_a_row_draws_the_same(one):
    rows = [
        order("a cat", negative_prompt="<bad-hand>", embeddings=[Embedding(word())]),
        order(f"{LONG} <bad-hand>", 2, embeddings=[Embedding(word(count=9))]),
        order("<bad-hand>", 3, embeddings=[Embedding(word(seed=2))], num_images=1, guidance_scale=1.0),
        order("<bad-hand> cat", 4, concepts=[], embeddings=[Embedding(word(seed=3))]),
    ]
    for row, mixed in zip(rows, draw(one, rows), strict=True):
        torch.testing.assert_close(draw(one, [row])[0], mixed, rtol=0, atol=COMPANY)


def test_a_word_drawn_alone_is_the_pipelines(one):
    """Of one vector that is a token's own embedding: the word is that token."""
    table = one.text_encoder.get_input_embeddings().weight.detach()
    (cat,) = one.tokenizer("cat", add_special_tokens=False).input_ids
    same = LearnedWord("<x>", (table[[cat]],))
    ours, plain = draw(one, [order("a <x> on blue", embeddings=[Embedding(same)]), order("a cat on blue")])
    torch.testing.assert_close(ours, plain, rtol=0, atol=ROUNDING)


def test_delayed_subjects_leave_words_where_they_are(one, concept_for):
    alice = concept_for(one)
    held = order("<alice-cat> <bad-hand>", concepts=[Use(alice)], embeddings=[Embedding(word())], subject_start=1.0)
    plain = order("cat <bad-hand>", embeddings=[Embedding(word())])
    assert (draw(one, [held])[0] - draw(one, [plain])[0]).abs().max() <= ROUNDING
