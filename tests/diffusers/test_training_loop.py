"""The training loop: its rates as a table, and its steps against AdamW and the average written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from keylock_diffusers.training import checkpoint, loop
from tests.diffusers.accuracy import FLOAT64
from tests.diffusers.drawing import random
from tests.diffusers.losses import adamw, clipped, optimizers

SCHEDULE = loop.Schedule(steps=8, batch_size=1, learning_rate=0.5, warmup=4, weight_decay=0.1)


@pytest.mark.parametrize(
    ("step", "warm", "cosine"),
    [
        (0, 0.25, 1.0),
        (1, 0.5, 0.9619397662556434),
        (2, 0.75, 0.8535533905932737),
        (3, 1.0, 0.6913417161825449),
        (4, 1.0, 0.5),
        (5, 1.0, 0.3086582838174551),
        (6, 1.0, 0.1464466094067262),
        (7, 1.0, 0.03806023374435663),
        (8, 1.0, 0.0),
    ],
)
def test_the_rate_warms_up_and_falls_as_a_cosine_to_a_fiftieth(step, warm, cosine):
    assert loop.rate(SCHEDULE, step) == pytest.approx(0.5 * warm * (0.02 + 0.98 * cosine), rel=FLOAT64)
    cold = dataclasses.replace(SCHEDULE, warmup=0)
    assert loop.rate(cold, step) == pytest.approx(0.5 * (0.02 + 0.98 * cosine), rel=FLOAT64)


def fit(schedule, *, scale=1.0):
    """Trains a module in float64 whose gradients are given; returns it, its optimiser and the gradients."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    slopes = [[scale * random(*p.shape, seed=step).double() for p in module.parameters()] for step in range(8)]

    def loss(step):
        pairs = zip(module.parameters(), slopes[step], strict=True)
        value = sum((parameter * slope).sum() for parameter, slope in pairs)
        return value, {"loss": value.item()}

    with optimizers() as made:
        loop.fit(module, loss, None, schedule, accelerator=Accelerator(cpu=True), progress=False)
    return module, made[0], slopes


def close(found, expected):
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), right, rtol=FLOAT64, atol=FLOAT64 / 100)


@pytest.mark.parametrize("scale", [0.05, 10.0])
def test_steps_are_adamws_on_gradients_of_at_most_norm_one(scale):
    module, optimizer, slopes = fit(SCHEDULE, scale=scale)
    cut = [clipped(step, 1.0) for step in slopes]
    assert torch.equal(cut[0][0], slopes[0][0]) == (scale < 1)
    for step in range(8):
        close(optimizer.gradients[step], cut[step])
    rates = [[loop.rate(SCHEDULE, step)] * 2 for step in range(8)]
    after = adamw(optimizer.before[0], cut, rates, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(7):
        close(optimizer.before[step + 1], after[step])
    close(module.parameters(), after[-1])


def test_what_is_returned_is_the_average_in_which_early_steps_count_less():
    module, optimizer, _ = fit(dataclasses.replace(SCHEDULE, average_decay=0.3))
    last = [parameter.detach() for parameter in fit(SCHEDULE)[0].parameters()]  # without an average
    average = optimizer.before[0]
    for step, weights in enumerate([*optimizer.before[1:], last]):
        decay = (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3)[step]
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    close(module.parameters(), average)


class Counted:
    """Counts its steps; there is nothing left to learn in the step `last`."""

    def __init__(self, last=None):
        self.done, self.last = [], last

    def step(self, number):
        self.done.append(number)
        return None if number == self.last else {"loss": 1.0}

    def state(self):
        return {"done": torch.tensor(self.done)}, {"last": self.last}

    def restore(self, tensors, facts):
        self.restored = tensors["done"].tolist(), facts["last"]


def test_a_run_is_written_every_so_many_steps_and_at_its_end_and_goes_on_after_the_last_of_them(tmp_path, monkeypatch):
    written, save = [], checkpoint.save

    def saved(path, *given, step, **more):
        written.append(step)
        save(path, *given, step=step, **more)

    monkeypatch.setattr(checkpoint, "save", saved)
    path = tmp_path / "run.safetensors"
    loop.run(first := Counted(), loop.Run(8, path, "mine", 3, progress=False))
    assert first.done == list(range(8)) and written == [3, 6, 8]
    loop.run(second := Counted(), loop.Run(10, path, "mine", 3, progress=False))
    assert second.restored == (list(range(8)), None) and second.done == [8, 9]
    loop.run(ended := Counted(last=12), loop.Run(20, path, "mine", progress=False))
    assert ended.done == [10, 11, 12], "steps went on where nothing was left to learn"
    with pytest.raises(ValueError, match="of another run"):
        loop.run(Counted(), loop.Run(20, path, "another", progress=False))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="^checkpoint .*run.safetensors"):
        loop.run(Counted(), loop.Run(20, path, "mine", progress=False))
    loop.run(Counted(), loop.Run(2, tmp_path / "other.safetensors", writes=False, progress=False))
    assert not (tmp_path / "other.safetensors").exists()


def test_figures_are_shown_smoothed(monkeypatch):
    shown = []

    class Bar(list):
        def __init__(self, numbers, **_):
            super().__init__(numbers)

        def set_postfix(self, figures, refresh):
            shown.append(float(figures["loss"]))

    monkeypatch.setattr(loop, "tqdm", Bar)
    module = nn.Linear(1, 1)
    figures = [1.0, 3.0, -2.0]
    loop.fit(
        module,
        lambda step: (module.weight.sum(), {"loss": figures[step]}),
        None,
        loop.Schedule(steps=3, batch_size=1, learning_rate=0.1),
        accelerator=Accelerator(cpu=True),
    )
    assert shown == [1.0, 0.98 + 0.02 * 3, 0.9792]  # 0.98 * 1.04 - 0.04


def test_draws_differ_by_seed_step_and_process_and_by_nothing_else():
    def draw(*arguments):
        return torch.rand(4, generator=loop.generator(*arguments)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3) and draw(1, 2) == draw(1, 2, 0)
    assert len({tuple(draw(*a)) for a in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4
