"""Many users' things learned in one run: each subject's pictures and draws, and how its own training goes.

Every draw is a function of the subject's seed and the step, and every subject has an optimiser of its own: it learns
what it would have learned alone, and what goes wrong with it stops it alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from keylock_diffusers.checks import listed, reason_of, shown
from keylock_diffusers.concepts import BaseModel
from keylock_diffusers.masks import soft_mask
from keylock_diffusers.pictures import decode, turned
from keylock_diffusers.training import checkpoint, loop
from keylock_diffusers.training.advice import quarters
from keylock_diffusers.training.config import DEFAULT_CAPTIONS, Subject, SubjectTrainingError
from keylock_diffusers.training.frozen import encode_images, named, noise_levels, prediction_target, squares_of
from keylock_diffusers.training.views import VIEWS, small_views

# Of a learner, what a checkpoint keeps besides its tensors.
FACTS = ("loss", "best", "best_step", "steps", "stopped", "losses")


@dataclass(kw_only=True)
class Learner(ABC):
    """One subject's share of a run.

    Args:
        subject: whose pictures they are.
        latents: of the pictures; and then, if they are shown, of smaller views of them.
        weights: the soft masks over their maximum.
        optimizer: of all that is learned.
    """

    subject: Subject
    latents: Tensor  # [N, c, h, w]
    weights: Tensor  # [N, 1, h, w]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of every step
    loss: float = float("nan")  # smoothed
    best: float = float("inf")
    best_step: int = 0
    steps: int = 0
    stopped: str | None = None
    failure: SubjectTrainingError | None = None

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps of it, by name."""

    @property
    @abstractmethod
    def ids(self) -> list[Any]:
        """Its captions' tokens, as JSON."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is learned."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update(self, loss: float, config: Any, step: int) -> str | None:
        """Takes the optimiser's step; why it cannot go on where the loss or a gradient is not finite."""
        gradients = [parameter.grad for parameter in self.parameters]
        if not torch.isfinite(torch.tensor(loss)) or not all(g is not None and g.isfinite().all() for g in gradients):
            self.stopped = "failed"
            return (
                f"the loss or its gradient was not finite at step {step}; check the pictures and masks, or lower the "
                "learning rates"
            )
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        self.steps = step + 1
        self.losses.append(round(loss, 6))
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        if self.loss < self.best:
            self.best, self.best_step = self.loss, step
        elif config.patience is not None and step - self.best_step >= config.patience:
            self.stopped = "converged"
        return None

    def facts(self, recipe: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What is worth keeping about its training, as JSON; `advice` reads it."""
        return {
            **recipe,
            "steps": self.steps,
            "stopped": self.stopped or "finished",
            "pictures": len(self.subject.images),
            "seed": self.subject.seed,
            "loss": round(self.loss, 5),
            **quarters(self.losses),
            "seconds": round(seconds, 1),
        }


L = TypeVar("L", bound=Learner)
T = TypeVar("T")
# After a step, of how many there were and what gives the results as they are: the places of subjects that are to stop.
OnStep = Callable[[int, Callable[[], list[Any]]], Sequence[int] | None]


class Together(ABC, Generic[L, T]):
    """The run in which all subjects are learned; a `loop.Trainable`.

    Args:
        pipe: the pipeline, frozen.
        subjects: what to learn.
        config: how: it has ``steps``, ``batch_size``, ``max_grad_norm`` and ``patience``.
        on_step: called after every step; subjects whose places it gives stop there.
    """

    error: ClassVar[type[SubjectTrainingError]]
    whole_schedule: ClassVar[bool] = False  # whether a step depends on how many there are

    def __init__(self, pipe: Any, subjects: Sequence[Subject], config: Any, on_step: OnStep | None) -> None:
        self.pipe, self.config, self.on_step = pipe, config, on_step
        self.base, self.started = BaseModel.of(pipe), time.monotonic()
        self.admitted = [self._admitted(subject) for subject in subjects]
        self.learners = [one for one in self.admitted if isinstance(one, Learner)]

    @abstractmethod
    def begin(self, subject: Subject) -> L:
        """A subject's learner, before the first step; whatever is wrong with it is raised."""

    @abstractmethod
    def learn(self, learners: Sequence[L], step: int) -> Tensor:  # [S]
        """Leaves what a step teaches them as gradients of their parameters, and gives their losses."""

    @abstractmethod
    def result(self, learner: L, seconds: float) -> T:
        """What was learned so far.

        Raises:
            ValueError: it is of no use.
        """

    @property
    def given(self) -> Sequence[Tensor]:
        """What the run begins with besides pictures."""
        return ()

    def results(self) -> list[T | Any]:
        """What was learned so far, or the error that stopped it, in the order of the subjects."""
        seconds = time.monotonic() - self.started
        return [self._result(one, seconds) if isinstance(one, Learner) else one for one in self.admitted]

    def step(self, number: int) -> dict[str, float] | None:
        active = [learner for learner in self.learners if learner.stopped is None]
        if not active:
            return None
        for learner in active:
            learner.optimizer.zero_grad(set_to_none=True)
        for learner, loss in zip(active, self.learn(active, number).tolist(), strict=True):
            reason = learner.update(loss, self.config, number)
            learner.failure = self._failure(learner.subject, reason) if reason else None
        if self.on_step is not None:
            for place in self.on_step(number + 1, self.results) or ():
                if isinstance(one := self.admitted[place], Learner) and one.stopped is None:
                    one.stopped = "overtrained"
        seen = [learner.loss for learner in self.learners if learner.failure is None]
        return {"loss": sum(seen) / max(len(seen), 1), "active": len(active)}

    def state(self) -> tuple[dict[str, Tensor], Any]:
        tensors: dict[str, Tensor] = {}
        facts = []
        for number, learner in enumerate(self.learners):
            tensors |= {f"{number}/{name}": tensor for name, tensor in learner.tensors.items()}
            tensors |= checkpoint.optimizer_tensors(learner.optimizer, f"{number}/optimizer/")
            failure = learner.failure and str(learner.failure)
            facts.append({name: getattr(learner, name) for name in FACTS} | {"failure": failure})
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Any) -> None:
        for number, (learner, fact) in enumerate(zip(self.learners, facts, strict=True)):
            with torch.no_grad():
                for name, tensor in learner.tensors.items():
                    tensor.copy_(tensors[f"{number}/{name}"])
            for name in FACTS:
                setattr(learner, name, fact[name])
            learner.failure = fact["failure"] and self.error(fact["failure"])
            checkpoint.restore_optimizer(learner.optimizer, tensors, f"{number}/optimizer/")

    def digest(self) -> str:
        """Names what makes a run the same run; more steps continue it."""
        settings = asdict(self.config)
        if not self.whole_schedule:
            del settings["steps"]
        subjects = [
            [one.subject.placeholder, one.subject.super_class, one.subject.seed, one.ids] for one in self.learners
        ]
        given = (tensor for one in self.learners for tensor in (one.latents, one.weights))
        return checkpoint.digest([settings, subjects, self.base.to_json(), FACTS], (*self.given, *given))

    def run(self, how: loop.Run) -> list[T | Any]:
        """All steps, from where the checkpoint left off; what `results` gives then."""
        if self.learners:
            loop.run(self, how)
        return self.results()

    def _admitted(self, subject: Subject) -> L | SubjectTrainingError:
        """One user's pictures and words must not cost the others theirs, whatever is wrong with them."""
        try:
            return self.begin(subject)
        except Exception as error:
            failure = self._failure(subject, reason_of(error))
            failure.__cause__ = error
            return failure

    def _result(self, learner: Any, seconds: float) -> T | SubjectTrainingError:
        if learner.failure is not None:
            return learner.failure  # type: ignore[no-any-return]
        try:
            return self.result(learner, seconds)
        except ValueError as error:  # one user's extreme values must not cost the others theirs
            return self._failure(learner.subject, str(error))

    def _failure(self, subject: Subject, reason: str) -> SubjectTrainingError:
        return self.error(f"{subject.placeholder}: {reason}")


def check_subjects(subjects: Any, name: str) -> None:
    """That there are subjects to learn.

    Raises:
        TypeError, ValueError: there are none, or something else.
    """
    for subject in listed(subjects, f"{name}: subjects"):
        if not isinstance(subject, Subject):
            raise TypeError(f"{name}: subjects must be Subject objects, got {shown(subject)}")
    if not subjects:
        raise ValueError(f"{name}: subjects must not be empty")


def captions_of(subject: Subject) -> Sequence[str]:
    """One for each of a subject's pictures."""
    return subject.captions or [
        DEFAULT_CAPTIONS[n % len(DEFAULT_CAPTIONS)].format(subject.placeholder) for n in range(len(subject.images))
    ]


@torch.no_grad()
def lessons_of(pipe: Any, subject: Subject, views: bool = False) -> tuple[Tensor, Tensor]:  # [n, c, h, w], [n, 1, h, w]
    """A subject's latents, and its soft masks over their maximum, on the CPU in float32; behind them those of views.

    Raises:
        ValueError: a picture or mask cannot be used.
    """
    latents = encode_images(pipe, subject.images)
    if subject.masks is None:
        weights = torch.ones(len(latents), 1, *latents.shape[-2:], dtype=torch.float32)
    else:
        weights = torch.stack([_soft(subject, n, latents) for n in range(len(latents))])
    if views:
        small, masks = small_views(squares_of(pipe, subject.images), weights, subject.seed)
        latents, weights = torch.cat([latents, encode_images(pipe, small)]), torch.cat([weights, masks])
    return latents.float().cpu(), weights


def _soft(subject: Subject, number: int, latents: Tensor) -> Tensor:  # [1, h, w]
    """A picture's mask, which must be of its shape: of both it is the middle square that is taken."""
    assert subject.masks is not None
    mask = subject.masks[number]
    what = named(f"mask {number}", mask)
    decode(mask, what)
    (width, height), (across, down) = turned(subject.images[number]).size, turned(mask).size
    if abs(width * down - height * across) > max(width + height, across + down):  # more than rounding
        raise ValueError(f"{what} must have its picture's shape, {width} x {height}, got {across} x {down} upright")
    return soft_mask(mask, latents.shape[-2:], what)


class Lesson(NamedTuple):
    """What a step shows the model: as many rows for each learner, one learner's after another's."""

    pictures: list[int]  # of each row
    times: Tensor  # [B]
    signal: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]
    noisy: Tensor  # [B, c, h, w]
    target: Tensor  # [B, c, h, w], what the model should say
    weights: Tensor  # [B, 1, h, w]

    def losses(self, predicted: Tensor) -> Tensor:  # [B]
        """Each row's squared error, weighted by its picture's mask."""
        error, weights = (predicted.float() - self.target) ** 2, self.weights
        return (error * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * error.shape[1])

    def strayed(self, predicted: Tensor, plain: Tensor) -> Tensor:  # [B]
        """How far each row is, outside its picture's mask, from what the model says without what is learned."""
        return ((predicted.float() - plain.float()) ** 2 * (1 - self.weights)).mean((1, 2, 3))


def lesson(pipe: Any, learners: Sequence[Learner], config: Any, step: int, start: float = 0.0) -> Lesson:
    """Which pictures, times and noise the learners see in a step, `config.batch_size` rows each.

    Times are those of the steps that remain after a share of them, `start`; of pictures and times `config` says more:
    see `AddedConfig.views` and `timestep_power`.
    """
    size = config.batch_size
    device, scheduler = pipe.unet.device, pipe.scheduler
    times_of = max(1, round(scheduler.config.num_train_timesteps * (1 - start)))
    draws = [_draws(learner, config, step, times_of) for learner in learners]
    chosen, times, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
    rows = list(zip([learner for learner in learners for _ in range(size)], chosen.tolist(), strict=True))
    clean = torch.stack([row.latents[n] for row, n in rows]).to(device)
    weights = torch.stack([row.weights[n] for row, n in rows]).to(device)
    times, noise = times.to(device), noise.to(device)
    # Not the scheduler's add_noise: those that count in sigmas leave their input unscaled.
    signal, sigma = noise_levels(scheduler, times, device)
    noisy = (signal * clean + sigma * noise).to(pipe.unet.dtype)
    target = prediction_target(scheduler, clean, noise, signal, sigma)
    return Lesson([n for _, n in rows], times, signal, sigma, noisy, target, weights)


def _draws(learner: Learner, config: Any, step: int, times_of: int) -> tuple[Tensor, Tensor, Tensor]:
    random, size = loop.generator(learner.subject.seed, step), config.batch_size
    count = len(learner.latents) // (1 + VIEWS if config.views else 1)
    pictures = torch.randint(count, (size,), generator=random)
    times = torch.randint(times_of, (size,), generator=random)
    if config.timestep_power != 1:
        times = times_of - 1 - (times_of * (times / times_of) ** config.timestep_power).long()
    noise = torch.randn(size, *learner.latents.shape[1:], generator=random, dtype=torch.float32)
    if config.views:
        small = torch.rand(size, generator=random) < config.views
        pictures += small * count * torch.randint(1, 1 + VIEWS, (size,), generator=random)
    return pictures, times, noise
