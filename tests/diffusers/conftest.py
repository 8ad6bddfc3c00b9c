"""A tiny random Stable Diffusion pipeline, and concepts for it."""

import uuid

import fsspec
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline

import keylock_diffusers as kd
from keylock_diffusers.concepts import AddedConcept, BaseModel, KeyLockedConcept
from keylock_diffusers.embedded.diffusion import build_tokenizer
from tests.diffusers.compatibility import text_encoder, unet


def build_tiny(seed=0, prediction_type="v_prediction"):
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encoder = text_encoder(tokenizer)
    # transformers starts embeddings at 0.02; a trained encoder's words differ far more.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    model = unet()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (vae, encoder, model):
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
    return KeyLockedConcept(
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


def make_added(
    pipe, placeholder="<alice-cat>", super_class="cat", seed=1, words=3, encodings=1, keys=2, values=3, **changes
):
    """A concept that adds random vectors at its own words."""
    base = pipe if isinstance(pipe, BaseModel) else BaseModel.of(pipe)
    random = torch.Generator().manual_seed(seed)
    widths = [width for name, width in base.layers if name in changes.get("layers", dict(base.layers))]
    return AddedConcept(
        placeholder,
        super_class,
        word_embeddings=tuple(torch.randn(words, e.hidden_size, generator=random) * 0.5 for e in base.text_encoders),
        encodings=torch.randn(encodings, base.cross_attention_dim, generator=random) * 0.5,
        keys=torch.randn(keys, sum(widths), generator=random),
        values=torch.randn(values, sum(widths), generator=random),
        base=base,
        **changes,
    )


@pytest.fixture
def pipe():
    return build_tiny()


@pytest.fixture
def ready(pipe):
    """The pipeline after `install`."""
    return kd.install(pipe)


@pytest.fixture(name="build_tiny")
def _build_tiny():
    return build_tiny


@pytest.fixture
def concept_for():
    return make_concept


@pytest.fixture
def added_for():
    return make_added


@pytest.fixture(params=["folder", "memory"])
def root(request, tmp_path):
    """A bank's place: a folder, or a file system that fsspec opens."""
    if request.param == "folder":
        yield str(tmp_path / "bank")
        return
    url = f"memory://keylock-{uuid.uuid4().hex}/bank"
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.fixture
def folder(tmp_path):
    """The place of a bank that is a folder."""
    return tmp_path / "bank"


@pytest.fixture
def one_thread():
    """torch splits one tall product of the U-Net's own layers over threads, and where it splits rounds differently:
    only with one thread is a row the same to the bit wherever it stands. What its neighbours hold never matters."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
