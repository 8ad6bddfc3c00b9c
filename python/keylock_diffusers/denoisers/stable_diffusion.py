"""Stable Diffusion 1.x and 2.x, consistency and distilled models of them, and perturbed-attention guidance."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from keylock_diffusers.denoisers.base import RowLayout, Schedule, Size
from keylock_diffusers.denoisers.neighbours import own_forward, quiet
from keylock_diffusers.denoisers.projections import projections
from keylock_diffusers.denoisers.unet import (
    TextEncoder,
    adapters,
    are_compiled,
    blocks_of,
    cross_attention_layers,
    lock_of,
    lora_scale,
    perturbed_attention,
    resolutions_of,
    text_encoders,
    unet_of,
)

# Keywords of `generate` itself, which may have been meant.
_OF_THE_CALL = (
    "num_inference_steps",
    "height",
    "width",
    "scheduler",
    "callback_on_step_end",
    "output_type",
    "max_batch",
)


class StableDiffusion:
    """One U-Net, one CLIP text encoder; also the base of the families that differ from it in a few places.

    Args:
        pipe: a pipeline, whatever its task: what is drawn, changed or filled in is each row's own affair.
        options: keywords of the pipeline's call that a batch shares, by `OPTIONS`.

    Raises:
        TypeError: a keyword that it does not take.
    """

    # Keywords of the pipelines' calls that all rows share, with their defaults.
    OPTIONS: Mapping[str, Any] = {
        "cross_attention_kwargs": None,
        "clip_skip": None,
        "eta": 0.0,
        "guidance_rescale": 0.0,
        "timesteps": None,
        "sigmas": None,
        "pag_scale": 3.0,
        "pag_adaptive_scale": 0.0,
        "original_inference_steps": None,
    }

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in self.OPTIONS:
                close = difflib.get_close_matches(name, [*self.OPTIONS, *_OF_THE_CALL], n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"generate: {name} is no keyword that {type(pipe).__name__} takes here{hint}")
        self.pipe = pipe
        self.options: dict[str, Any] = {**self.OPTIONS, **options}
        self.unet: Any = unet_of(pipe)
        self._scheduler = pipe.scheduler  # the pipeline's own, where batches are given another too
        given = dict(self.options["cross_attention_kwargs"] or {})
        self.lora_scale = given.pop("scale", None)
        self.attention_options = given
        # Read by callbacks, as in the pipelines' own calls.
        pipe._guidance_rescale, pipe._clip_skip = self.options["guidance_rescale"], self.options["clip_skip"]
        pipe._cross_attention_kwargs = self.options["cross_attention_kwargs"]
        pipe._pag_scale = self.options["pag_scale"]
        pipe._pag_adaptive_scale = self.options["pag_adaptive_scale"]

    @staticmethod
    def knows(pipe: Any) -> bool:
        """Whether a pipeline is of this family."""
        try:
            unet_of(pipe)
        except TypeError:
            return False
        encoders = text_encoders(pipe)
        clip = all("clip" in getattr(encoder.model.config, "model_type", "") for encoder in encoders)
        return clip and hasattr(pipe, "vae") and hasattr(pipe, "text_encoder")

    # Where things are.

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return cross_attention_layers(self.unet)

    @cached_property
    def _blocks(self) -> list[Any]:
        return blocks_of(self.unet, self._layers)

    @cached_property
    def _in_graphs(self) -> bool:
        """Whether the U-Net, or a part of it, is compiled."""
        return self.pipe.unet is not self.unet or are_compiled(self.unet.modules())

    def layers(self) -> dict[str, Any]:
        """See `Denoiser`."""
        return self._layers

    @cached_property
    def _projections(self) -> dict[str, Any]:
        return projections(self.unet)

    def projections(self) -> dict[str, Any]:
        """See `Denoiser`."""
        return self._projections

    def grid(self, layers: Sequence[str], latent: Size) -> dict[str, Size]:
        """See `Denoiser`."""
        return resolutions_of(self.unet, layers, latent)

    @contextmanager
    def bound(self, inputs: Any, layout: RowLayout, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """See `Denoiser`: as keywords, and with LoRA weights at this call's own scale."""
        with ExitStack() as held:
            held.enter_context(quiet())
            held.enter_context(self.scaled())
            held.enter_context(perturbed_attention(self.pipe, "perturbed" in layout.parts, layout.guided))
            by_blocks = are_compiled(self._blocks)
            if by_blocks and options.get("readout") is not None:
                raise ValueError("generate: record must be None where blocks are compiled one by one")
            if inputs.adapters:
                apart = {"in_graphs": self._in_graphs, "perturbed": "perturbed" in layout.parts}
                held.enter_context(inputs.adapted(self.unet, self.projections(), **apart))
            if by_blocks:
                held.enter_context(lock_of(self.unet))
                inputs = held.enter_context(inputs.handed_out(self.layers()))
            yield {"cross_attention_kwargs": {**self.attention_options, **options, "personalization": inputs}}

    def scaled(self) -> AbstractContextManager[None]:
        """While it lasts, LoRA weights of the U-Net count as this call wants them to."""
        return lora_scale([self.unet], self.lora_scale)

    def encoding(self) -> AbstractContextManager[None]:
        """The same for the text encoders."""
        return lora_scale([encoder.model for encoder in self.encoders()], self.lora_scale)

    # Text.

    def encoders(self) -> list[TextEncoder]:
        """See `Denoiser`."""
        return text_encoders(self.pipe)

    @property
    def tokenizer(self) -> Any:
        """Of the words of prompts; None where no text encoder is loaded."""
        return next((encoder.tokenizer for encoder in self.encoders()), None)

    @property
    def can_encode(self) -> bool:
        """Whether all text encoders are loaded that cross-attention reads the encodings of."""
        return sum(int(encoder.model.config.hidden_size) for encoder in self.encoders()) >= self.text_width

    @property
    def text_width(self) -> int:
        """Of what cross-attention reads."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def pooled_width(self) -> int | None:
        """Of the pooled encodings that the model is given; None: of none."""
        return None

    @property
    def text_dtype(self) -> torch.dtype:
        """Of the encodings."""
        encoders = self.encoders()
        return encoders[-1].model.dtype if encoders else self.unet.dtype

    @property
    def zeros_without_negative(self) -> bool:
        """Whether a negative prompt that is not given is encoded as zeros."""
        return False

    # One step.

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the model rather than two calls of it."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def perturbed(self) -> bool:
        """Whether guidance by perturbed attention is on."""
        return self.options["pag_scale"] > 0 and bool(getattr(self.pipe, "pag_applied_layers", ()))

    begins_without_noise = False  # an image-to-image row whose picture another model has left unfinished

    @property
    def frames(self) -> int:
        """How many pictures one row of latents holds."""
        return 1

    def size(self, height: int | None, width: int | None) -> Size:
        """See `Denoiser`."""
        sample = self.unet.config.sample_size
        default = tuple(sample) if isinstance(sample, (list, tuple)) else (sample, sample)
        factor = self.pipe.vae_scale_factor
        if height is None or width is None:  # these pipelines take both or neither
            return default[0] * factor, default[1] * factor
        return divisible(height, "height", factor), divisible(width, "width", factor)

    def latent_size(self, size: Size) -> Size:
        """See `Denoiser`."""
        return size[0] // self.pipe.vae_scale_factor, size[1] // self.pipe.vae_scale_factor

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Of one row, [C, h, w]."""
        return self.latent_channels, *self.latent_size(size)

    @property
    def latent_channels(self) -> int:
        """Of the latents; an inpainting U-Net reads five more."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def fills_in(self) -> bool:
        """Whether the U-Net reads the mask and the masked picture itself."""
        return self.unet.config.in_channels == 2 * self.latent_channels + 1

    def noise(self, size: Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """See `Denoiser`."""
        device = self.pipe._execution_device
        return randn_tensor((1, *self.latent_shape(size)), generator=generator, device=device, dtype=dtype)

    def encode(self, pixels: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """See `Denoiser`."""
        vae, device = self.pipe.vae, self.pipe._execution_device
        if pixels.shape[1] == self.latent_channels:  # latents already
            return pixels.to(device, dtype)
        upcast = getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16
        if upcast:
            vae.to(dtype=torch.float32)
        encoded = vae.encode(pixels.to(device, vae.dtype))
        if upcast:
            vae.to(dtype=torch.float16)
        if hasattr(encoded, "latent_dist"):
            drawn: DiagonalGaussianDistribution = encoded.latent_dist
            latents = drawn.sample(generator)
        else:
            latents = encoded.latents
        return self._scaled(latents.to(dtype))

    def _scaled(self, latents: Tensor) -> Tensor:
        return self.pipe.vae.config.scaling_factor * latents

    def schedule(self, scheduler: Any, steps: int, share: float | None) -> Schedule:
        """See `Denoiser`."""
        made = copy.deepcopy(scheduler)
        given = {name: self.options[name] for name in ("timesteps", "sigmas") if self.options[name] is not None}
        if self.options["original_inference_steps"] is not None:
            given["original_inference_steps"] = self.options["original_inference_steps"]
        times, steps = retrieve_timesteps(made, steps, "cpu", **given)
        if share is not None:
            times = self._times_from(made, steps, share)
        if self.followed:  # by its times in the pipeline's scheduler, where a row's first must be the first
            self._scheduler.timesteps = times
        return Schedule(made, times)

    @property
    def followed(self) -> bool:
        """Whether somebody's code around the U-Net follows the steps, as DeepCache does, which skips some."""
        return own_forward(self.unet) is not None

    def _times_from(self, scheduler: Any, steps: int, share: float) -> Tensor:
        """The times of an image-to-image row: the last share of the steps."""
        order = getattr(scheduler, "order", 1)
        first = max(steps - min(int(steps * share), steps), 0) * order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler.timesteps[first:]

    def rows(self, guided: bool) -> RowLayout:
        """See `Denoiser`."""
        guided = guided and not self.distilled
        return RowLayout((("uncond",) if guided else ()) + ("cond",) + (("perturbed",) if self.perturbed else ()))

    def conditions(
        self,
        requests: Sequence[Any],
        size: Size,
        layout: RowLayout,
        pooled: Mapping[str, Tensor],  # per part [B, P]
    ) -> dict[str, Any]:
        """See `Denoiser`."""
        device = self.pipe._execution_device
        found: dict[str, Any] = {}
        if self.distilled:
            width = self.unet.config.time_cond_proj_dim
            scales = [torch.tensor([request.guidance_scale - 1.0]) for request in requests]
            embedded = [self.pipe.get_guidance_scale_embedding(scale, embedding_dim=width) for scale in scales]
            found["timestep_cond"] = torch.cat(embedded * len(layout.parts)).to(device, self.text_dtype)
        count = len(adapters(self.unet))
        if count:  # a personalization has the images: the U-Net is given embeddings of none
            rows = len(requests) * len(layout.parts) * self.frames
            found["added_cond_kwargs"] = {"image_embeds": [torch.empty(rows, 0, 1)] * count}
        return found

    def predict(self, latents: Tensor, times: Tensor, text: Tensor, keywords: Mapping[str, Any]) -> Tensor:
        """See `Denoiser`."""
        if self.followed and bool((times == times[0]).all()):
            times = times[0]  # one number, as in the pipelines' own calls
        return self.pipe.unet(latents, times, encoder_hidden_states=text, return_dict=False, **keywords)[0]

    def guide(self, predictions: Tensor, scales: Tensor, layout: RowLayout, times: Tensor) -> Tensor:
        """See `Denoiser`: uncond + s (cond - uncond), and with perturbed attention + t (cond - perturbed)."""
        if len(layout.parts) == 1:
            return predictions
        parts = dict(zip(layout.parts, predictions.chunk(len(layout.parts)), strict=True))
        cond = parts["cond"]
        guided = cond
        if layout.guided:
            guided = parts["uncond"] + _scaled_by(scales, cond - parts["uncond"])
        if "perturbed" in parts:
            pag = torch.tensor([float(self.pipe._get_pag_scale(time)) for time in times.tolist()])
            guided = guided + _scaled_by(pag, cond - parts["perturbed"])
        if layout.guided and self.options["guidance_rescale"] > 0:
            guided = rescale_noise_cfg(guided, cond, guidance_rescale=self.options["guidance_rescale"])
        return guided

    def decode(self, latents: Tensor, output_type: str) -> tuple[list[Any], Tensor]:
        """See `Denoiser`."""
        finite = finite_rows(latents)
        if output_type == "latent":
            return list(latents), finite
        vae = self.pipe.vae
        pixels = vae.decode(self._unscaled(latents).to(vae.dtype), return_dict=False)[0]
        finite &= finite_rows(pixels)
        pixels, flagged = self._checked(pixels.where(finite.view(-1, 1, 1, 1), 0))
        show = [True] * len(pixels) if flagged is None else [not one for one in flagged]
        pictures = self.pipe.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=show)
        return list(pictures), finite

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.pipe.vae.config.scaling_factor

    def _checked(self, pixels: Tensor) -> tuple[Tensor, Any]:
        """Pictures as the pipeline's safety checker lets them through, and which it did not."""
        if getattr(self.pipe, "safety_checker", None) is None:
            return pixels, None
        return self.pipe.run_safety_checker(pixels, self.pipe._execution_device, self.text_dtype)


def divisible(pixels: int, name: str, factor: int) -> int:
    """A height or width of what is drawn.

    Raises:
        ValueError: the autoencoder cannot draw it.
    """
    if pixels % factor:
        raise ValueError(f"generate: {name} must be divisible by {factor}, got {pixels}")
    return int(pixels)


def finite_rows(rows: Tensor) -> Tensor:  # [B, ...] -> [B] bool
    """Which rows hold finite numbers alone."""
    return rows.isfinite().flatten(1).all(1)


def _scaled_by(scales: Tensor, difference: Tensor) -> Tensor:  # [B], [B, ...]
    scales = scales.to(difference.device).view(-1, *[1] * (difference.ndim - 1))
    return (difference.float() * scales).to(difference.dtype)
