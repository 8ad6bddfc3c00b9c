"""How tools spell a tensor of a LoRA file: a module's name, then what the tensor is to it."""

from __future__ import annotations

PAIR = ("down", "up")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_TUCKER = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

# By what the key ends with. The pair is spelled as kohya, old diffusers, PEFT, diffusers, Mochi, transformers and PEFT
# with its adapter's name do.
_PARTS = {
    f"{joint}{side}{tail}": part
    for part, sides in {"down": ("down", "A"), "up": ("up", "B")}.items()
    for joint, side, tail in (
        (".lora_", sides[0], ".weight"),
        ("_lora.", sides[0], ".weight"),
        (".lora_", sides[1], ".weight"),
        (".lora.", sides[0], ".weight"),
        (".lora_", sides[1], ""),
        (".lora_linear_layer.", sides[0], ".weight"),
        (".lora_", sides[1], ".default.weight"),
    )
}
_PARTS |= {
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    **{f".lora_magnitude_vector{tail}": "magnitude" for tail in ("", ".weight", ".default", ".default.weight")},
    **{f".{name}": name for name in (*LOHA, *LOHA_TUCKER, *LOKR)},
    ".diff": "diff",
}
_UNDERSCORED = ("lora_", "lycoris_")
# What no low-rank update can stand for, by what the key ends with.
_REFUSED = {
    (".diff_b", ".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias"): "a changed bias",
    (".set_weight",): "a weight that replaces the model's",
    (".reshape_weight",): "a weight of another shape than the model's",
    (".w_norm", ".b_norm"): "a changed normalisation",
    (".oft_blocks", ".oft_diag", ".oft_r", ".oft_R", ".oft_R.weight", ".oft_s"): "OFT, an orthogonal change",
    (".boft_R", ".boft_s"): "BOFT, an orthogonal change",
    (".rescale",): "OFT or BOFT with a rescaled output",
    tuple(f".{name}.weight" for name in ("a1", "a2", "b1", "b2", "am", "bm")): "GLoRA",
    (".on_input", ".ia3_l"): "(IA)3, a rescaled input or output",
    (".lokr_t1",): "LoKr with a Tucker core of its first factor, which no tool writes,",
    (".lora_embedding_A", ".lora_embedding_B"): "a LoRA of an embedding table",
    (".lora_E", ".ranknum"): "AdaLoRA",
    (".vera_lambda_b", ".vera_lambda_d"): "VeRA",
    (".modules_to_save.weight", ".modules_to_save.bias"): "a whole module trained beside the LoRA",
}


def split_key(key: str) -> tuple[str, str] | None:
    """The module's name as the key spells it, and what the tensor is: ``down``, ``up``, ``mid``, ``alpha``,
    ``dora_scale``, ``magnitude``, ``diff`` or a factor of LoHa or LoKr; None where the key is neither."""
    for ending in sorted((ending for ending in _PARTS if key.endswith(ending)), key=len, reverse=True):
        module = key[: -len(ending)]
        # diffusers' conversion to kohya's names leaves the last dot of a DoRA's.
        return module.replace(".", "_") if module.startswith(_UNDERSCORED) else module, _PARTS[ending]
    return None


def refused(key: str) -> str | None:
    """What a key holds that is known but not supported, in words."""
    return next((kind for endings, kind in _REFUSED.items() if key.endswith(endings)), None)
