"""Whole U-Net steps and whole generations, with concepts and image prompts and without."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

# A whole pipeline needs what kernels and layers do not, and what a bare machine lacks.
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
pytest.importorskip("fsspec")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

import keylock_diffusers as kd
from benchmarks.harness import DEVICE, QUICK, Addition, Case, Contestant, dtype_name, dtypes
from keylock_diffusers import embedded
from keylock_diffusers.concepts import KeyLockedConcept
from keylock_diffusers.denoisers.unet import cross_attention_layers, resolutions_of
from keylock_diffusers.routing.rows import ConceptUse, ImageUse
from keylock_diffusers.testing import random_ip_adapter, random_unet

if TYPE_CHECKING:
    from keylock_diffusers.concepts import BaseModel

USERS = ("alice", "bob", "carol", "dave")
SCENES = ("{} on blue", "{} on green", "a pouting {} on yellow", "{} next to a house on green")
STEPS = 2 if QUICK else 4
GUIDANCE = 4.0
ROUNDING = 2 / 255  # of a channel, between batches of different sizes in float32


def concept(base: BaseModel, user: str, seed: int) -> kd.Concept:
    """Random and untrained: what a picture costs does not depend on what it shows."""
    random = torch.Generator().manual_seed(seed)
    width = base.cross_attention_dim
    target = torch.randn(width, generator=random)
    energy = float(target @ target)
    return KeyLockedConcept(
        f"<{user}-cat>",
        "cat",
        target_input=target,
        energy=energy,
        direction=target / energy,
        super_class_encoding=torch.randn(width, generator=random),
        word_embeddings=tuple(0.1 * torch.randn(e.hidden_size, generator=random) for e in base.text_encoders),
        values=0.1 * torch.randn(base.values_width, generator=random),
        base=base,
    )


def requests(concepts: list[kd.Concept], seed: int) -> list[kd.Request]:
    return [
        kd.Request(scene.format(c.placeholder), concepts=[c], seed=seed + n, guidance_scale=GUIDANCE)
        for n, (scene, c) in enumerate(zip(SCENES, concepts, strict=True))
    ]


def judge(one_by_one: Callable[[list[kd.Request]], list[Any]]) -> Any:
    def oracle(orders: list[kd.Request]) -> Callable[[list[Any]], None]:
        expected = np.stack(one_by_one(orders))

        def accept(images: list[Any]) -> None:
            difference = float(np.abs(np.stack(images) - expected).max())
            if not difference <= ROUNDING:  # also true for NaN
                raise AssertionError(f"a channel differs by {255 * difference:.1f}/255 from the picture drawn alone")

        return accept

    return oracle


def pipelines() -> tuple[Any, Any]:
    """The embedded model as it is, and under our processors."""
    if not (embedded.BASE_MODEL / "model_index.json").exists():
        pytest.skip("this checkout has no embedded base model")
    stock, pipe = embedded.load(dtype=torch.float32).to(DEVICE), embedded.load(dtype=torch.float32)
    return stock, kd.install(pipe.to(DEVICE))


def unpersonalised(stock: Any, scenes: Sequence[str], steps: int) -> Contestant:
    """Plain diffusers draws the same scenes with a cat that is nobody's."""

    def run(orders: list[kd.Request]) -> Any:
        return stock(
            [scene.format("cat") for scene in scenes],
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(order.seed or 0) for order in orders],
            num_inference_steps=steps,
            output_type="np",
        ).images

    return Contestant("same batch unpersonalised, plain diffusers", "floor", run)


def test_mixed_batch(compare):
    from keylock_diffusers.concepts import BaseModel

    stock, pipe = pipelines()
    base = BaseModel.of(pipe)
    concepts = [concept(base, user, seed) for seed, user in enumerate(USERS)]

    def one_batch(orders: list[kd.Request]) -> list[Any]:
        return kd.generate(pipe, orders, num_inference_steps=STEPS, output_type="np")

    def one_by_one(orders: list[kd.Request]) -> list[Any]:
        return [one_batch([order])[0] for order in orders]

    compare(
        Case(
            f"generation/{len(USERS)}-users/embedded-{STEPS}-steps/float32",
            [requests(concepts, seed) for seed in (0, 100)],
            [
                Contestant("one batch", "library", one_batch),
                Contestant("one batch, again", "again", one_batch),
                Contestant("one request at a time", "peer", one_by_one),
                unpersonalised(stock, SCENES, STEPS),
            ],
            judge(one_by_one),
            graph=False,
        )
    )


STEP_IMAGES = (4, 8)
ENCODING = 1024  # the width of an image encoder's output
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
SIZE = 16 if QUICK else 64  # of the latents
MODELS = ["small"] if QUICK else ["SD 1.5", "SDXL"]
by_dtype = pytest.mark.parametrize("dtype", dtypes(), ids=dtype_name)


def sharing(unet: Any) -> Any:
    """Another U-Net with the same weights, for other processors."""
    return copy.deepcopy(unet, {id(t): t for t in [*unet.parameters(), *unet.buffers()]})


def stripes(count: int) -> torch.Tensor:  # [1, count, height, width]
    """One mask per image at the picture's size, as IPAdapterMaskProcessor makes them."""
    masks = torch.zeros(1, count, 8 * SIZE, 8 * SIZE, device=DEVICE)
    for n in range(count):
        masks[0, n, :, n * 8 * SIZE // count : (n + 1) * 8 * SIZE // count] = 1
    return masks


def whole_step(unet: Any, given: dict[str, Any], images: torch.Tensor, attention: dict[str, Any]) -> torch.Tensor:
    return unet(
        given["latents"],
        500,
        given["text"],
        added_cond_kwargs={"image_embeds": [images]},
        cross_attention_kwargs=attention,
        return_dict=False,
    )[0]


def its_cross_attention(
    unet: Any, given: dict[str, Any], images: torch.Tensor, attention: dict[str, Any]
) -> torch.Tensor:
    """The image projection and every cross-attention layer, each on hidden states of its own size."""
    text: Any = given["text"]
    if unet.encoder_hid_proj is not None:
        text = text, unet.encoder_hid_proj([images])
    layers = cross_attention_layers(unet)
    return torch.cat([layers[name](hidden, text, **attention).flatten() for name, hidden in given["hidden"].items()])


def line_up(name: str, model: str, dtype: torch.dtype, step: Callable[..., torch.Tensor]) -> Case:
    """A guided request: ours with everything prepared, diffusers' with its masks on the device beforehand."""
    stock = random_unet(model, dtype).to(DEVICE)
    width = stock.config.cross_attention_dim
    stock._load_ip_adapter_weights([random_ip_adapter(stock, width=ENCODING)])
    ours, plain = kd.install(sharing(stock)), sharing(stock)
    # Without image prompts nobody would have loaded an adapter: its empty branch is not diffusers' to pay for.
    plain.encoder_hid_proj = None
    plain.set_attn_processor(AttnProcessor2_0())
    layers = cross_attention_layers(stock)
    sizes = resolutions_of(stock, layers, (SIZE, SIZE))
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE, dtype)

    inputs = {
        "latents": normal(2, 4, SIZE, SIZE),
        "text": normal(2, 77, width),
        "images": normal(2, max(STEP_IMAGES), ENCODING),
        "hidden": {name: normal(2, math.prod(sizes[name]), attn.query_dim) for name, attn in layers.items()},
    }

    def theirs(count: int) -> Contestant:
        attention = {"ip_adapter_masks": [stripes(count)]} if count else {}

        def run(given: dict[str, Any]) -> Any:
            return count, step(stock if count else plain, given, given["images"][:, :count], attention)

        return Contestant(f"diffusers, {count} masked images" if count else "diffusers, none", "peer", run)

    def mine(count: int, kind: str = "library") -> Contestant:
        def prepare(given: dict[str, Any]) -> Any:
            (projection,) = ours.encoder_hid_proj.image_projection_layers
            tokens = [projection(row[:count]) if count else [] for row in given["images"]]
            regions = stripes(max(count, 1))[0]
            rows = [[ImageUse(t, region=region) for t, region in zip(row, regions, strict=False)] for row in tokens]
            personalization = kd.Personalization([kd.Row(images=row) for row in rows])
            return given, personalization.prepare(ours, given["text"], latent_size=(SIZE, SIZE))

        def run(prepared: Any) -> Any:
            given, personalization = prepared
            return count, step(ours, given, given["images"][:, :0], {"personalization": personalization})

        label = f"ours, {count} masked images" if count else "ours, none"
        return Contestant(label if kind == "library" else f"{label}, again", kind, run, prepare)  # type: ignore[arg-type]

    def judge(given: dict[str, Any]) -> Any:
        """At most twice what diffusers errs in the same dtype against the next wider one, plus one rounding."""
        wide = {k: v.to(WIDER[dtype]) for k, v in given.items() if k != "hidden"}
        wide["hidden"] = {layer: hidden.to(WIDER[dtype]) for layer, hidden in given["hidden"].items()}
        allowed = {}
        for count in (0, *STEP_IMAGES):
            exact_unet = sharing(stock if count else plain)
            if step is its_cross_attention:  # the rest of a large U-Net may not fit in memory in float64
                exact_unet.conv_in = exact_unet.conv_out = None
                for block in [*exact_unet.down_blocks, exact_unet.mid_block, *exact_unet.up_blocks]:
                    block.resnets = None
                    for layer in block.modules():
                        if isinstance(layer, BasicTransformerBlock):
                            layer.ff = layer.attn1 = None
            exact_unet = copy.deepcopy(exact_unet).to(WIDER[dtype])
            masks = {"ip_adapter_masks": [stripes(count)]} if count else {}
            exact = step(exact_unet, wide, wide["images"][:, :count], masks)
            del exact_unet
            near = theirs(count).run(given)[1]
            largest = float(exact.abs().max())
            allowed[count] = exact, 2 * float((near - exact).abs().max()) + torch.finfo(dtype).eps * largest

        def accept(result: tuple[int, torch.Tensor]) -> None:
            exact, bound = allowed[result[0]]
            mistake = float((result[1] - exact).abs().max())
            if not mistake <= bound:  # also true for NaN
                raise AssertionError(f"errs {mistake:.3g}, allowed {bound:.3g}")

        return accept

    return Case(
        f"{name}/{model.lower().replace(' ', '')}-{8 * SIZE}px/B2/{dtype_name(dtype)}",
        [inputs],
        [mine(0), *map(mine, STEP_IMAGES), mine(0, "again"), theirs(0), *map(theirs, STEP_IMAGES)],
        judge,
        additions=[
            Addition(
                f"{n} masked images",
                (f"ours, {n} masked images", "ours, none"),
                (f"diffusers, {n} masked images", "diffusers, none"),
            )
            for n in STEP_IMAGES
        ],
        facts=resident(mine(STEP_IMAGES[0]).prepare(inputs)[1]),
    )


@by_dtype
@torch.no_grad()
def test_step(compare, dtype):
    compare(line_up("step", MODELS[0], dtype, whole_step))


@by_dtype
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_cross_attention_of_a_step(compare, model, dtype):
    """All that image prompts add to, where a whole step's noise does not hide it."""
    compare(line_up("cross-attention", model, dtype, its_cross_attention))


def resident(personalization: kd.Personalization) -> dict[str, float]:
    """What a generation keeps in memory for a row, and how much of it is more than keys and values."""

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    everything = size(personalization.tensors())
    pairs = [*personalization.kv.values(), *personalization._images._pairs.values()]
    return {
        f"MB per row with {STEP_IMAGES[0]} images": everything / len(personalization.rows) / 1e6,
        "all of it over keys and values": everything / size(t for pair in pairs for t in pair),
    }


def test_eight_users(compare, tmp_path):
    """A whole generation of 8 users with a concept each, from files to pictures, beside the same without."""
    from keylock_diffusers.concepts import BaseModel

    stock, pipe = pipelines()
    base, bank = BaseModel.of(pipe), kd.ConceptBank(tmp_path / "bank")
    users = [f"user{n}" for n in range(8)]
    for seed, user in enumerate(users):
        bank.add(f"{user}/cat", concept(base, user, seed))
    scenes = [SCENES[n % len(SCENES)] for n in range(len(users))]
    steps = 2 if QUICK else 25

    def orders(seed: int) -> list[kd.Request]:
        return [
            kd.Request(scene.format(f"<{user}-cat>"), concepts=[f"{user}/cat"], seed=seed + n, guidance_scale=GUIDANCE)
            for n, (user, scene) in enumerate(zip(users, scenes, strict=True))
        ]

    def generate(given: list[kd.Request]) -> list[Any]:
        fresh = kd.ConceptBank(tmp_path / "bank")  # which has loaded nothing yet
        return kd.generate(pipe, given, bank=fresh, num_inference_steps=steps, output_type="np")

    def one_by_one(given: list[kd.Request]) -> list[Any]:
        return [generate([order])[0] for order in given]

    def prepare(given: list[kd.Request]) -> kd.Personalization:
        rows = [kd.Row((ConceptUse(bank[f"{user}/cat"], beta=0.7, tau=0.15),)) for user in users]
        text = torch.randn(16, pipe.tokenizer.model_max_length, base.cross_attention_dim, device=DEVICE)
        return kd.Personalization([kd.Row()] * 8 + rows).prepare(pipe, text)

    compare(
        Case(
            f"generation/8-users/embedded-{steps}-steps/float32",
            [orders(seed) for seed in (0, 100)],
            [
                Contestant("one batch", "library", generate),
                Contestant("one batch, again", "again", generate),
                Contestant("one request at a time", "peer", one_by_one),
                unpersonalised(stock, scenes, steps),
                Contestant("prepare alone", "floor", prepare),
            ],
            judge(one_by_one),
            graph=False,
        )
    )
