"""LoRAs beside what other libraries hang on a pipeline: theirs counts, ours comes on top and leaves no trace."""

import copy
import dataclasses
import functools

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft.tuners.lora import LoraLayer
from torch import nn

import keylock_diffusers as kd
from keylock_diffusers import ImagePrompt, Lora, Request, RequestError
from keylock_diffusers.denoisers.projections import projections, weight_shapes
from keylock_diffusers.loras import Adapter, LowRank
from keylock_diffusers.processors.projection import project_vectors
from keylock_diffusers.processors.routed import handed_out
from keylock_diffusers.routing.adapters import AdapterRouting, AdapterUse, store_of
from tests.diffusers import compatibility
from tests.diffusers.compatibility import WIDTH
from tests.diffusers.drawing import COMPANY, random
from tests.diffusers.lora_files import delta, parts, pipeline, write
from tests.diffusers.test_addons import CPU, OFFLOADS, WAYS, merge_tokens
from tests.diffusers.test_lora_files import written
from tests.diffusers.test_loras import apart, draw, fused, made, plain, same

STEPS = {"num_inference_steps": 3}


def order(*loras, seed=1, **more):
    return Request("a cat on blue", seed=seed, guidance_scale=4.0, loras=list(loras), **more)


def fuse_into(pipe, adapter, strength=1.0):
    """The adapter in a pipeline's own weights."""
    other = fused("SD1.5", adapter, strength)
    for name, module in projections(other.unet).items():
        projections(pipe.unet)[name].weight.data.copy_(module.weight.data)
    for name, module in projections(other.text_encoder).items():
        projections(pipe.text_encoder)[name].weight.data.copy_(module.weight.data)
    return pipe


ADAPTER = made("SD1.5", 21, scale=0.05)


@pytest.fixture
def pipe():
    return copy.deepcopy(pipeline("SD1.5"))


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_lora_that_the_pipeline_loaded_applies_to_every_row_and_ours_on_top(pipe, first, tmp_path):
    path, _ = written(tmp_path / "theirs.safetensors", "diffusers, PEFT's pair", "SD1.5")
    both = fuse_into(copy.deepcopy(pipeline("SD1.5")), ADAPTER, 0.5)
    for one in (pipe, both):
        if first == "ours":
            kd.install(one)
        one.load_lora_weights(path, "theirs")
        one.set_adapters("theirs", 0.1)
        kd.install(one)
    assert any(isinstance(module, LoraLayer) for module in pipe.unet.modules())
    rows = [order(), order(Lora(ADAPTER, 0.5))]
    found = draw(pipe, rows)
    same(found[0], plain(pipe, order()), COMPANY)
    same(found[1], plain(both, order()), COMPANY)
    halved = draw(pipe, rows, cross_attention_kwargs={"scale": 0.5})
    same(halved[1], plain(both, order(), cross_attention_kwargs={"scale": 0.5}), COMPANY)
    assert apart(found[0], found[1]) and apart(found[1], halved[1])
    pipe.unload_lora_weights()
    same(draw(pipe, rows)[1], plain(fused("SD1.5", ADAPTER, 0.5), order()), COMPANY)


SIDES = ("attn1.to_q", "attn2.to_k", "ff.net.2", "time_emb_proj")


def hang(pipe, way):
    for name, layer in projections(pipe.unet).items():
        if name.endswith(SIDES):
            WAYS[way](layer)


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_hung_on_projections_counts_whoever_came_first(pipe, way, first):
    """Forwards, hooks, parametrizations and classes of somebody's own: W x of theirs, and our update of the same x.

    Where theirs scales what it wraps, the update it wraps is scaled too; one that comes on top is not.
    """
    if first == "ours":
        kd.install(pipe)
    hang(pipe, way)
    kd.install(pipe)
    inside = first == "ours" and way in ("function", "hook")
    scale = 1.5 if inside or way == "hook" else 1.0  # what is hung before a layer scales what our hook is shown, too
    names = [name for name in projections(pipe.unet) if name.endswith(SIDES)]
    bare, some = copy.deepcopy(pipe), Adapter({name: ADAPTER.denoiser[name] for name in names})
    found = draw(pipe, [order(Lora(some, 0.5)), order(Lora(ADAPTER, 0.5)), order()])
    same(found[2], plain(bare, order()), COMPANY)
    by_hand = kd.uninstall(bare)
    for name in names:
        layer, more = projections(by_hand.unet)[name], (some.denoiser[name], scale * 0.5)
        layer.register_forward_hook(functools.partial(added, more))
    same(found[0], plain(by_hand, order()), 1e-5)  # far less than what one layer's update counted twice makes
    assert apart(found[0], found[2]) and apart(found[1], found[0])


def added(more, _layer, given, out):
    update, strength = more
    return out + nn.functional.linear(given[0], (strength * delta(update)).to(out.dtype))


@pytest.mark.parametrize("way", ["function", "hook", "hook before", "class"])
def test_a_key_locked_concept_takes_nothing_of_a_neighbours_lora_where_projections_are_wrapped(pipe, way, concept_for):
    """Its keys and values are made anew in every step there."""
    concept = concept_for(pipe)
    for name, layer in projections(pipe.unet).items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            WAYS[way](layer)
    kd.install(pipe)
    mine = dataclasses.replace(order(), prompt="<alice-cat> on blue", concepts=[concept])
    lora = [Lora(ADAPTER, 0.5)]
    beside = draw(pipe, [order(*lora), mine, dataclasses.replace(mine, loras=lora)])
    same(beside[1], draw(pipe, [mine])[0], 1e-5)
    same(beside[2], draw(pipe, [dataclasses.replace(mine, loras=lora)])[0], 1e-5)
    assert apart(beside[2], beside[1])


@pytest.mark.parametrize("way", [None, "function", "hook", "class"])
def test_vectors_of_a_wrapped_projection_take_each_its_own_adapters_within_what_is_around_it(pipe, way):
    layers = projections(pipe.unet)
    name, layer = next((name, layer) for name, layer in layers.items() if name.endswith("attn2.to_k"))
    kd.install(pipe)
    if way:
        WAYS[way](layer)
    factor, strengths = 1.5 if way in ("function", "hook") else 1.0, (0.0, 0.5, -2.0)
    vectors = random(3, layer.in_features)
    routing = AdapterRouting([[AdapterUse(ADAPTER.denoiser, strength)] for strength in strengths], store_of())
    routing.prepare(layers, CPU, torch.float32, size=lambda name: (1, 1))
    own = routing.of_vectors(name, [(row, 0) for row in range(3)])
    before, found = (project_vectors(layer, vectors, adapters=adapters).double() for adapters in (None, own))
    more = torch.tensor(strengths, dtype=torch.float64)[:, None] * (vectors.double() @ delta(ADAPTER.denoiser[name]).T)
    torch.testing.assert_close(found, before + factor * more, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("way", OFFLOADS)
def test_weights_that_are_elsewhere_between_calls_are_loaded(pipe, tmp_path, way, first):
    rows = [order(Lora(ADAPTER, 0.5)), order(seed=2)]
    if way.endswith("cast"):
        pipe.unet.to(torch.bfloat16).to(torch.float32)  # the weights as they will come back
    elsewhere = copy.deepcopy(pipe)
    right = draw(kd.install(pipe), rows)
    if first == "ours":
        kd.install(elsewhere)
    OFFLOADS[way](elsewhere.unet, tmp_path)
    kd.install(elsewhere)
    for _ in range(2):  # the second time after a forward pass
        for found, expected in zip(draw(elsewhere, rows), right, strict=True):
            same(found, expected, COMPANY)
    kd.uninstall(elsewhere)
    assert not any("_keylock_route" in vars(module) for module in elsewhere.unet.modules())
    same(plain(elsewhere, rows[1]), right[1], COMPANY)


def test_a_decomposed_lora_reads_weights_that_are_elsewhere(pipe):
    modules = projections(pipe.unet)
    norms = {n: modules[n].weight.detach().flatten(1).norm(dim=1) for n in ADAPTER.denoiser}
    decomposed = Adapter({n: dataclasses.replace(u, magnitude=norms[n]) for n, u in ADAPTER.denoiser.items()})
    right = draw(kd.install(copy.deepcopy(pipe)), [order(Lora(decomposed, 0.5))])[0]
    cpu_offload(pipe.unet, CPU)
    same(draw(kd.install(pipe), [order(Lora(decomposed, 0.5))])[0], right, COMPANY)


class Halves(nn.Linear):
    """A quantised linear layer, as bitsandbytes' and GGUF's are: a class of its own, whose weight is no matrix."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        steps = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (layer.weight.detach() / steps).round().to(torch.int8).flatten(), requires_grad=False
        )
        self.register_buffer("steps", steps)
        self.bias = layer.bias

    @property
    def matrix(self):
        return self.weight.view(self.out_features, self.in_features) * self.steps

    def forward(self, x):
        return nn.functional.linear(x, self.matrix, self.bias)


def test_quantised_layers_are_called_as_they_are_and_updated(pipe):
    both = copy.deepcopy(pipe)
    for one in (pipe, both):
        for name, layer in list(projections(one.unet).items()):
            if isinstance(layer, nn.Linear):
                parent, _, last = name.rpartition(".")
                quantised = Halves(layer)
                if one is both:
                    more = 0.5 * delta(ADAPTER.denoiser[name]).float()
                    quantised.register_forward_hook(lambda _, given, out, more=more: out + given[0] @ more.T)
                setattr(one.unet.get_submodule(parent), last, quantised)
    of_linear = {n: u for n, u in ADAPTER.denoiser.items() if isinstance(projections(pipe.unet)[n], nn.Linear)}
    kd.install(pipe)
    same(draw(pipe, [order(Lora(Adapter(of_linear), 0.5))])[0], plain(both, order()), COMPANY)
    norms = {n: torch.ones(len(u.up)) for n, u in of_linear.items()}
    decomposed = Adapter({n: dataclasses.replace(u, magnitude=norms[n]) for n, u in of_linear.items()})
    with pytest.raises(RequestError, match="needs the numbers of .*, whose weight is quantised or not loaded: Halves"):
        draw(pipe, [order(Lora(decomposed))])


def test_checkpointed_blocks_give_the_same_gradients(pipe):
    """What a batch adds is there too when a block is computed a second time, in backward."""
    kd.install(pipe)
    modules = projections(pipe.unet)
    routing = AdapterRouting([[AdapterUse(ADAPTER.denoiser, 0.5)], []], store_of())
    routing.prepare(modules, CPU, torch.float32, size=lambda name: (1, 1))
    latents, text = random(2, 4, 8, 8), random(2, 77, WIDTH, seed=1)
    pipe.unet.train()
    found = []
    for checkpointed in (False, True):
        given = latents.clone().requires_grad_()
        (pipe.unet.enable_gradient_checkpointing if checkpointed else pipe.unet.disable_gradient_checkpointing)()
        with handed_out(modules, routing.updates):
            pipe.unet(given, torch.tensor([3, 5]), text).sample.square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)
    assert all(vars(module)["_keylock_route"].kept is None for module in modules.values())


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_uninstall_leaves_no_trace_whoever_comes_and_goes(pipe, first):
    before = plain(pipe, order())
    kept = {name: dict(vars(module)) for name, module in pipe.unet.named_modules()}
    if first == "ours":
        kd.install(pipe)
    cpu_offload(pipe.unet, CPU)
    kd.install(pipe)
    draw(pipe, [order(Lora(ADAPTER))])
    if first == "theirs":
        kd.uninstall(pipe)
        remove_hook_from_submodules(pipe.unet)
    else:
        remove_hook_from_submodules(pipe.unet)
        kd.uninstall(pipe)
    for name, module in pipe.unet.named_modules():
        assert "_keylock_route" not in vars(module)
        forward = vars(module).get("forward")  # accelerate leaves the class's own
        assert forward is None or forward == type(module).forward.__get__(module), name
        assert set(kept[name]) <= set(vars(module))
    assert torch.equal(plain(pipe, order()), before)


def test_a_projection_that_lost_our_forward_is_named(pipe):
    kd.install(pipe)
    module = projections(pipe.unet)["mid_block.resnets.0.conv1"]
    del module.forward
    with pytest.raises(RequestError, match="LoRAs cannot reach mid_block.resnets.0.conv1: call .*install"):
        draw(pipe, [order(Lora(ADAPTER))])
    same(draw(kd.install(pipe), [order(Lora(ADAPTER))])[0], plain(fused("SD1.5", ADAPTER), order()), COMPANY)


def test_merged_pixels_are_refused_where_a_loras_region_needs_them(pipe):
    kd.install(pipe)
    merge_tokens(pipe, merge_crossattn=False)
    with pytest.raises(RequestError, match="regions of LoRAs need all pixels, but tomesd merges some"):
        draw(pipe, [order(Lora(ADAPTER, region=torch.ones(16, 16)))])


@pytest.mark.parametrize("family", compatibility.FAMILIES)
def test_every_family_draws_what_it_would_with_the_lora_in_its_weights(family):
    """img2img and inpainting rows, control images, perturbed rows, videos, distilled guidance: against `generate`."""
    torch.manual_seed(0)
    builder, extra = compatibility.FAMILIES[family]
    one = builder()
    adapter = random_adapter(one)
    other = copy.deepcopy(one)
    modules = parts(other)
    for component, module in modules.items():
        for name, update in (adapter.denoiser if component < 0 else adapter.text_encoders[component]).items():
            weight = projections(module)[name].weight
            weight.data += (0.5 * delta(update)).view(weight.shape).float()
    more, of_call = {}, {}
    if "mask_image" in extra:
        more = {"image": extra["image"], "mask": extra["mask_image"], "strength": 0.9}
    elif "strength" in extra:
        more = {"image": extra["image"], "strength": 0.9}
    elif "image" in extra:
        more = {"controls": [kd.Control("c", extra["image"])]}
        of_call["controlnets"] = {"c": one.controlnet}
    else:
        of_call = dict(extra)
    row = order(**more)
    for pipe in (one, other):
        kd.install(pipe)
    found = draw(one, [dataclasses.replace(row, loras=[Lora(adapter, 0.5)]), row], **of_call)
    expected = draw(other, [row, row], **of_call)[0]
    same(found[0].float(), expected.float(), COMPANY)
    assert apart(found[0].float(), found[1].float())


def random_adapter(pipe):
    """Of every projection that a pipeline has."""
    generator = torch.Generator().manual_seed(5)

    def half(module):
        shapes = weight_shapes(projections(module))
        return {
            name: LowRank(
                torch.randn(2, *shape[1:], generator=generator) * 0.05,
                torch.randn(shape[0], 2, generator=generator),
            )
            for name, shape in shapes.items()
        }

    modules = parts(pipe)
    return Adapter(half(modules.pop(-1)), tuple(half(module) for module in modules.values()))


def test_a_face_adapters_own_lora_counts_in_the_rows_with_its_faces_alone(tmp_path):
    """diffusers gives it to every row of the pipeline."""
    pipe, call = compatibility.make("SD 1.x", "FaceID")
    before = copy.deepcopy(pipe)
    path, random_ = tmp_path / "face.safetensors", torch.Generator().manual_seed(0)
    shapes = {n: s for n, s in weight_shapes(projections(pipe.unet)).items() if n.endswith(("to_q", "to_k"))}
    tensors = {f"unet.{n}.lora_A.weight": torch.randn(2, s[1], generator=random_) * 0.3 for n, s in shapes.items()}
    tensors |= {f"unet.{n}.lora_B.weight": torch.randn(s[0], 2, generator=random_) * 0.3 for n, s in shapes.items()}
    write(path, tensors)
    pipe.load_lora_weights(path, adapter_name="faceid_0")
    pipe.set_adapters(["faceid_0"], [0.7])
    for one in (pipe, before):
        one.set_ip_adapter_scale(0.8)
        kd.install(one)
    face = ImagePrompt(embeds=random(1, WIDTH, seed=3), scale=0.8)
    rows = [order(image_prompts=[face]), order(seed=2)]
    embeds = torch.stack([torch.zeros_like(face.embeds), face.embeds])
    found = draw(pipe, rows, num_inference_steps=2)
    same(found[0], plain(pipe, rows[0], ip_adapter_image_embeds=[embeds], num_inference_steps=2), COMPANY)
    same(found[1], draw(before, rows, num_inference_steps=2)[1], COMPANY)
    assert apart(found[0], draw(before, rows, num_inference_steps=2)[0])
    scaling = {layer.scaling["faceid_0"] for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)}
    assert scaling == {0.7}, "what was there is put back"
    pipe.unet.disable_lora()
    same(draw(pipe, rows, num_inference_steps=2)[0], draw(before, rows, num_inference_steps=2)[0], COMPANY)
