"""What a dial does: one request over its values, drawn together and laid out as a labelled grid."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw

from keylock_diffusers.checks import is_number, listed, shown, whole
from keylock_diffusers.concepts import Concept
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.generation.visualize import INK, PAPER, QUIET
from keylock_diffusers.limits import RequestLimits
from keylock_diffusers.requests import Request, Use

_OF_USE = ("beta", "tau", "strength", "lock")
DIALS = (*_OF_USE, "guidance_scale")
_CELL, _GAP, _LINE, _FONT = 160, 8, 28, 14


@dataclass(frozen=True)
class Sweep:
    """What `sweep` drew.

    Args:
        grid: all pictures, with the dials' values beside them.
        images: the pictures, row by row as in the grid.
        requests: what each of them was drawn from.
    """

    grid: Image.Image
    images: list[list[Image.Image]]
    requests: list[list[Request]]


def sweep(
    pipe: Any,
    request: Request,
    over: Mapping[str, Sequence[Any]],
    *,
    bank: Mapping[str, Concept] | None = None,
    max_batch: int | None = None,
    **options: Any,
) -> Sweep:
    """Draws a request at several values of a dial, or of two, in one batch.

    Args:
        pipe: a pipeline after `install`.
        request: what to draw. Over one dial it is a row of the grid for each of its ``num_images``; without a seed, one
            is drawn for all.
        over: the values of one or two of beta, tau, strength and lock, which all concepts of the request then have, and
            guidance_scale; the first makes the columns, the second the rows.
        bank: where the ids of concepts are looked up.
        max_batch: pictures per call of the U-Net; default all of them.
        options: what `generate` takes besides, but for on_error and output_type: num_inference_steps, height, width,
            scheduler ...

    Raises:
        RequestError: a value is none of its dial's.
        TypeError, ValueError: an argument is not what this says.

    Example:
        >>> order = kd.Request("<alice-cat> on blue", concepts=["alice/cat"], seed=7)
        >>> kd.sweep(pipe, order, {"beta": [0.4, 0.6, 0.8]}, bank=bank).grid.save("beta.png")  # doctest: +SKIP
    """
    for name in ("on_error", "output_type"):
        if name in options:
            raise TypeError(f"sweep: {name} cannot be given, since a grid needs all its pictures as images")
    dials = _dials(request, over)
    seed = secrets.randbelow(1 << 32) if request.seed is None else request.seed
    (columns, values), *second = dials
    if second:
        [(rows, others)] = second
        settings = [(_label(rows, other), {rows: other}, seed) for other in others]
    else:
        settings = [(f"seed {seed + number}", {}, seed + number) for number in range(request.num_images)]
    orders = [
        [_turned(replace(request, seed=own, num_images=1), {columns: value, **fixed}) for value in values]
        for _, fixed, own in settings
    ]
    flat = [order for row in orders for order in row]
    drawn = generate(
        pipe, flat, bank=bank, max_batch=len(flat) if max_batch is None else max_batch, output_type="pil", **options
    )
    images = [drawn[first : first + len(values)] for first in range(0, len(drawn), len(values))]
    heads = [_label(columns, value) for value in values]
    return Sweep(labelled_grid(str(request.prompt), heads, [label for label, _, _ in settings], images), images, orders)


def _dials(request: Any, over: Any) -> list[tuple[str, list[Any]]]:
    """The dials with their values."""
    if not isinstance(request, Request):
        raise TypeError(f"sweep: request must be a Request, got {type(request).__name__}")
    right = isinstance(over, Mapping) and len(over) in (1, 2) and all(name in DIALS for name in over)
    dials = [(name, _listed(values)) for name, values in over.items()] if right else []
    if not dials or not all(values for _, values in dials):
        raise ValueError(
            f"sweep: over must give the values of one or two of {', '.join(DIALS)}, each in a list, got {shown(over)}"
        )
    if not listed(request.concepts, "sweep: concepts of the request") and any(name in _OF_USE for name in over):
        raise ValueError(f"sweep: request must have concepts for {' and '.join(over)} to act on, got none")
    count = whole(request.num_images, "sweep: num_images of the request", 1, RequestLimits().num_images)
    if len(dials) == 2 and count != 1:
        raise ValueError(f"sweep: num_images of the request must be 1 over two dials, got {count}")
    if request.seed is not None:
        whole(request.seed, "sweep: seed of the request", 0, 2**63 - 1 - count)
    return dials


def _listed(values: Any) -> list[Any]:
    """Values in a list or an array, as a list; none of something else."""
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | Mapping) else []


def _turned(request: Request, dials: Mapping[str, Any]) -> Request:
    """A request with its dials at these values."""
    of_use = {name: value for name, value in dials.items() if name in _OF_USE}
    uses = [replace(use if isinstance(use, Use) else Use(use), **of_use) for use in request.concepts]
    return replace(request, concepts=uses, **{name: value for name, value in dials.items() if name not in of_use})


def _label(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {format(float(value), 'g') if is_number(value) else value}"


def labelled_grid(
    title: str, heads: Sequence[str], sides: Sequence[str], images: Sequence[Sequence[Any]]
) -> Image.Image:
    """Pictures in rows and columns, their heads above and their sides on the left; what is no picture is left empty."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = round(max(measure.textlength(side, font_size=_FONT) for side in sides)) + 2 * _GAP
    size = next((image.size for line in images for image in line if isinstance(image, Image.Image)), (_CELL, _CELL))
    width, height = (round(side * _CELL / max(size)) for side in size)
    sheet = Image.new("RGB", (left + len(heads) * (width + _GAP), 2 * _LINE + len(sides) * (height + _GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((left, _LINE / 2), title, fill=INK, font_size=_FONT, anchor="lm")
    for column, head in enumerate(heads):
        middle = left + column * (width + _GAP) + width / 2
        pen.text((middle, 1.5 * _LINE), head, fill=QUIET, font_size=_FONT, anchor="mm")
    for row, (side, line) in enumerate(zip(sides, images, strict=True)):
        top = 2 * _LINE + row * (height + _GAP)
        pen.text((left - _GAP, top + height / 2), side, fill=QUIET, font_size=_FONT, anchor="rm")
        for column, image in enumerate(line):
            if not isinstance(image, Image.Image):  # it was not begun when the call was stopped
                continue
            picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * (width + _GAP), top))
    return sheet
