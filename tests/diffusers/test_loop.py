"""The loop of one batch: what a step is, what callbacks may do, who draws noise, what is noticed between steps."""

import inspect
import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from torch._dynamo.testing import CompileCounter

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Region, Request, Use
from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.generation.batch import Picture
from keylock_diffusers.generation.engine import Engine, Settings
from keylock_diffusers.routing import edits
from tests.diffusers import compatibility as tiny
from tests.diffusers.drawing import APART, COMPANY, ROUNDING, build, picture

STEPS = 5
TEXT = "a cat on blue"
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(pipe, requests, **kwargs):
    return kd.generate(pipe, requests, **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


def plain(pipe, seed=1, **kwargs):
    given = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "pt", **kwargs}
    return pipe(TEXT, generator=torch.Generator().manual_seed(seed), **given).images[0]


def order(seed=1, text=TEXT, **more):
    return Request(text, seed=seed, **{"guidance_scale": 4.0, **more})


def loaded(pipe, requests, **settings):
    engine = Engine(pipe, Settings(num_inference_steps=STEPS, output_type="pt", **settings))
    return engine, engine.load([Picture(engine.plan(request)) for request in requests])


# One step


def test_a_step_is_one_call_of_the_unet_and_the_pipelines_call_is_not_used(ready, monkeypatch):
    monkeypatch.setattr(type(ready), "__call__", lambda *_, **__: pytest.fail("the pipeline's own call was used"))
    calls = []
    ready.unet.register_forward_hook(lambda *_: calls.append(1))
    engine, batch = loaded(ready, [order(), order(2)])
    before = batch.latents.clone()
    engine.step(batch)
    assert len(calls) == 1 and batch.position == 1 and not torch.equal(batch.latents, before)
    pictures = engine.draw(batch)
    assert len(calls) == STEPS
    for ours, theirs in zip(pictures, draw(ready, [order(), order(2)]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [diffusers.DPMSolverMultistepScheduler, diffusers.EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("where", ["denoiser", "scheduler"])
def test_a_step_that_fails_leaves_the_batch_as_it_was(ready, kind, where):
    ready.scheduler = kind.from_config(ready.scheduler.config)
    orders = [order(), order(2)]
    expected = draw(ready, orders)
    engine, batch = loaded(ready, orders)
    engine.step(batch)
    held = batch.latents

    def fail(*_args, **_kwargs):
        batch.rows[1].schedule.scheduler.half_done = True
        raise MemoryError("no room")

    if where == "denoiser":
        handle = ready.unet.register_forward_pre_hook(fail)
    else:
        scheduler = batch.rows[1].schedule.scheduler  # the first row has stepped already
        scheduler.step = fail
    with pytest.raises(MemoryError):
        engine.step(batch)
    assert batch.latents is held and batch.position == 1
    assert not hasattr(batch.rows[1].schedule.scheduler, "half_done")
    handle.remove() if where == "denoiser" else vars(scheduler).pop("step")
    for ours, theirs in zip(engine.draw(batch), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_two_draws_find_the_same_buffers(ready, concept_for):
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    first = [
        Request("<alice-cat> and <bob-dog>", concepts=[Use(alice, region=LEFT), Use(bob, region=1 - LEFT)], seed=1),
        order(2),
    ]
    second = [order(3), Request("<bob-dog> on pink", concepts=[Use(bob, lock="global")], seed=4)]
    engine = Engine(ready, Settings(num_inference_steps=STEPS, output_type="pt", max_regions=2))

    def addresses(requests):
        batch = engine.load([Picture(engine.plan(request)) for request in requests])
        held = [*batch.held.personalization.tensors(), *batch.held.inputs.values()]
        return [tensor.data_ptr() for tensor in held], engine.draw(batch)

    places, once = addresses(first)
    again, _ = addresses(second)
    assert places == again and len(places) > 4
    for ours, theirs in zip(addresses(first)[1], once, strict=True):
        assert torch.equal(ours, theirs)


def test_two_batches_of_one_engine_may_be_drawn_in_turns(ready):
    engine = Engine(ready, Settings(num_inference_steps=STEPS, output_type="pt"))
    batches = [engine.load([Picture(engine.plan(order(n, text)))]) for n, text in ((1, TEXT), (2, "a dog"))]
    for _ in range(STEPS):
        for batch in batches:
            engine.step(batch)
    for batch, (n, text) in zip(batches, ((1, TEXT), (2, "a dog")), strict=True):
        assert torch.equal(engine.draw(batch)[0], draw(ready, [order(n, text)])[0])
    with pytest.raises(RuntimeError, match="drawn to its end"):
        engine.step(batches[0])


def test_the_text_encoder_is_called_once_for_all_that_a_batch_reads(ready, concept_for):
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    both = [Use(alice, region=LEFT), Use(bob, region=1 - LEFT, lock="global")]
    rich = [Request("<alice-cat> and <bob-dog>", concepts=both, subject_start=0.4, seed=1), order(2)]
    sizes = []
    ready.text_encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    draw(ready, rich, max_regions=2)
    draw(ready, [order(1), order(2)], max_regions=2)
    assert len(sizes) == 3, "once, and once more for what is read before a subject's start"
    assert len(set(sizes)) == 1, "its size depends on what a row wants"


@pytest.mark.parametrize(("regions", "distinct"), [(False, 1), (True, 3)])
def test_how_concepts_combine_is_solved_once_for_each_set_of_them(ready, concept_for, regions, distinct, monkeypatch):
    solved, made = [], edits.mixing
    monkeypatch.setattr(edits, "mixing", lambda *given: solved.append(1) or made(*given))
    alice, bob = concept_for(ready), concept_for(ready, "<bob-dog>", "dog", seed=2)
    masks = (LEFT, 1 - LEFT) if regions else (None, None)
    uses = [Use(alice, region=masks[0]), Use(bob, region=masks[1])] if regions else [Use(alice)]
    request = Request("<alice-cat> and <bob-dog>" if regions else "<alice-cat>", concepts=uses, seed=1, num_images=2)
    engine = Engine(ready, Settings(num_inference_steps=1))
    plan = engine.plan(request)
    planned = len(solved)
    engine.load([Picture(plan), Picture(plan, image=1)])
    assert planned == 1 and len(solved) == distinct


# Callbacks


@pytest.mark.parametrize("recipe", ["decay", "lower", "read"])
def test_a_callback_meets_a_number_and_sets_one(pipe, recipe):
    seen = []

    def callback(pipe, step, time, given):
        seen.append((step, float(time), float(pipe.guidance_scale)))
        if recipe == "decay":
            pipe._guidance_scale = pipe.guidance_scale * 0.9
        elif recipe == "lower":
            pipe._guidance_scale = max(1.5, pipe.guidance_scale - 1)
        return given

    expected = plain(pipe, callback_on_step_end=callback)
    theirs, seen[:] = list(seen), []
    (ours,) = draw(kd.install(pipe), [order()], callback_on_step_end=callback)
    assert seen == theirs
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_a_callbacks_guidance_scales_every_row_in_proportion(ready):
    def halve(pipe, step, _time, given):
        if step == 0:
            pipe._guidance_scale = pipe.guidance_scale / 2
        return given

    orders = [order(1, guidance_scale=8.0), order(2, guidance_scale=4.0)]
    together = draw(ready, orders, callback_on_step_end=halve)
    for one, mixed in zip(orders, together, strict=True):
        assert (draw(ready, [one], callback_on_step_end=halve)[0] - mixed).abs().max() <= COMPANY


@pytest.mark.parametrize("family", ["SD 1.x", "SDXL"])
def test_the_official_cutoff_of_guidance(family):
    kind = SDXLCFGCutoffCallback if family == "SDXL" else SDCFGCutoffCallback
    pipe, options = build(family, adapters=()), {"height": 16, "width": 16}
    expected = plain(pipe, callback_on_step_end=kind(cutoff_step_ratio=0.5), **options)
    kd.install(pipe)
    (ours,) = draw(pipe, [order()], callback_on_step_end=kind(cutoff_step_ratio=0.5), **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_the_cutoff_of_guidance_beside_an_ip_adapter_concepts_and_regions(concept_for):
    """Rows go on with their conditional halves alone, in the batch as alone, and with guidance 1 from there on."""
    pipe = kd.install(build())
    alice = concept_for(pipe)
    orders = [
        order(1, image_prompts=[ImagePrompt(picture(0), region=LEFT)]),
        Request("<alice-cat> and a dog", concepts=[Use(alice, region=LEFT)], seed=2, guidance_scale=6.0),
        order(3, regions=[Region(LEFT, "cat")]),
    ]
    options = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5), "height": 16, "width": 16}
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = draw(pipe, orders, **options)
    handle.remove()
    assert rows == [6, 6, 6, 3, 3]
    for one, mixed in zip(orders, together, strict=True):
        assert (draw(pipe, [one], **options)[0] - mixed).abs().max() <= COMPANY


@pytest.mark.parametrize("masked", [False, True])
def test_the_cutoff_of_guidance_in_a_plain_call_with_an_ip_adapter_is_diffusers(masked):
    pipe = build()
    images = [[picture(0), picture(1)]]
    more = {"cross_attention_kwargs": {"ip_adapter_masks": [tiny.masks(2)]}} if masked else {}
    options = {"ip_adapter_image": images, "height": 16, "width": 16, **more}
    expected = plain(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5), **options)
    ours = plain(kd.install(pipe), callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5), **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_adapters_that_replace_a_projections_forward_count(build_tiny):
    """What some loaders of other adapters do, before `install` or after it."""

    def adapt(pipe):
        random = torch.Generator().manual_seed(0)
        for name, layer in pipe.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                down = torch.randn(4, layer.in_features, generator=random) * 0.2
                up = torch.randn(layer.out_features, 4, generator=random) * 0.2
                layer.forward = lambda x, old=layer.forward, down=down, up=up: old(x) + x @ down.T @ up.T
        return pipe

    expected, bare = plain(adapt(build_tiny())), plain(build_tiny())
    assert not torch.allclose(expected, bare, atol=1e-3)
    for pipe in (kd.install(adapt(build_tiny())), adapt(kd.install(build_tiny()))):
        torch.testing.assert_close(draw(pipe, [order()])[0], expected, rtol=0, atol=ROUNDING)


def test_latents_that_a_callback_returns_are_drawn_on_with(pipe):
    def shift(_pipe, step, _time, given):
        return {"latents": given["latents"] * 0.5} if step == 2 else given

    expected = plain(pipe, callback_on_step_end=shift)
    torch.testing.assert_close(
        draw(kd.install(pipe), [order()], callback_on_step_end=shift)[0], expected, rtol=0, atol=ROUNDING
    )
    with pytest.raises(ValueError, match=r"latents must be \[1, 4, 8, 8\], got \[1, 4, 2, 2\]"):
        draw(pipe, [order()], callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 2, 2)})
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ValueError, match="prompt_embeds is what rows were prepared with"):
        draw(
            pipe, [order()], callback_on_step_end=lambda p, i, t, g: {"prompt_embeds": g["prompt_embeds"] + 1}, **names
        )
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs must be of latents, .*, got 'nothing'"):
        draw(pipe, [order()], callback_on_step_end=print, callback_on_step_end_tensor_inputs=["nothing"])


def test_pipelines_whose_call_knows_no_callback_have_one_here(pipe):
    class Old(type(pipe)):
        def __call__(self, prompt, num_inference_steps=1):
            raise AssertionError

    old = kd.install(Old(**pipe.components, requires_safety_checker=False))
    seen = []
    draw(old, [order()], callback_on_step_end=lambda p, i, t, g: seen.append(i) or g)
    assert seen == list(range(STEPS))


# Stopping


def test_a_stop_flag_from_outside_is_seen_at_the_next_step_and_in_the_batches_that_follow(ready):
    calls = []

    def count(*_):  # stands for a stop button's thread
        calls.append(1)
        if len(calls) == 3:
            ready._interrupt = True

    handle = ready.unet.register_forward_pre_hook(count)
    drawn = draw(ready, [order(n) for n in range(3)], max_batch=1)
    assert len(calls) == 3 and drawn[0].isfinite().all() and drawn[1:] == [None, None]
    handle.remove()
    assert all(image is not None for image in draw(ready, [order(n) for n in range(3)], max_batch=1))


def test_a_callback_stops_the_whole_call(ready):
    def stop(pipe, step, _time, given):
        pipe._interrupt = step >= 2
        return given

    calls, encoded = [], []
    ready.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    ready.text_encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    maps = kd.AttentionMaps(["cat"])
    drawn = draw(ready, [order(n) for n in range(3)], max_batch=1, callback_on_step_end=stop, record=maps)
    assert len(calls) == 3 and drawn[1:] == [None, None]
    assert [image.prompt for image in maps.images] == [order(0).prompt], "of what was begun, as the picture is"
    assert len(encoded) == 1, "the batches that follow were encoded"


# Noise


def schedulers():
    """Every scheduler of diffusers that draws noise of its own while it steps, as users set it up."""
    names = {
        "DDPMScheduler": {}, "EulerAncestralDiscreteScheduler": {}, "KDPM2AncestralDiscreteScheduler": {},
        "LCMScheduler": {}, "TCDScheduler": {}, "DPMSolverSDEScheduler": {}, "SASolverScheduler": {},
        "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
        "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++"},
        "DDIMScheduler": {"eta": 1.0}, "CMStochasticIterativeScheduler": {}, "DDPMParallelScheduler": {},
        "DDIMParallelScheduler": {"eta": 1.0}, "CosineDPMSolverMultistepScheduler": {},
        "EDMDPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    }  # fmt: skip
    return [pytest.param(name, changes, id=name) for name, changes in names.items()]


# Those that draw noise, but not for these pipelines: for tokens, video, flows, proteins, several stages, inversion;
# or draw it only where `step` is given a churn, which no pipeline does.
OTHERS = {
    "AmusedScheduler", "BlockRefinementScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
    "DDPMWuerstchenScheduler", "DPMSolverMultistepInverseScheduler", "DiscreteDDIMScheduler", "EDMEulerScheduler",
    "EntropyBoundScheduler",
    "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "LTXEulerAncestralRFScheduler",
    "RFD4ProteinaScheduler", "RePaintScheduler", "SCMScheduler", "UnCLIPScheduler", "VQDiffusionScheduler",
}  # fmt: skip


def test_every_scheduler_that_draws_noise_is_among_them():
    found = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Scheduler") and not name.startswith("Flax") else None
        if isinstance(kind, type) and hasattr(kind, "step"):
            draws = "generator" in inspect.signature(kind.step).parameters or "noise_sampler" in inspect.getsource(kind)
            found |= {name} if draws else set()
    tested = {case.values[0] for case in schedulers()}
    assert found - OTHERS - tested == set()


# What latents of a batch may differ by from those drawn alone, of the largest: they are no grey levels, and no float64
# measures them, whose noise the pipelines draw otherwise.
LATENTS = 1e-3


@pytest.mark.parametrize(("name", "changes"), schedulers())
def test_noise_comes_from_each_rows_own_generator(ready, name, changes):
    changes = dict(changes)
    options = {"eta": changes.pop("eta")} if "eta" in changes else {}
    kept = {key: value for key, value in ready.scheduler.config.items() if key in ("num_train_timesteps",)}
    scheduler = getattr(diffusers, name)(**kept, **changes)
    options |= {"scheduler": scheduler, "output_type": "latent"}
    torch.manual_seed(0)
    one = draw(ready, [order(5)], **options)[0]
    torch.manual_seed(99)  # the global generator has no part in it
    again = draw(ready, [order(5)], **options)[0]
    assert torch.equal(one, again), "the same seed drew another picture"
    first, second = draw(ready, [order(9), order(5)], **options)
    scale = float(one.abs().max())
    assert (second - one).abs().max() <= LATENTS * scale
    assert ((first - second).abs() > 10 * LATENTS * scale + 1e-5 * second.abs()).any()
    swapped = draw(ready, [order(5), order(9)], **options)
    assert torch.equal(swapped[0], second) and torch.equal(swapped[1], first)


def test_a_schedulers_own_source_of_noise_is_seeded_as_the_pipelines_is(pipe):
    pipe.scheduler = diffusers.DPMSolverSDEScheduler.from_config(pipe.scheduler.config, noise_sampler_seed=5)
    expected = plain(pipe, seed=5)
    pipe.scheduler = diffusers.DPMSolverSDEScheduler.from_config(pipe.scheduler.config, noise_sampler_seed=None)
    torch.testing.assert_close(draw(kd.install(pipe), [order(5)])[0], expected, rtol=0, atol=ROUNDING)


# LoRA weights that others change


def with_lora(pipe, **more):
    from peft import LoraConfig

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False, **more)
    pipe.unet.add_adapter(config, "a")
    return pipe


def test_a_lora_schedule_between_steps_reaches_what_is_kept(build_tiny):
    def schedule(pipe, step, _time, given):
        pipe.unet.set_adapters(["a"], [0.0 if step >= 1 else 1.0])
        return given

    pipe = with_lora(build_tiny())
    expected = plain(pipe, callback_on_step_end=schedule)
    kd.install(pipe).unet.set_adapters(["a"], [1.0])
    (ours,) = draw(pipe, [order()], callback_on_step_end=schedule)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_weights_that_are_changed_between_steps_are_noticed(build_tiny, how):
    def change(pipe, step, _time, given):
        for name, module in pipe.unet.named_modules():
            if step == 0 and name.endswith("attn2.to_k"):
                module.weight = torch.nn.Parameter(module.weight.clone())  # written to as often as the one that follows
            if step == 1:
                if name.endswith("attn2.to_k"):
                    if how == "in place":
                        module.weight.data.mul_(1)
                        module.weight.mul_(1.5)
                    else:
                        module.weight = torch.nn.Parameter(module.weight * 1.5)
        return given

    with torch.no_grad():
        expected = plain(build_tiny(), callback_on_step_end=change)
        (ours,) = draw(kd.install(build_tiny()), [order()], callback_on_step_end=change)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_what_is_made_again_between_steps_is_that_of_the_step_at_hand(ready, concept_for):
    def touch(pipe, _step, _time, given):
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2.to_k"):
                module.weight.mul_(1)  # counts as written to
        return given

    late = Request("<alice-cat> on blue", concepts=[concept_for(ready)], subject_start=0.4, seed=1)
    with torch.no_grad():
        touched, bare = (draw(ready, [late], callback_on_step_end=callback)[0] for callback in (touch, None))
    assert torch.equal(touched, bare)


def test_overlapping_calls_have_lora_scales_of_their_own(build_tiny):
    pipe = kd.install(with_lora(build_tiny()))
    scales = (0.3, None, 1.7)

    def job(scale):
        options = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
        return draw(pipe, [order()], **options)[0]

    alone = [job(scale) for scale in scales]
    found = {}

    def work(number):
        for _ in range(3):
            found.setdefault(number, []).append(job(scales[number]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(scales))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert all(torch.equal(image, expected) for image in found[number])
    assert (alone[0] - alone[2]).abs().max() > APART


# Compiled steps


@pytest.mark.parametrize("layers", [1, 3])
def test_repeated_blocks_share_one_compiled_graph(layers, concept_for):
    torch.compiler.reset()
    torch.manual_seed(0)
    pipe = kd.install(tiny.build(diffusers.StableDiffusionPipeline, tiny.unet(layers_per_block=layers)))
    alice = concept_for(pipe)
    orders = [Request("<alice-cat> on blue", concepts=[alice], seed=1), order(2)]
    options = {"height": 16, "width": 16}
    bounded = [order(5, "a cat and a dog", regions=[Region(LEFT, "cat"), Region(1 - LEFT, "dog")])]
    expected, within = draw(pipe, orders, **options), draw(pipe, bounded, **options)
    counter = CompileCounter()
    pipe.unet.compile_repeated_blocks(backend=counter, fullgraph=True)
    for ours, theirs in zip(draw(pipe, orders, **options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
    assert all(attn.processor.kept is None for attn in cross_attention_layers(pipe.unet).values())
    graphs = counter.frame_count
    draw(pipe, [order(3), order(4)], **options)
    assert graphs <= 4 and counter.frame_count == graphs, "a graph for every block, or for every user"
    torch.testing.assert_close(draw(pipe, bounded, **options), within, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match="record must be None where blocks are compiled one by one"):
        draw(pipe, [order(3)], record=kd.AttentionMaps(["cat"]), **options)
    torch.compiler.reset()


def halving(pipe, step, _time, given):
    pipe.set_ip_adapter_scale(0.8 * 0.5 ** (step + 1))
    return given


def blinking(pipe, step, _time, given):
    pipe.set_ip_adapter_scale(0.8 * (step % 2))
    return given


@pytest.mark.parametrize("callback", [IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5), halving, blinking])
def test_callbacks_that_set_the_adapters_scale(callback):
    pipe = build()
    pipe.set_ip_adapter_scale(0.8)
    image, options = picture(0), {"height": 16, "width": 16}
    expected = plain(pipe, callback_on_step_end=callback, ip_adapter_image=image, **options)
    kd.install(pipe).set_ip_adapter_scale(0.8)
    prompts = [ImagePrompt(image, scale=0.8)]
    (ours,) = draw(pipe, [order(image_prompts=prompts)], callback_on_step_end=callback, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)
    assert np.isfinite(ours.numpy()).all()
    # Each batch begins anew.
    pipe.set_ip_adapter_scale(0.8)
    orders = [order(image_prompts=prompts)] * 2
    for again in draw(pipe, orders, callback_on_step_end=callback, max_batch=1, **options):
        assert torch.equal(again, ours)


def test_a_cutoff_of_an_adapter_whose_scale_differs_by_block():
    pipe = build()
    block = next(n for n, kind in enumerate(pipe.unet.config.up_block_types) if "Cross" in kind)
    scale = {"up": {f"block_{block}": [0.0, 0.7, 0.3][: pipe.unet.config.layers_per_block + 1]}}
    pipe.set_ip_adapter_scale(scale)
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5)
    image, options = picture(0), {"height": 16, "width": 16}
    expected = plain(pipe, callback_on_step_end=callback, ip_adapter_image=image, **options)
    kd.install(pipe).set_ip_adapter_scale(scale)
    orders = [order(image_prompts=[ImagePrompt(image, scale=scale)])] * 2
    for ours in draw(pipe, orders, callback_on_step_end=callback, max_batch=1, **options):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ROUNDING)


def test_an_adapter_that_was_switched_off_stays_off_after_the_cutoff_of_guidance():
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)

    def both(pipe, step, time, given):
        if step == 1:
            pipe.set_ip_adapter_scale(0.0)
        return cutoff(pipe, step, time, given)

    pipe = kd.install(build())
    pipe.set_ip_adapter_scale(0.8)
    options = {"callback_on_step_end_tensor_inputs": cutoff.tensor_inputs, "height": 16, "width": 16}
    (ours,) = draw(pipe, [order(image_prompts=[ImagePrompt(picture(0))])], callback_on_step_end=both, **options)
    ended = order(image_prompts=[ImagePrompt(picture(0), end=0.4)])  # the first two of five steps
    (expected,) = draw(pipe, [ended], callback_on_step_end=cutoff, **options)
    assert torch.equal(ours, expected)
