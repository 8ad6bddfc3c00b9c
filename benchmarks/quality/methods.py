"""The methods, each with the settings that it is tuned over; what they cost is counted in rows of the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import keylock_diffusers as kd
from benchmarks.quality import fusion
from benchmarks.quality.users import Order, User
from benchmarks.quality.weights import Weights, WeightsConfig, train_weights
from keylock_diffusers import embedded
from keylock_diffusers.embedded.captions import default_captions
from keylock_diffusers.embedded.prompts import PERSONAL_GUIDANCE
from keylock_diffusers.training import (
    AddedConfig,
    LoraTrainingConfig,
    PerfusionConfig,
    covariance,
    train_concepts,
    train_loras,
)

BATCH = 6  # pictures a step
# A row of the U-Net forward is one, backward two; at 30 seconds on two quiet cores, so many (see docs/quality.md).
ROWS = {10: 2700, 30: 8100, 120: 32400}


@dataclass(frozen=True)
class Learned:
    """What one user's subject became.

    Args:
        placeholder: what its prompts say.
        nbytes: what it keeps, numbers in float16.
        use: what is put into a request.
        weights: a model of its own, with which it alone draws.
    """

    placeholder: str
    nbytes: int
    use: dict[str, Any] = field(default_factory=dict)
    weights: Weights | None = None

    def request(self, order: Order, seed: int) -> kd.Request:
        """One of the user's orders."""
        words = order.prompt.format(self.placeholder)
        return kd.Request(words, seed=seed, guidance_scale=PERSONAL_GUIDANCE, **self.use)


@dataclass(frozen=True)
class Method:
    """One way to personalise.

    Args:
        name: what tables call it.
        learn: of a pipeline, users, settings and a budget in rows, what each of them became.
        settings: those it is used with.
        tried: what tuning chooses from: other values of them.
        trains: whether it learns at all.
        draws: whether the model draws what is judged: else it is a picture that the users gave, or the right answer.
        adapter: whether it draws with the image prompt adapter, or its image encoder.
        options: what `generate` is given besides.
    """

    name: str
    learn: Callable[[Any, Sequence[User], dict[str, Any], int], list[Learned]]
    settings: dict[str, Any] = field(default_factory=dict)
    tried: tuple[dict[str, Any], ...] = ()
    trains: bool = True
    draws: bool = True
    adapter: bool = False
    options: Callable[[], dict[str, Any]] = dict


def steps_of(rows: int, config: Any) -> int:
    """How many steps a budget pays: forward and backward of each row, forward once more for the prior; and forward and
    backward of as many pictures of the kind, where there are any.
    """
    cost = 3 + (config.prior > 0) + 3 * (getattr(config, "of_kind", 0) > 0)
    return max(1, rows // (BATCH * cost))


def _chosen(config: Any, settings: dict[str, Any], rows: int) -> tuple[Any, dict[str, Any]]:
    """A configuration with those settings that it knows, and the others."""
    own = {name: value for name, value in settings.items() if hasattr(config, name)}
    made = replace(config, batch_size=BATCH, **own)
    return replace(made, steps=steps_of(rows, made)), {n: v for n, v in settings.items() if n not in own}


def _raised(found: list[Any]) -> list[Any]:
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


@cache
def _metric() -> Any:
    return covariance(embedded.load(), default_captions()[:500])


def _nothing(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    return [Learned(user.kind, 0) for user in users]


def _perfusion(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    config, more = _chosen(PerfusionConfig(), settings, rows)
    subjects = [user.subject(number) for number, user in enumerate(users)]
    found = _raised(train_concepts(pipe, subjects, config, metric=_metric(), progress=False))
    return [
        Learned(u.placeholder, _bytes(c), {"concepts": [kd.Use(c, **more)]}) for u, c in zip(users, found, strict=True)
    ]


def _added(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    config, more = _chosen(AddedConfig(), settings, rows)
    subjects = [user.subject(number) for number, user in enumerate(users)]
    found = _raised(train_concepts(pipe, subjects, config, progress=False))
    return [
        Learned(u.placeholder, _bytes(c), {"concepts": [kd.Use(c, **more)]}) for u, c in zip(users, found, strict=True)
    ]


def _lora(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    settings = dict(settings)
    word = settings.pop("word")
    strength, bound = settings.pop("strength", 1.0), settings.pop("bound", False)
    config, _ = _chosen(LoraTrainingConfig(), settings, rows)
    plain = "sks {}"
    subjects = [user.subject(number, None if word else plain.format(user.kind)) for number, user in enumerate(users)]
    found = _raised(train_loras(pipe, subjects, config, progress=False))
    made = []
    for user, adapter in zip(users, found, strict=True):
        numbers = sum(u.up.numel() + u.down.numel() for u in adapter.denoiser.values())
        numbers += sum(vector.numel() for one in adapter.words.values() for vector in one.vectors)
        named = user.placeholder if word else plain.format(user.kind)
        where = kd.Attention(named) if bound else None
        made.append(Learned(named, 2 * numbers, {"loras": [kd.Lora(adapter, strength, region=where)]}))
    return made


def _weights(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    settings = dict(settings)
    word, strength = settings.pop("word"), settings.pop("strength", 1.0)
    config = replace(WeightsConfig(), batch_size=BATCH, **settings)
    config, made = replace(config, steps=steps_of(rows, config)), []
    for number, user in enumerate(users):
        named = user.placeholder if word else f"sks {user.kind}"
        found = train_weights(pipe, user.subject(number, None if word else named), config)
        found = found.scaled(pipe, strength)
        use = {"loras": [found.adapter(user.placeholder)]} if word else {}
        made.append(Learned(named, found.nbytes, use, found))
    return made


def _image_prompt(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    made = []
    for user in users:
        subject = user.subject()
        prompts = [kd.ImagePrompt(subject.images[0], scale=settings["scale"], end=settings.get("end", 1.0))]
        tokens = 4 * pipe.unet.config.cross_attention_dim
        made.append(Learned(user.kind, 2 * tokens, {"image_prompts": prompts}))
    return made


def _fused(pipe: Any, users: Sequence[User], settings: dict[str, Any], rows: int) -> list[Learned]:
    width = pipe.unet.config.cross_attention_dim
    return [
        Learned(user.kind, 2 * width, {"subjects": [kd.FusedSubject(user.kind, user.subject().images[0])], **settings})
        for user in users
    ]


def _bytes(concept: Any) -> int:
    return 2 * sum(tensor.numel() for tensor in concept.tensors.values())


def _grid(**values: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """One setting at a time away from the others."""
    return tuple({name: value} for name, each in values.items() for value in each)


_PERFUSION_TRIED = _grid(
    values_rate=(0.01, 0.1, 0.3),
    embedding_rate=(0.002, 0.01, 0.03),
    inference_beta=(0.35, 0.5, 0.85),
    inference_tau=(0.05, 0.3),
    prior=(0.3, 1.0),
    timestep_power=(2.0,),
    views=(0.5,),
)
_ADDED_TRIED = _grid(
    values_rate=(0.015, 0.1),
    encodings_rate=(0.02, 0.1),
    keys_rate=(0.005, 0.05),
    prior=(0.3, 3.0),
    spread=(0.1, 0.4),
    timestep_power=(1.0, 3.0),
    views=(0.0, 0.5),
    strength=(0.9, 1.1),
)
_WORD_TRIED = _grid(
    embedding_rate=(0.03, 0.06, 0.12, 0.7, 1.4),
    prior=(0.3, 1.0, 3.0),
    spread=(0.0, 0.1, 0.6),
    timestep_power=(2.0,),
    views=(0.5,),
)
_LORA_TRIED = _grid(
    learning_rate=(5e-4, 1e-3, 4e-3, 8e-3),
    embedding_rate=(0.03, 0.07, 0.4),
    prior=(0.3, 1.0, 3.0),
    timestep_power=(2.0,),
    views=(0.5,),
    strength=(0.7, 0.85),
)


_WEIGHTS_TRIED = _grid(
    learning_rate=(2e-5, 5e-5, 2e-4, 5e-4),
    embedding_rate=(0.03, 0.07, 0.4),
    of_kind=(0.3, 3.0),
    prior=(0.3, 1.0, 3.0),
    timestep_power=(2.0,),
    views=(0.5,),
    strength=(0.7, 0.85),
)


def _word(words: int) -> Method:
    begin = {"words": words, "embeddings": True, "spread": 0.3, "encodings": 0, "keys": 0, "values": 0}
    begin |= {"prior": 0.0, "timestep_power": 1.0, "views": 0.0, "embedding_rate": 0.35}
    named = "one vector" if words == 1 else f"{words} vectors"
    return Method(f"textual inversion, {named}", _added, begin, _WORD_TRIED)


def _lora_of(rank: int, word: bool) -> Method:
    begin = {"rank": rank, "word": word, "learning_rate": 2e-3, "embedding_rate": 0.15 if word else 0.0}
    return Method(f"LoRA rank {rank}, {'with a word' if word else 'plain words'}", _lora, begin, _LORA_TRIED)


def _own(name: str, **settings: Any) -> Method:
    return Method(name, _added, settings, _ADDED_TRIED)


METHODS = {
    method.name: method
    for method in (
        Method("no personalisation", _nothing, trains=False),
        Method("a training picture", _nothing, trains=False, draws=False),
        Method("right answers", _nothing, trains=False, draws=False),
        Method(
            "key-locked (Perfusion)",
            _perfusion,
            {"values_rate": 0.03, "embedding_rate": 0.004, "inference_beta": 0.65},
            _PERFUSION_TRIED,
        ),
        Method(
            "key-locked, global lock",
            _perfusion,
            {"values_rate": 0.03, "embedding_rate": 0.004, "lock": "global", "inference_beta": 0.5},
            _PERFUSION_TRIED,
        ),
        Method(
            "image prompt",
            _image_prompt,
            {"scale": 0.7},
            _grid(scale=(0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0), end=(0.4, 0.6, 0.8)),
            trains=False,
            adapter=True,
        ),
        Method(
            "subject fusion (FastComposer)",
            _fused,
            {"subject_start": 0.0},
            _grid(subject_start=(0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.28, 0.32, 0.36, 0.4, 0.48)),
            trains=False,
            adapter=True,
            options=lambda: {"fusion": kd.SubjectFusion.load(fusion.FILE)},
        ),
        _word(1),
        _word(4),
        Method(
            "Custom Diffusion",
            _weights,
            {"word": True, "learning_rate": 5e-4, "targets": ("attn2.to_k", "attn2.to_v")},
            _WEIGHTS_TRIED,
        ),
        Method("DreamBooth, with a word", _weights, {"word": True, "learning_rate": 1e-4}, _WEIGHTS_TRIED),
        Method("DreamBooth, plain words", _weights, {"word": False, "learning_rate": 1e-4}, _WEIGHTS_TRIED),
        _lora_of(1, True),
        _lora_of(4, True),
        _lora_of(16, True),
        _lora_of(4, False),
        Method(
            "LoRA rank 4, with a word, bound to it",
            _lora,
            {"rank": 4, "word": True, "learning_rate": 2e-3, "embedding_rate": 0.15, "bound": True},
            _LORA_TRIED,
        ),
        _own("added, small", words=4, keys=0, values=1),
        _own("added"),
        _own("added, large", words=8, keys=2, values=3),
        _own("added, one word", words=1),
        _own("added, five words, all keys and values", keys=None, values=None),
        _own("added, words of its own", words=3, embeddings=True, encodings=0, keys=None, values=None, spread=0.3),
    )
}
