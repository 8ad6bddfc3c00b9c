"""LoCon, LoHa, LoKr and whole differences: the factors' product is the weight that the tool's own formula makes."""

import copy
import math

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from keylock_diffusers.loras import LoraFileError, LowRank
from keylock_diffusers.loras.products import MAX_RANK
from tests.diffusers.lora_files import delta, pipeline, read, read_linear, write

LINEAR, CONV = (12, 10), (12, 10, 3, 3)
LARGE = (160, 150)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def file_of(folder, parts, **more):
    return write(folder / "lora.safetensors", {f"layer.{name}": one for name, one in {**parts, **more}.items()})


def tucker(core, up, down):
    """LyCORIS's rebuild: sum_ij core[i, j, ...] up[i, o] down[j, c]."""
    return torch.einsum("ij...,io,jc->oc...", core.double(), up.double(), down.double())


def locon(rank):
    up, mid, down = draw(12, rank, 1, 1), draw(rank, rank, 3, 3), draw(rank, 10, 1, 1)
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    return parts, tucker(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])


def loha(weight, ranks, cores):
    parts, halves = {}, []
    for half, rank in zip("12", ranks, strict=True):
        seed = 100 * int(half)
        if cores:
            up, down, core = (
                draw(rank, weight[0], seed=seed),
                draw(rank, weight[1], seed=seed),
                draw(rank, rank, *weight[2:]),
            )
            parts[f"hada_t{half}"] = core
            halves.append(tucker(core, up, down))
        else:
            up, down = draw(weight[0], rank, seed=seed), draw(rank, math.prod(weight[1:]), seed=seed)
            halves.append((up.double() @ down.double()).reshape(weight))
        parts |= {f"hada_w{half}_a": up, f"hada_w{half}_b": down}
    return parts, halves[0] * halves[1]


def lokr(first, second, ranks=(None, None), core=False):
    """Factors of shapes `first` [o, i] and `second` [o, i] or [o, i, kh, kw]; a rank makes a factor a product."""
    parts, made = {}, []
    for w, shape, rank in zip(("lokr_w1", "lokr_w2"), (first, second), ranks, strict=True):
        if rank is None:
            parts[w] = draw(*shape, seed=5)
            made.append(parts[w].double())
        elif core and w == "lokr_w2":
            a, b, t = draw(rank, shape[0], seed=6), draw(rank, shape[1], seed=7), draw(rank, rank, *shape[2:])
            parts |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
            made.append(tucker(t, a, b))
        else:
            a, b = draw(shape[0], rank, seed=8), draw(rank, math.prod(shape[1:]), seed=9)
            parts |= {f"{w}_a": a, f"{w}_b": b}
            made.append((a.double() @ b.double()).reshape(shape))
    w1, w2 = made
    return parts, torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2.contiguous())


# parts and their product, the module's weight, the rank that comes out, the rank that alpha is divided by
EXACT = {
    "LoCon with a core": (locon(3), CONV, 3, 3),
    "LoHa": (loha(LINEAR, (2, 3), False), LINEAR, 6, 2),
    "LoHa of a convolution": (loha(CONV, (2, 2), False), CONV, 4, 2),
    "LoHa with cores": (loha(CONV, (3, 3), True), CONV, 9, 3),
    "LoHa of a rank that the weight does not have": (loha(LINEAR, (12, 12), False), LINEAR, 10, 12),
    "LoKr, first whole, second a product": (lokr((3, 2), (4, 5), (None, 2)), LINEAR, 4, 2),
    "LoKr, both products": (lokr((3, 5), (4, 2), (2, 2)), LINEAR, 4, 2),
    "LoKr, first a product, second whole": (lokr((4, 5), (3, 2), (1, None)), LINEAR, 2, 1),
    "LoKr, both whole": (lokr((3, 2), (4, 5)), LINEAR, 8, None),
    "LoKr of a convolution, second whole": (lokr((3, 2), (4, 5, 3, 3), (2, None)), CONV, 8, 2),
    "LoKr of a convolution, second a product": (lokr((3, 2), (4, 5, 3, 3), (None, 3)), CONV, 6, 3),
    "LoKr of a convolution with a core": (lokr((3, 2), (4, 5, 3, 3), (None, 2), core=True), CONV, 4, 2),
    "LoKr of a 1 x 1 convolution": (lokr((3, 2), (4, 5, 1, 1)), (12, 10, 1, 1), 8, None),
    "LoKr of a rank that the weight does not have": (lokr((10, 10), (16, 15)), LARGE, 150, None),
    "a whole difference": (({"diff": draw(*CONV)}, draw(*CONV).double()), CONV, 12, None),
    "a whole difference of low rank": (({"diff": draw(160, 3) @ draw(3, 150)}, None), LARGE, 3, None),
}


@pytest.mark.parametrize("case", [case for case, (_, _, rank, _) in EXACT.items() if rank <= MAX_RANK])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_product_of_low_rank_is_exact(case, alpha, tmp_path):
    (parts, product), weight, rank, divisor = EXACT[case]
    product = parts["diff"].double() if product is None else product
    more = {} if alpha is None or "diff" in parts else {"alpha": torch.tensor(alpha)}
    update = read_linear(file_of(tmp_path, parts, **more), weight)
    scale = more["alpha"].item() / divisor if more and divisor else 1.0
    assert update.scale == pytest.approx(scale) and update.rank == rank and update.residual < 1e-7
    expected = scale * product.reshape(weight[0], -1)
    error = (delta(update) - expected).norm() / expected.norm()
    assert error < 3e-7, error
    assert update.down.shape == (rank, *weight[1:])


HIGH = {
    "LoHa": loha(LARGE, (12, 12), False),
    "LoKr": lokr((10, 10), (16, 15)),
    "LoKr, products": lokr((10, 10), (16, 15), (10, 15)),
    "full": ({"diff": draw(*LARGE)}, draw(*LARGE).double()),
}


@pytest.mark.parametrize("case", HIGH)
def test_a_product_of_high_rank_is_refused_or_truncated_by_as_much_as_is_allowed(case, tmp_path):
    parts, product = HIGH[case]
    path = file_of(tmp_path, parts)
    values = torch.linalg.svdvals(product)
    best = float(values[MAX_RANK:].norm() / values.norm())
    kind = case.partition(",")[0]
    for max_error in (None, 0.9 * best):
        with pytest.raises(
            LoraFileError, match=f"layer: {kind}: of a rank above 128; the best .* errs by {best:.2g} of"
        ):
            read_linear(path, LARGE, max_error)
    for max_error in (1.01 * best, 0.5):
        update = read_linear(path, LARGE, max_error)
        error = float((delta(update) - product).norm() / product.norm())
        assert update.residual == pytest.approx(error, rel=1e-4) and error <= max_error
        smaller = values[update.rank - 1 :].norm() / values.norm()
        assert update.rank <= MAX_RANK and smaller > max_error  # one less would not do


def test_products_of_nothing_are_nothing(tmp_path):
    parts, _ = loha(LARGE, (12, 12), False)
    update = read_linear(file_of(tmp_path, {**parts, "hada_w2_a": torch.zeros(160, 12)}), LARGE)
    assert update.rank == 1 and not delta(update).any() and update.residual == 0


def test_a_joint_projection_is_not_truncated(tmp_path):
    from keylock_diffusers.loras import read_adapter

    path = write(tmp_path / "lora.safetensors", {"attn.to_kv.diff": draw(*LARGE)})
    shapes = {"attn.to_k": (80, 150), "attn.to_v": (80, 150)}
    with pytest.raises(LoraFileError, match="max_error=None does not allow"):
        read_adapter(path, denoiser=shapes, text_encoders=[], max_error=0.9)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LoHaConfig(r=2, alpha=3), "LoHa"),
        (LoHaConfig(r=2, alpha=3, use_effective_conv2d=True), "LoHa"),
        (LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4), "LoKr"),
        (LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, decompose_factor=2), "LoKr"),
    ],
)
def test_peft_makes_the_same_weights_of_the_same_factors(config, kind, tmp_path):
    config = copy.deepcopy(config)
    config.target_modules = ["to_k", "conv1", "conv_shortcut"]
    base = pipeline("SD1.5").unet
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "hada_" in name or "lokr_" in name:
            nn.init.normal_(parameter, std=0.5)
    state = get_peft_model_state_dict(model)
    alphas = {f"{key.rpartition('.')[0]}.alpha": torch.tensor(3.0) for key in state}
    # PEFT divides by the rank even where there are none; LyCORIS and ComfyUI do not, and theirs is the format.
    whole = {key.rpartition(".")[0] for key in state if key.endswith("lokr_w1")}
    whole &= {key.rpartition(".")[0] for key in state if key.endswith("lokr_w2")}
    adapter = read(write(tmp_path / "lora.safetensors", {**state, **alphas}), "SD1.5")
    assert adapter.facts.kinds == (kind,) and len(adapter.denoiser) == len(alphas)
    after = model.merge_and_unload()
    compared = 0
    for name, update in adapter.denoiser.items():
        if f"base_model.model.{name}" in whole:
            continue
        before = base.get_submodule(name).weight.detach()
        ours = before.double() + delta(update).reshape(before.shape)
        torch.testing.assert_close(ours.float(), after.get_submodule(name).weight.detach(), rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared > 5


def test_dora_of_a_product_keeps_its_magnitude(tmp_path):
    parts, product = lokr((3, 2), (4, 5))
    magnitude = draw(12, 1).abs()
    update = read_linear(file_of(tmp_path, parts, dora_scale=magnitude), LINEAR)
    assert torch.equal(update.magnitude, magnitude.flatten())
    torch.testing.assert_close(delta(update), product, rtol=1e-6, atol=1e-6)


PRODUCT = {case: parts for case, ((parts, _), *_) in EXACT.items()}
LOHA, LOKR = PRODUCT["LoHa"], PRODUCT["LoKr, both products"]


def without(parts, *names):
    return {name: one for name, one in parts.items() if name not in names}


WRONG = {
    "half of LoHa": (without(LOHA, "hada_w2_b"), LINEAR, "half of LoHa: needs hada_w1_a, .*got hada_w1_a"),
    "one core of two": (without(PRODUCT["LoHa with cores"], "hada_t2"), CONV, "half of LoHa"),
    "half of LoKr": (without(LOKR, "lokr_w1_b"), LINEAR, "half of LoKr: needs lokr_w1, or lokr_w1_a and lokr_w1_b"),
    "no second": (without(LOKR, "lokr_w2_a", "lokr_w2_b"), LINEAR, "half of LoKr: needs lokr_w2"),
    "a factor twice": ({**LOKR, "lokr_w1": draw(3, 5)}, LINEAR, "half of LoKr: needs lokr_w1, or"),
    "a core beside a whole": (
        {**PRODUCT["LoKr, both whole"], "lokr_t2": draw(2, 2)},
        LINEAR,
        "takes lokr_t2 beside lokr_w2_a",
    ),
    "ranks that readers disagree about": (
        {**lokr((3, 5), (4, 2), (2, 1))[0], "alpha": torch.ones(())},
        LINEAR,
        r"LoKr with factors of ranks \[1, 2\]: what alpha is divided by is not known",
    ),
    "LoKr of another weight": (LOKR, (12, 11), r"lokr_w1 \[3, 5\] does not divide"),
    "LoKr of another second": (LOKR, (15, 10), r"lokr_w2 must be \[5, 2\] beside lokr_w1 \[3, 5\] .*got \[4, 2\]"),
    "LoKr that does not multiply": ({**LOKR, "lokr_w2_b": draw(3, 2)}, LINEAR, r"must be \[o, r\] and \[r, i\]"),
    "LoKr of a vector": ({"lokr_w1": draw(3), "lokr_w2": draw(4, 5)}, LINEAR, "must be a matrix"),
    "LoHa of another weight": (LOHA, (12, 11), r"hada_w1_b must be \[2, 11\], got \[2, 10\]"),
    "a core of another kernel": (PRODUCT["LoHa with cores"], (12, 10, 5, 5), r"hada_t1 must be \[3, 3, 5, 5\]"),
    "LoCon of another kernel": (PRODUCT["LoCon with a core"], (12, 10, 5, 5), r"mid must be \[3, 3, 5, 5\]"),
    "a difference of another shape": ({"diff": draw(10, 12)}, LINEAR, r"diff must be \[12, 10\], got \[10, 12\]"),
    "the first core of LoKr": (
        {**LOKR, "lokr_t1": draw(2, 2)},
        LINEAR,
        "which no tool writes, is not supported: layer.lokr_t1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_factors_that_do_not_fit_are_refused_by_name(case, tmp_path):
    parts, weight, message = WRONG[case]
    with pytest.raises(LoraFileError, match=f"lora.safetensors: .*{message}"):
        read_linear(file_of(tmp_path, parts), weight)


@pytest.mark.parametrize("max_error", [-1, 2, math.nan, "0.1"])
def test_the_error_that_may_be_made_is_between_0_and_1(max_error, tmp_path):
    with pytest.raises(ValueError, match=r"read_adapter: max_error must lie in \[0, 1\]"):
        read_linear(tmp_path / "nowhere", LINEAR, max_error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": torch.ones(4, 3)}, r"up must be \[O, r\] and down"),
        ({"up": torch.ones(4, 2).half()}, "must have one dtype"),
        ({"down": torch.full((2, 3), math.nan)}, "down must be finite"),
        ({"down": torch.ones(0, 3), "up": torch.ones(4, 0)}, "down must not be empty"),
        ({"scale": math.inf}, "LowRank: scale must be a finite number"),
        ({"residual": 2.0}, "LowRank: residual must lie in"),
        ({"magnitude": torch.ones(3)}, r"magnitude must be \[4\], got \[3\]"),
    ],
)
def test_an_update_is_what_it_says(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LowRank(**{"down": torch.ones(2, 3), "up": torch.ones(4, 2), **changes})
