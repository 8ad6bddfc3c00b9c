"""Stage 2 of the embedded model: text encoder and U-Net, trained together on latents of rendered pictures."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from keylock_diffusers.training import loop

from . import autoencoder, render
from .coats import WORDS
from .glyphs import BACKGROUNDS, DYES, GLYPHS

CHECKPOINT = "diffusion.safetensors"
LENGTH = 32  # tokens of a prompt
_WIDTH = 192
_BOS, _EOS, _END = "<|startoftext|>", "<|endoftext|>", "</w>"
_UNCONDITIONAL = 0.1  # share of captions dropped, for guidance
_BATCH = 32  # pictures a step
# Words that people put around a subject; learned as single tokens though no caption uses them.
_EXTRA_WORDS = "photo picture drawing painting of the in wearing my your two next to"


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer in which every word of the captions is one token."""
    text = " ".join([*(g.caption for g in GLYPHS), *BACKGROUNDS, *DYES, *WORDS.values(), "a an and on", _EXTRA_WORDS])
    merges = list(_merges(tuple(sorted(set(text.split())))))
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}{_END}" for letter in letters), *map("".join, merges), _BOS, _EOS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=_EOS, unk_token=_EOS)


@cache
def _merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Byte-pair merges, most frequent pair first, until every word is one token.

    The tokenizers library breaks ties by the order of a hash table; a vocabulary must be the same every time.
    """
    pieces = [[*word[:-1], f"{word[-1]}{_END}"] for word in words]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for number, word in enumerate(pieces):
            merged: list[str] = []
            for piece in word:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces[number] = merged
    return tuple(merges)


def _edit_json(path: Path, changes: dict[str, str | None]) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2) + "\n")


def build(vae: AutoencoderTiny) -> StableDiffusionPipeline:
    """The untrained pipeline around a trained autoencoder."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            projection_dim=_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=render.SIZE // autoencoder.FACTOR,
        in_channels=autoencoder.CHANNELS,
        out_channels=autoencoder.CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 6),  # diffusers reads this as the number of heads: 32 channels each
        cross_attention_dim=_WIDTH,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, 32] int64, padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode_pool(
    pipe: StableDiffusionPipeline, path: Path, size: int, pairs: float, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scaled latents [size, 20, 16, 16] fp16 and token ids [size, 32] of `size` pictures; kept in `path`."""
    if path.exists():
        pool = load_file(path)
        if len(pool["latents"]) == size:
            return pool["latents"], pool["ids"].long()
    vae = pipe.vae.to(device).eval()
    latents, ids = [], []
    for start in tqdm(range(0, size, 64), desc="encoding pictures", mininterval=5):
        pictures = [render.draw(seed, i, pairs=pairs) for i in range(start, min(start + 64, size))]
        encoded = vae.encode(autoencoder.pixels([p.image for p in pictures]).to(device)).latents
        latents.append((encoded * vae.config.scaling_factor).half().cpu())
        ids.append(token_ids(pipe.tokenizer, [p.caption for p in pictures]))
    pool = {"latents": torch.cat(latents).contiguous(), "ids": torch.cat(ids).int().contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pool, path)
    return pool["latents"], pool["ids"].long()


def train(
    folder: Path,
    vae: AutoencoderTiny,
    *,
    start: StableDiffusionPipeline | None = None,
    steps: int = 10_000,
    pool: int = 60_000,
    pairs: float = 0.35,
    learning_rate: float = 8e-4,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Trains text encoder and U-Net on the v-prediction loss, a share `pairs` of it on pictures of two subjects.

    Resumes from the checkpoint in `folder`; where there is none, goes on from the weights of `start` with a fresh
    optimiser, or begins anew.
    """
    accelerator = loop.fastest()
    device = accelerator.device
    torch.manual_seed(seed)
    pipe = build(vae)
    if start is not None:
        pipe.unet.load_state_dict(start.unet.state_dict())
        pipe.text_encoder.load_state_dict(start.text_encoder.state_dict())
    latents, ids = encode_pool(pipe, folder / f"pool-{seed}.safetensors", pool, pairs, seed + 10, device)
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).to(device).train()
    unet, text_encoder = pipe.unet, pipe.text_encoder
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # torch's fused CPU attention has a slow backward at this size
    empty = token_ids(pipe.tokenizer, [""])[0]
    alphas = pipe.scheduler.alphas_cumprod.to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = loop.generator(seed, step)
        rows = torch.randint(len(latents), (_BATCH,), generator=random)
        dropped = torch.rand(_BATCH, generator=random) < _UNCONDITIONAL
        clean = latents[rows].float().to(device)
        noise = torch.randn(clean.shape, generator=random).to(device)
        # Logit-normal: what a subject is gets decided at middling noise, which is drawn more often.
        times = (len(alphas) * torch.sigmoid(0.4 + torch.randn(_BATCH, generator=random))).long().to(device)
        signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (alphas[times], 1 - alphas[times]))
        text = text_encoder(torch.where(dropped[:, None], empty, ids[rows]).to(device))[0]
        predicted = unet(signal * clean + sigma * noise, times, text).sample
        value = F.mse_loss(predicted.float(), signal * noise - sigma * clean)
        return value, {"loss": value.item()}

    loop.fit(
        model,
        loss,
        folder / CHECKPOINT,
        loop.Schedule(steps, _BATCH, learning_rate, warmup=200, average_decay=0.998, seed=seed),
        accelerator=accelerator,
        desc="diffusion",
    )
    unet.set_attn_processor(AttnProcessor2_0())
    return pipe


def assemble(folder: Path, vae: AutoencoderTiny) -> StableDiffusionPipeline:
    """The pipeline of the checkpoints in `folder`, with averaged weights; the autoencoder's decoder if it is there."""
    pipe = build(vae)
    if (folder / autoencoder.CHECKPOINT).exists():
        loop.load_average(folder / autoencoder.CHECKPOINT, nn.ModuleDict({"decoder": pipe.vae.decoder}))
    loop.load_average(folder / CHECKPOINT, nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}))
    for module in (pipe.vae, pipe.unet, pipe.text_encoder):
        module.eval()
    return pipe


def export(pipe: StableDiffusionPipeline, folder: Path) -> int:
    """Writes the pipeline in float16, in shards of at most 12 MiB; returns its bytes."""
    for shard in folder.rglob("*.safetensors*"):  # an earlier export may have had more of them
        shard.unlink()
    pipe.to(dtype=torch.float16).save_pretrained(folder, max_shard_size="11MB")
    pipe.to(dtype=torch.float32)
    # transformers loads in the dtype that the configuration names, diffusers in float32: make them agree.
    _edit_json(folder / "text_encoder" / "config.json", {"dtype": "float32"})
    # The first is derived, and diffusers warns of it; the second says where a model was loaded from.
    _edit_json(folder / "vae" / "config.json", {"block_out_channels": None, "_name_or_path": None})
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
