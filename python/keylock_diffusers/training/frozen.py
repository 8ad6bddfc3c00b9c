"""What every trainer here does with a pipeline: noise, targets, latents of pictures and masks, frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from keylock_diffusers.checks import one_of, shown
from keylock_diffusers.denoisers.unet import adapters
from keylock_diffusers.pictures import decode, upright
from keylock_diffusers.processors import CrossAttnProcessor, IPAdapterCrossAttnProcessor, install, uninstall, verify
from keylock_diffusers.training import loop

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_TOGETHER = 16  # pictures that the autoencoder is given at a time


def noise_levels(scheduler: Any, times: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How much of a picture and of noise there is at the given times, [B, 1, 1, 1] each."""
    alphas = scheduler.alphas_cumprod.to(device, torch.float32)[times].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal * noise - sigma * clean
    return clean


def named(what: str, image: Image.Image) -> str:
    """A picture for errors, with its file's name where it has one."""
    file = getattr(image, "filename", "")
    return f"{what} ({file})" if file else what


def _upright(image: Image.Image, what: str) -> Image.Image:
    """A picture decoded and upright, in RGB; errors call it `what`."""
    decode(image, what)
    try:
        return upright(image)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def encode_images(pipe: Any, images: Sequence[Image.Image], names: Sequence[str] | None = None) -> Tensor:
    """Pictures' scaled latents [n, c, h, w], of the middle square of each.

    Args:
        pipe: the pipeline.
        images: the pictures; one is held at a time.
        names: of them in errors; default their numbers.

    Raises:
        ValueError: one is damaged or too large, by its number and its file's name.
    """
    squares, parts = squares_of(pipe, images, names), []
    for first in range(0, len(squares), _TOGETHER):
        group = squares[first : first + _TOGETHER]
        encoded = pipe.vae.encode(pipe.image_processor.preprocess(group).to(pipe.vae.device, pipe.vae.dtype))
        parts.append(encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode())
    return torch.cat(parts) * pipe.vae.config.scaling_factor


def squares_of(pipe: Any, images: Sequence[Image.Image], names: Sequence[str] | None = None) -> list[Image.Image]:
    """The middle square of each picture, of the side that the model draws; arguments and errors of `encode_images`."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    squares = []
    for number in range(len(images)):
        image = images[number]  # which may open a file
        seen = _upright(image, named(names[number] if names else f"picture {number}", image))
        squares.append(ImageOps.fit(seen, (side, side), Image.Resampling.LANCZOS))
    return squares


def latents_of(
    pipe: Any, images: Sequence[Image.Image | Tensor], names: Sequence[str], device: torch.device
) -> Tensor:  # [B, c, h, w]
    """Pictures' scaled latents in float32; those that are latents already are taken as they are."""
    made = [
        image if isinstance(image, Tensor) else encode_images(pipe, [image], [name])[0]
        for image, name in zip(images, names, strict=True)
    ]
    return torch.stack([latents.to(device, torch.float32) for latents in made])


def encoded_prompts(
    pipe: Any, prompts: Sequence[Image.Image | Tensor], device: torch.device, name: str
) -> Tensor:  # [B, D]
    """Pictures as the pipeline's image encoder says them, in float32; encodings [D] are taken as they are.

    Raises:
        TypeError: a picture, and the pipeline has no image encoder.
        ValueError: an encoding of another shape.
    """
    made = []
    for prompt in prompts:
        if isinstance(prompt, Tensor):
            if prompt.ndim != 1:
                raise ValueError(f"{name}: encodings must be [D], got {list(prompt.shape)}")
            made.append(prompt.to(device, torch.float32))
            continue
        if getattr(pipe, "image_encoder", None) is None:
            raise TypeError(f"{name}: pipe must have an image_encoder for pictures, got none")
        seen = _upright(prompt, named(f"{name}: a picture", prompt))
        made.append(pipe.encode_image(seen, device, 1)[0][0].float())
    return torch.stack(made)


class Draw(NamedTuple):
    """What one step of training on pictures is made of."""

    rows: list[Any]  # examples
    share: list[float]  # per row in 0..1, says what it learns without
    times: Tensor  # [B]
    noisy: Tensor  # [B, c, h, w]
    target: Tensor  # [B, c, h, w], what the U-Net should say


@torch.no_grad()
def draw(pipe: Any, examples: Sequence[Any], config: loop.Schedule, step: int, process: int) -> Draw:
    """A step's examples (which have an ``image``), each at a time and with noise of its own.

    Args:
        pipe: the pipeline.
        examples: all there are.
        config: batch size and seed.
        step: which step.
        process: of several that train together, which.
    """
    device = pipe.unet.device
    random = loop.generator(config.seed, step, process)
    chosen = torch.randint(len(examples), (config.batch_size,), generator=random).tolist()
    rows = [examples[n] for n in chosen]
    times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=random).to(device)
    share = torch.rand(len(rows), generator=random, dtype=torch.float32).tolist()
    clean = latents_of(pipe, [row.image for row in rows], [f"the image of example {n}" for n in chosen], device)
    noise = torch.randn(clean.shape, generator=random, dtype=torch.float32).to(device)
    signal, sigma = noise_levels(pipe.scheduler, times, device)
    noisy = (signal * clean + sigma * noise).to(pipe.unet.dtype)
    return Draw(rows, share, times, noisy, prediction_target(pipe.scheduler, clean, noise, signal, sigma))


def check_encoder(pipe: Any, name: str, *parts: str, two: bool = False) -> None:
    """That a pipeline is of Stable Diffusion 1.x or 2.x, as far as its text goes, or of XL.

    Args:
        pipe: the pipeline.
        name: who asks.
        parts: what else it must have.
        two: whether it may have two text encoders.

    Raises:
        TypeError: it has two text encoders, or lacks something.
    """
    if two and hasattr(pipe, "text_encoder_2"):
        parts = ("text_encoder_2", "tokenizer_2", *parts)
    elif getattr(pipe, "text_encoder_2", None) is not None:
        raise TypeError(f"{name}: pipe must have one text encoder, got two: Stable Diffusion XL cannot be trained")
    missing = [part for part in ("text_encoder", "tokenizer", *parts) if getattr(pipe, part, None) is None]
    if missing:
        raise TypeError(
            f"{name}: pipe must be a Stable Diffusion 1.x{', 2.x or XL' if two else ' or 2.x'} pipeline with its "
            f"{', '.join(missing)}, got {type(pipe).__name__}"
        )


def check_pipeline(pipe: Any, name: str, *, two: bool = False) -> None:
    """What every trainer here needs of a pipeline.

    Args:
        pipe: the pipeline.
        name: who asks.
        two: whether it may have two text encoders.

    Raises:
        TypeError: see `check_encoder`.
        ValueError: it is in float16, has an IP-Adapter loaded, reads more than noisy latents, or has a scheduler that
            says no target to learn.
    """
    check_encoder(pipe, name, "unet", "vae", "scheduler", two=two)
    kind = type(pipe.scheduler).__name__
    if getattr(pipe.scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{name}: pipe must have a scheduler of a diffusion (alphas_cumprod) model, got {kind}")
    one_of(pipe.scheduler.config.get("prediction_type"), f"{name}: prediction_type of {kind}", _PREDICTIONS)
    if pipe.unet.dtype == torch.float16:
        raise ValueError(f"{name}: gradients vanish in float16; load the pipeline in float32 or bfloat16")
    if adapters(pipe.unet):
        raise ValueError(f"{name}: pipe must have no IP-Adapter loaded; call pipe.unload_ip_adapter first")
    read, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if read != made:
        raise ValueError(f"{name}: pipe must have a U-Net that reads noisy latents alone, {made} channels, got {read}")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError(f"{name}: pipe must have an autoencoder without latents_mean, which training does not know")


def check_examples(examples: Any, name: str) -> None:
    """That there is something to learn from.

    Raises:
        TypeError: it has no length and items.
        ValueError: it is empty.
    """
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__") or isinstance(examples, (str, bytes)):
        raise TypeError(f"{name}: examples must have a length and items, got {shown(examples)}")
    if not len(examples):
        raise ValueError(f"{name}: examples must not be empty")


@contextmanager
def frozen(pipe: Any, device: torch.device | None = None) -> Iterator[None]:
    """Weights without gradients, modules in evaluation mode, our processors installed; all undone afterwards.

    Args:
        pipe: the pipeline.
        device: where its modules are meanwhile; default where they are.
    """
    names = ("unet", "text_encoder", "text_encoder_2", "vae", "image_encoder")
    modules = [module for name in names if (module := getattr(pipe, name, None)) is not None]
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    devices = [(module, next(module.parameters()).device) for module in modules]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    installed = any(
        isinstance(p, (CrossAttnProcessor, IPAdapterCrossAttnProcessor)) for p in pipe.unet.attn_processors.values()
    )
    try:
        for module in modules:
            module.requires_grad_(False).eval()
            if device is not None:
                module.to(device)
        install(pipe)
        verify(pipe)
        kind = (device or pipe.unet.device).type
        # Whatever the caller has switched on. Autocast keeps its copies of weights until the outermost block ends,
        # which is this one: without them, or every step would compute with the first step's.
        with torch.autocast(kind, enabled=False, cache_enabled=False):
            yield
    finally:
        if not installed:
            uninstall(pipe)
        for module, before in devices if device is not None else ():
            module.to(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
