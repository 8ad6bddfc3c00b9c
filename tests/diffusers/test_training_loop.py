"""The training loop: its rates as a table, and its steps against AdamW and the average written out."""

from __future__ import annotations

import dataclasses
import errno
import signal
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from keylock_diffusers import files
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


class Interrupted(Counted):
    """Somebody presses Ctrl-C so often in the step `at`."""

    def __init__(self, at, times=1):
        super().__init__()
        self.at, self.times = at, times

    def step(self, number):
        if number == self.at:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return super().step(number)


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_step_is_done_and_kept(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(
        KeyboardInterrupt, match="what 4 steps have learned is in .*run.safetensors, from where"
    ) as said:
        loop.run(first := Interrupted(3), loop.Run(8, path, "mine", 100, desc="knitting", progress=False))
    assert str(said.value).startswith("knitting was stopped") and first.done == [0, 1, 2, 3]
    loop.run(second := Counted(), loop.Run(8, path, "mine", progress=False))
    assert second.restored == ([0, 1, 2, 3], None) and second.done == [4, 5, 6, 7]


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_does_not_wait_and_without_a_checkpoint_none_does(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        loop.run(first := Interrupted(3, times=2), loop.Run(8, path, "mine", 2, progress=False))
    assert first.done == [0, 1, 2] and checkpoint.restore(path, "mine")[2] == 2
    with pytest.raises(KeyboardInterrupt):
        loop.run(bare := Interrupted(3), loop.Run(8, progress=False))
    assert bare.done == [0, 1, 2]


def test_an_applications_own_handler_and_other_threads_are_left_alone(tmp_path):
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        loop.run(mine := Interrupted(1), loop.Run(3, tmp_path / "run.safetensors", "mine", progress=False))
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("the application's handler was not asked")
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [1] and mine.done == [0, 1, 2]
    counted = Counted()
    thread = threading.Thread(target=loop.run, args=(counted, loop.Run(3, tmp_path / "b", "mine", progress=False)))
    thread.start()
    thread.join()
    assert counted.done == [0, 1, 2]


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_that_cannot_be_kept_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(KeyboardInterrupt, match="what 2 steps have learned could not be kept"):
        loop.run(Interrupted(1), loop.Run(8, tmp_path / "run.safetensors", "mine", progress=False))


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_a_warning_and_a_later_write_succeeds(tmp_path, monkeypatch, caplog):
    path = tmp_path / "run.safetensors"

    class Filled(Counted):
        def step(self, number):
            monkeypatch.setattr(files, "write_tensors", full if number < 4 else files_write)
            return super().step(number)

    files_write = files.write_tensors
    loop.run(mine := Filled(), loop.Run(8, path, "mine", 3, progress=False))
    assert mine.done == list(range(8)) and checkpoint.restore(path, "mine")[2] == 8
    assert caplog.text.count("cannot be written") == 1 and str(path) in caplog.text


def test_a_checkpoint_is_written_every_two_minutes_besides(tmp_path, monkeypatch):
    written, clock = [], [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "save", lambda *_, step, **__: written.append(step) or True)

    class Slow(Counted):
        def step(self, number):
            clock[0] += 50
            return super().step(number)

    loop.run(Slow(), loop.Run(8, tmp_path / "run.safetensors", "mine", 5, progress=False))
    assert written == [3, 5, 8]


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_of_two_runs_on_one_checkpoint_is_told(tmp_path):
    path = tmp_path / "folder" / "run.safetensors"

    class Nested(Counted):
        def step(self, number):
            with pytest.raises(ValueError, match=f"checkpoint {path} is being written by another run"):
                loop.run(Counted(), loop.Run(8, path, "mine", progress=False))
            loop.run(Counted(), loop.Run(1, path, "mine", writes=False, progress=False))  # another process of this run
            return super().step(number)

    loop.run(Nested(), loop.Run(2, path, "mine", progress=False))
    with pytest.raises(KeyboardInterrupt):
        loop.run(Interrupted(2), loop.Run(4, path, "mine", progress=False))
    loop.run(Counted(), loop.Run(4, path, "mine", progress=False))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


_HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"


def test_a_killed_run_is_resumed(tmp_path):
    """Its lock file stays, and its lock does not."""
    path, lock = tmp_path / "run.safetensors", tmp_path / ".run.safetensors.lock"
    loop.run(Counted(), loop.Run(3, path, "mine", progress=False))
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="is being written by another run"):
            loop.run(Counted(), loop.Run(8, path, "mine", progress=False))
        other.kill()
        other.wait()
    assert lock.exists()
    loop.run(mine := Counted(), loop.Run(8, path, "mine", progress=False))
    assert mine.done == [3, 4, 5, 6, 7] and not lock.exists()


def test_a_checkpoint_that_cannot_be_locked_warns_and_one_that_is_a_folder_is_refused(tmp_path, monkeypatch, caplog):
    with pytest.raises(ValueError, match=f"checkpoint_path must be a file, got the folder {tmp_path}"):
        loop.run(Counted(), loop.Run(2, tmp_path, "mine", progress=False))

    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", without)
    loop.run(mine := Counted(), loop.Run(2, tmp_path / "run.safetensors", "mine", progress=False))
    assert mine.done == [0, 1] and "cannot be locked" in caplog.text and (tmp_path / "run.safetensors").exists()


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
