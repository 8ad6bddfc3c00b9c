"""Trains a subject fusion module: pictures of subjects mixed into the words that name them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from keylock_diffusers.checks import check_field, number, one_of
from keylock_diffusers.concepts import BaseModel
from keylock_diffusers.encoding import text
from keylock_diffusers.encoding.fusion import FusionUse, SubjectFusion, fuse
from keylock_diffusers.masks import soft_mask
from keylock_diffusers.training import loop
from keylock_diffusers.training.frozen import check_examples, check_pipeline, draw, encoded_prompts, frozen, named
from keylock_diffusers.training.localization import FORMS, Localization, localization_loss


@dataclass(frozen=True, eq=False)
class FusionSubject:
    """One subject of a picture.

    Args:
        prompt: the words that name it, as they stand in the caption; the last of their tokens is fused.
        image: a picture of it, or its encoding [D] by the pipeline's image encoder.
        mask: where it is, a picture that is white there, or a tensor [1, h, w] in latents' resolution; None: it is not
            localized.
    """

    prompt: str
    image: Image.Image | Tensor  # [D]
    mask: Image.Image | Tensor | None = None  # [1, h, w]


@dataclass(frozen=True, eq=False)
class FusionExample:
    """One picture to learn from.

    Args:
        image: what is to be drawn: a picture, or its scaled latents [c, h, w].
        caption: its words.
        subjects: those of its subjects that are fused.
    """

    image: Image.Image | Tensor  # [c, h, w]
    caption: str
    subjects: Sequence[FusionSubject]


@dataclass(frozen=True)
class FusionConfig(loop.Schedule):
    """How fusion is trained; the defaults are FastComposer's on Stable Diffusion 1.5, whose U-Net learned too.

    Args:
        steps, batch_size, learning_rate, weight_decay, warmup, average_decay, seed: see `loop.Schedule`.
        drop_text: share of the rows that learn without words or subjects, for guidance.
        drop_subjects: share of the rows that learn from words alone.
        localize: weight of the localization loss of the subjects that have a mask.
        localization_form: see `Localization`.
    """

    steps: int = 150_000
    batch_size: int = 16
    learning_rate: float = 1e-5
    warmup: int = 500
    drop_text: float = 0.1
    drop_subjects: float = 0.1
    localize: float = 1e-3
    localization_form: str = "balanced"

    def __post_init__(self) -> None:
        super().__post_init__()
        loop.check_shares(self, "drop_text", "drop_subjects")
        check_field(self, "localize", number, 0)
        check_field(self, "localization_form", one_of, FORMS)


@torch.inference_mode(False)
@torch.enable_grad()
def train_subject_fusion(
    pipe: Any,
    examples: Sequence[FusionExample],
    config: FusionConfig = FusionConfig(),
    *,
    start: SubjectFusion | None = None,
    accelerator: Accelerator | None = None,
    checkpoint_path: str | Path | None = None,
    progress: bool = True,
) -> SubjectFusion:
    """Learns the fusion of subjects into words; the pipeline is frozen, and as before afterwards.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x pipeline; where subjects are given as pictures, with an ``image_encoder``
            whose encodings are as wide as its text's.
        examples: what to learn from: anything with a length and items; pictures are encoded when they are drawn.
        config: how.
        start: the weights to go on from, which are copied; default new ones.
        accelerator: accelerate's, for several devices and mixed precision; default ``Accelerator()``.
        checkpoint_path: a safetensors file to resume from and to write every two minutes.
        progress: whether to show a progress bar.

    Returns:
        The module.

    Raises:
        ValueError: no examples, words that are not in their caption, an encoding of another width than the text's, a
            pipeline in float16 or with an IP-Adapter, or a checkpoint of another run.
        TypeError: the pipeline has two text encoders, or lacks an image encoder that is needed.

    Paper: Xiao et al., FastComposer, arXiv 2305.10431.
    """
    check_examples(examples, "train_subject_fusion")
    accelerator = accelerator or Accelerator()
    device, unet = accelerator.device, pipe.unet
    check_pipeline(pipe, "train_subject_fusion")
    width = unet.config.cross_attention_dim
    if start is not None and start.width != width:
        raise ValueError(f"train_subject_fusion: start must be as wide as the text, {width}, got {start.width}")
    with frozen(pipe, device):
        torch.manual_seed(config.seed)
        fusion = SubjectFusion(width) if start is None else copy.deepcopy(start)
        fusion.train().requires_grad_(True)
        empty = text.tokenize(pipe.tokenizer, "")

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            drawn = draw(pipe, examples, config, step, accelerator.process_index)
            with torch.no_grad():
                prompts = [
                    empty if share < config.drop_text else text.tokenize(pipe.tokenizer, row.caption)
                    for row, share in zip(drawn.rows, drawn.share, strict=True)
                ]
                encodings = text.encode(pipe.text_encoder, prompts).to(unet.dtype)
                places = [
                    [] if share < config.drop_text + config.drop_subjects else _places(pipe, row, prompt)
                    for row, prompt, share in zip(drawn.rows, prompts, drawn.share, strict=True)
                ]
                pictures = [subject.image for row in places for subject, _ in row]
                embeds = iter(encoded_prompts(pipe, pictures, device, "train_subject_fusion") if pictures else ())
            uses = [[FusionUse((token,), next(embeds)) for _, token in row] for row in places]
            wrong = [use.embeds for row in uses for use in row if use.embeds.shape != (fusion.width,)]
            if wrong:
                raise ValueError(
                    f"train_subject_fusion: encodings must be [{fusion.width}], as wide as the text's, "
                    f"got {list(wrong[0].shape)}"
                )
            words = fuse(fusion, encodings, uses)
            if not any(uses):  # every process and step has a gradient, though it be none
                words = words + 0 * sum(parameter.sum() for parameter in fusion.parameters())
            options = {}
            if config.localize:
                size = drawn.noisy.shape[2], drawn.noisy.shape[3]
                tokens, masks = _targets(places, size, device)
                options["readout"] = Localization(unet, tokens, masks, size, form=config.localization_form)
            predicted = unet(drawn.noisy, drawn.times, words, cross_attention_kwargs=options).sample
            value = F.mse_loss(predicted.float(), drawn.target)
            figures = {"loss": value.item()}
            if config.localize:
                localized = localization_loss(options["readout"])
                figures["localization"] = localized.item()
                value = value + config.localize * localized
            return value, figures

        loop.fit(
            fusion,
            loss,
            checkpoint_path,
            config,
            accelerator=accelerator,
            run_digest=loop.digest(config, len(examples), fusion, BaseModel.of(pipe)),
            desc="subject fusion",
            progress=progress,
        )
    return fusion.eval().requires_grad_(False)


def _places(pipe: Any, row: FusionExample, prompt: text.TokenizedPrompt) -> list[tuple[FusionSubject, int]]:
    """A row's subjects, each with the token it is fused into at every place where its words stand."""
    found = []
    for subject in row.subjects:
        spots = text.find(pipe.tokenizer, prompt, subject.prompt)
        if not spots:
            raise ValueError(f"FusionExample: the words {subject.prompt!r} are not in the caption {row.caption!r}")
        found += [(subject, spot[-1]) for spot in spots]
    return found


def _targets(
    places: Sequence[Sequence[tuple[FusionSubject, int]]], size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:  # [B, M], [B, M, h, w]
    """The tokens that are localized, -1 for none, and their masks."""
    masked = [[(subject.mask, token) for subject, token in row if subject.mask is not None] for row in places]
    width = max(1, *(len(row) for row in masked))
    tokens, masks = torch.full((len(places), width), -1), torch.zeros(len(places), width, *size, dtype=torch.float32)
    for row, subjects in enumerate(masked):
        for place, (mask, token) in enumerate(subjects):
            tokens[row, place] = token
            soft = (
                mask if isinstance(mask, Tensor) else soft_mask(mask, size, named("the mask of a FusionSubject", mask))
            )
            if soft.shape != (1, *size):
                raise ValueError(f"FusionSubject: mask must be {[1, *size]}, got {list(soft.shape)}")
            masks[row, place] = soft[0]
    return tokens.to(device), masks.to(device)
