"""Tiny random pipelines of every U-Net family, and every feature of diffusers that touches our processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from keylock_diffusers.embedded.diffusion import build_tokenizer
from keylock_diffusers.testing import random_ip_adapter

WIDTH = 32  # of every encoder
SIZE = 16  # of the pictures
STEPS = 2


def text_encoder(tokenizer: Any, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def image_encoder() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=2,  # 257 hidden states
    )
    return {
        "image_encoder": CLIPVisionModelWithProjection(config),
        "feature_extractor": CLIPImageProcessor(size=32, crop_size=32),
    }


def unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = dict(
        sample_size=SIZE // 2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )
    return UNet2DConditionModel(**{**config, **changes})


def build(kind: Any, the_unet: Any, **more: Any) -> Any:
    tokenizer = build_tokenizer()
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=SIZE,
        ),
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": the_unet,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        **image_encoder(),
        **more,
    }
    if "XL" not in kind.__name__ and "AnimateDiff" not in kind.__name__:
        parts.update(safety_checker=None, requires_safety_checker=False)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    return pipe


def sdxl_unet() -> UNet2DConditionModel:
    return unet(
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=48 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )


def sdxl(kind: Any) -> Any:
    tokenizer = build_tokenizer()
    return build(
        kind,
        sdxl_unet(),
        text_encoder_2=text_encoder(tokenizer, projection=True),
        tokenizer_2=tokenizer,
    )


def controlnet() -> Any:
    control = ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    for parameter in control.parameters():  # its output layers start at 0
        torch.nn.init.normal_(parameter, std=0.05)
    return build(StableDiffusionControlNetPipeline, unet(), controlnet=control.eval())


def animate_diff() -> Any:
    motion = MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=4
    )
    return build(AnimateDiffPipeline, unet(), motion_adapter=motion)


def latent_consistency() -> Any:
    return build(LatentConsistencyModelPipeline, unet(time_cond_proj_dim=32), scheduler=LCMScheduler())


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
HALF = Image.fromarray(np.repeat([[0] * (SIZE // 2) + [255] * (SIZE // 2)], SIZE, 0).astype(np.uint8))

# Per family: its pipeline, and what its call needs beside the prompt.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD 1.x": (lambda: build(StableDiffusionPipeline, unet()), {}),
    "SD 2.x": (
        lambda: build(StableDiffusionPipeline, unet(use_linear_projection=True, attention_head_dim=(2, 4))),
        {},
    ),
    "SDXL": (lambda: sdxl(StableDiffusionXLPipeline), {}),
    "SDXL img2img": (lambda: sdxl(StableDiffusionXLImg2ImgPipeline), {"image": PICTURE, "strength": 0.9}),
    "img2img": (lambda: build(StableDiffusionImg2ImgPipeline, unet()), {"image": PICTURE, "strength": 0.9}),
    "inpaint": (
        lambda: build(StableDiffusionInpaintPipeline, unet()),
        {"image": PICTURE, "mask_image": HALF, "strength": 0.9},
    ),
    "ControlNet": (controlnet, {"image": PICTURE}),
    "PAG": (
        lambda: build(StableDiffusionPAGPipeline, unet(), pag_applied_layers=["mid"]),
        {"pag_scale": 2.0},
    ),
    "AnimateDiff": (animate_diff, {"num_frames": 2}),
    "LCM": (latent_consistency, {}),
}


@dataclass(frozen=True)
class Feature:
    """What is loaded before the call and what the call is given."""

    adapters: tuple[str, ...] = ()
    images: tuple[int, ...] = ()  # per adapter
    masks: Any = None
    scale: Any = None
    prompts: int = 1
    embeds: bool = False
    call: tuple[tuple[str, Any], ...] = ()
    lora: str = ""

    def load(self, pipe: Any) -> None:
        if self.lora == "before":
            add_lora(pipe)
        if self.adapters:
            encoder = pipe.image_encoder  # a state dict has none of its own
            pipe.load_ip_adapter(
                [random_ip_adapter(pipe.unet, kind, width=WIDTH, seed=n) for n, kind in enumerate(self.adapters)],
                subfolder="",
                weight_name=[""] * len(self.adapters),
            )
            pipe.image_encoder = encoder
            if self.scale is not None:
                pipe.set_ip_adapter_scale(self.scale)
        if self.lora == "after":
            add_lora(pipe)

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """What the pipeline's call is given; FaceID-Plus adapters also get their faces here."""
        given: dict[str, Any] = dict(self.call)
        random = torch.Generator().manual_seed(5)
        dtype = pipe.unet.dtype
        if self.embeds:
            halves = 1 if given.get("guidance_scale") == 1 or pipe.unet.config.time_cond_proj_dim else 2
            given["ip_adapter_image_embeds"] = [
                torch.randn(halves, count, WIDTH, generator=random).to(dtype) for count in self.images
            ]
            for layer in pipe.unet.encoder_hid_proj.image_projection_layers:
                if isinstance(layer, IPAdapterFaceIDPlusImageProjection):
                    rows = halves + hasattr(pipe, "pag_attn_processors")  # which repeats the conditional half
                    layer.clip_embeds = torch.randn(1, rows * self.images[0], 5, WIDTH, generator=random).to(dtype)
        elif self.adapters:
            pictures = [
                [
                    Image.fromarray(np.random.default_rng(10 * a + n).integers(0, 255, (32, 32, 3), dtype=np.uint8))
                    for n in range(count)
                ]
                for a, count in enumerate(self.images)
            ]
            given["ip_adapter_image"] = pictures
        if self.masks is not None:
            given["cross_attention_kwargs"] = {"ip_adapter_masks": self.masks}
        return given


def save_adapter(folder: Path, pipe: Any, name: str = "ip-adapter_sd15.safetensors") -> None:
    """An adapter and its image encoder on disk, laid out as the published ones are."""
    state = random_ip_adapter(pipe.unet, width=WIDTH)
    (folder / "models").mkdir(parents=True)
    flat = {f"{part}.{key}": tensor for part, tensors in state.items() for key, tensor in tensors.items()}
    save_file(flat, folder / "models" / name)
    image_encoder()["image_encoder"].save_pretrained(folder / "models" / "image_encoder")


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def masks(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:  # [1, count, height, width]
    """Stripes, one per image, with soft edges."""
    stripes = torch.zeros(1, count, height, width)
    for n in range(count):
        stripes[0, n, :, n * width // count : (n + 1) * width // count] = 1
    return (stripes + 0.25 * stripes.roll(1, -1)).clamp(0, 1)


STYLE_ONLY = {"down": {"block_0": [1.0]}, "up": {"block_1": [0.0, 0.7]}}
FEATURES = {
    "text only": Feature(),
    "text only, LoRA": Feature(lora="before"),
    "one image, 4 tokens": Feature(("base",), (1,)),
    "one image, 16 tokens": Feature(("plus",), (1,)),
    "one image, every hidden state a token": Feature(("full-face",), (1,)),
    "three images in one softmax": Feature(("base",), (3,), scale=0.6),
    "three masked images, a scale each": Feature(("base",), (3,), masks=[masks(3)], scale=[[0.7, 0.2, 1.3]]),
    "masked images, one of scale 0": Feature(("base",), (3,), masks=[masks(3)], scale=[[0.7, 0.0, 1.3]]),
    "two adapters": Feature(("base", "plus"), (1, 2), scale=[0.5, 0.8]),
    "two adapters, None among masks": Feature(("base", "plus"), (2, 1), masks=[masks(2), None], scale=[0.5, 0.8]),
    "masks in one tensor": Feature(("base", "plus"), (1, 1), masks=masks(2).transpose(0, 1)),
    "mask of another aspect ratio": Feature(("base",), (2,), masks=[masks(2, 3 * SIZE, 2 * SIZE)]),
    "scale 0": Feature(("base",), (1,), scale=0.0),
    "one of two scales 0": Feature(("base", "plus"), (1, 1), scale=[0.0, 0.8]),
    "precomputed embeddings": Feature(("base",), (2,), embeds=True),
    "FaceID": Feature(("faceid",), (1,), embeds=True),
    "FaceID-Plus": Feature(("faceid-plus",), (1,), embeds=True),
    "LoRA before the adapter": Feature(("base",), (2,), masks=[masks(2)], lora="before"),
    "LoRA after the adapter": Feature(("base",), (2,), masks=[masks(2)], lora="after"),
    "several pictures of a prompt": Feature(("base",), (2,), masks=[masks(2)], call=(("num_images_per_prompt", 3),)),
    "without guidance": Feature(("base",), (1,), call=(("guidance_scale", 1.0),)),
}
PER_LAYER = "scales per layer (InstantStyle)"


def cases() -> list[tuple[str, str]]:
    """(family, feature) of everything that is compared."""
    return [
        (family, name)
        for family in FAMILIES
        for name in [*FEATURES, PER_LAYER]
        if family != "AnimateDiff" or "num_images_per_prompt" not in dict(getattr(FEATURES.get(name), "call", ()))
    ]


def make(family: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[], Tensor]]:
    """A family's pipeline with a feature loaded, and its call."""
    torch.manual_seed(0)
    builder, extra = FAMILIES[family]
    pipe = builder()
    if name == PER_LAYER:
        blocks = pipe.unet.config
        cross = [n for n, kind in enumerate(blocks.down_block_types) if "Cross" in kind][0]
        up = [n for n, kind in enumerate(blocks.up_block_types) if "Cross" in kind][0]
        per = blocks.layers_per_block
        scale = {"down": {f"block_{cross}": [1.0] * per}, "up": {f"block_{up}": [0.0, 0.7, 0.2][: per + 1]}}
        feature = Feature(("base", "plus"), (1, 2), scale=[scale, 0.3])
    else:
        feature = FEATURES[name]
    feature.load(pipe)
    if dtype != torch.float32:
        pipe.to(dtype)

    def call() -> Tensor:
        frames = "num_frames" in extra
        out = pipe(
            "a cat on blue",
            num_inference_steps=STEPS if "strength" not in extra else STEPS + 1,
            generator=torch.Generator().manual_seed(1),
            output_type="pt" if frames else "np",
            **({"height": SIZE, "width": SIZE} if "image" not in extra else {}),
            **extra,
            **feature.arguments(pipe),
        )
        return torch.as_tensor(out.frames if frames else out.images).float()

    return pipe, call


def main() -> None:
    """The table of docs/compatibility.md: per feature and family, our largest error over what is allowed."""
    from keylock_diffusers.testing import shadow

    worst: dict[tuple[str, str], list[str]] = {}
    for family, name in cases():
        for dtype in (torch.float32, torch.bfloat16):
            pipe, call = make(family, name, dtype)
            with shadow(pipe) as calls:
                call()
            worst.setdefault((family, name), []).append(f"{max(c.ours / c.allowed for c in calls):.2f}")
    names = [*FEATURES, PER_LAYER]
    print("| feature |", " | ".join(FAMILIES), "|")
    print("| --- |" + " --- |" * len(FAMILIES))
    for name in names:
        print(f"| {name} |", " | ".join(", ".join(worst.get((family, name), [""])) for family in FAMILIES), "|")


if __name__ == "__main__":
    main()
