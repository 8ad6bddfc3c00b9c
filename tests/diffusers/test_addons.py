"""How other libraries attach themselves to a pipeline, each by a small stand-in: what is theirs counts in `generate` as
it does in the pipeline's own call, or is refused by name."""

import copy
import functools
import importlib
import logging
import pickle
import pkgutil
from itertools import chain

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionXLPipeline
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor2_0
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import keylock_diffusers
import keylock_diffusers as kd
from keylock_diffusers import AttentionMaps, ImagePrompt, Region, Request, RequestError
from keylock_diffusers.concepts import BaseModel
from keylock_diffusers.concepts.bank import ConceptExistsError, UnknownConceptError
from keylock_diffusers.concepts.files import ConceptFileError
from keylock_diffusers.denoisers.neighbours import loading
from keylock_diffusers.denoisers.unet import attention_modules
from keylock_diffusers.loras import LoraExistsError, LoraFileError, UnknownLoraError
from keylock_diffusers.loras.products import WrongShape
from keylock_diffusers.processors.projection import is_plain_linear
from keylock_diffusers.training.config import ConceptTrainingError, LoraTrainingError, SubjectTrainingError
from tests.diffusers.compatibility import sdxl
from tests.diffusers.drawing import APART, ROUNDING, build, picture, random

STEPS = 3
CPU = torch.device("cpu")


def order(seed=1, text="a cat on blue", **more):
    return Request(text, seed=seed, guidance_scale=4.0, **more)


def draw(pipe, *orders, **kwargs):
    return kd.generate(pipe, list(orders), **{"num_inference_steps": STEPS, "output_type": "pt", **kwargs})


def plain(pipe, seed=1, text="a cat on blue", **kwargs):
    """The pipeline's own call of the same request."""
    kwargs = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "pt", **kwargs}
    return pipe(text, generator=torch.Generator().manual_seed(seed), **kwargs).images[0]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def apart(found, expected):
    return float((found - expected).abs().max()) > APART


# Projections


class Network(nn.Module):
    """A low-rank adapter that puts its forward on the layer itself, as kohya's and LyCORIS' networks do."""

    def __init__(self, layer, seed=0):
        super().__init__()
        random_ = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(2, layer.in_features, generator=random_) * 0.3)
        self.up = nn.Parameter(torch.randn(layer.out_features, 2, generator=random_) * 0.5)
        self.multiplier, self.layer = 1.0, [layer]

    def apply_to(self):
        self.before = self.layer[0].forward
        self.layer[0].forward = self.forward

    def restore(self):
        self.layer[0].forward = self.before

    def forward(self, x):
        return self.before(x) + self.multiplier * (x @ self.down.T @ self.up.T)

    @property
    def weight(self):
        return (self.up @ self.down).detach()


class Added(nn.Module):
    """A low-rank adapter as a parametrization of the weight, LyCORIS' other way."""

    def __init__(self, weight):
        super().__init__()
        self.more = 0.3 * random(*weight.shape)

    def forward(self, weight):
        return weight + self.more


class Louder(nn.Linear):
    """A layer of somebody's own class, as diffusers' LoRACompatibleLinear and the quantised ones are."""

    def forward(self, x, scale=1.0):
        return 1.5 * super().forward(x)


def of_its_own_class(layer):
    layer.__class__ = Louder


def normalised(layer):
    weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(1.5)


def compiled(layer):
    layer.weight.data.mul_(1.5)
    layer.compile(backend="eager")


WAYS = {
    "forward": lambda layer: Network(layer).apply_to(),
    "function": lambda layer: setattr(layer, "forward", lambda x, before=layer.forward: 1.5 * before(x)),
    "hook": lambda layer: layer.register_forward_hook(lambda _layer, _in, out: 1.5 * out),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda _layer, given: (1.5 * given[0],)),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Added(layer.weight)),
    "weight norm": normalised,
    "class": of_its_own_class,
    "compiled": compiled,
}
SIDES = ("to_q", "to_k", "to_v", "to_out.0")


def projections(pipe, sides=SIDES):
    return [m for name, m in pipe.unet.named_modules() if name.endswith(tuple(f"attn2.{side}" for side in sides))]


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_hung_on_projections_counts_whoever_came_first(pipe, way, first):
    bare = plain(pipe)
    if first == "ours":
        kd.install(pipe)
    for layer in projections(pipe):
        WAYS[way](layer)
    right = plain(pipe)
    kd.install(pipe)
    assert apart(right, bare)
    assert_same(plain(pipe), right)
    assert_same(draw(pipe, order())[0], right)


def test_a_forward_that_all_layers_were_given_counts(ready, monkeypatch):
    bare, before = plain(ready), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: 1.1 * before(layer, x))
    right = plain(ready)
    assert apart(right, bare)
    assert_same(draw(ready, order())[0], right)


def test_a_hook_on_all_modules_counts(ready):
    bare = plain(ready)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _in, out: 1.1 * out if isinstance(module, nn.Linear) else None
    )
    try:
        right = plain(ready)
        assert apart(right, bare)
        assert_same(draw(ready, order())[0], right)
    finally:
        handle.remove()


def test_what_is_hung_on_an_adapters_projections_counts():
    pipe = build()
    shown = {"height": 16, "width": 16}
    for processor in pipe.unet.attn_processors.values():
        for layer in (*getattr(processor, "to_k_ip", ()), *getattr(processor, "to_v_ip", ())):
            Network(layer).apply_to()
    right = plain(pipe, ip_adapter_image=picture(0), **shown)
    kd.install(pipe)
    assert_same(draw(pipe, order(image_prompts=[ImagePrompt(picture(0))]), **shown)[0], right)


def test_a_concept_edits_what_a_network_projects(pipe, concept_for):
    """A network's forward and its weights merged into the layer's are one and the same to an edit."""
    merged = copy.deepcopy(pipe)
    concept = concept_for(pipe)
    for layer, other in zip(projections(pipe), projections(merged), strict=True):
        network = Network(layer)
        network.apply_to()
        other.weight.data += network.weight
    wanted = order(text="a <alice-cat> on blue", concepts=[concept])
    found, right = (draw(kd.install(one), wanted)[0] for one in (pipe, merged))
    assert_same(found, right)
    assert apart(found, draw(pipe, order())[0])


@pytest.mark.parametrize("change", ["multiplier", "put on", "taken off"])
def test_what_a_network_adds_may_change_between_steps(ready, change):
    networks = [Network(layer) for layer in projections(ready, ("to_k", "to_v"))]

    def begin():
        for network in networks:
            network.multiplier = 1.0
            if change != "put on":
                network.apply_to()

    def after(_pipe, step, _time, given):
        if step == 0:
            for network in networks:
                if change == "multiplier":
                    network.multiplier = -2.0
                elif change == "put on":
                    network.apply_to()
                else:
                    network.restore()
        return given

    begin()
    right = plain(ready, callback_on_step_end=after)
    if change != "taken off":
        for network in networks:
            network.restore()
    begin()
    assert apart(right, plain(ready))
    assert_same(draw(ready, order(), callback_on_step_end=after)[0], right)


def test_layers_that_were_given_back_are_kept_again(ready, monkeypatch):
    for layer in projections(ready):
        network = Network(layer)
        network.apply_to()
        network.restore()
        assert is_plain_linear(layer)
    remade = []
    monkeypatch.setattr(kd.Personalization, "remake", lambda *_: remade.append(1))
    draw(ready, order())
    assert not remade


# Offloading


def grouped(level, blocks=None, to_disk=False):
    def offload(unet, folder):
        apply_group_offloading(
            unet, CPU, CPU, level, num_blocks_per_group=blocks, offload_to_disk_path=str(folder) if to_disk else None
        )

    return offload


def cast(whole):
    def offload(unet, _folder):
        skip = {"skip_modules_pattern": None, "skip_modules_classes": None} if whole else {}
        apply_layerwise_casting(unet, torch.bfloat16, torch.float32, **skip)

    return offload


OFFLOADS = {
    "blocks in memory": grouped("block_level", 1),
    "blocks on disk": grouped("block_level", 1, to_disk=True),
    "two blocks a group on disk": grouped("block_level", 2, to_disk=True),
    "leaves in memory": grouped("leaf_level"),
    "leaves on disk": grouped("leaf_level", to_disk=True),
    "accelerate, leaf by leaf": lambda unet, _: cpu_offload(unet, CPU),
    "accelerate, block by block": lambda unet, _: cpu_offload(
        unet, CPU, preload_module_classes=[BasicTransformerBlock.__name__]
    ),
    "layers cast": cast(whole=False),
    "the whole model cast": cast(whole=True),
}


@pytest.mark.parametrize("way", OFFLOADS)
def test_weights_that_are_elsewhere_between_calls_are_loaded(pipe, concept_for, tmp_path, way):
    concept = concept_for(pipe)
    orders = [order(text="a <alice-cat> on blue", concepts=[concept]), order(2)]
    if way.endswith("cast"):
        pipe.unet.to(torch.bfloat16).to(torch.float32)  # the weights as they will come back
    kd.install(pipe)
    right, alone = draw(pipe, *orders), plain(pipe, 2)
    OFFLOADS[way](pipe.unet, tmp_path)
    for _ in range(2):  # the second time after a forward pass
        for found, expected in zip(draw(pipe, *orders), right, strict=True):
            assert_same(found, expected)
    assert_same(plain(pipe, 2), alone)


def test_what_is_loaded_is_put_away_again(pipe, monkeypatch):
    loaded, most, times = set(), [], []
    apply_group_offloading(pipe.unet, CPU, CPU, "block_level", num_blocks_per_group=1)
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: loaded.add(group) or times.append(group))
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: loaded.remove(group))
    with loading(pipe.unet) as bring:
        for name, attn in attention_modules(pipe.unet).items():
            bring(name)
            assert attn in chain(*(module.modules() for group in loaded for module in group.modules))
            most.append(len(loaded))
    assert max(most) == 2 and not loaded, "the model's own, and one block's"
    assert len(times) == len(set(times)), "each once"


def test_an_adapter_is_loaded_too(tmp_path):
    pipe = kd.install(build())
    orders, shown = [order(image_prompts=[ImagePrompt(picture(0))])], {"height": 16, "width": 16}
    right = draw(pipe, *orders, **shown)[0]
    OFFLOADS["blocks on disk"](pipe.unet, tmp_path)
    assert_same(draw(pipe, *orders, **shown)[0], right)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_a_base_model_is_known_by_its_weights_wherever_they_are(pipe, tmp_path, level):
    right = BaseModel.of(pipe).weights_hash
    for name in ("unet", "text_encoder"):
        OFFLOADS["blocks on disk" if level == "block_level" else "leaves on disk"](getattr(pipe, name), tmp_path / name)
    assert BaseModel.of(pipe).weights_hash == right


# Attention


class Shared(AttnProcessor2_0):
    """A self-attention of one's own that names no more than it needs, as those of StyleAligned's kind."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out + 0.1 * hidden_states.mean(1, keepdim=True)


def test_somebodys_self_attention_counts_and_nobody_is_warned(ready, caplog):
    unet = ready.unet
    unet.set_attn_processor({n: Shared() if "attn1" in n else p for n, p in unet.attn_processors.items()})
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        right = plain(ready)
        assert_same(draw(ready, order(), record=AttentionMaps(["cat"]))[0], right)
        with kd.record_attention(ready, ["cat"]):
            assert_same(plain(ready), right)
        assert not caplog.records
        draw(ready, order(), cross_attention_kwargs={"somebodys": 1})
        assert "'somebodys'" in caplog.text
        caplog.clear()
        options = {"personalization": kd.Personalization([kd.Row()] * 2)}
        options["personalization"].prepare(ready, ready.text_encoder(torch.zeros(2, 32, dtype=torch.long))[0])
        ready.unet(
            torch.zeros(2, 4, 8, 8), 10, ready.text_encoder(torch.zeros(2, 32, dtype=torch.long))[0],
            cross_attention_kwargs=options,
        )  # fmt: skip
        assert caplog.records, "whoever passes it by hand is told as before"
    finally:
        logger.removeHandler(caplog.handler)


def custom_diffusion(pipe):
    made = {}
    for name, processor in pipe.unet.attn_processors.items():
        attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
        made[name] = processor
        if "attn2" in name:
            made[name] = CustomDiffusionAttnProcessor2_0(True, False, attn.inner_dim, attn.cross_attention_dim)
    pipe.unet.set_attn_processor(made)


def style_aligned(pipe):
    class Default(nn.Module):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)

    pipe.unet.set_attn_processor({name: Default() for name in pipe.unet.attn_processors})


@pytest.mark.parametrize(
    ("hold", "message"),
    [
        (custom_diffusion, "has the processor CustomDiffusionAttnProcessor2_0.*install keeps it.*take off what set it"),
        (style_aligned, "has the processor Default,.*install keeps it"),
        (lambda pipe: pipe.fuse_qkv_projections(vae=False), "call pipe.unfuse_qkv_projections"),
    ],
)
def test_a_layer_that_somebody_holds_is_named_with_the_way_out(pipe, hold, message):
    hold(pipe)
    for _ in range(2):
        kd.install(pipe)
        with pytest.raises(RuntimeError, match=message):
            draw(pipe, order())
    if hold is custom_diffusion:  # the way out
        for attn in attention_modules(pipe.unet).values():
            attn.set_processor(AttnProcessor2_0())
        draw(kd.install(pipe), order())


def tiled(pipe):
    """HyperTile's way: the forward of self-attention, on the layer itself, works on tiles."""

    def wrapped(forward):
        @functools.wraps(forward)
        def call(x, *args, **kwargs):
            halves = forward(torch.cat(x.chunk(2, 1)), *args, **kwargs)
            return torch.cat(halves.chunk(2), 1)

        return call

    for name, attn in attention_modules(pipe.unet).items():
        if name.endswith("attn1"):
            attn.forward = wrapped(attn.forward)


def backbone_scaled(pipe):
    pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)


@pytest.mark.parametrize("attach", [tiled, backbone_scaled])
def test_what_works_inside_of_blocks_counts(ready, attach):
    bare = plain(ready)
    attach(ready)
    right = plain(ready)
    assert apart(right, bare)
    assert_same(draw(ready, order())[0], right)


def merge_tokens(pipe, merge_crossattn):
    """tomesd's way: blocks of another class, which is told by the U-Net how to merge."""

    class ToMeBlock(BasicTransformerBlock):
        def forward(self, hidden_states, **given):
            if self._tome_info["args"]["merge_crossattn"]:
                attend = self.attn2.forward
                self.attn2.forward = lambda x, **more: attend(x[:, ::2], **more).repeat_interleave(2, 1)
                try:
                    return super().forward(hidden_states, **given)
                finally:
                    del self.attn2.forward
            return super().forward(hidden_states, **given)

    for block in pipe.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.__class__, block._tome_info = ToMeBlock, {"args": {"merge_crossattn": merge_crossattn}}


def test_merged_pixels_are_refused_where_regions_or_maps_need_them(ready):
    calls = []
    ready.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    left = order(regions=[Region(torch.eye(8), "cat")])
    merge_tokens(ready, merge_crossattn=True)
    drawn = draw(ready, order(), left, on_error="return")
    assert_same(drawn[0], plain(ready))
    assert isinstance(drawn[1], RequestError) and "tomesd merges some before cross-attention" in str(drawn[1])
    calls.clear()
    with pytest.raises(ValueError, match="maps need all pixels, but tomesd.*merge_crossattn=False"):
        draw(ready, order(), record=AttentionMaps(["cat"]))
    with pytest.raises(ValueError, match="maps need all pixels"), kd.record_attention(ready, ["cat"]):
        pass
    assert not calls
    merge_tokens(ready, merge_crossattn=False)
    maps = AttentionMaps(["cat"])
    draw(ready, left, record=maps)
    assert maps.images


class Skipping:
    """DeepCache's way: forwards on the U-Net and its blocks, which reuse what they gave in the steps between."""

    def __init__(self, pipe, every):
        self.pipe, self.every, self.step, self.held = pipe, every, 0, {}
        unet = pipe.unet
        self._wrap(unet, self._counting)
        for block in (unet.mid_block, *(a for b in unet.down_blocks for a in getattr(b, "attentions", ()))):
            self._wrap(block, self._reusing)

    def _wrap(self, module, how):
        module.forward = functools.partial(how, module, module.forward)

    def _counting(self, _unet, forward, *args, **kwargs):
        self.step = list(self.pipe.scheduler.timesteps).index(args[1].item())
        return forward(*args, **kwargs)

    def _reusing(self, block, forward, *args, **kwargs):
        if self.step % self.every == 0:
            self.held[block] = forward(*args, **kwargs)
        return self.held[block]


def test_what_skips_steps_counts_and_no_batch_sees_anothers(ready):
    bare = plain(ready, num_inference_steps=5)
    Skipping(ready, every=2)
    right = [plain(ready, seed, num_inference_steps=5) for seed in (1, 2)]
    assert apart(right[0], bare)
    for size in (1, 2):
        for found, expected in zip(
            draw(ready, order(1), order(2), max_batch=size, num_inference_steps=5), right, strict=True
        ):
            assert_same(found, expected)
    fewer = draw(ready, order(), num_inference_steps=4)[0]  # the pipeline's scheduler has the times of five
    assert_same(fewer, plain(ready, num_inference_steps=4))
    given = copy.deepcopy(ready.scheduler)
    assert_same(draw(ready, order(), scheduler=given, num_inference_steps=5)[0], right[0])
    photo = picture(0).resize((16, 16))
    late = order(image=photo, strength=0.6)
    alone = draw(ready, late, num_inference_steps=5)[0]
    for size in (1, 2):  # it follows one schedule: rows of another make their steps in another batch
        assert draw(ready, order(7), late, max_batch=size, num_inference_steps=5)[1].equal(alone)


# Text encoders and errors


@pytest.mark.parametrize("freed", [["text_encoder"], ["text_encoder_2"], ["text_encoder", "text_encoder_2"]])
def test_text_encoders_may_be_freed_where_all_is_encoded(freed):
    torch.manual_seed(0)
    pipe = kd.install(sdxl(StableDiffusionXLPipeline))
    shown = {"height": 16, "width": 16}
    positive, negative, pooled, negative_pooled = pipe.encode_prompt("a cat", device="cpu")
    given = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
    zeros = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    right = plain(pipe, text=None, **given, **zeros, **shown)
    for name in freed:
        setattr(pipe, name, None)
    rows = {name: tensor[0] for name, tensor in given.items()}
    everything = rows | {name: tensor[0] for name, tensor in zeros.items()}
    for row in (rows, everything):  # a negative prompt that is not given is zeros
        assert_same(draw(pipe, order(text=None, **row), **shown)[0], right)
    with pytest.raises(RequestError, match="text encoder is not loaded: give prompt_embeds"):
        draw(pipe, order(), **shown)
    with pytest.raises(RequestError, match="text encoder is not loaded: give prompt_embeds"):
        draw(pipe, order(text=None, negative_prompt="a dog", **rows), **shown)


ERRORS = [
    RequestError(3, Request("a cat", id="alice"), "no"),
    ConceptFileError("damaged"),
    LoraFileError("damaged"),
    WrongShape("[2] and not [3]"),
    ConceptTrainingError("<alice-cat>: no"),
    LoraTrainingError("<alice-cat>: no"),
    SubjectTrainingError("<alice-cat>: no"),
    UnknownLoraError("no LoRA 'a'"),
    LoraExistsError("exists already"),
    UnknownConceptError("no concept 'a'"),
    ConceptExistsError("exists already"),
]


def own_errors(kind=Exception):
    found = {kind} if kind.__module__.startswith("keylock") and not kind.__name__.startswith("_") else set()
    return found.union(*(own_errors(below) for below in kind.__subclasses__()))


def test_every_error_can_be_sent_to_another_process():
    for module in pkgutil.walk_packages(keylock_diffusers.__path__, "keylock_diffusers."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert own_errors() == {type(error) for error in ERRORS}
    for error in ERRORS:
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
