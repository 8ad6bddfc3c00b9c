"""The trainers' losses written out once more: what a model is taught by one step, in plain torch; and the steps.

Nothing of the library computes here. Attention is softmax(q k^T) v with every map kept, an edited projection is the
projection and a correction, and whatever is drawn is drawn again by the rule (seed, step) -> draws. It runs in any
dtype: float64 says what is right, and float32 how far plain torch is from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8  # of the latents of a tiny pipeline
LOCALIZED = ("mid_block.attentions.0.transformer_blocks.0.attn2",)  # its blocks but the first and the last


class Keeping:
    """diffusers' plain attention, which keeps its probabilities [B, H, N, T]; beside it, decoupled, an image's."""

    def __init__(self, image: tuple[Tensor, Tensor] | None = None) -> None:
        self.image = image  # keys and values, [B, L, C] each
        self.kept = torch.empty(0)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        def split(projected: Tensor) -> Tensor:  # [B, T, C] -> [B, H, T, C / H]
            return projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states))
        key, value = split(attn.to_k(encoder_hidden_states)), split(attn.to_v(encoder_hidden_states))
        self.kept = (attn.scale * query @ key.mT).softmax(-1)
        out = self.kept @ value
        if self.image is not None:
            key, value = (split(side) for side in self.image)
            out = out + (attn.scale * query @ key.mT).softmax(-1) @ value
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def localization(
    maps: Mapping[str, Tensor],  # per layer [B, H, N, T]
    tokens: Sequence[Sequence[int]],  # per row, those of its objects
    masks: Sequence[Sequence[Tensor]],  # per row and object [h, w]
    sizes: Mapping[str, tuple[int, int]],  # height and width of each layer
    form: str,
) -> Tensor:  # [B]
    """FastComposer's localization loss, and Break-A-Scene's, of every row, from maps that were all kept.

    balanced: mean of a map outside the mask less its mean inside; normalised: the same of a map over its maximum; mse:
    the mean squared difference from the mask of the map averaged over heads and layers, over its maximum.
    """

    def mask_of(row: int, place: int, size: tuple[int, int]) -> Tensor:  # [N]
        given = masks[row][place][None, None]
        return F.interpolate(given, size, mode="bilinear", antialias=True).clamp(0, 1).flatten()

    def scaled(a_map: Tensor) -> Tensor:
        return a_map / a_map.amax(-1, keepdim=True).clamp(min=1e-5)

    found = []
    for row, objects in enumerate(tokens):
        terms = []
        for place, token in enumerate(objects):
            if form == "mse":
                for size in dict.fromkeys(sizes[name] for name in maps):
                    here = [maps[name][row, :, :, token].mean(0) for name in maps if sizes[name] == size]
                    error = scaled(torch.stack(here).mean(0)) - mask_of(row, place, size)
                    terms.append(error.square().mean())
                continue
            for name, kept in maps.items():
                mask, seen = mask_of(row, place, sizes[name]), kept[row, :, :, token]  # [N], [H, N]
                seen = scaled(seen) if form == "normalised" else seen
                outside, inside = (1 - mask) / (1 - mask).sum(), mask / mask.sum()
                terms.append((seen @ outside - seen @ inside).mean())
        found.append(torch.stack(terms).mean() if terms else next(iter(maps.values())).new_zeros(()))
    return torch.stack(found)


class Model:
    """A pipeline's frozen modules in one dtype.

    Args:
        pipe: the pipeline, which is left alone.
        dtype: of everything.
    """

    def __init__(self, pipe: Any, dtype: torch.dtype) -> None:
        self.dtype, self.tokenizer = dtype, pipe.tokenizer
        self.prediction = pipe.scheduler.config.prediction_type
        self.unet = copy.deepcopy(pipe.unet).to(dtype).requires_grad_(False).eval()
        self.text_encoder = copy.deepcopy(pipe.text_encoder).to(dtype).requires_grad_(False).eval()
        blocks = ("down_blocks", "mid_block", "up_blocks")
        named = [(name, module) for name, module in self.unet.named_modules() if name.endswith(".attn2")]
        self.layers = dict(sorted(named, key=lambda item: blocks.index(item[0].partition(".")[0])))
        config = pipe.scheduler.config
        assert config.beta_schedule == "linear"
        betas = torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=dtype)
        self.kept_share = (1 - betas).cumprod(0)  # alpha bar

    def ids(self, captions: Sequence[str]) -> Tensor:  # [B, T]
        return self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def encode(self, ids: Tensor, words: Tensor | None = None, vector: Tensor | None = None) -> Tensor:  # [B, T, D]
        """The text's encodings, with one learned vector [W] where `words` [B, T] says."""
        hooks = []
        if words is not None:
            embedding = self.text_encoder.get_input_embeddings()
            hooks = [embedding.register_forward_hook(lambda _m, _i, out: torch.where(words[..., None], vector, out))]
        encoded = self.text_encoder(ids).last_hidden_state
        for hook in hooks:
            hook.remove()
        return encoded

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:  # [B, c, h, w] each
        """sqrt(a) x + sqrt(1 - a) e, and what the U-Net should make of it."""
        share = self.kept_share[times].view(-1, 1, 1, 1)
        signal, sigma = share.sqrt(), (1 - share).sqrt()
        clean, noise = clean.to(self.dtype), noise.to(self.dtype)
        targets = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}
        return signal * clean + sigma * noise, targets[self.prediction]

    def predict(
        self,
        noisy: Tensor,  # [B, c, h, w]
        times: Tensor,  # [B]
        encodings: Tensor,  # [B, T, D]
        images: Mapping[str, tuple[Tensor, Tensor]] | None = None,  # per layer [B, L, C] each
        corrections: Mapping[tuple[str, str], Tensor] | None = None,  # per layer and side [B, T, C]
    ) -> tuple[Tensor, dict[str, Tensor]]:  # [B, c, h, w], per layer [B, H, N, T]
        """What the U-Net says, and its maps; corrections are added to what projections make of the text."""
        processors, hooks = {}, []
        for name, attn in self.layers.items():
            processors[name] = Keeping(None if images is None else images[name])
            attn.set_processor(processors[name])
            for side in ("to_k", "to_v") if corrections is not None else ():
                more = corrections[name, side]
                hooks.append(getattr(attn, side).register_forward_hook(lambda _m, _i, out, more=more: out + more))
        predicted = self.unet(noisy, times, encodings).sample
        for hook in hooks:
            hook.remove()
        return predicted, {name: processor.kept for name, processor in processors.items()}

    def sizes(self, maps: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Heights and widths of layers, of pictures as high as wide."""
        return {name: (round(kept.shape[2] ** 0.5),) * 2 for name, kept in maps.items()}

    def localized(
        self, maps: Mapping[str, Tensor], tokens: Sequence[Sequence[int]], masks: Sequence[Sequence[Tensor]], form: str
    ) -> Tensor:  # [B]
        chosen = {name: maps[name] for name in LOCALIZED}
        masks = [[mask.to(self.dtype) for mask in row] for row in masks]
        return localization(chosen, tokens, masks, self.sizes(chosen), form)


# Concepts


@dataclass
class ConceptStep:
    """What one subject's concept is taught by one step, as Perfusion's equations have it.

    Args:
        model: the modules.
        pipe: the pipeline, whose autoencoder encodes the pictures.
        subject: a `Subject` whose pictures are as large as the pipeline draws, and masks 8 times the latents.
        config: a `PerfusionConfig`.
        metric: C, [D, D].
        step: which.
    """

    model: Model
    pipe: Any
    subject: Any
    config: Any
    metric: Tensor
    step: int = 0
    noise: Tensor = field(init=False)

    def __post_init__(self) -> None:
        model, subject, size = self.model, self.subject, self.config.batch_size
        generator = torch.Generator().manual_seed(subject.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(subject.images), (size,), generator=generator).tolist()
        self.times = torch.randint(1000, (size,), generator=generator)
        self.noise = torch.randn(size, 4, SIDE, SIDE, generator=generator)
        with torch.no_grad():
            pixels = torch.stack([torch.tensor(np.array(subject.images[n])).permute(2, 0, 1) for n in chosen])
            self.clean = self.pipe.vae.encode(pixels.float() / 127.5 - 1).latents * self.pipe.vae.config.scaling_factor
            self.weights = torch.ones(size, 1, SIDE, SIDE, dtype=model.dtype)
            if subject.masks is not None:
                masks = torch.stack([torch.tensor(np.array(subject.masks[n])).to(model.dtype)[None] for n in chosen])
                soft = F.avg_pool2d(masks, masks.shape[-1] // SIDE)
                self.weights = soft / soft.amax((1, 2, 3), keepdim=True)
            plain = model.ids([words.replace(subject.placeholder, subject.super_class) for words in subject.captions])
            (noun,) = model.tokenizer(subject.super_class, add_special_tokens=False).input_ids
            self.super_encoding = model.encode(plain)[plain == noun].mean(0)
            self.ids, self.words = plain[chosen], plain[chosen] == noun
            self.start = (
                model.text_encoder.get_input_embeddings().weight[noun].clone(),
                torch.cat([attn.to_v.weight @ self.super_encoding for attn in model.layers.values()]),
            )

    def now(self, embedding: Tensor) -> Tensor:  # [W] -> [D]
        """The mean encoding of the concept's word."""
        return self.model.encode(self.ids, self.words, embedding)[self.words].mean(0)

    def average(self, now: Tensor) -> Tensor:  # [D] -> [D]
        """The target input i* after this, the first, step."""
        decay = self.config.target_decay
        return decay * self.super_encoding + (1 - decay) * now

    def loss(
        self,
        embedding: Tensor,  # [W]
        values: Tensor,  # [sum O]
        target_of: Callable[[Tensor], Tensor] | None = None,  # [D] -> [D]
    ) -> tuple[Tensor, Tensor]:
        """The masked diffusion loss of the edited model, and the localization loss of the word.

        h(e) = W e - s(e) (W i*) + g(e) o*, s(e) = e^T C^-1 i* / (i*^T C^-1 i*), g(e) = sigmoid((s(e) - beta) / tau)

        Args:
            embedding: the learned word.
            values: o*_V of every layer.
            target_of: i* from this step's mean encoding of the word; default the moving average.
        """
        model, config = self.model, self.config
        encodings = model.encode(self.ids, self.words, embedding)
        target = (target_of or self.average)(encodings[self.words].mean(0))
        solved = torch.linalg.solve(self.metric.to(model.dtype), target)
        similarity = (encodings @ (solved / (target @ solved)))[..., None]
        gate = ((similarity - config.beta) / config.tau).sigmoid()
        corrections, parts = {}, values.split([attn.to_v.out_features for attn in model.layers.values()])
        for (name, attn), value in zip(model.layers.items(), parts, strict=True):
            for side, output in (("to_k", attn.to_k.weight @ self.super_encoding), ("to_v", value)):
                removed = getattr(attn, side).weight @ target
                corrections[name, side] = gate * output - similarity * removed
        noisy, goal = model.noised(self.clean, self.noise, self.times)
        predicted, maps = model.predict(noisy, self.times, encodings, corrections=corrections)
        error = (predicted - goal) ** 2
        diffusion = torch.stack(
            [(e * w).sum() / (w.sum() * len(e)) for e, w in zip(error, self.weights, strict=True)]
        ).mean()
        if not config.localize:  # without masks nothing lies outside of one
            return diffusion, diffusion.new_zeros(())
        tokens = [[int(row.nonzero()[0])] for row in self.words]
        localized = model.localized(maps, tokens, [[w[0]] for w in self.weights], config.localization_form)
        return diffusion, localized.mean()

    def gradients(self, target_of: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Of the whole loss, at the start, with respect to the word and the values."""
        learned = [tensor.clone().requires_grad_() for tensor in self.start]
        diffusion, localized = self.loss(*learned, target_of)
        return list(torch.autograd.grad(diffusion + self.config.localize * localized, learned))


# Image adapters and subject fusion


@dataclass
class Drawn:
    """What a step of adapters' and fusion's training draws of examples whose pictures are latents."""

    rows: list[Any]
    share: list[float]
    times: Tensor  # [B]
    clean: Tensor  # [B, c, h, w]
    noise: Tensor  # [B, c, h, w]


def drawn(examples: Sequence[Any], config: Any, step: int = 0) -> Drawn:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = [examples[n] for n in torch.randint(len(examples), (config.batch_size,), generator=generator).tolist()]
    times = torch.randint(1000, (len(rows),), generator=generator)
    share = torch.rand(len(rows), generator=generator).tolist()
    clean = torch.stack([row.image for row in rows])
    return Drawn(rows, share, times, clean, torch.randn(clean.shape, generator=generator))


def adapter_loss(model: Model, step: Drawn, config: Any, weights: Mapping[str, Tensor]) -> Tensor:
    """IP-Adapter's loss: out = Attention(q, k_text, v_text) + Attention(q, k_image, v_image), mean squared error.

    Args:
        weights: the adapter's, by the names of its parameters.
    """
    without_text, without_image, without_both = config.drop_text, config.drop_image, config.drop_both
    captions, embeds = [], []
    for row, share in zip(step.rows, step.share, strict=True):
        image = row.prompt.to(model.dtype)
        if share < without_text:
            captions, embeds = [*captions, ""], [*embeds, image]
        elif share < without_text + without_image:
            captions, embeds = [*captions, row.caption], [*embeds, torch.zeros_like(image)]
        elif share < without_text + without_image + without_both:
            captions, embeds = [*captions, ""], [*embeds, torch.zeros_like(image)]
        else:
            captions, embeds = [*captions, row.caption], [*embeds, image]
    norm, linear = ([weights[f"projection.{name}.{part}"] for part in ("weight", "bias")] for name in PROJECTION)
    width = len(norm[0])
    tokens = F.layer_norm(F.linear(torch.stack(embeds), *linear).unflatten(1, (-1, width)), (width,), *norm)
    images = {}
    for name in model.layers:
        key = name.replace(".", "-")
        images[name] = tuple(tokens @ weights[f"{side}.{key}.weight"].T for side in ("keys", "values"))
    noisy, goal = model.noised(step.clean, step.noise, step.times)
    predicted, _ = model.predict(noisy, step.times, model.encode(model.ids(captions)), images)
    return (predicted - goal).square().mean()


PROJECTION = ("norm", "image_embeds")  # to image tokens: a layer, then a norm


def fusion_loss(
    model: Model, step: Drawn, config: Any, module: nn.Module, places: Callable[[Any, Any], Sequence[int]]
) -> Tensor:
    """FastComposer's loss: the error of what is drawn from fused words, and where their attention lies.

    Args:
        module: the fusion (w, i) -> words, in the model's dtype.
        places: the tokens into which a subject of an example is fused.
    """
    captions, subjects = [], []
    for row, share in zip(step.rows, step.share, strict=True):
        captions.append("" if share < config.drop_text else row.caption)
        alone = share < config.drop_text + config.drop_subjects
        subjects.append([] if alone else [(s, token) for s in row.subjects for token in places(row, s)])
    encodings = model.encode(model.ids(captions))
    rows = []
    for words, row in zip(encodings, subjects, strict=True):
        fused = list(words)
        for subject, token in row:
            fused[token] = module(words[token][None], subject.image.to(model.dtype)[None])[0]
        rows.append(torch.stack(fused))
    noisy, goal = model.noised(step.clean, step.noise, step.times)
    predicted, maps = model.predict(noisy, step.times, torch.stack(rows))
    loss = (predicted - goal).square().mean()
    if config.localize:
        seen = [[(token, s.mask[0]) for s, token in row if s.mask is not None] for row in subjects]
        tokens, masks = ([[pair[n] for pair in row] for row in seen] for n in (0, 1))
        loss = loss + config.localize * model.localized(maps, tokens, masks, config.localization_form).mean()
    return loss


def clipped(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Gradients whose norm, all together, is at most `limit`; torch adds 1e-6 to the norm it divides by."""
    norm = float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())
    return [gradient * min(1.0, limit / (norm + 1e-6)) for gradient in gradients]


def adamw(
    before: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],  # per step and parameter
    rates: Sequence[Sequence[float]],  # per step and parameter
    *,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
) -> list[list[Tensor]]:
    """Adam with decoupled weight decay, in float64: the parameters after each step.

    p <- p - lr decay p - lr m^ / (sqrt(v^) + eps), m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)
    """
    learned = [tensor.double() for tensor in before]
    first, second = ([torch.zeros_like(tensor) for tensor in learned] for _ in range(2))
    after = []
    for step, (given, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        for n, gradient in enumerate(tensor.double() for tensor in given):
            first[n] = betas[0] * first[n] + (1 - betas[0]) * gradient
            second[n] = betas[1] * second[n] + (1 - betas[1]) * gradient**2
            mean, spread = first[n] / (1 - betas[0] ** step), second[n] / (1 - betas[1] ** step)
            learned[n] = learned[n] * (1 - rate[n] * weight_decay) - rate[n] * mean / (spread.sqrt() + epsilon)
        after.append(list(learned))
    return after


@contextmanager
def optimizers() -> Iterator[list[Any]]:
    """Every AdamW that is made meanwhile: what it learns, and at each step its gradients, rates and weights before."""
    made: list[Any] = []
    original = torch.optim.AdamW

    class Kept(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.learned = [parameter for group in self.param_groups for parameter in group["params"]]
            self.gradients: list[list[Tensor]] = []
            self.before: list[list[Tensor]] = []
            self.rates: list[list[float]] = []
            made.append(self)

        def step(self, closure: Any = None) -> Any:
            self.gradients.append([parameter.grad.clone() for parameter in self.learned])
            self.before.append([parameter.detach().clone() for parameter in self.learned])
            self.rates.append([group["lr"] for group in self.param_groups for _ in group["params"]])
            return super().step(closure)

    torch.optim.AdamW = Kept
    try:
        yield made
    finally:
        torch.optim.AdamW = original
