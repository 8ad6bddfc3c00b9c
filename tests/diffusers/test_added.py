"""Concepts that add to keys and values at their own words: what they draw, and what they leave alone."""

import dataclasses
import json
import struct

import pytest
import torch
from typer.testing import CliRunner

import keylock_diffusers as kd
from keylock_diffusers import Lora, Region, Request, Use, cli
from keylock_diffusers.concepts import AddedConcept, BaseModel, Concept, ConceptFileError, KeyLockedConcept
from keylock_diffusers.concepts.bank import ConceptBank
from keylock_diffusers.concepts.base_model import TextEncoderInfo
from keylock_diffusers.concepts.files import pack, read_header, read_tensors
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.tokens import plain
from keylock_diffusers.loras import Adapter, LowRank, read_embedding
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import ConceptUse, Row
from tests.diffusers.accuracy import assert_as_accurate
from tests.diffusers.compatibility import SIZE, STEPS, make
from tests.diffusers.drawing import APART, COMPANY, ROUNDING
from tests.diffusers.test_cli import run

BASE = BaseModel(
    text_encoders=(TextEncoderInfo("CLIPTextModel", 6, 2, 100), TextEncoderInfo("CLIPTextModel", 3, 1, 100)),
    layers=(("down.attn2", 4), ("mid.attn2", 7), ("up.attn2", 4)),
    cross_attention_dim=5,
    weights_hash="0123abcd",
)
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1


def draw(pipe, *orders, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "np", **kwargs}
    return [torch.as_tensor(picture) for picture in kd.generate(pipe, list(orders), **kwargs)]


def step(pipe, batch, states):
    keywords = {"cross_attention_kwargs": {"personalization": batch}, "return_dict": False}
    return pipe.unet(torch.zeros(len(states), 4, 8, 8), 3, states, **keywords)[0]


def order(prompt="<alice-cat> on blue", *concepts, **more):
    return Request(prompt, concepts=concepts, **{"seed": 1, "guidance_scale": 4.0, **more})


def largest(one, other):
    return float((one - other).abs().max())


# The file


def test_a_file_gives_back_what_was_saved(added_for, tmp_path):
    concept = added_for(BASE, keys=1, values=2, layers=("down.attn2", "up.attn2"), start=0.25, training={"steps": 3})
    size = concept.save(tmp_path / "a.safetensors")
    found = Concept.load(tmp_path / "a.safetensors")
    assert isinstance(found, AddedConcept) and found.digest == concept.digest and size == concept.nbytes
    assert (found.words, found.layers, found.start) == (3, ("down.attn2", "up.attn2"), 0.25)
    assert all(torch.equal(getattr(found, part), getattr(concept, part)) for part in ("encodings", "keys", "values"))
    assert list(found.keys.shape) == [1, 8] and list(found.values.shape) == [2, 8]
    assert all(map(torch.equal, found.word_embeddings, concept.word_embeddings))
    assert found.settings == {"words": 3, "start": 0.25}
    assert found.per_layer("values").keys() == {"down.attn2", "up.attn2"}


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 0, 3), (0, 3, 0), (2, 0, 0)])
def test_a_part_may_have_learned_nothing(added_for, counts):
    concept = added_for(BASE, encodings=counts[0], keys=counts[1], values=counts[2])
    found = Concept.load(concept.to_bytes())
    assert (len(found.encodings), len(found.keys), len(found.values)) == counts and found.digest == concept.digest
    whole = added_for(BASE)
    for part in ("encodings", "keys", "values"):
        assert len(getattr(whole.with_(**{part: None}), part)) == 0


def test_a_bank_holds_both_kinds_and_tells_them_apart(added_for, concept_for, tmp_path):
    bank = ConceptBank(tmp_path)
    bank.add("alice/cat", added_for(BASE, start=0.2))
    bank.add("bob/cat", concept_for(BASE, "<bob-cat>", beta=0.6))
    assert isinstance(bank["alice/cat"], AddedConcept) and isinstance(bank["bob/cat"], KeyLockedConcept)
    assert (bank.summary("alice/cat").edit, bank.summary("alice/cat").settings) == ("added", {"words": 3, "start": 0.2})
    assert (bank.summary("bob/cat").edit, bank.summary("bob/cat").settings) == ("perfusion", {"beta": 0.6, "tau": 0.15})
    with pytest.raises(ConceptFileError, match="the concept's edit is 'perfusion', not 'added'"):
        AddedConcept.load(bank["bob/cat"].to_bytes())


def test_a_concept_of_stable_diffusion_is_as_small_as_its_words():
    """One word's keys and values are about 50 KiB; of values alone three words are in 100."""
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    base = BaseModel(
        (TextEncoderInfo("CLIPTextModel", 768, 12, 49408),),
        tuple((f"down_blocks.{n}.attentions.0.transformer_blocks.0.attn2", width) for n, width in enumerate(widths)),
        768,
    )

    def size(words, keys, values):
        return AddedConcept(
            "<a>",
            "cat",
            word_embeddings=(torch.zeros(words, 768),),
            keys=torch.zeros(keys, sum(widths)),
            values=torch.zeros(values, sum(widths)),
            base=base,
        ).nbytes

    assert sum(widths) == 12480
    assert (
        size(1, 0, 1) <= 36 << 10 < size(1, 1, 1) <= 56 << 10
        and size(3, 0, 3) <= 100 << 10
        and size(2, 1, 2) <= 100 << 10
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 1.5}, r"start must lie in \[0, 1\], got 1.5"),
        (
            {"layers": ("mid.attn2", "down.attn2")},
            "layers must be names of cross-attention layers in the model's order",
        ),
        ({"layers": ("elsewhere",)}, "layers must be names of cross-attention layers"),
        ({"layers": "mid.attn2"}, "layers must be names of cross-attention layers"),
        ({"keys": torch.zeros(4, 15)}, r"keys must be \[3, 15\], got \[4, 15\]"),
        ({"values": torch.zeros(2, 14)}, r"values must be \[2, 15\], got \[2, 14\]"),
        ({"values": [1.0]}, r"values must be \[0, 15\], got list"),
        ({"encodings": torch.zeros(2, 4)}, r"encodings must be \[2, 5\], got \[2, 4\]"),
        ({"encodings": torch.zeros(4, 5)}, r"encodings must be \[3, 5\], got \[4, 5\]"),
        ({"values": torch.full((1, 15), float("nan"))}, "values must be finite, got NaN"),
        ({"keys": torch.full((1, 15), 1e6)}, "keys must be finite, got values torch.float16 cannot hold"),
        ({"word_embeddings": (torch.zeros(3, 6),)}, "word_embeddings must hold one per text encoder, 2, got 1"),
        ({"word_embeddings": (torch.zeros(3, 6), torch.zeros(2, 3))}, r"word_embeddings\[1\] must be \[3, 3\], got"),
        ({"word_embeddings": (torch.zeros(6), torch.zeros(3))}, "number of words in word_embeddings must be a whole"),
        ({"word_embeddings": (torch.zeros(17, 6), torch.zeros(17, 3))}, "must be a whole number from 1 to 16, got 17"),
    ],
)
def test_what_is_no_concept_is_refused(added_for, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        added_for(BASE).with_(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edit": "perfusion"}, "edit must be 'added', got 'perfusion'"),
        ({"words": 0}, "words must be a whole number from 1 to 16, got 0"),
        ({"words": 2}, r"keys must be a whole number from 0 to 2, got 3|tensor word_embedding.0 must be F16 \[12\]"),
        ({"keys": -1}, "keys must be a whole number from 0 to 3, got -1"),
        *[
            ({"layers": layers}, "layers must be numbers from 0 to 2 in rising order, and at least one, got")
            for layers in ([], [0, 0, 1], [2, 1, 0], [0, 1, 3], [[0]], ["0"], "0", None)
        ],
        ({"start": "now"}, r"start must lie in \[0, 1\], got 'now'"),
        ({"format_version": 4}, "format_version must be 1 or 2 or 3, which this release reads, got 4"),
        ({"format_version": [2]}, r"format_version must be 1 or 2 or 3, which this release reads, got \[2\]"),
        ({"beta": 1.0}, "missing or unknown: .'beta'."),
    ],
)
def test_a_file_that_says_something_else_is_refused(added_for, change, message):
    data = added_for(BASE, keys=3).to_bytes()
    header = read_header(data, "file")
    tensors = {name: tensor.flatten() for name, tensor in read_tensors(data, header, "file").items()}
    wrong = pack({**header.fields, **change}, tensors)
    with pytest.raises(ConceptFileError, match=message):
        Concept.load(wrong)
    if change.keys() & {"edit", "start", "format_version", "beta"}:
        with pytest.raises(ConceptFileError, match=message):
            kd.concepts.ConceptSummary.of(read_header(wrong, "file"), len(wrong), "file")


def test_no_flipped_bit_passes(added_for):
    data = added_for(BASE, words=1, keys=1, values=1).to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert json.loads(data[8 : 8 + length])
    for place in range(0, len(data), 7):
        with pytest.raises(ConceptFileError):
            Concept.load(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])


@pytest.mark.parametrize("kind", ["added", "locked"])
def test_its_words_are_an_embedding_file(ready, added_for, concept_for, tmp_path, kind):
    """Which draws what the concept draws whose words are all that it has."""
    concept = added_for(ready, encodings=0, keys=0, values=0) if kind == "added" else concept_for(ready)
    ConceptBank(tmp_path / "bank").add("alice/cat", concept)
    command = ["bank", "words", "alice/cat", "--output", tmp_path / "word.safetensors", "--bank", tmp_path / "bank"]
    assert "<alice-cat>" in run(*command)
    word = read_embedding(tmp_path / "word.safetensors", [32])
    assert torch.equal(word.vectors[0], concept.word_embeddings[0].float().view(-1, 32))
    assert CliRunner().invoke(cli.app, [*map(str, command)]).exception is not None
    run(*command, "--overwrite")
    if kind == "added":
        taught, own = draw(
            ready,
            order("a <alice-cat> on blue", embeddings=[kd.Embedding(tmp_path / "word.safetensors")]),
            order("a <alice-cat> on blue", concept),
        )
        assert largest(taught, own) <= ROUNDING


# Keys and values


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
def test_at_its_words_it_is_added_and_nowhere_else(pipe, added_for, strength):
    """W e + strength o at the word's own tokens, against float64; every other token keeps its bits."""
    concept = added_for(pipe, keys=2, values=3)
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    use = ConceptUse(concept, strength=strength, places=(((2, 0), (3, 1), (4, 2), (6, 0)),))
    found = Personalization([Row((use,)), Row()]).prepare(pipe, states).kv
    without = Personalization([Row(), Row()]).prepare(pipe, states).kv
    where = torch.tensor([2, 3, 4, 6])
    for name in found:
        attn = pipe.unet.get_submodule(name)
        for side, got, bare in zip(("keys", "values"), found[name], without[name], strict=True):
            rows = torch.zeros(4, got.shape[2])
            own = concept.per_layer(side)[name].float()
            for n, word in enumerate((0, 1, 2, 0)):
                if word < len(own):
                    rows[n] = own[word]
            weight = (attn.to_k if side == "keys" else attn.to_v).weight.detach()
            eager, exact = (
                states[0, where].to(t) @ weight.to(t).T + strength * rows.to(t) for t in (torch.float32, torch.float64)
            )
            assert_as_accurate(got[0, where], eager, exact)
            others = [n for n in range(7) if n not in where.tolist()]
            assert torch.equal(got[0, others], bare[0, others]) and torch.equal(got[1], bare[1])


def test_layers_that_it_does_not_change_stay_the_plain_ones(pipe, added_for):
    names = [name for name, _ in BaseModel.of(pipe).layers]
    concept = added_for(pipe, layers=tuple(names[1:3]))
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3))
    use = ConceptUse(concept, places=(((2, 0), (3, 1), (4, 2)),))
    found = Personalization([Row((use,))]).prepare(pipe, states).kv
    without = Personalization([Row()]).prepare(pipe, states).kv
    changed = [name for name in names if not torch.equal(found[name][1], without[name][1])]
    assert changed == names[1:3]


def test_beside_key_locked_concepts_each_does_its_own(pipe, added_for, concept_for):
    states = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(3))
    added = ConceptUse(added_for(pipe, "<bob-cat>", seed=5), strength=0.7, places=(((2, 0), (3, 1)),))
    locked = ConceptUse(concept_for(pipe), 0.6, 0.2)
    both = Personalization([Row((locked, added)), Row((locked,)), Row((added,))]).prepare(pipe, states).kv
    for name, pair in both.items():
        bare = Personalization([Row((locked,)), Row((locked,)), Row()]).prepare(pipe, states).kv[name]
        for side, got, one in zip(("keys", "values"), pair, bare, strict=True):
            assert torch.equal(got[1], one[1])
            own = added.concept.per_layer(side)[name].float() * 0.7
            torch.testing.assert_close(got[0, 2:4] - one[0, 2:4], own[:2], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got[2, 2:4] - one[2, 2:4], own[:2], rtol=1e-4, atol=1e-4)
            assert torch.equal(got[0, 4:], one[0, 4:])


def test_what_is_written_to_after_prepare_is_noticed(ready, added_for):
    concept = added_for(ready)
    states = torch.randn(1, 7, 32)
    batch = Personalization([Row((ConceptUse(concept, places=(((2, 0),),)),))]).prepare(ready, states)
    concept.values.mul_(2)
    with pytest.raises(ValueError, match="concept <alice-cat> was written to after it was prepared"):
        step(ready, batch, states)


@pytest.mark.parametrize("written", [0, 1])
def test_of_two_users_with_one_placeholder_both_are_watched(ready, added_for, concept_for, written):
    concepts = concept_for(ready), added_for(ready, seed=5)
    uses = ConceptUse(concepts[0], 0.6, 0.2), ConceptUse(concepts[1], places=(((2, 0),),))
    states = torch.randn(2, 7, 32)
    batch = Personalization([Row((use,)) for use in uses]).prepare(ready, states)
    step(ready, batch, states)
    concepts[written].values.mul_(2)
    with pytest.raises(ValueError, match="concept <alice-cat> was written to after it was prepared"):
        step(ready, batch, states)


# Prompts


def test_a_placeholder_is_its_noun_as_many_times(pipe):
    found = text.tokenize(pipe.tokenizer, "a <a> on blue", {"<a>": "teddy bear"}, nouns={"<a>": 3})
    once = text.tokenize(pipe.tokenizer, "a teddy bear on blue")
    start = found.words[0][0]
    assert [(n, name) for _, name, n in found.words] == [(0, "<a>"), (1, "<a>"), (2, "<a>")]
    assert [position for position, *_ in found.words] == [start, start + 1, start + 2]
    assert len(set(found.ids[start : start + 3])) == 1 and found.ids[start] in once.ids


@pytest.mark.parametrize("prompt", ["<a> on blue", "a grinning <a> and a <b>, and again <a>", "<a> " * 30])
def test_a_plain_prompt_is_the_super_classs_own_with_the_padding_elsewhere(pipe, prompt):
    names = {"<a>": "teddy bear", "<b>": "dog"}
    said = text.tokenize(
        pipe.tokenizer, prompt, {n: c for n, c in names.items() if n in prompt}, nouns={"<a>": 3, "<b>": 2}, chunks=None
    )
    found, at = plain(pipe.tokenizer, said, {"<a>"})
    wanted = prompt.replace("<a>", "teddy bear")
    assert sorted(at) == list(range(len(said.ids)))
    if said.chunks == 1:
        same = text.tokenize(pipe.tokenizer, wanted, {"<b>": "dog"} if "<b>" in prompt else None, nouns={"<b>": 2})
        assert (found.ids, found.attention) == (same.ids, same.attention)
        assert tuple(word for word in found.words if word[1] == "<b>") == same.words
    for position, name, number in said.words:
        if name == "<b>" or number == 0:
            assert found.ids[at[position]] == said.ids[position]
        else:
            assert found.attention[at[position]] == 0 and found.ids[at[position]] == pipe.tokenizer.pad_token_id
    assert plain(pipe.tokenizer, said, ())[0].ids == said.ids


# Pictures


def test_encodings_are_moved_at_the_words_by_the_strength(ready, added_for):
    """What a moved encoding draws is what a model draws whose text encoder says so."""
    concept = added_for(ready, words=2, encodings=1, keys=0, values=0)
    concept = concept.with_(encodings=8 * concept.encodings)
    asked = order("a <alice-cat> on blue", Use(concept, strength=0.7))
    tokenized = text.tokenize(ready.tokenizer, "a <a> on blue", {"<a>": "cat"}, nouns={"<a>": 2})
    with torch.no_grad():
        states = text.encode(ready.text_encoder, [tokenized], [{"<a>": concept.word_embeddings[0]}])[0]
        negative = text.encode(ready.text_encoder, [text.tokenize(ready.tokenizer, "")])[0]
    states[tokenized.words[0][0]] += 0.7 * concept.encodings[0].float()
    given = Request(prompt_embeds=states, negative_prompt_embeds=negative, seed=1, guidance_scale=4.0)
    found, expected, bare = draw(ready, asked, given, order("a <alice-cat> on blue", concept.with_(encodings=None)))
    assert largest(found, expected) <= ROUNDING < APART < largest(found, bare)


@pytest.mark.parametrize("words", [1, 3])
def test_at_strength_zero_and_before_it_starts_the_picture_is_the_super_classs(ready, added_for, words, one_thread):
    concept = added_for(ready, words=words, encodings=1, keys=words, values=words)
    bare = order("a cat on blue")
    absent, late, whole = (
        order("a <alice-cat> on blue", Use(concept, **more)) for more in ({"strength": 0.0}, {"start": 1.0}, {})
    )
    found = draw(ready, bare, absent, late, whole)
    assert largest(found[1], found[0]) <= ROUNDING and largest(found[2], found[0]) <= ROUNDING
    if words == 1:  # where not even the order of the tokens is another
        assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    assert largest(found[3], found[0]) > APART


def test_when_it_starts_is_its_own_the_requests_or_the_files(ready, added_for):
    concept = added_for(ready)
    early, late = concept, concept.with_(start=0.5)
    prompt = "a <alice-cat> on blue"
    found = draw(
        ready,
        order(prompt, Use(early, start=0.5)),
        order(prompt, early, subject_start=0.5),
        order(prompt, late),
        order(prompt, Use(late, start=0.0), subject_start=0.5),
        order(prompt, early),
    )
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and torch.equal(found[3], found[4])
    assert largest(found[0], found[4]) > APART / 4


def test_two_concepts_start_each_in_its_own_time(ready, added_for):
    one, two = added_for(ready, "<a>"), added_for(ready, "<b>", "dog", seed=7)
    prompt = "a <a> and a <b> on blue"
    found = draw(
        ready,
        order(prompt, Use(one, start=0.5), Use(two)),
        order(prompt, Use(one, start=1.0), Use(two)),
        order("a cat and a <b> on blue", Use(two)),
        order(prompt, one, two),
    )
    assert largest(found[1], found[2]) <= ROUNDING
    assert largest(found[0], found[1]) > 0 and largest(found[0], found[3]) > 0


def test_users_with_one_placeholder_stay_apart(ready, added_for, concept_for, one_thread):
    alice, other = added_for(ready), added_for(ready, seed=9, words=2, keys=1, values=2)
    locked = concept_for(ready)
    orders = [order("<alice-cat> on blue", concept, seed=4) for concept in (alice, other, locked)]
    together = draw(ready, *orders, order("a cat on blue", seed=4))
    for n, one in enumerate(orders):
        alone = draw(ready, *[one] * 4)
        assert all(torch.equal(picture, together[n]) for picture in alone)
    assert all(largest(a, b) > APART / 4 for a, b in zip(together, together[1:], strict=False))


def test_a_neighbour_whose_concept_is_poisoned_changes_nobody(ready, added_for, one_thread):
    mine, theirs = added_for(ready), added_for(ready, "<bob-cat>", seed=3)
    clean = draw(ready, order("<alice-cat> on blue", mine), order("<bob-cat> on pink", theirs), order("a dog"))
    theirs.values.fill_(float("inf"))
    spoilt = kd.generate(
        ready,
        [order("<alice-cat> on blue", mine), order("<bob-cat> on pink", theirs), order("a dog")],
        num_inference_steps=STEPS,
        height=SIZE,
        width=SIZE,
        output_type="np",
        on_error="return",
    )
    assert torch.equal(torch.as_tensor(spoilt[0]), clean[0]) and torch.equal(torch.as_tensor(spoilt[2]), clean[2])
    assert isinstance(spoilt[1], Exception)


def test_in_a_region_it_is_seen_inside_of_it(ready, added_for):
    concept = added_for(ready)
    prompt = "a <alice-cat> and a dog on blue"
    regions = [Region(1 - LEFT, "dog")]
    found = draw(
        ready,
        order(prompt, Use(concept, region=LEFT), regions=regions),
        order("a cat and a dog on blue", regions=[Region(LEFT, "cat"), *regions]),
        order(prompt, Use(concept, region=LEFT, strength=0.0), regions=regions),
    )
    assert largest(found[0], found[1]) > APART
    assert largest(found[2], found[1]) < largest(found[0], found[1]) / 4


def test_beside_a_lora_it_is_the_concept_of_the_fused_model(ready, added_for, build_tiny):
    random = torch.Generator().manual_seed(3)
    name, _ = BaseModel.of(ready).layers[0]
    weight = ready.unet.get_submodule(f"{name}.to_v").weight
    update = LowRank(
        torch.randn(2, weight.shape[1], generator=random), torch.randn(weight.shape[0], 2, generator=random)
    )
    adapter, concept = Adapter({f"{name}.to_v": update}), added_for(ready)
    asked = order("a <alice-cat> on blue", concept)
    found = draw(ready, dataclasses.replace(asked, loras=[Lora(adapter, 0.5)]))[0]
    fused = kd.install(build_tiny())
    with torch.no_grad():
        fused.unet.get_submodule(f"{name}.to_v").weight += 0.5 * update.up @ update.down
    assert largest(found, draw(fused, asked)[0]) <= COMPANY < largest(found, draw(ready, asked)[0])


def test_stable_diffusion_xl_reads_it_in_both_encoders(added_for):
    pipe = kd.install(make("SDXL", "text only")[0])
    concept = added_for(pipe, words=2, keys=1, values=2)
    bare, found, absent = draw(
        pipe,
        order("a cat on blue"),
        order("a <alice-cat> on blue", concept),
        order("a <alice-cat> on blue", Use(concept, strength=0.0)),
    )
    assert largest(absent, bare) <= ROUNDING and largest(found, bare) > APART
    same = order("a <alice-cat> on blue", concept, prompt_2="a <alice-cat> on pink")
    assert largest(draw(pipe, same)[0], found) > 0
    other = order("a <alice-cat> on blue", concept, prompt_2="on pink, a <alice-cat>")
    with pytest.raises(kd.RequestError, match="<alice-cat> must stand at the same tokens of prompt and prompt_2"):
        draw(pipe, other)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"beta": 0.5}, "beta of <alice-cat> must not be given"),
        ({"tau": 0.5}, "tau of <alice-cat> must not be given"),
        ({"lock": "global"}, "lock of <alice-cat> must not be given"),
        ({"start": 2}, r"start of <alice-cat> must lie in \[0, 1\], got 2"),
        ({"strength": float("nan")}, "strength of <alice-cat> must be a finite number, got nan"),
    ],
)
def test_a_use_that_it_does_not_know_is_refused(ready, added_for, use, message):
    with pytest.raises(kd.RequestError, match=message):
        draw(ready, order("<alice-cat>", Use(added_for(ready), **use)))


def test_a_long_prompt_holds_it_beyond_the_first_chunk(ready, added_for):
    concept = added_for(ready)
    filler = "a dog next to a house on blue and " * 12
    found = draw(ready, order(f"{filler} <alice-cat>", concept), order(f"{filler} cat"))
    absent = draw(ready, order(f"{filler} <alice-cat>", Use(concept, strength=0.0)))
    assert largest(found[0], found[1]) > APART / 4 and largest(absent[0], found[1]) <= COMPANY
