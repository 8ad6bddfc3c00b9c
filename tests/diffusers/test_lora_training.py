"""Training LoRAs: many together, each as if alone, and as diffusers and PEFT have them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import keylock_diffusers as kd
from keylock_diffusers import embedded
from keylock_diffusers.demo import pictures as demo
from keylock_diffusers.denoisers.families import denoiser_of
from keylock_diffusers.encoding import text
from keylock_diffusers.loras import Adapter, ModelShapes, read_adapter, write_adapter, write_word
from keylock_diffusers.training import LoraTrainingConfig, LoraTrainingError, Subject, advice, loras, train_loras
from keylock_diffusers.training import learners as shared
from keylock_diffusers.training import training_facts as facts_of
from keylock_diffusers.training.factors import Factors
from keylock_diffusers.training.loras import snr_weights
from tests.diffusers import accuracy, losses
from tests.diffusers.compatibility import latent_consistency, sdxl
from tests.diffusers.conftest import build_tiny
from tests.diffusers.drawing import ROUNDING
from tests.diffusers.lora_reference import PeftStep
from tests.diffusers.losses import SIDE, adamw

assert_as_accurate = functools.partial(accuracy.assert_as_accurate, largest=False)
QUICK = LoraTrainingConfig(steps=3, batch_size=2, rank=2, learning_rate=0.05, max_grad_norm=None)
# Everything that can learn, and what changes the loss.
WHOLE = dataclasses.replace(QUICK, targets="all", text_targets="linear", rank=3, alpha=1.5, snr_gamma=2.0)

DRAWING = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}


def subject(name="alice", seed=1, **changes):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 255, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)) for _ in range(2)]
    captions = [f"<{name}-cat> on blue", f"a grinning <{name}-cat> on white"]
    plain = {"placeholder": f"<{name}-cat>", "super_class": "cat", "images": images, "captions": captions}
    return Subject(**{**plain, "seed": seed, **changes})


def masked(seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 200, (8 * SIDE, 8 * SIDE), dtype=np.uint8)) for _ in range(2)]


def mixed():
    """One whose word is learned, one with plain words and masks, one whose word is of two tokens."""
    return [
        subject("alice", 1),
        subject("bob", 2, placeholder="a dog", super_class="", captions=["a dog on red", "a cat"], masks=masked(2)),
        subject("carol", 3, super_class="crying cat"),
    ]


def train(pipe, subjects, config=QUICK, **kwargs):
    return train_loras(pipe, subjects, config, progress=False, **kwargs)


def tensors(adapter):
    """All that was learned, by name."""
    found = {("word", name, n): v for name, word in adapter.words.items() for n, v in enumerate(word.vectors)}
    for component, updates in enumerate((adapter.denoiser, *adapter.text_encoders)):
        for name, update in updates.items():
            found |= {(component, name, "down"): update.down, (component, name, "up"): update.up}
    return found


def same(one, other):
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.fixture(name="optimizers")
def _optimizers():
    with losses.optimizers() as made:
        yield made


@pytest.fixture
def begun(monkeypatch):
    """Factors that begin anywhere: from zero, B's gradient would be all there is."""

    def begin(self, generator, dtype):
        return torch.randn(sum(self._sizes), generator=generator).to(dtype) * 0.1

    monkeypatch.setattr(Factors, "begin", begin)


def held(factors, tensors_):
    """An optimiser's tensors (gradients among them) as an adapter of one learner."""
    denoiser, *encoders = factors.low_rank(tensors_[0])
    return Adapter(denoiser, tuple(encoders)), tensors_[1:]


# The loss and its gradients


PIPELINES = {
    "epsilon": lambda: build_tiny(prediction_type="epsilon"),
    "sample": lambda: build_tiny(prediction_type="sample"),
    "v_prediction": lambda: build_tiny(prediction_type="v_prediction"),
    "SDXL": lambda: sdxl(StableDiffusionXLPipeline),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_mixed_batchs_gradients_are_those_of_pipelines_with_pefts_layers(case, optimizers, begun):
    pipe, config, subjects = PIPELINES[case](), dataclasses.replace(WHOLE, steps=1), mixed()
    found = train(pipe, subjects, config)
    factors = Factors(denoiser_of(copy.copy(pipe), {}), config)
    for one, learned, optimizer in zip(subjects, found, optimizers, strict=True):
        adapter, words = held(factors, optimizer.before[0])
        if words:
            word = kd.loras.LearnedWord(one.placeholder, tuple(words))
            adapter = dataclasses.replace(adapter, words={one.placeholder: word})
        steps = [PeftStep(pipe, dtype, adapter, config.scale) for dtype in (torch.float32, torch.float64)]
        eager, exact = (step.gradients(one, config) for step in steps)
        gradient, of_words = held(factors, optimizer.gradients[0])
        ours = {(component - 1, *rest): tensor for (component, *rest), tensor in tensors(gradient).items()}
        ours |= {(number, "word"): tensor for number, tensor in enumerate(of_words)}
        assert ours.keys() == exact.keys() and len(exact) > 100
        keys = [key for key in exact if exact[key].abs().max() > 0]
        assert not any(ours[key].any() for key in exact.keys() - {*keys})
        assert_as_accurate(*([side[key].reshape(exact[key].shape) for key in keys] for side in (ours, eager, exact)))
        shown = [torch.tensor(round(step.loss(one, config).item(), 5)) for step in steps]
        assert_as_accurate(torch.tensor(facts_of(learned)["loss"]), *shown)


def test_a_picture_of_sdxl_is_told_by_its_size_and_where_its_middle_square_lies():
    pipe, seen = PIPELINES["SDXL"](), []
    pipe.unet.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["added_cond_kwargs"]), with_kwargs=True)
    wide = subject(images=[Image.new("RGB", (32, 20)), Image.new("RGB", (32, 20))])
    train(pipe, [wide], dataclasses.replace(QUICK, steps=1))
    assert seen[0]["time_ids"].tolist() == [[20, 32, 0, 5, 16, 16]] * 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_minimal_snr_weights_hold_where_there_is_no_signal_and_no_noise(prediction):
    share = torch.tensor([0.0, 0.2, 0.999, 1.0], dtype=torch.float64)
    signal, sigma = share.sqrt(), (1 - share).sqrt()
    given = shared.Lesson([], share, signal, sigma, share, share, share)
    ratio = share[1:3] / (1 - share[1:3])
    counts = ratio.clamp(max=5)
    inner = {"epsilon": counts / ratio, "v_prediction": counts / (ratio + 1), "sample": counts}[prediction]
    ends = {"epsilon": (1.0, 0.0), "v_prediction": (0.0, 0.0), "sample": (0.0, 5.0)}[prediction]
    expected = torch.tensor([ends[0], *inner.tolist(), ends[1]], dtype=torch.float64)
    torch.testing.assert_close(snr_weights(given, 5.0, prediction), expected, rtol=accuracy.FLOAT64, atol=1e-15)


# Isolation


@pytest.mark.parametrize("what", ["pictures", "factors", "word"])
def test_a_neighbour_that_explodes_changes_nobodys_bits(build_tiny, optimizers, begun, monkeypatch, what):
    pipe, subjects, config = build_tiny(), mixed(), dataclasses.replace(WHOLE, steps=1)
    sick, begin = subjects[0], loras._Training.begin

    def poisoned(self, one):
        learner = begin(self, one)
        if one is sick:
            with torch.no_grad():
                if what == "pictures":
                    learner.latents.fill_(math.nan)
                else:
                    {"factors": learner.factors, "word": learner.words[0]}[what].mul_(1e30)
        return learner

    well = train(pipe, subjects, config)
    monkeypatch.setattr(loras._Training, "begin", poisoned)
    failure, *others = train(pipe, subjects, config)
    assert isinstance(failure, LoraTrainingError)
    assert str(failure).startswith("<alice-cat>: the loss or its gradient was not finite at step 0")
    assert all(same(one, other) for one, other in zip(others, well[1:], strict=True))
    before, after = [one.gradients[0] for one in optimizers[1:3]], [one.gradients[0] for one in optimizers[4:6]]
    assert all(
        torch.equal(a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_at_equal_batch_size_a_subject_learns_the_same_bits_whoever_else_does(pipe):
    alice, bob, carol = mixed()
    together, with_another = train(pipe, [alice, bob], WHOLE), train(pipe, [alice, carol], WHOLE)
    assert same(together[0], with_another[0]) and not same(together[1], with_another[1])


def test_a_subject_that_failed_is_computed_no_more_and_stays_failed(pipe, tmp_path, monkeypatch):
    encode, rows, path = shared.encode_images, [], tmp_path / "run.safetensors"
    sick = subject("sick", 9)
    pipe.unet.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))

    def poisoned(pipe, images):
        return encode(pipe, images) * (math.nan if images is sick.images else 1)

    monkeypatch.setattr(shared, "encode_images", poisoned)
    for steps in (2, 4):
        failure, bob = train(
            pipe, [sick, subject("bob", 2)], dataclasses.replace(QUICK, steps=steps), checkpoint_path=path
        )
        assert isinstance(failure, LoraTrainingError) and "was not finite at step 0" in str(failure)
        assert facts_of(bob)["steps"] == steps
    assert rows == [4, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [Image.new("I", (16, 16), 70_000)] * 2}, "picture 0: a picture in mode I must have values in"),
        ({"masks": [Image.new("L", (16, 16))] * 2}, "mask 0 is empty"),
        ({"captions": ["<sick-cat>", "a cat"]}, "prompt 'a cat': the word <sick-cat> is not in the prompt"),
        ({"captions": ["<sick-cat>", "<sick-cat> <bob-cat>"]}, "<bob-cat> is no concept"),
        ({"captions": ["<sick-cat>", "a " * 40 + "<sick-cat>"]}, "<sick-cat> lies beyond"),
        ({"placeholder": "sick", "captions": ["<sick-cat>", "a"]}, "<sick-cat> is no concept"),
    ],
)
def test_what_is_wrong_with_one_users_pictures_or_words_stops_that_user_alone(pipe, changes, message):
    sick, bob = subject("sick", 9, **changes), subject("bob", 2)
    failure, other = train(pipe, [sick, bob])
    assert isinstance(failure, LoraTrainingError) and message in str(failure), str(failure)
    assert str(failure).startswith(f"{sick.placeholder}: ") and same(other, train(pipe, [bob])[0])


# A run


@pytest.mark.parametrize("interrupted_at", [1, 3])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(pipe, tmp_path, interrupted_at):
    subjects, path, config = mixed(), tmp_path / "run.safetensors", dataclasses.replace(WHOLE, steps=4)
    whole = train(pipe, subjects, config)
    train(pipe, subjects, dataclasses.replace(config, steps=interrupted_at), checkpoint_path=path)
    resumed = train(pipe, subjects, config, checkpoint_path=path)
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(facts_of(a)["loss"] == facts_of(b)["loss"] for a, b in zip(whole, resumed, strict=True))
    for other in (dataclasses.replace(config, rank=4), dataclasses.replace(config, targets="linear")):
        with pytest.raises(ValueError, match="is of another run"):
            train(pipe, subjects, other, checkpoint_path=path)
    with pytest.raises(ValueError, match="is of another run"):
        train(pipe, [*subjects[:2], subject("carol", 4, super_class="crying cat")], config, checkpoint_path=path)


@pytest.mark.parametrize("case", ["v_prediction", "SDXL"])
def test_what_is_computed_twice_is_the_same_to_the_bit(case):
    pipe = PIPELINES[case]()
    calls = []
    pipe.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    before = [{n: v for n, v in vars(m).items() if "checkpointing" in n} for m in pipe.unet.modules()]
    plain = train(pipe, mixed(), WHOLE)
    assert len(calls) == WHOLE.steps
    twice = train(pipe, mixed(), dataclasses.replace(WHOLE, gradient_checkpointing=True))
    assert len(calls) == 3 * WHOLE.steps, "nothing was computed twice"
    assert all(same(a, b) for a, b in zip(plain, twice, strict=True))
    assert before == [{n: v for n, v in vars(m).items() if "checkpointing" in n} for m in pipe.unet.modules()]


def test_factors_begin_as_pefts_do_and_words_as_their_super_class(pipe):
    still = dataclasses.replace(WHOLE, steps=1, learning_rate=0.0, embedding_rate=0.0, rank=8)
    alice, bob, carol = train(pipe, mixed(), still)
    torch.manual_seed(0)
    for update in (*alice.denoiser.values(), *alice.text_encoders[0].values()):
        assert not update.up.any() and update.scale == 1.5 / 8 and update.down.dtype == torch.float32
        layer = nn.Linear(update.down[0].numel(), 8)
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))  # as PEFT's reset_lora_parameters
        bound = 1 / math.sqrt(update.down[0].numel())
        assert 0.8 * bound < update.down.abs().max() <= bound * (1 + 1e-6)
        # 8 K draws of a uniform distribution: its variance within five standard errors
        error = 5 * math.sqrt(0.8 / update.down.numel())
        assert update.down.square().mean() == pytest.approx(bound**2 / 3, rel=error)
    assert same(alice, train(pipe, [subject("alice", 1)], still)[0])
    assert not torch.equal(alice.denoiser["conv_in"].down, carol.denoiser["conv_in"].down)
    table = pipe.text_encoder.get_input_embeddings().weight
    for adapter, words in ((alice, "cat"), (carol, "crying cat")):
        (word,) = adapter.words.values()
        assert torch.equal(word.vectors[0], table[text.super_class_ids(pipe.tokenizer, words)])
    assert not bob.words and bob.facts.trigger_words == ("a dog",)


def test_steps_are_adamws_and_only_factors_decay(pipe, optimizers):
    config = dataclasses.replace(QUICK, weight_decay=0.1, embedding_rate=0.2)
    train(pipe, [subject()], config)
    (optimizer,) = optimizers
    size = float(optimizer.before[0][1].square().mean().sqrt())
    assert [rates for rates in optimizer.rates] == [[0.05, pytest.approx(0.2 * size)]] * 3
    for number, decay in enumerate((0.1, 0.0)):
        rates = [[given[number]] for given in optimizer.rates]
        gradients = [[given[number]] for given in optimizer.gradients]
        start = [optimizer.before[0][number]]
        after = adamw(start, gradients, rates, betas=(0.9, 0.999), weight_decay=decay)
        found = [*(before[number] for before in optimizer.before[1:]), optimizer.learned[number].detach()]
        for ours, (right,) in zip(found, after, strict=True):
            assert (ours.double() - right).abs().max() <= 4 * torch.finfo(torch.float32).eps * right.abs().max()


def test_the_defaults_are_those_of_diffusers_scripts():
    config = LoraTrainingConfig()
    assert (config.rank, config.scale, config.learning_rate, config.weight_decay) == (4, 1.0, 1e-4, 1e-2)
    assert config.targets == ("to_q", "to_k", "to_v", "to_out.0") and config.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (("to_q", "attn2.to_out.0"), {"to_q", "to_out"}),
        (("mid_block.attentions.0.proj_in",), {"proj_in"}),
        ("linear", {nn.Linear, (1, 1)}),
        ("all", {nn.Linear, (1, 1), (3, 3)}),
    ],
)
def test_targets_are_names_or_their_ends_or_kinds(pipe, targets, kinds):
    (adapter,) = train(pipe, [subject()], dataclasses.replace(QUICK, steps=1, targets=targets))
    modules = {name: pipe.unet.get_submodule(name) for name in adapter.denoiser}
    if isinstance(targets, str):
        assert {type(m) if isinstance(m, nn.Linear) else m.kernel_size for m in modules.values()} == kinds
        all_of = [n for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert targets == "linear" or sorted(modules) == sorted(all_of)
    else:
        assert {name.removesuffix(".0").rpartition(".")[2] for name in modules} == kinds
        assert "attn2.to_out.0" not in targets or not any("attn1.to_out" in name for name in modules)
    assert not adapter.text_encoders


def test_a_frozen_word_stays_and_plain_words_have_none(pipe):
    (still,) = train(pipe, [subject()], dataclasses.replace(QUICK, embedding_rate=0.0))
    (moved,) = train(pipe, [subject()])
    start = pipe.text_encoder.get_input_embeddings().weight[text.super_class_ids(pipe.tokenizer, "cat")]
    assert torch.equal(still.words["<alice-cat>"].vectors[0], start)
    assert not torch.equal(moved.words["<alice-cat>"].vectors[0], start)


def test_plain_captions_may_hold_words_of_the_pipelines_own(pipe):
    pipe.load_textual_inversion({"<hat>": torch.randn(2, 32)}, token="<hat>")
    seen = []
    pipe.text_encoder.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    one = subject(placeholder="hat", captions=["a cat with <hat>"] * 2)
    assert isinstance(train(pipe, [one])[0], Adapter)
    expected = pipe.tokenizer("a cat with <hat> <hat>_1", padding="max_length").input_ids
    assert seen[-1].tolist() == [expected] * QUICK.batch_size


def test_training_lowers_the_loss_on_its_own_pictures():
    """On the embedded base model, of draws that it was not trained on."""
    pipe = embedded.load()
    images, masks = demo.load(demo.USERS[0])
    captions = [caption.format("<alice-cat>") for caption in demo.CAPTIONS]
    alice = Subject("<alice-cat>", "cat", images, captions, masks)
    moving = LoraTrainingConfig(steps=20, batch_size=2, learning_rate=4e-3)
    still = dataclasses.replace(moving, steps=1, learning_rate=0.0, embedding_rate=0.0)
    trained, untrained = (train(pipe, [alice], config)[0] for config in (moving, still))
    draws = dataclasses.replace(moving, batch_size=8)
    with torch.no_grad():
        ours, theirs = (
            np.mean([float(PeftStep(pipe, torch.float32, one).loss(alice, draws, 1000 + n)) for n in range(2)])
            for one in (trained, untrained)
        )
    assert ours < 0.9 * theirs


# What training leaves


def test_the_pipeline_is_as_before(pipe):
    pipe.unet.train()
    before = dict(pipe.unet.attn_processors)
    weights = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    train(pipe, [subject()], WHOLE)
    modules = [*pipe.unet.modules(), *pipe.text_encoder.modules()]
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)
    assert not any("forward" in vars(module) or "_keylock_route" in vars(module) for module in modules)
    assert pipe.unet.training and not pipe.vae.training
    assert all(p.requires_grad and torch.equal(p, weights[name]) for name, p in pipe.unet.named_parameters())
    kd.install(pipe)
    with pytest.raises(ValueError, match="targets must name"):
        train(pipe, [subject()], dataclasses.replace(QUICK, targets=("to_x",)))
    assert all(vars(module)["_keylock_route"].kept is None for module in modules if "_keylock_route" in vars(module))


def test_a_caller_may_have_switched_gradients_off_or_another_precision_on(pipe):
    (expected,) = train(pipe, [subject()])
    with torch.no_grad():
        assert same(train(pipe, [subject()])[0], expected) and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert same(train(pipe, [subject()])[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(train(pipe, [subject()])[0], expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(train(pipe, [subject()])[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["mixed precision", "bfloat16 weights"])
def test_what_is_learned_is_float32_beside_bfloat16(pipe, how):
    (full,) = train(pipe, [subject()], WHOLE)
    if how == "bfloat16 weights":
        pipe.to(dtype=torch.bfloat16)
    half = train(pipe, [subject()], dataclasses.replace(WHOLE, mixed_precision="bf16" if how[0] == "m" else "no"))[0]
    assert {tensor.dtype for tensor in tensors(half).values()} == {torch.float32}
    assert facts_of(half)["loss"] == pytest.approx(facts_of(full)["loss"], rel=2**-5) and not same(half, full)


def test_the_adapters_so_far_are_given_after_every_step_and_say_how_they_were_trained(pipe):
    seen = []
    (last,) = train(pipe, [subject()], on_step=lambda step, adapters: seen.append((step, adapters()[0])))
    assert [step for step, _ in seen] == [facts_of(one)["steps"] for _, one in seen] == [1, 2, 3]
    assert same(seen[-1][1], last) and not same(seen[0][1], last)
    assert last.facts.trigger_words == ("<alice-cat>",) and last.facts.words == ("<alice-cat>",)
    assert last.facts.ranks == {"denoiser": {2: len(last.denoiser)}} and last.facts.kinds == ("LoRA",)
    facts = facts_of(last)
    assert facts["targets"] == list(QUICK.targets) and facts["stopped"] == "finished" and facts["pictures"] == 2
    assert advice(facts) == "Fewer than 40 steps say nothing of how it goes."


def test_a_patient_subject_stops_where_nothing_improves(pipe):
    config = dataclasses.replace(QUICK, steps=12, learning_rate=0.0, embedding_rate=0.0, patience=2)
    assert facts_of(train(pipe, [subject()], config)[0])["stopped"] == "converged"


def test_a_lora_that_is_loaded_counts_beneath_what_is_learned_and_stays(pipe):
    (without,) = train(pipe, [subject()])
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    fused = copy.deepcopy(pipe)
    fused.fuse_lora(components=["unet"])
    fused.unload_lora_weights()
    before = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    (beneath,), (in_weights,) = train(pipe, [subject()]), train(fused, [subject()])
    assert list(beneath.denoiser) == list(without.denoiser)
    assert facts_of(beneath)["loss"] == pytest.approx(facts_of(in_weights)["loss"], abs=2e-5)  # five decimals
    assert abs(facts_of(beneath)["loss"] - facts_of(without)["loss"]) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.state_dict().items())


@pytest.mark.parametrize("case", ["v_prediction", "SDXL"])
def test_its_files_draw_in_an_unmodified_pipeline_what_generate_draws(case, tmp_path):
    pipe = PIPELINES[case]()
    learned = train(pipe, mixed(), dataclasses.replace(WHOLE, steps=6))
    both = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))[: len(learned[0].text_encoders)]
    for number, (adapter, prompt) in enumerate(
        zip(learned, ("<alice-cat>", "a dog on red", "<carol-cat>"), strict=True)
    ):
        file, word_file = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.embedding.safetensors"
        write_adapter(file, dataclasses.replace(adapter, words={}), model=ModelShapes.of(pipe))
        theirs, ours = copy.deepcopy(pipe), copy.deepcopy(pipe)
        for name, word in adapter.words.items():
            write_word(word_file, word)
            state = load_file(word_file)
            layers = state.values() if len(both) == 1 else (state["clip_l"], state["clip_g"])
            for one in (theirs, ours):
                for (encoder, tokenizer), vectors in zip(both, layers, strict=True):
                    own = {"text_encoder": getattr(one, encoder), "tokenizer": getattr(one, tokenizer)}
                    one.load_textual_inversion({name: vectors}, token=name, **own)
        order = kd.Request(prompt, guidance_scale=4.0, seed=1)
        orders = [order, dataclasses.replace(order, loras=[adapter])]
        plain, drawn = kd.generate(kd.install(ours), orders, **DRAWING)
        theirs.load_lora_weights(tmp_path, weight_name=file.name)
        expected = theirs(prompt, generator=torch.Generator().manual_seed(1), guidance_scale=4.0, **DRAWING).images[0]
        assert np.abs(drawn - expected).max() <= ROUNDING < np.abs(drawn - plain).max()
        again = read_adapter(file, **dataclasses.asdict(ModelShapes.of(pipe)))
        assert facts_of(again) == facts_of(adapter) and same(again, dataclasses.replace(adapter, words={}))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"alpha": 0}, "alpha must be above 0, or None, got 0"),
        ({"alpha": -1.0}, "alpha must be a finite number of at least 0, got -1.0"),
        ({"snr_gamma": math.nan}, "snr_gamma must be a finite number"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, or None, got 0"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number of at least 0, got inf"),
        ({"weight_decay": "1"}, "weight_decay must be a finite number of at least 0, got '1'"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be one of no, bf16, got 'fp16'"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing must be True or False, got 1"),
        ({"targets": "to_q"}, "targets must be one of linear, all, got 'to_q'"),
        ({"targets": 3}, "targets must be a list, got int"),
        ({"targets": ["to_q", ""]}, "targets must be names of modules, got '' among them"),
        ({"text_targets": [1]}, "text_targets must be names of modules, got 1 among them"),
        ({"targets": (), "text_targets": ()}, "targets and text_targets must not both be empty"),
    ],
)
def test_a_wrong_setting_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"^LoraTrainingConfig: {message}"):
        LoraTrainingConfig(**changes)


def test_what_cannot_train_is_refused(build_tiny, tmp_path):
    pipe = build_tiny()
    for arguments, message in (
        ((pipe, None), "subjects must be a list, got NoneType"),
        ((pipe, []), "subjects must not be empty"),
        ((pipe, [subject(), "bob"]), "subjects must be Subject objects, got 'bob'"),
        ((None, [subject()]), "pipe must be a Stable Diffusion 1.x, 2.x or XL pipeline .*, got NoneType"),
        ((pipe, [subject()], {"steps": 1}), "config must be a LoraTrainingConfig, got {'steps': 1}"),
        ((latent_consistency(), [subject()]), "pipe must have no distilled model"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^train_loras: {message}"):
            train_loras(*arguments, progress=False)
    with pytest.raises(ValueError, match="checkpoint_every must be a whole number of at least 1, got 0"):
        train(pipe, [subject()], checkpoint_every=0)
    with pytest.raises(ValueError, match="checkpoint_path must be a file"):
        train(pipe, [subject()], checkpoint_path=tmp_path)
    for field in ("targets", "text_targets"):
        with pytest.raises(ValueError, match=f"{field} must name projections .* got 'to_x'; last parts .*k"):
            train(pipe, [subject()], dataclasses.replace(QUICK, **{field: ("to_x",)}))
    xl = PIPELINES["SDXL"]()
    xl.text_encoder_2 = None
    with pytest.raises(TypeError, match="XL pipeline with its text_encoder_2, got StableDiffusionXLPipeline"):
        train(xl, [subject()])
    pipe.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="train_loras: pipe must have an autoencoder without latents_mean"):
        train(pipe, [subject()])
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="a U-Net that reads noisy latents alone, 4 channels, got 9"):
        train(pipe, [subject()])
    pipe.unet.half()
    with pytest.raises(ValueError, match="float16"):
        train(pipe, [subject()])
