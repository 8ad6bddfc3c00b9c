"""The names that a model's modules go by in LoRA files, made from the model's own, so that none is guessed.

A text-to-image model has a denoiser and text encoders; `DENOISER` and 0, 1, .. number them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from keylock_diffusers.loras.adapter import component_name

Shapes = Mapping[str, tuple[int, ...]]
DENOISER = -1

# Longer ones first where one begins another.
_PREFIXES = {
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lycoris_": DENOISER,
    "lora_te_": 0,
    "lora_te1_": 0,
    "lora_te2_": 1,
    "lora_te3_": 2,
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "model.diffusion_model.": DENOISER,
    "diffusion_model.": DENOISER,
    "text_encoder.": 0,
    "text_encoder_2.": 1,
    "text_encoder_3.": 2,
    "text_encoders.clip_l.transformer.": 0,
    "text_encoders.clip_h.transformer.": 0,
    "text_encoders.clip_g.transformer.": 1,
}
_PEFT = "base_model.model."
# One projection in a file, several in the model: the file's rows are theirs, in this order.
_JOINT = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "in_proj": ("q_proj", "k_proj", "v_proj"),
}
_PROCESSOR = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}  # names of old diffusers
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_OPEN_CLIP = {"self_attn.out_proj": "attn.out_proj", "self_attn.in_proj": "attn.in_proj", "mlp.fc1": "mlp.c_fc"}
_OPEN_CLIP |= {"mlp.fc2": "mlp.c_proj"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


class ModuleNames:
    """Finds a model's modules by every name that LoRA files give them.

    Args:
        denoiser: the denoiser's modules in its own order, each with the shape of its weight.
        text_encoders: likewise for each text encoder.

    Raises:
        ValueError: one name would mean two modules.

    Example:
        >>> names = ModuleNames({"mid_block.attentions.0.proj_in": (8, 8)}, [])
        >>> names.find("lora_unet_middle_block_1_proj_in")
        (-1, ('mid_block.attentions.0.proj_in',))
    """

    def __init__(self, denoiser: Shapes, text_encoders: Sequence[Shapes]) -> None:
        self._tables = {DENOISER: _table(denoiser)} | {n: _table(shapes) for n, shapes in enumerate(text_encoders)}

    def find(self, spelled: str) -> tuple[int, tuple[str, ...]] | None:
        """The component that a name means, and its module; or its modules, whose rows lie one after another.

        Raises:
            ValueError: the name does not say which of several text encoders it means.
        """
        component, name = split_prefix(spelled)
        if component is not None:
            modules = self._tables.get(component, {}).get(name)
            return None if modules is None else (component, modules)
        found = [(number, table[name]) for number, table in self._tables.items() if name in table]
        if len(found) > 1:
            could = " or ".join(component_name(number) for number, _ in found)
            raise ValueError(f"{spelled:.200} could be of {could}, and the name does not say which")
        return found[0] if found else None


def split_prefix(spelled: str) -> tuple[int | None, str]:
    """The component that a name's prefix says, None without one, and the rest of the name."""
    name = spelled.removeprefix(_PEFT)
    for prefix, component in _PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix).removeprefix(_PEFT)
    return None, name


def _table(shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """Every name of every module, with dots and, as kohya has them, with underscores."""
    modules = {name: (name,) for name in shapes} | _joint(shapes)
    blocks = _blocks(shapes)
    table: dict[str, tuple[str, ...]] = {}
    for name, meant in modules.items():
        names = [name, *_compvis(name, blocks), *_clip(name)]
        names += [old for known in names for old in _old(known)]
        for spelled in dict.fromkeys(form for known in names for form in (known, known.replace(".", "_"))):
            if table.setdefault(spelled, meant) != meant:
                raise ValueError(f"{spelled} would mean both {table[spelled][0]} and {meant[0]}")
    return table


def _joint(shapes: Shapes) -> dict[str, tuple[str, ...]]:
    joint = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        for name, parts in _JOINT.items():
            modules = tuple(f"{parent}.{part}" for part in parts)
            if f"{parent}.{name}" in shapes or not all(module in shapes for module in modules):
                continue
            # Projections of different inputs, as to_q and to_k of cross-attention, cannot be one.
            if len({shapes[module][1:] for module in modules}) == 1:
                joint[f"{parent}.{name}"] = modules
    return joint


def _old(name: str) -> list[str]:
    """Names that diffusers gave attention's projections before they were modules of their own."""
    found = [f"{name.removesuffix(new)}processor.{old}" for new, old in _PROCESSOR.items() if name.endswith(f".{new}")]
    if name.endswith(".to_out.0"):
        found.append(name.removesuffix(".0"))
    found += [name.removesuffix(new) + old for new, old in _OLD_TEXT.items() if name.endswith(f".self_attn.{new}")]
    return found


def _clip(name: str) -> list[str]:
    """A module of CLIP's text encoder in the naming with and without ``text_model``, and in OpenCLIP's."""
    inner = name.removeprefix("text_model.")
    if not inner.startswith("encoder.layers."):
        return []
    found = [inner, f"text_model.{inner}"]
    _, _, number, rest = inner.split(".", 3)
    if rest in _OPEN_CLIP:
        found.append(f"transformer.resblocks.{number}.{_OPEN_CLIP[rest]}")
    return found


def _blocks(shapes: Shapes) -> dict[str, str]:
    """Where diffusers' blocks of a U-Net lie in the original implementation's numbering, by their names."""
    counts: dict[tuple[str, int], set[int]] = {}
    tail = set()
    for name in shapes:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            counts.setdefault((match[1], int(match[2])), set()).add(int(match[3]))
        elif match := re.match(r"((?:down|up)_blocks\.\d+)\.(?:attentions|downsamplers|upsamplers)\.", name):
            tail.add(name[: match.end() - 1])
    found = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    position = {"down": 1, "up": 0}  # input_blocks.0 is conv_in
    for (side, block), resnets in sorted(counts.items()):
        place, here = ("input_blocks" if side == "down" else "output_blocks"), f"{side}_blocks.{block}"
        for layer in range(len(resnets)):
            found[f"{here}.resnets.{layer}"] = f"{place}.{position[side]}.0"
            found[f"{here}.attentions.{layer}"] = f"{place}.{position[side]}.1"
            position[side] += 1
        if f"{here}.downsamplers" in tail:
            found[f"{here}.downsamplers.0.conv"] = f"{place}.{position[side]}.0.op"
            position[side] += 1
        if f"{here}.upsamplers" in tail:  # stands after the last layer, not in a place of its own
            after = 2 if f"{here}.attentions" in tail else 1
            found[f"{here}.upsamplers.0.conv"] = f"{place}.{position[side] - 1}.{after}.conv"
    return found


def _compvis(name: str, blocks: Mapping[str, str]) -> list[str]:
    """A U-Net's module in the original implementation's naming (CompVis, Stability AI's sgm)."""
    if name in _OUTSIDE_BLOCKS:
        return [_OUTSIDE_BLOCKS[name]]
    for dot in re.finditer(r"\.|$", name):
        if place := blocks.get(name[: dot.start()]):
            rest = name[dot.end() :]
            return [f"{place}.{_RESNET.get(rest, rest)}" if rest else place]
    return []
