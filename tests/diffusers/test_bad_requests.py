"""A bad request fails alone, whatever is wrong with it, and says what; the others' pictures do not change by a bit."""

import copy
import dataclasses
import json
import pickle
import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import keylock_diffusers as kd
from keylock_diffusers import Control, FusedSubject, ImagePrompt, Region, Request, RequestError, RequestLimits, Use
from keylock_diffusers.generation.engine import Engine
from tests.diffusers.drawing import build, picture, random

STEPS = 2
GOOD = [Request("a house", seed=1), Request("a cat on blue", seed=2)]
HUGE = int("1" + "0" * 400)


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


@pytest.fixture(scope="module")
def ready():
    return kd.install(build())


class Silent:
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class SilentText(str):
    __str__ = __repr__ = Silent.__str__


def damaged():
    data = BytesIO()
    Image.effect_noise((64, 64), 50).save(data, "PNG")
    whole = data.getvalue()
    at = whole.index(b"IDAT")
    return Image.open(BytesIO(whole[: at - 4] + struct.pack(">I", 99) + whole[at : at + 103] + bytes(20)))


def thin():
    return Image.new("RGB", (1, 100_000))


# fmt: off
BAD = {
    "a scale of guidance of 400 digits": (lambda: Request("a", guidance_scale=HUGE), "guidance_scale must be a finite"),
    "one of ten thousand digits": (lambda: Request("a", guidance_scale=10**10_000), "guidance_scale must be a finite"),
    "an image's scale of 400 digits": (
        lambda: Request("a", image_prompts=[ImagePrompt(picture(1), scale=HUGE)]),
        "scale of an image prompt must be a finite number",
    ),
    "a seed of 400 digits": (lambda: Request("a", seed=HUGE), "seed must be a whole number"),
    "a score of 400 digits": (lambda: Request("a", aesthetic_score=HUGE), "aesthetic_score must be a finite number"),
    "a size of 400 digits": (lambda: Request("a", original_size=(HUGE, 1)), "original_size must be two numbers"),
    "a strength of 400 digits": (lambda: Request("a", strength=HUGE), r"strength must lie in \[0, 1\]"),
    "pictures without end": (lambda: Request("a", num_images=10**11), "num_images must be a whole number from 1 to 64"),
    "a damaged mask": (lambda: Request("a cat", regions=[Region(damaged(), "cat")]), "mask of a Region cannot be dec"),
    "a damaged picture": (lambda: Request("a", image=damaged()), "image cannot be decoded"),
    "a damaged image prompt": (lambda: Request("a", image_prompts=[ImagePrompt(damaged())]), "cannot be decoded"),
    "a thin image prompt": (lambda: Request("a", image_prompts=[ImagePrompt(thin())]), "at most 16 times as long"),
    "a thin picture": (lambda: Request("a", image=thin()), "image must be at most 16 times as long as wide"),
    "latents too large to be drawn": (
        lambda: Request("a", image=torch.zeros(4, 2_000, 2_000)),
        "image must have at most 4194304 pixels where it gives the size of what is drawn",
    ),
    "a picture of one channel": (lambda: Request("a", image=torch.zeros(1, 16, 16)), "image must have 3 channels"),
    "a nested request": (lambda: torch.nested.nested_tensor([torch.zeros(2)]), "must be a Request, got Tensor"),
    "a nested id": (lambda: Request(7, id=torch.nested.nested_tensor([torch.zeros(2)])), "prompt must be text"),
    "a nested mask": (
        lambda: Request("a", image=picture(1), mask=torch.nested.nested_tensor([torch.zeros(2)])),
        "mask must be a dense tensor",
    ),
    "a mask that is an endless view": (
        lambda: Request("a", image=picture(1), mask=np.broadcast_to(np.float32(0), (10**6, 10**6))),
        "pictures of a request must have at most 128000000 pixels together, got .*, 1000000000000 of them in mask",
    ),
    "masks without end": (
        lambda: Request("a cat", regions=[Region(torch.ones(8_000, 8_000), "cat")] * 3),
        "pictures of a request must have at most 128000000 pixels together, got 192000000, 64000000 .* mask of Region",
    ),
    "encodings of pictures without end": (
        lambda: Request("a", image_prompts=[ImagePrompt(embeds=torch.zeros(1).expand(10**6, 32))]),
        "a request must hold at most 64 pictures and masks|pixels together",
    ),
    "a long prompt and a placeholder nobody has": (
        lambda: Request("a cat " * 200 + "<alice-cat>"), "<alice-cat> is no concept of this request"
    ),
    "long names and a long list": (
        lambda: Request("x" * 100, id="y" * 100, regions=[Region(torch.ones(2, 2), tokens=[10**9] * 60)]),
        "tokens of a Region must be positions",
    ),
    "a token of ten thousand digits": (
        lambda: Request("a", regions=[Region(torch.ones(2, 2), tokens=[10**9_999])]), "tokens of a Region must be"
    ),
    "a second prompt that nobody reads": (lambda: Request("a", prompt_2="oil"), "prompt_2 and negative_prompt_2 must"),
    "a corner that is none": (lambda: Request("a", crops_coords_top_left=None), "crops_coords_top_left must be two"),
    "a picture in floats below zero": (
        lambda: Request("a", image=Image.new("F", (64, 64), -1)), "image: a picture in mode F must have values"
    ),
    "a weight that is no number": (
        lambda: Request("b " + "(" * 80 + "a" + ":9000)" * 79 + ":0)"), "weights must be at most 10000 together"
    ),
    "a picture too large to be drawn": (
        lambda: Request("a", image=Image.new("RGB", (4096, 4096))),
        "image must have at most 4194304 pixels where it gives the size of what is drawn, got 4096 x 4096",
    ),
    "an address as picture": (lambda: Request("a", image="http://localhost/"), "image must be a picture.*got str"),
    "a file's name as picture": (lambda: Request("a", image_prompts=[ImagePrompt("/etc/hosts")]), "got str; open it"),
    "a file's name as mask": (lambda: Request("a", image=picture(1), mask="/etc/hosts"), "mask must be a picture"),
    "encodings without tokens": (
        lambda: Request(prompt_embeds=torch.zeros(0, 32), guidance_scale=1.0),
        r"prompt_embeds must not be empty, got \[0, 32\]",
    ),
    "sparse encodings": (lambda: Request(prompt_embeds=torch.zeros(77, 32).to_sparse()), "must be a dense tensor"),
    "encodings nowhere": (lambda: Request(prompt_embeds=torch.zeros(77, 32, device="meta")), "on the meta device"),
    "encodings of bool": (lambda: Request(prompt_embeds=torch.zeros(77, 32) > 0), "must be a floating-point tensor"),
    "complex encodings": (lambda: Request(prompt_embeds=torch.zeros(77, 32) * 1j), "must be a floating-point tensor"),
    "nested encodings": (
        lambda: Request(prompt_embeds=torch.nested.nested_tensor([torch.zeros(2, 32)])), "must be a dense tensor"
    ),  # fmt: skip
    "encodings without end": (
        lambda: Request(prompt_embeds=torch.zeros(5_000, 32), negative_prompt_embeds=torch.zeros(5_000, 32)),
        "prompt_embeds must have at most 1024 tokens, got 5000",
    ),
    "a prompt without end": (lambda: Request("cat " * 250_000), "prompt must have at most 10000 letters, got 1000000"),
    "a prompt of too many tokens": (lambda: Request("! " * 4_000), "a prompt must have at most 1024 tokens"),
    "a negative prompt without end": (lambda: Request("a", negative_prompt="x" * 20_000), "negative_prompt must have"),
    "a region's words without end": (lambda: Request("a", regions=[Region(None, "x" * 20_000)]), "prompt of regions"),
    "tokens without end": (
        lambda: Request("a", regions=[Region(torch.ones(2, 2), tokens=range(10**9))]),
        "tokens of a Region must be positions",
    ),
    "image prompts without end": (
        lambda: Request("a", image_prompts=[ImagePrompt(picture(1))] * 65), "image_prompts must be at most 64, got 65"
    ),  # fmt: skip
    "pictures of an image prompt without end": (
        lambda: Request("a", image_prompts=[ImagePrompt([picture(1)] * 40)] * 2),
        "a request must hold at most 64 pictures and masks, got 80, ",
    ),
    "a weight that grows": (
        lambda: Request("(" * 300 + "a" + ":9000)" * 300),
        "weights must be at most 10000 together",
    ),
    "an id that cannot say itself": (lambda: Request(7, id=Silent()), r"\(a value of type Silent: 7\): prompt must be"),
    "a prompt that cannot say itself": (lambda: Request(Silent()), "a value of type Silent.*prompt must be text"),
    "an id of a concept that cannot say itself": (lambda: Request("a", concepts=[Silent()]), "a concept must be an id"),
    "concepts in one text": (lambda: Request("<alice-cat>", concepts="alice/cat"), "concepts must be a list, got str"),
    "concepts without end": (lambda: Request("<a-b>", concepts=["a/b"] * 1000), "concepts must be at most 64"),
    "no request": (lambda: "a cat", "must be a Request, got str"),
    "nothing": (lambda: None, "must be a Request, got NoneType"),
    "something that cannot say itself": (Silent, r"request 1 \(a value of type Silent\): must be a Request"),
    "controls that are none": (lambda: Request("a", controls=[7]), "controls must be Control objects, got int"),
    "a control that nobody has": (
        lambda: Request("a", controls=[Control([], picture(1))]),
        r"given to generate \(none\)",
    ),
    "subjects that are none": (lambda: Request("a", subjects=[7]), "subjects must be FusedSubject objects, got int"),
    "a subject without a module": (
        lambda: Request("a cat", subjects=[FusedSubject("cat", picture(1))]),
        "fusion module",
    ),
    "regions that are none": (lambda: Request("a", regions={"cat": 1}), "regions must be a list, got dict"),
    "latents of another kind": (
        lambda: Request("a", latents=np.zeros((4, 8, 8))),
        "latents must be a tensor, got ndarr",
    ),
    "sparse latents": (
        lambda: Request("a", latents=torch.zeros(4, 8, 8).to_sparse()),
        "latents must be a dense tensor",
    ),
    "an ending that is a list": (lambda: Request("a cat", endings=[1]), "endings must be one of"),
    "a start that is text": (
        lambda: Request("a", subject_start="now"),
        r"subject_start must lie in \[0, 1\], got 'now'",
    ),
    "a lone surrogate": (lambda: Request("a \ud800 cat"), "prompt must be text, got half of a surrogate pair"),
    "a number beyond float32": (lambda: Request("a", guidance_scale=1e39), "guidance_scale must be a finite number"),
    "a text as id that cannot say itself": (lambda: Request(7, id=SilentText("a")), "SilentText: 7.*prompt must be"),
    "an id of many lines": (lambda: Request(7, id="a\nb"), r"request 1 \(a\\nb: 7\): prompt must be text"),
    "a bool as number": (lambda: Request("a", guidance_scale=True), "guidance_scale must be a finite number, got True"),
}
# fmt: on


@pytest.fixture(scope="module")
def alone(ready):
    """The good requests' pictures beside another good one."""
    return draw(ready, [GOOD[0], Request("a dog", seed=3), GOOD[1]])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone_and_says_what_is_wrong(ready, name):
    make, reason = BAD[name]
    with pytest.raises(RequestError, match=reason) as raised:
        draw(ready, [GOOD[0], make()])
    assert raised.value.index == 1 and len(str(raised.value)) <= 500
    assert "\n" not in str(raised.value)


def test_among_all_bad_requests_the_good_ones_are_drawn_to_the_bit(ready):
    bad = [make() for make, _ in BAD.values()]
    clean = draw(ready, GOOD)
    mixed = draw(ready, [GOOD[0], *bad, GOOD[1]], on_error="return")
    assert all(isinstance(one, RequestError) for one in mixed[1:-1])
    assert [one.index for one in mixed[1:-1]] == list(range(1, len(bad) + 1))
    assert torch.equal(mixed[0], clean[0]) and torch.equal(mixed[-1], clean[1])


def test_numbers_that_overflow_while_drawing_are_told_after_the_batch(ready, alone, concept_for):
    overflowing = [
        Request("a <alice-cat>", concepts=[Use(concept_for(ready), strength=1e30)], seed=3),
        Request("a dog", guidance_scale=1e38, seed=3),
        Request("a dog", image_prompts=[ImagePrompt(embeds=random(1, 32), scale=1e38)], guidance_scale=1e30, seed=3),
        Request("a dog", latents=torch.full((4, 8, 8), torch.nan)),
    ]
    for request in overflowing:
        drawn = draw(ready, [GOOD[0], request, GOOD[1]], on_error="return")
        assert isinstance(drawn[1], RequestError) and drawn[1].index == 1
        assert "infinite or no numbers at all while it was drawn" in str(drawn[1])
        assert torch.equal(drawn[0], alone[0]) and torch.equal(drawn[2], alone[2])
        with pytest.raises(RequestError, match="while it was drawn") as raised:
            draw(ready, [GOOD[0], request, GOOD[1]])
        assert torch.equal(raised.value.images[0], alone[0]) and torch.equal(raised.value.images[2], alone[2])
        assert draw(ready, [request], on_error="return", output_type="latent")[0].index == 0


def test_a_decoder_that_overflows_is_told_too(ready, alone, monkeypatch):
    decode = ready.vae.decode

    def broken(latents, **kwargs):
        (made,) = decode(latents, **kwargs)
        made = made.clone()
        made[1, 0, 3, 3] = torch.inf
        return (made,)

    monkeypatch.setattr(ready.vae, "decode", broken)
    drawn = draw(ready, [GOOD[0], Request("a dog", seed=3), GOOD[1]], on_error="return")
    assert isinstance(drawn[1], RequestError)
    assert torch.equal(drawn[0], alone[0]) and torch.equal(drawn[2], alone[2])
    told = []
    keep = {"callback_on_image": lambda *said: told.append(said)}
    drawn = draw(ready, [Request("a dog", num_images=3, seed=1)], on_error="return", **keep)
    assert [isinstance(one, RequestError) for one in drawn[0]] == [False, True, False]  # its other pictures are kept
    assert [said[:2] for said in told] == [(0, 0), (0, 2)]


def test_a_request_that_fails_only_when_it_is_loaded_fails_alone(ready, monkeypatch):
    clean, begin = draw(ready, GOOD), Engine._begin

    def begun(engine, picture):
        if picture.plan.request.prompt == "a dog":
            raise ArithmeticError("it cannot begin")
        return begin(engine, picture)

    monkeypatch.setattr(Engine, "_begin", begun)
    orders = [GOOD[0], Request("a dog", num_images=3), GOOD[1]]
    drawn = draw(ready, orders, on_error="return")
    assert [str(one) for one in drawn[1]] == ["request 1 ('a dog'): it cannot begin"] * 3
    assert torch.equal(drawn[0], clean[0]) and torch.equal(drawn[2], clean[1])
    with pytest.raises(RequestError, match="it cannot begin") as raised:
        draw(ready, orders)
    assert torch.equal(raised.value.images[0], clean[0])
    assert all(isinstance(one, RequestError) for one in draw(ready, orders[1:2], on_error="return")[0])

    def broken(engine, picture):
        raise RuntimeError("nobody can begin")

    monkeypatch.setattr(Engine, "_begin", broken)
    drawn = draw(ready, GOOD, on_error="return")
    assert all("nobody can begin" in str(one) for one in drawn)


def test_a_batch_that_fails_as_a_whole_blames_nobody(ready, monkeypatch):
    load = Engine.load
    monkeypatch.setattr(
        Engine, "load", lambda engine, batch: load(engine, batch) if len(batch) == 1 else (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        draw(ready, GOOD, on_error="return")


def test_a_request_that_fails_only_when_it_begins_fails_alone(ready, monkeypatch):
    clean, predict = draw(ready, GOOD), type(Engine(ready).denoiser).predict

    def predicted(denoiser, latents, times, text, keywords):
        if bool((latents > 40).any()):
            raise RuntimeError("it cannot begin")
        return predict(denoiser, latents, times, text, keywords)

    monkeypatch.setattr(type(Engine(ready).denoiser), "predict", predicted)
    bad = Request("a dog", latents=torch.full((4, 8, 8), 50.0))
    drawn = draw(ready, [GOOD[0], bad, GOOD[1]], on_error="return")
    assert str(drawn[1]) == "request 1 ('a dog'): it cannot begin" and isinstance(drawn[1].__cause__, RuntimeError)
    assert torch.equal(drawn[0], clean[0]) and torch.equal(drawn[2], clean[1])


def test_a_batch_that_is_broken_off_after_its_first_step_is_not_begun_anew(ready, monkeypatch):
    steps, made, step = [], [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine, batch: (made.append(len(batch.rows)), step(engine, batch)))

    def stop(pipe, step, time, given):
        steps.append(step)
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        draw(ready, GOOD, on_error="return", callback_on_step_end=stop)
    assert steps == [0] and made == [2]


def test_pictures_are_told_of_as_they_are_drawn(ready):
    told = {}
    orders = [GOOD[0], Request("a dog", num_images=2, seed=3), Request(7), GOOD[1]]

    def keep(index, number, image):
        told[index, number] = image
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(ready, orders, on_error="return", max_batch=2, callback_on_image=keep)
    assert list(told) == [(0, 0), (1, 0), (1, 1)]
    told.clear()
    drawn = draw(
        ready, orders, on_error="return", max_batch=2, callback_on_image=lambda *said: told.update({said[:2]: 1})
    )
    assert sorted(told) == [(0, 0), (1, 0), (1, 1), (3, 0)] and isinstance(drawn[2], RequestError)


def test_the_bounds_are_options_of_the_call(ready):
    order = Request("a cat", num_images=2, seed=1, guidance_scale=1.0)
    small = RequestLimits(num_images=1)
    with pytest.raises(RequestError, match="num_images must be a whole number from 1 to 1, got 2"):
        draw(ready, [order], limits=small)
    assert len(draw(ready, [order])[0]) == 2
    for field in dataclasses.fields(RequestLimits):
        assert getattr(kd.RequestLimits(), field.name), field.name


def test_numbers_of_numpy_are_numbers(ready):
    plain = Request("a cat", seed=9, guidance_scale=4.0, num_images=2, strength=0.5, original_size=(8, 8))
    numpy = Request(
        "a cat", seed=np.int64(9), guidance_scale=np.float32(4), num_images=np.uint8(2), strength=np.float16(0.5),
        original_size=(np.int32(8), np.float64(8)), subject_start=np.float64(0), endings="own",
    )  # fmt: skip
    for one, other in zip(draw(ready, [plain])[0], draw(ready, [numpy])[0], strict=True):
        assert torch.equal(one, other)
    use = ImagePrompt(
        embeds=random(1, 32), scale=np.float32(0.5), start=np.float64(0), end=np.int64(1), adapter=np.int8(0)
    )
    same = ImagePrompt(embeds=random(1, 32), scale=0.5)
    assert torch.equal(*(draw(ready, [Request("a", image_prompts=[one], seed=1)])[0] for one in (use, same)))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"requests": Request("a")}, "requests must be a list of Requests, got one; put it in a list"),
        ({"requests": None}, "requests must be a list of Requests, got NoneType"),
        ({"requests": "a cat"}, "requests must be a list of Requests, got str"),
        ({"requests": {"prompt": "a"}}, "requests must be a list of Requests, got dict"),
        ({"num_inference_steps": "5"}, "num_inference_steps must be a whole number .* got '5'"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number .* got 2.5"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"max_batch": None}, "max_batch must be a whole number"),
        ({"bank": "concepts"}, "bank must be a ConceptBank or a mapping, got str"),
        ({"on_error": "ignore"}, 'on_error must be "raise" or "return"'),
        ({"num_inference_step": 99}, "num_inference_step.*num_inference_steps"),
        ({"strenght": 3}, "strenght"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents belongs to each Request"),
        ({"return_dict": False}, "return_dict"),
        ({"prompt_2": "oil"}, "prompt_2 belongs to each Request"),
        ({"timesteps": 5}, "timesteps must be a list, got int"),
        ({"pag_scale": "3"}, "pag_scale must be a finite number of at least 0, got '3'"),
        ({"max_regions": True}, "max_regions must be a whole number from 1"),
        ({"max_regions": 0}, "max_regions must be a whole number from 1"),
        ({"image_lengths": [[4, "x"]]}, "image_lengths must be a whole number"),
        ({"height": 17, "width": 16}, "height must be divisible by 2, got 17"),
        ({"limits": 3}, "limits must be a RequestLimits, got int"),
    ],
)
def test_what_is_wrong_with_the_call_is_named(ready, kwargs, reason):
    with pytest.raises((TypeError, ValueError), match=reason):
        draw(ready, **{"requests": [GOOD[0]], **kwargs})


def test_requests_may_come_from_any_iterable(ready):
    assert torch.equal(draw(ready, (order for order in GOOD))[1], draw(ready, GOOD)[1])


def test_an_error_can_be_sent_elsewhere():
    error = RequestError(3, Request("a cat", id="bob-7"), "it is too large")
    error.images = [None, "a picture"]
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is RequestError and str(other) == str(error) == "request 3 (bob-7: 'a cat'): it is too large"
        assert (other.index, other.id, other.images) == (3, "bob-7", [None, "a picture"])
        assert other.reason == "it is too large"


def test_json_that_is_hostile_is_one_error_that_names_the_field(tmp_path):
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("no picture")
    for order, reason in (
        ('{"prompt": "a", "image": "thin.png"}', "image .*at most 16 times as long as wide"),
        ('{"prompt": "a", "mask": "text.png"}', "mask .*must be a picture in PNG"),
        ('{"prompt": "a", "image": "../outside.png"}', "image must be a file inside"),
        ('{"prompt": "a", "image": "\\u0000.png"}', "image "),
        ('{"prompt": "a", "image": "absent.png"}', "image: .*absent.png"),
        ('{"prompt": "a", "image": "."}', "image"),
        ('{"prompt": "a", "image_prompts": [{"image": ["thin.png"]}]}', "image .*at most 16 times"),
    ):
        with pytest.raises((ValueError, OSError, TypeError), match=reason):
            Request.from_json(json.loads(order), tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    folder = tmp_path / "deep"
    folder.mkdir()
    assert Request.from_json({"prompt": "a", "image": "../x.png"}, folder, outside=True).image.size == (8, 8)
    Image.new("1", (7_000, 7_000)).save(tmp_path / "large.png")
    large = {"prompt": "a", "image_prompts": [{"image": ["large.png"] * 3}]}
    with pytest.raises(ValueError, match="image .*large.png must have at most 30000000 pixels"):
        Request.from_json(large, tmp_path)
    many = {"prompt": "a", "image_prompts": [{"image": ["x.png"] * 65}]}
    with pytest.raises(ValueError, match="at most 64 pictures and masks"):
        Request.from_json(many, tmp_path)
