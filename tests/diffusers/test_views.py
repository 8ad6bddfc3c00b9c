"""Smaller views of pictures: what they show, where their masks are, and by what they are told."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from keylock_diffusers.training.captions import Captions
from keylock_diffusers.training.learners import lessons_of
from keylock_diffusers.training.views import small_views
from tests.diffusers.test_added_training import QUICK, masked, train
from tests.diffusers.test_training import subject

UNIT, ACROSS = 8, 16  # pixels of a latent, latents of a side


def squares(count=3, mode="RGB"):
    random = np.random.default_rng(1)
    shape = (ACROSS * UNIT, ACROSS * UNIT) + ((3,) if mode == "RGB" else ())
    return [Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)) for _ in range(count)]


def ones(count=3):
    return torch.ones(count, 1, ACROSS, ACROSS)


def extent(mask):
    """Where a view lies, from a mask that is 1 all over its picture: left, top and size in latents."""
    rows, columns = (mask[0] > 0.5).nonzero().unbind(1)
    size = int(rows.max() - rows.min()) + 1
    assert size == int(columns.max() - columns.min()) + 1 and len(rows) == size * size
    return int(columns.min()), int(rows.min()), size


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_view_is_its_picture_smaller_and_goes_on_in_its_edges(mode):
    pictures = squares(mode=mode)
    views, masks = small_views(pictures, ones(), seed=3)
    assert len(views) == 6 and list(masks.shape) == [6, 1, ACROSS, ACROSS]
    for number, (view, mask) in enumerate(zip(views, masks, strict=True)):
        left, top, size = (UNIT * value for value in extent(mask))
        assert view.size == pictures[0].size and view.mode == mode
        shown = np.asarray(view)[top : top + size, left : left + size]
        wanted = pictures[number % 3].resize((size, size), Image.Resampling.LANCZOS)
        assert np.array_equal(shown, np.asarray(wanted))
        seen = np.asarray(view)
        assert (seen[:top] == seen[top : top + 1]).all() and (seen[top + size :] == seen[top + size - 1]).all()
        across = seen[top : top + size]
        assert (across[:, :left] == across[:, left : left + 1]).all()
        assert (across[:, left + size :] == across[:, left + size - 1 : left + size]).all()


def test_views_are_of_all_sizes_and_lie_everywhere():
    views, masks = small_views(squares(100), ones(100), seed=0)
    lefts, tops, sizes = zip(*map(extent, masks), strict=True)
    assert set(sizes) == set(range(8, 11)) and len(views) == 200
    assert min(lefts) == min(tops) == 0
    assert max(left + size for left, size in zip(lefts, sizes, strict=True)) == ACROSS
    assert max(top + size for top, size in zip(tops, sizes, strict=True)) == ACROSS
    assert abs(np.corrcoef(lefts, tops)[0, 1]) < 0.3


def test_a_mask_is_shrunk_with_its_picture():
    """A half-white picture's mask: of the view it is the same half, at its own place, and nothing lies outside."""
    half = torch.zeros(1, 1, ACROSS, ACROSS)
    half[..., : ACROSS // 2] = 0.5  # a faint mask: of a view, too, it counts from 0 to 1
    picture = Image.fromarray(np.repeat((half[0, 0] * 400).byte().numpy(), UNIT, 0).repeat(UNIT, 1))
    for seed in range(8):
        (view, _), masks = small_views([picture], half, seed)
        _, everywhere = small_views([picture], ones(1), seed)
        left, top, size = extent(everywhere[0])
        inside = masks[0, 0, top : top + size, left : left + size]
        assert masks[0].sum() == pytest.approx(float(inside.sum())) and inside.max() == 1
        assert (inside[:, : size // 2 - 1] == 1).all() and (inside[:, size // 2 + 1 :] == 0).all()
        shown = np.asarray(view)[UNIT * top : UNIT * (top + size), UNIT * left : UNIT * (left + size)]
        assert shown[:, : shown.shape[1] // 4].min() > 190 and shown[:, -shown.shape[1] // 4 :].max() < 10


def test_views_are_the_seeds_alone():
    one, again, other = (small_views(squares(1), ones(1), seed)[0][0] for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()


@torch.no_grad()
def test_a_subject_has_its_pictures_first_and_as_without_views(pipe):
    one = masked()
    latents, weights = lessons_of(pipe, one)
    more, masks = lessons_of(pipe, one, True)
    assert len(latents) == 2 and len(more) == len(masks) == 6
    assert torch.equal(more[:2], latents) and torch.equal(masks[:2], weights)
    assert not torch.equal(more[2:4], more[4:]) and (masks.flatten(1).amax(1) == 1).all()
    _, everywhere = lessons_of(pipe, subject(), True)  # which has no masks: of a view only its picture counts
    assert (everywhere[:2] == 1).all() and all(extent(mask)[2] < 8 for mask in everywhere[2:])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_so_many_rows_show_a_view_told_by_its_pictures_caption(pipe, monkeypatch, share):
    seen, told = [], Captions.told

    def watched(self, *args):
        seen.append(told(self, *args))
        return seen[-1]

    monkeypatch.setattr(Captions, "told", watched)
    (concept,) = train(pipe, [masked()], dataclasses.replace(QUICK, views=share, steps=25, batch_size=8))
    pictures = [n for step in seen for n in step.given.pictures]
    captions = [n for step in seen for n in step.captions]
    assert {*pictures} == {*range(2 if share == 1 else 0, 6)} and captions == [n % 2 for n in pictures]
    assert sum(n >= 2 for n in pictures) / 200 == pytest.approx(share, abs=0.1)
    assert concept.training["pictures"] == 2 and concept.training["views"] == share


def test_rows_that_show_no_view_are_what_they_are_without(pipe, monkeypatch):
    """Of the same step, picture, time and noise: who compares two runs compares views alone."""
    seen, told = [], Captions.told
    monkeypatch.setattr(Captions, "told", lambda self, *args: seen.append(told(self, *args)) or seen[-1])
    for share in (0.0, 0.5):
        train(pipe, [masked()], dataclasses.replace(QUICK, views=share, steps=1, batch_size=8))
    plain, viewed = (step.given for step in seen)
    kept = [row for row, picture in enumerate(viewed.pictures) if picture < 2]
    assert 0 < len(kept) < 8 and torch.equal(plain.noisy[kept], viewed.noisy[kept])
    assert torch.equal(plain.times, viewed.times) and torch.equal(plain.target[kept], viewed.target[kept])
    assert [picture % 2 for picture in viewed.pictures] == plain.pictures
