"""What one step teaches one subject's LoRA, by diffusers, PEFT and nothing else: unmodified pipelines in any dtype."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tests.diffusers.lora_files import parts


class PeftStep:
    """A pipeline that carries one user's adapter as PEFT's layers, and her word as `load_textual_inversion` adds it.

    Args:
        pipe: the pipeline, which is left alone.
        dtype: of everything.
        adapter: what the layers hold, a `keylock_diffusers.loras.Adapter`.
        scale: alpha / rank.
    """

    def __init__(self, pipe: Any, dtype: torch.dtype, adapter: Any, scale: float = 1.0) -> None:
        self.pipe, self.dtype = copy.deepcopy(pipe), dtype
        self.words = adapter.words
        for name, word in adapter.words.items():
            pairs = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
            for (encoder, tokenizer), vectors in zip(pairs, word.vectors, strict=False):
                own = {"text_encoder": getattr(self.pipe, encoder), "tokenizer": getattr(self.pipe, tokenizer)}
                self.pipe.load_textual_inversion({name: vectors.float()}, token=name, **own)
        self.layers: dict[tuple[int, str], nn.Module] = {}
        updates: Mapping[int, Any] = {-1: adapter.denoiser, **dict(enumerate(adapter.text_encoders))}
        for component, module in parts(self.pipe).items():
            module.requires_grad_(False)
            own = updates.get(component)
            if own:
                rank = next(iter(own.values())).rank
                config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=list(own))
                inject_adapter_in_model(config, module)
                self.layers |= {(component, name): module.get_submodule(name) for name in own}
            module.to(dtype).eval()
        with torch.no_grad():
            for (component, name), layer in self.layers.items():
                up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                up.copy_(updates[component][name].up.view(up.shape)).requires_grad_()
                down.copy_(updates[component][name].down.view(down.shape)).requires_grad_()

    def loss(self, subject: Any, config: Any, step: int = 0) -> Tensor:
        """The diffusion loss, weighted by the soft masks, of what the subject draws in a step."""
        pipe, dtype, size = self.pipe, self.dtype, config.batch_size
        random = torch.Generator().manual_seed(subject.seed * 1_000_003 + step)
        chosen = torch.randint(len(subject.images), (size,), generator=random).tolist()
        times = torch.randint(1000, (size,), generator=random)
        side = pipe.unet.config.sample_size
        noise = torch.randn(size, pipe.unet.config.in_channels, side, side, generator=random).to(dtype)
        weights = torch.ones(size, 1, side, side, dtype=dtype)
        with torch.no_grad():
            pixels = torch.stack([torch.tensor(np.array(subject.images[n])).permute(2, 0, 1) for n in chosen])
            encoded = pipe.vae.encode(pixels.float() / 127.5 - 1)
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            clean = (latents * pipe.vae.config.scaling_factor).to(dtype)
            if subject.masks is not None:
                masks = torch.stack([torch.tensor(np.array(subject.masks[n])).to(dtype)[None] for n in chosen])
                soft = F.avg_pool2d(masks, masks.shape[-1] // side)
                weights = soft / soft.amax((1, 2, 3), keepdim=True)
        settings = pipe.scheduler.config
        betas = torch.linspace(settings.beta_start, settings.beta_end, 1000, dtype=dtype)
        share = (1 - betas).cumprod(0)[times].view(-1, 1, 1, 1)
        signal, sigma = share.sqrt(), (1 - share).sqrt()
        kind = settings.prediction_type
        goal = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}[kind]
        text, added = self._encoded([subject.captions[n] for n in chosen])
        said = pipe.unet(signal * clean + sigma * noise, times, text, added_cond_kwargs=added).sample
        rows = ((said - goal) ** 2 * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * goal.shape[1])
        if config.snr_gamma is not None:
            ratio = share.flatten() / (1 - share.flatten())
            counts = ratio.clamp(max=config.snr_gamma)
            rows = rows * {"epsilon": counts / ratio, "sample": counts, "v_prediction": counts / (ratio + 1)}[kind]
        return rows.mean()

    def _encoded(self, captions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor] | None]:
        given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if not hasattr(self.pipe, "text_encoder_2"):
            return self.pipe.encode_prompt(list(captions), **given)[0], None
        text, _, pooled, _ = self.pipe.encode_prompt(list(captions), **given)
        sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * len(captions), dtype=self.dtype)
        return text, {"text_embeds": pooled, "time_ids": sizes}

    def gradients(self, *given: Any) -> dict[tuple[Any, ...], Tensor]:
        """Of `loss`: by component, module and factor, and by component of the word's vectors."""
        learned = {}
        for (component, name), layer in self.layers.items():
            learned[component, name, "down"] = layer.lora_A["default"].weight
            learned[component, name, "up"] = layer.lora_B["default"].weight
        tables = {}
        if self.words:
            for component, module in parts(self.pipe).items():
                if component >= 0:
                    tables[component] = module.get_input_embeddings().weight.requires_grad_()
        wanted = [*learned.values(), *tables.values()]
        found = torch.autograd.grad(self.loss(*given), wanted, allow_unused=True, materialize_grads=True)
        gradients = dict(zip([*learned, *tables], found, strict=True))
        for component in tables:
            (word,) = self.words.values()
            gradients[component, "word"] = gradients.pop(component)[-len(word.vectors[component]) :]
        return gradients
