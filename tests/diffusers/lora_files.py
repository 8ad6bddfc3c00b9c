"""Tiny models with the block structure of the published ones, and LoRA files for them in every tool's spelling."""

import functools

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from keylock_diffusers.embedded.diffusion import build_tokenizer
from keylock_diffusers.loras import read_adapter
from keylock_diffusers.loras.modules import _blocks, _compvis
from tests.diffusers.compatibility import WIDTH, build, text_encoder, unet

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SHAPED = {
    "layers_per_block": 2,
    "block_out_channels": (8, 8, 12, 12),
    "down_block_types": (*[CROSS[0]] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *[CROSS[1]] * 3),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
UNETS = {
    "SD1.5": SHAPED,
    "SD2": {**SHAPED, "use_linear_projection": True, "attention_head_dim": (1, 1, 2, 2)},
    "SDXL": {
        **SHAPED,
        "block_out_channels": (8, 8, 12),
        "down_block_types": ("DownBlock2D", *[CROSS[0]] * 2),
        "up_block_types": (*[CROSS[1]] * 2, "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 1, 2),
        "projection_class_embeddings_input_dim": 48 + WIDTH,
        "cross_attention_dim": 2 * WIDTH,
    },
}


@functools.cache
def pipeline(model):
    """A pipeline that nobody changes: copy it to load something."""
    torch.manual_seed(0)
    if model != "SDXL":
        return build(StableDiffusionPipeline, unet(**UNETS[model]))
    second = text_encoder(build_tokenizer(), projection=True)
    return build(StableDiffusionXLPipeline, unet(**UNETS[model]), text_encoder_2=second, tokenizer_2=build_tokenizer())


def parts(pipe):
    """The denoiser and the text encoders, by the numbers that the reader gives them."""
    found = {-1: pipe.unet, 0: pipe.text_encoder}
    return found | ({1: pipe.text_encoder_2} if hasattr(pipe, "text_encoder_2") else {})


def shapes(module):
    return {
        name: tuple(one.weight.shape) for name, one in module.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)
    }


@functools.cache
def model_shapes(model):
    return {component: shapes(module) for component, module in parts(pipeline(model)).items()}


@functools.cache
def full_size(model):
    """The shapes of a published U-Net."""
    from keylock_diffusers.testing import UNETS as published

    with torch.device("meta"):
        return shapes(UNet2DConditionModel(**published[model]))


def read(path, model, **named):
    found = dict(model_shapes(model))
    denoiser = found.pop(-1)
    return read_adapter(path, denoiser=denoiser, text_encoders=list(found.values()), **named)


def read_linear(path, weight, max_error=None, name="layer"):
    """A file for a model of one module."""
    return read_adapter(path, denoiser={name: weight}, text_encoders=[], max_error=max_error).denoiser[name]


def write(path, tensors, **texts):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, texts or None)
    return path


def delta(update):
    """scale * up @ down in float64, a convolution's weight flattened."""
    return update.scale * update.up.double() @ update.down.double().flatten(1)


def deltas(adapter):
    by_component = {-1: adapter.denoiser, **dict(enumerate(adapter.text_encoders))}
    return {(c, name): delta(update) for c, updates in by_component.items() for name, update in updates.items()}


class Pair:
    """A random pair for one module, as a trainer would have it."""

    def __init__(self, weight, rank, random):
        self.weight, self.rank = weight, rank
        self.down = torch.randn(rank, *weight[1:], generator=random)
        self.up = torch.randn(weight[0], rank, generator=random)

    def delta(self, scale=1.0):
        return scale * self.up.double() @ self.down.double().flatten(1)

    def stored_up(self):
        """Trainers make a convolution's `up` one too."""
        return self.up if len(self.weight) == 2 else self.up[:, :, None, None]


def pairs(model, wanted=lambda component, name: True, rank=2):
    random = torch.Generator().manual_seed(1)
    return {
        (component, name): Pair(weight, rank + (component < 0 and "0" in name), random)
        for component, found in model_shapes(model).items()
        for name, weight in found.items()
        if wanted(component, name)
    }


@functools.cache
def compvis(model):
    """The original implementation's names of a U-Net's modules."""
    found = model_shapes(model)[-1]
    return {name: _compvis(name, _blocks(found))[0] for name in found}


def diffusers_prefix(component):
    return ("unet.", "text_encoder.", "text_encoder_2.")[component + 1]


def kohya_prefix(component, model):
    return ("lora_unet_", "lora_te1_" if model == "SDXL" else "lora_te_", "lora_te2_")[component + 1]


def trained_name(component, name):
    """CLIP's text encoders had their modules within `text_model` when the files were made."""
    return f"text_model.{name}" if component >= 0 and name.startswith("encoder.") else name
