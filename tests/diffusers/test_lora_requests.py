"""What requests say of LoRAs: ids, files and adapters, words that came with them, and what is wrong with one alone."""

import copy
import dataclasses
import threading
from pathlib import Path

import pytest
import torch

import keylock_diffusers as kd
from keylock_diffusers import Lora, LoraBank, LoraCapacity, Region, Request, RequestError
from keylock_diffusers.files import read_tensors
from keylock_diffusers.loras import Adapter, LearnedWord, UnknownLoraError, write_adapter
from tests.diffusers.drawing import COMPANY
from tests.diffusers.lora_files import parts, pipeline, write
from tests.diffusers.test_lora_files import written
from tests.diffusers.test_loras import LEFT, apart, draw, installed, made, plain, same

MODEL = "SD1.5"


def order(*loras, text="a cat on blue", seed=1, **more):
    return Request(text, seed=seed, guidance_scale=4.0, loras=list(loras), **more)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    made_bank = LoraBank(folder / "bank", cache=folder / "cache")
    for number in range(6):
        write_adapter(folder / "one.safetensors", made(MODEL, 30 + number, rank=1 + number % 3, scale=0.05))
        made_bank.add(f"user{number}/style", folder / "one.safetensors")
    return made_bank


def test_ids_files_and_adapters_are_the_same_lora(bank, tmp_path):
    path = tmp_path / "style.safetensors"
    write_adapter(path, made(MODEL, 30, rank=1, scale=0.05))
    pipe = installed(MODEL)
    rows = [order("user0/style"), order(Lora(path)), order(Lora(made(MODEL, 30, rank=1, scale=0.05)))]
    found = draw(pipe, [*rows, order()], loras=bank)
    for other in found[1:3]:
        same(other, found[0])
    assert apart(found[0], found[3])
    by_name = draw(pipe, [order("mine"), order("other")], loras={"mine": path, "other": str(path)})
    for other in by_name:
        same(other, found[0], COMPANY)
    version = bank.version("user0/style")
    assert torch.equal(
        draw(pipe, [order(f"user0/style@{version}")], loras=bank)[0], draw(pipe, [rows[0]], loras=bank)[0]
    )


def test_words_that_come_with_a_file_are_the_prompts_words(tmp_path):
    """And only where the prompt has them; the request's own word of that name comes first."""
    word = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "lora.safetensors"
    write_adapter(path, made(MODEL, 30, scale=0.05))
    tensors, texts = read_tensors(path)
    write(path, {**tensors, "bundle_emb.<hat>.string_to_param.*": word}, **texts)
    pipe = installed(MODEL)
    text = "a cat with <hat> on blue"
    of_file, of_request, without, unused = draw(pipe, [
        order(Lora(path), text=text),
        order(Lora(made(MODEL, 30, scale=0.05)), text=text, embeddings=[kd.Embedding(LearnedWord("<hat>", (word,)))]),
        order(Lora(path)),
        order(Lora(made(MODEL, 30, scale=0.05))),
    ])  # fmt: skip
    same(of_file, of_request)
    same(without, unused)
    assert float((of_file - without).abs().max()) > 0
    own = kd.Embedding(LearnedWord("<hat>", (-word,)))
    first = draw(pipe, [order(Lora(path), text=text, embeddings=[own]), order(Lora(path), text=text)])
    assert not torch.equal(*first)


WRONG = {
    "an id without a bank": (order("alice/style"), {}, "is an id, but generate was given no loras; a file is a Path"),
    "an unknown id": (order("alice/style"), "bank", "no LoRA 'alice/style' in the bank"),
    "an unknown name": (order("alice/style"), {"loras": {}}, "no LoRA 'alice/style' in loras"),
    "an id that leads out": (order("../style"), "bank", "LoRA's id looks like"),
    "a file that is none": (order(Lora(Path("none.safetensors"))), {}, "none.safetensors"),
    "something else": (order(Lora(5)), {}, "lora of a Lora must be an id, a Path or an Adapter, got int"),
    "a strength of text": (order(Lora("user0/style", "much")), "bank", "strength of a Lora must be a finite number"),
    "a strength without end": (order(Lora("user0/style", float("nan"))), "bank", "strength of a Lora must be a finite"),
    "text's strength": (order(Lora("user0/style", text_strength="a")), "bank", "text_strength of a Lora must be"),
    "a start": (order(Lora("user0/style", start=1.5)), "bank", r"start of a Lora must lie in \[0, 1\]"),
    "an end": (order(Lora("user0/style", end=-1)), "bank", r"end of a Lora must lie in \[0, 1\]"),
    "blocks": (order(Lora("user0/style", blocks={"up": {"block_9": 1}})), "bank", "blocks of a Lora must name"),
    "numbers of blocks": (order(Lora("user0/style", blocks={"mid": "a"})), "bank", "blocks of a Lora must"),
    "an empty region": (order(Lora("user0/style", region=LEFT * 0)), "bank", "region of a Lora must not be empty"),
    "too many": (order(*["user0/style"] * 9), "bank", "loras must be at most 8, got 9"),
    "no list": (Request("a", loras="user0/style"), "bank", "loras must be a list"),
    "an adapter of another model": (order(Lora(made("SDXL", 1))), {}, "with 2 text encoders, this one has 1"),
    "an adapter of other layers": (
        order(Lora(Adapter({"mid_block.attentions.0.proj_in": made(MODEL, 1).denoiser["conv_in"]}))), {}, "does not fit"
    ),
    "a word of A1111's": (order(text="a cat <lora:style:0.8>"), "bank", "prompt has '<lora:style:0.8>'"),
    "one in the negative prompt": (order(negative_prompt="<LyCO:a>"), "bank", "negative_prompt has '<LyCO:a>'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_fails_alone(bank, case):
    wrong, options, message = WRONG[case]
    options = {"loras": bank} if options == "bank" else options
    found = draw(installed(MODEL), [wrong, order(seed=2)], on_error="return", **options)
    assert isinstance(found[0], RequestError)
    with pytest.raises(RequestError, match=message):
        raise found[0]
    assert isinstance(found[1], torch.Tensor)


def test_a_file_for_another_base_model_names_its_layers(tmp_path):
    path, _ = written(tmp_path / "xl.safetensors", "diffusers", "SDXL")
    with pytest.raises(RequestError, match="xl.safetensors: .* do not fit this model|name nothing in this model"):
        draw(installed(MODEL), [order(Lora(path))])


def test_weight_decomposition_is_refused_where_it_is_not_defined():
    base = parts(pipeline(MODEL))[-1]
    decomposed = Adapter({
        name: dataclasses.replace(update, magnitude=base.get_submodule(name).weight.detach().flatten(1).norm(dim=1))
        for name, update in made(MODEL, 1).denoiser.items()
    })  # fmt: skip
    for loras, message in [
        ([Lora(decomposed), Lora(made(MODEL, 2))], r"\(DoRA\) must be a request's only one, got more beside it"),
        ([Lora(decomposed, region=LEFT)], r"\(DoRA\) must have no region"),
    ]:
        with pytest.raises(RequestError, match=message):
            draw(installed(MODEL), [order(*loras)])


@pytest.mark.parametrize("numbers", [(0, 4, 1), (4, 0, 1), (4, 4, 0), (4, 4.5, 1), ("4", 4, 1)])
def test_a_capacity_is_of_whole_numbers(numbers):
    with pytest.raises(ValueError, match="LoraCapacity: (adapters|rank|slots) must be a whole number of at least 1"):
        LoraCapacity(*numbers)


def test_more_wordings_than_a_row_can_hold_are_refused(bank):
    regions = [Region(LEFT, word) for word in ("cat", "blue")] * 3
    with pytest.raises(RequestError, match="regions and the regions of 4 LoRAs make .* regions together, at most 30"):
        draw(installed(MODEL), [order(*[Lora("user0/style", region=LEFT)] * 4, regions=regions)], loras=bank)


def test_requests_in_json_name_loras_by_id_or_as_files_in_their_folder(tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"")
    said = {"prompt": "a", "loras": ["alice/style", {"lora": "own.safetensors", "strength": 0.5, "blocks": {"mid": 0}}]}
    loras = Request.from_json(said, tmp_path).loras
    assert loras[0].lora == "alice/style" and loras[1].lora == (tmp_path / "own.safetensors").resolve()
    assert loras[1].strength == 0.5 and loras[1].blocks == {"mid": 0}
    for lora, message in [("../x.safetensors", "must be a file inside"), ("none.safetensors", "none.safetensors")]:
        with pytest.raises((ValueError, OSError), match=message):
            Request.from_json({"prompt": "a", "loras": [{"lora": lora}]}, tmp_path)
    with pytest.raises(ValueError, match="must be None where no folder of files was given"):
        Request.from_json({"prompt": "a", "loras": ["x.safetensors"]})


def test_eight_threads_share_a_bank_that_holds_half_of_what_they_want(tmp_path, one_thread):
    """While others are added and removed; everybody draws what they draw alone."""
    pipe, users = installed(MODEL), 16
    room = LoraCapacity(adapters=8, rank=2, convolutions=True)
    adapters = [made(MODEL, 40 + number, rank=1 + number % 2, scale=0.05) for number in range(users)]
    size = sum(
        u.up.nbytes + u.down.nbytes
        for half in (adapters[1].denoiser, *adapters[1].text_encoders)
        for u in half.values()
    )
    bank = LoraBank(tmp_path / "bank", cache=tmp_path / "cache", host_bytes=8 * size)
    for number, adapter in enumerate(adapters):
        write_adapter(tmp_path / "one.safetensors", adapter)
        bank.add(f"user{number}/style", tmp_path / "one.safetensors")
    rows = [order(f"user{number}/style", seed=number) for number in range(users)]
    options = {"num_inference_steps": 1, "lora_capacity": room}
    expected = [draw(pipe, [row], loras={f"user{n}/style": adapters[n]}, **options)[0] for n, row in enumerate(rows)]
    start, failed, found = threading.Barrier(9), [], {}

    def work(first):
        try:
            start.wait()
            for number in (first, first + 8):
                found[number] = draw(pipe, [rows[number]], loras=bank, **options)[0]
        except Exception as error:
            failed.append(error)

    def come_and_go():
        start.wait()
        for number in range(12):
            bank.add(f"guest{number}/style", tmp_path / "one.safetensors")
            bank.remove(f"guest{number}/style")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    threads.append(threading.Thread(target=come_and_go))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert all(torch.equal(found[number], theirs) for number, theirs in enumerate(expected))
    stats = bank.stats()
    assert stats.bytes <= 8 * size and stats.evictions > 0
    assert all(pool.held == 0 for pool in stats.pools), "everything was given back"
    with pytest.raises(UnknownLoraError):
        bank.version("guest0/style")


def test_what_a_batch_held_is_given_back_whatever_becomes_of_it(bank):
    pipe = installed(MODEL)

    def held():
        return sum(pool.held for pool in bank.stats().pools)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, [order("user0/style")], loras=bank, callback_on_step_end=stop)
    assert held() == 0
    pipe_stopped = draw(pipe, [order("user0/style"), order(Lora("user1/style", 1e30))], loras=bank, on_error="return")
    assert isinstance(pipe_stopped[1], RequestError) and held() == 0


def test_what_we_train_and_write_an_unmodified_pipeline_reads(tmp_path):
    adapter = made(MODEL, 33, scale=0.05)
    write_adapter(tmp_path / "lora.safetensors", adapter)
    pipe = copy.deepcopy(pipeline(MODEL))
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    same(draw(installed(MODEL), [order(Lora(adapter))])[0], plain(pipe, order()), COMPANY)
