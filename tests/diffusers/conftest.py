"""A tiny random Stable Diffusion pipeline, and concepts for it."""

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from keylock_diffusers.concepts import BaseModel, Concept
from keylock_diffusers.embedded.diffusion import build_tokenizer

WIDTH = 32


def build_tiny(seed=0, prediction_type="v_prediction"):
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # transformers starts embeddings at 0.02; a trained encoder's words differ far more.
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (vae, text_encoder, unet):
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_concept(pipe, placeholder="<alice-cat>", super_class="cat", seed=1, **changes):
    """A concept of a pipeline or a BaseModel, with random vectors in the metric C = I."""
    base = pipe if isinstance(pipe, BaseModel) else BaseModel.of(pipe)
    width = base.cross_attention_dim
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(width, generator=random)
    energy = float(target @ target)
    return Concept(
        placeholder,
        super_class,
        target_input=target,
        energy=energy,
        direction=target / energy,
        super_class_encoding=torch.randn(width, generator=random),
        word_embeddings=tuple(torch.randn(e.hidden_size, generator=random) * 0.5 for e in base.text_encoders),
        values=torch.randn(base.values_width, generator=random),
        base=base,
        **changes,
    )


@pytest.fixture
def pipe():
    return build_tiny()


@pytest.fixture(name="build_tiny")
def _build_tiny():
    return build_tiny


@pytest.fixture
def concept_for():
    return make_concept
