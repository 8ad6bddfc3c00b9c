"""Several users' concepts or LoRAs learned in one run, against one user after another, and against PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

# Training needs what kernels and layers do not, and what a bare machine lacks.
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from benchmarks.harness import DEVICE, QUICK, Case, Contestant
from keylock_diffusers import embedded
from keylock_diffusers.demo import pictures, story
from keylock_diffusers.embedded.captions import default_captions
from keylock_diffusers.training import (
    AddedConfig,
    LoraTrainingConfig,
    PerfusionConfig,
    Subject,
    covariance,
    train_concepts,
    train_loras,
    training_facts,
)
from keylock_diffusers.training.frozen import encode_images, noise_levels, prediction_target

STEPS = 2 if QUICK else 40
BATCH = 4  # pictures a step and user
RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
APART = 0.05  # how far apart losses may end, relative to their size: factors begin as other random numbers


def subjects() -> list[Subject]:
    """The demo's users, and one more with the first one's pictures; without masks, which scripts know nothing of."""
    taught = [replace(subject, masks=None) for subject in story.subjects()]
    return [*taught, replace(taught[0], placeholder="<dave-cat>", captions=_captions("<dave-cat>"), seed=9)]


def _captions(named: str) -> list[str]:
    return [words.format(named) for words in pictures.CAPTIONS]


def plain(subject: Subject) -> Subject:
    """The same with plain words, of which nothing is learned."""
    return replace(subject, placeholder="sks cat", super_class="", captions=_captions("sks cat"))


def judge(one_by_one: Callable[[list[Subject]], list[float]]) -> Any:
    """That every user's loss, smoothed, ends where it ends alone."""

    def oracle(given: list[Subject]) -> Callable[[list[float]], None]:
        expected = torch.tensor(one_by_one(given))

        def accept(found: list[float]) -> None:
            off = float(((torch.tensor(found) - expected).abs() / expected).max())
            if not off <= APART:
                raise AssertionError(f"a loss ends {off:.1%} from where it ends alone")

        return accept

    return oracle


def peft_script(config: LoraTrainingConfig) -> Callable[[list[Subject]], list[float]]:
    """What a training script does, user after user: PEFT's layers in the U-Net, and everything else by hand.

    It sees the pictures, times and noise that ours sees, so that losses compare.
    """
    from peft import LoraConfig, inject_adapter_in_model

    @torch.enable_grad()  # benchmarks run without
    def learn(pipe: Any, subject: Subject) -> float:
        settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
        unet, smoothed = pipe.unet.requires_grad_(False), float("nan")
        inject_adapter_in_model(settings, unet)
        learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay)
        with torch.no_grad():
            latents = encode_images(pipe, subject.images).float()
            text = pipe.encode_prompt(list(subject.captions or ()), DEVICE, 1, False)[0]
        for step in range(config.steps):
            random = torch.Generator().manual_seed(subject.seed * 1_000_003 + step)
            chosen = torch.randint(len(latents), (BATCH,), generator=random)
            times = torch.randint(pipe.scheduler.config.num_train_timesteps, (BATCH,), generator=random).to(DEVICE)
            noise = torch.randn(BATCH, *latents.shape[1:], generator=random).to(DEVICE)
            signal, sigma = noise_levels(pipe.scheduler, times, DEVICE)
            clean = latents[chosen]
            target = prediction_target(pipe.scheduler, clean, noise, signal, sigma)
            said = unet(signal * clean + sigma * noise, times, text[chosen], return_dict=False)[0]
            loss = F.mse_loss(said, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
            optimizer.step()
            now = float(loss.detach())
            smoothed = now if step == 0 else 0.95 * smoothed + 0.05 * now
        return smoothed

    def run(given: list[Subject]) -> list[float]:
        return [learn(embedded.load().to(DEVICE), subject) for subject in given]

    return run


def line_up(name: str, given: list[Subject], train: Callable[[list[Subject]], list[float]], *peers: Contestant) -> Case:
    def one_by_one(subjects: list[Subject]) -> list[float]:
        return [loss for subject in subjects for loss in train([subject])]

    return Case(
        f"training/{name}/{len(given)}-users/embedded-{STEPS}-steps-of-{BATCH}/float32",
        [given],
        [
            Contestant("one run", "library", train),
            Contestant("one run, again", "again", train),
            Contestant("one user after another", "peer", one_by_one),
            *peers,
        ],
        judge(one_by_one),
        graph=False,
        rounds=1 if QUICK else 3,
        facts={"users": len(given)},
    )


def test_concepts(compare):
    pipe, config = embedded.load().to(DEVICE), AddedConfig(steps=STEPS, batch_size=BATCH, prior=0.0)

    def train(given: Sequence[Subject]) -> list[float]:
        return [one.training["loss"] for one in train_concepts(pipe, given, config, progress=False)]

    compare(line_up("concepts", subjects(), train))


def test_key_locked_concepts(compare):
    pipe, config = embedded.load().to(DEVICE), PerfusionConfig(steps=STEPS, batch_size=BATCH)
    metric = covariance(pipe, default_captions()[:500])

    def train(given: Sequence[Subject]) -> list[float]:
        return [one.training["loss"] for one in train_concepts(pipe, given, config, metric=metric, progress=False)]

    compare(line_up("key-locked", subjects(), train))


def test_loras(compare):
    """Of plain words, so that a script and ours learn the same."""
    config = LoraTrainingConfig(rank=RANK, targets=TARGETS, steps=STEPS, batch_size=BATCH, learning_rate=1e-3)
    pipe = embedded.load().to(DEVICE)

    def train(given: Sequence[Subject]) -> list[float]:
        return [training_facts(one)["loss"] for one in train_loras(pipe, given, config, progress=False)]

    peft = Contestant("PEFT's layers, one user after another", "peer", peft_script(config))
    compare(line_up("loras", [plain(subject) for subject in subjects()], train, peft))
