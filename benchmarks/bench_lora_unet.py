"""One step of a whole U-Net whose rows are users with a LoRA each, against what a user would do instead.

Every LoRA changes what a file of kohya's changes: the linear layers and the convolutions over one pixel of all
transformer blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# A whole U-Net needs what kernels and layers do not, and what a bare machine lacks.
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

import keylock_diffusers as kd
from benchmarks.bench_generation import WIDER, sharing
from benchmarks.harness import DEVICE, QUICK, Case, Contestant, dtype_name, dtypes
from benchmarks.memory import peak_bytes
from keylock_diffusers.denoisers.projections import projections, weight_shapes
from keylock_diffusers.loras import Adapter, LowRank, read_adapter, write_adapter
from keylock_diffusers.routing.adapters import is_flat
from keylock_diffusers.testing import random_unet
from keylock_kernels.testing import assert_as_accurate_as_eager

USERS = 2 if QUICK else 8
RANK = 16
SCALE = 0.5  # alpha / rank
SIZE = 16 if QUICK else 64  # of the latents
ROUNDS = 5 if DEVICE.type == "cuda" else 1  # on a CPU a round takes minutes
JUDGED = (0, USERS - 1)  # the rows that are compared, for the same reason
# At its own 1024 pixels SDXL takes a CPU minutes a call.
FULL_SIZES = [("SD 1.5", SIZE), ("SDXL", 2 * SIZE if DEVICE.type == "cuda" else SIZE)]
SIZES = [("small", SIZE)] if QUICK else FULL_SIZES
LINE_UPS = [
    pytest.param(model, size, dtype, id=f"{model.lower().replace(' ', '')}-{8 * size}px-{dtype_name(dtype)}")
    for model, size in SIZES
    for dtype in dtypes()
    if model != "SDXL" or dtype == torch.bfloat16
]

Updates = Mapping[str, LowRank]


def changed(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules that kohya's tools train: 192 of SD1.5, 722 of SDXL."""
    return {name: m for name, m in projections(unet).items() if ".attentions." in name and is_flat(m)}


def written(unet: nn.Module, folder: Path) -> list[Path]:
    """A LoRA file a user. They add about a fifth of what the layers give, and bfloat16 holds their numbers exactly."""
    shapes = weight_shapes(changed(unet))
    paths = []
    for user in range(USERS):
        random = torch.Generator().manual_seed(user)

        def normal(*shape: int, scale: float, random: torch.Generator = random) -> Tensor:
            return (scale * torch.randn(*shape, generator=random)).bfloat16()

        updates = {
            name: LowRank(
                normal(RANK, *shape[1:], scale=shape[1] ** -0.5), normal(shape[0], RANK, scale=0.1), scale=SCALE
            )
            for name, shape in shapes.items()
        }
        paths.append(folder / f"{user}.safetensors")
        write_adapter(paths[-1], Adapter(updates))
    return paths


def inputs(unet: Any, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a U-Net, a row a user."""
    random = torch.Generator().manual_seed(100)

    def normal(*shape: int) -> Tensor:
        return torch.randn(USERS, *shape, generator=random).to(DEVICE, dtype)

    given: dict[str, Any] = {
        "sample": normal(4, size, size),
        "timestep": 500,
        "encoder_hidden_states": normal(77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([8 * size, 8 * size, 0, 0, 8 * size, 8 * size], dtype=dtype, device=DEVICE)
        given["added_cond_kwargs"] = {"text_embeds": normal(1280), "time_ids": sizes.expand(USERS, -1)}
    return given


def of_row(given: Any, row: int) -> Any:
    """A user's row of a U-Net's arguments."""
    if isinstance(given, dict):
        return {name: of_row(value, row) for name, value in given.items()}
    return given[row : row + 1] if isinstance(given, Tensor) else given


def as_dtype(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, dict):
        return {name: as_dtype(value, dtype) for name, value in given.items()}
    return given.to(dtype) if isinstance(given, Tensor) else given


def personalized(unet: Any, given: dict[str, Any], rows: list[kd.Row]) -> kd.Personalization:
    """What a batch keeps for a generation: keys and values of its text, and the LoRAs' tables."""
    latents = given["sample"].shape[2:]
    return kd.Personalization(rows).prepare(unet, given["encoder_hidden_states"], latent_size=tuple(latents))


def step(unet: Any, given: dict[str, Any], personalization: kd.Personalization) -> Tensor:
    with personalization.adapted(unet, projections(unet)):
        return unet(**given, cross_attention_kwargs={"personalization": personalization}, return_dict=False)[0]


@contextmanager
def fused(unet: nn.Module, updates: Updates) -> Iterator[None]:
    """While it lasts, a user's LoRA is in the weights; the base model's stay where they are, which makes leaving free.

    Adding and subtracting instead would round them anew with every user.
    """
    modules = {module: updates[name] for name, module in changed(unet).items()}
    before = {module: module.weight for module in modules}
    try:
        for module, update in modules.items():
            weight = before[module]
            up, down = (factor.to(DEVICE, weight.dtype) for factor in (update.up, update.down.flatten(1)))
            made = torch.addmm(weight.flatten(1), up, down, alpha=update.scale).view_as(weight)
            module._parameters["weight"] = nn.Parameter(made, requires_grad=False)
        yield
    finally:
        for module, weight in before.items():
            module._parameters["weight"] = weight


def one_at_a_time(
    unet: Any,
    given: dict[str, Any],
    load: Callable[[int], Updates],
    users: Sequence[int] = range(USERS),
    draw: bool = True,
) -> Tensor | None:
    """Users' rows with that user's LoRA in the weights, one after the other; or only what comes before drawing."""
    made = []
    for user in users:
        own = of_row(given, user)
        with fused(unet, load(user)):
            personalization = personalized(unet, own, [kd.Row()])
            if draw:
                made.append(step(unet, own, personalization))
    return torch.cat(made) if draw else None


def exactly(unet: nn.Module, given: dict[str, Any], updates: list[Updates], dtype: torch.dtype) -> Tensor:
    """The judged rows in a wider dtype, by diffusers' own processors; weights are widened while their layer runs."""
    names = {module: name for name, module in changed(unet).items()}
    before: dict[nn.Module, dict[str, Any]] = {}

    def widen(module: nn.Module, _: Any, user: int) -> None:
        before[module] = dict(module._parameters)
        for name, parameter in before[module].items():
            if parameter is None:
                continue
            wide = parameter.to(dtype)
            if name == "weight" and module in names:
                update = updates[user][names[module]]
                more = update.up.to(DEVICE, dtype) @ update.down.flatten(1).to(DEVICE, dtype)
                wide = wide + update.scale * more.view_as(wide)
            module._parameters[name] = nn.Parameter(wide, requires_grad=False)

    def narrow(module: nn.Module, *_: Any) -> None:
        module._parameters.update(before.pop(module))

    made = []
    for user in JUDGED:
        holding = [module for module in unet.modules() if module._parameters]
        handles = [module.register_forward_pre_hook(partial(widen, user=user)) for module in holding]
        handles += [module.register_forward_hook(narrow) for module in holding]
        made.append(unet(**as_dtype(of_row(given, user), dtype), return_dict=False)[0])
        for handle in handles:
            handle.remove()
    return torch.cat(made)


def peft_mixed(unet: nn.Module, updates: list[Updates]) -> nn.Module:
    """PEFT's layers with every user's adapter, each row told its adapter's name.

    diffusers passes no names on; PEFT's own hook gives them to its layers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.model import _adapter_names_pre_forward_hook

    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(changed(unet)), init_lora_weights=False)
    users = [f"user{user}" for user in range(USERS)]
    for user in users:
        inject_adapter_in_model(config, unet, user)
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            for user, own in zip(users, updates, strict=True):
                for side, factor in (("lora_A", own[name].down), ("lora_B", own[name].up)):
                    held = getattr(layer, side)[user]
                    made = factor.to(DEVICE, layer.base_layer.weight.dtype).view_as(held.weight)
                    held.weight = nn.Parameter(made, requires_grad=False)
            names = partial(_adapter_names_pre_forward_hook, adapter_names=users)
            layer.register_forward_pre_hook(names, with_kwargs=True)
    return unet.eval()


def line_up(model: str, size: int, dtype: torch.dtype, folder: Path) -> Case:
    """All share the model's weights and, but for the reference, our processors: who differs, differs by the LoRAs."""
    stock = random_unet(model, dtype).to(DEVICE)
    ours, alone, theirs = (kd.install(sharing(stock)) for _ in range(3))
    given = inputs(stock, size, dtype)
    shapes = weight_shapes(projections(stock))
    paths = written(stock, folder)
    facts: dict[str, float] = {"modules": len(changed(stock)), "MB a LoRA": paths[0].stat().st_size / 1e6}

    def load(user: int) -> Updates:
        return read_adapter(paths[user], denoiser=shapes, text_encoders=[]).denoiser

    updates = [load(user) for user in range(USERS)]

    def watched(name: str, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(prepared: Any) -> Any:
            start = time.process_time()
            result, peak = peak_bytes(lambda: run(prepared))
            if DEVICE.type == "cpu":  # what others who share the machine make longer is the time on the clock
                facts[f"processor seconds, {name}"] = time.process_time() - start
            if peak is not None:
                facts[f"GB at a call's peak, {name}"] = max(peak, 0) / 1e9
            return result

        return call

    def contestant(name: str, kind: Any, run: Callable[[Any], Any], prepare: Any = lambda inputs: inputs) -> Contestant:
        return Contestant(name, kind, watched(name, run), prepare)

    def with_rows(rows: list[kd.Row]) -> dict[str, Any]:
        return {
            "prepare": lambda inputs: personalized(ours, inputs, rows),
            "run": lambda personalization: step(ours, given, personalization),
        }

    rows = [kd.Row(loras=(kd.LoraUse(own),)) for own in updates]

    def judge(inputs: dict[str, Any]) -> Callable[[Tensor], None]:
        exact = exactly(stock, inputs, updates, WIDER[dtype])
        near = one_at_a_time(alone, inputs, load, JUDGED)
        return lambda found: assert_as_accurate_as_eager(found[list(JUDGED)], near, exact)

    return Case(
        f"step-loras/{model.lower().replace(' ', '')}-{8 * size}px/B{USERS}-r{RANK}/{dtype_name(dtype)}",
        [given],
        [
            contestant("one batch", "library", **with_rows(rows)),
            contestant("same batch without LoRAs", "floor", **with_rows([kd.Row()] * USERS)),
            contestant("one batch, again", "again", **with_rows(rows)),
            contestant(
                "loop over adapters, PEFT's layers",
                "peer",
                lambda unet: unet(**given, return_dict=False)[0],
                lambda inputs: peft_mixed(theirs, updates),
            ),
            contestant(
                "one user at a time, loaded and fused", "peer", lambda inputs: one_at_a_time(alone, inputs, load)
            ),
            contestant(
                "loading and fusing alone", "floor", lambda inputs: one_at_a_time(alone, inputs, load, draw=False)
            ),
        ],
        judge,
        graph=False,  # who loads files, or makes lists of rows, cannot be captured
        facts=facts,
        rounds=ROUNDS,
    )


@pytest.mark.parametrize(("model", "size", "dtype"), LINE_UPS)
@torch.no_grad()
def test_step_with_loras(compare, model, size, dtype, tmp_path):
    compare(line_up(model, size, dtype, tmp_path))
