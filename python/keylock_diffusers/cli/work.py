"""The pictures of a file of requests: what of them there is, and drawing the rest."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keylock_diffusers.cli import drawn
from keylock_diffusers.cli.orders import Identity, Order, Versions
from keylock_diffusers.generation import visualize
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.generation.maps import AttentionMaps
from keylock_diffusers.requests import Request, RequestError

_PAGE = 16  # pictures beside their attention, in one file


@dataclass(frozen=True)
class Job:
    """What is drawn of an order.

    Args:
        order: the order.
        request: what draws it, or those of its pictures that are missing; with a seed.
        first: which of the order's pictures is its first.
        identities: of these pictures, as of before they are drawn.
        versions: of the order's concepts and LoRAs.
    """

    order: Order
    request: Request
    first: int
    identities: Sequence[str]
    versions: Versions


class Work:
    """The pictures of a file of requests: which the folder holds already, and which are to be drawn.

    Args:
        orders: the file's requests.
        output: the folder.
        identity: what tells whether a picture is an order's.
        resume: whether to keep the pictures that are there.
    """

    def __init__(self, orders: Sequence[Order], output: Path, identity: Identity, resume: bool) -> None:
        self.output, self.identity = output, identity
        self.paths: list[Path] = []  # of what was drawn now
        self._pipe: Any = None
        held = self._held(orders) if resume else {}
        self.jobs = [job for order in orders for job in self._job(order, held.get(order.index, {}))]
        moves = {path: self._path(orders[n], number) for n, paths in held.items() for number, path in paths.items()}
        self.kept = [*moves.values()]
        drawn.rename({old: new for old, new in moves.items() if old != new})

    def draw(self, pipe: Any, words: Mapping[str, tuple[str, ...]], **options: Any) -> None:
        """Draws what is missing; each picture is a file once it is drawn.

        Args:
            pipe: the pipeline.
            words: whose attention is shown.
            options: of `keylock_diffusers.generate`.
        """
        self._pipe = pipe
        maps = AttentionMaps(words) if words else None
        requests = [job.request for job in self.jobs]
        try:
            images = generate(pipe, requests, record=maps, callback_on_image=self._keep, **options)
        except BaseException as error:
            total = len(self.kept) + sum(request.num_images for request in requests)
            if self.paths or isinstance(error, KeyboardInterrupt):
                print(
                    f"keylock: stopped; {len(self.kept) + len(self.paths)} of {total} pictures are in {self.output}. "
                    "The same command with --resume draws the rest.",
                    file=sys.stderr,
                )
            if isinstance(error, RequestError):
                raise self._of_the_file(error) from error
            raise
        if maps is not None:
            self._show(images, maps)

    def tell(self) -> None:
        """Says what was there before: pictures that were kept, and those that belong to no request."""
        if self.kept:
            print(f"kept, since their requests are unchanged: {len(self.kept)}")
        others = drawn.strangers(self.output, [*self.paths, *self.kept])
        if others:
            names = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
            print(f"pictures in {self.output} that belong to none of these requests, left as they are: {names}")

    def _held(self, orders: Sequence[Order]) -> dict[int, dict[int, Path]]:
        """The pictures that the folder holds, by order and number, whatever their names are now."""
        there = drawn.found(self.output)
        wanted = {
            (order.index, number): (self._path(order, number), self.identity.of(order, number))
            for order in (orders if there else ())
            for number in range(order.request.num_images)
        }
        held: dict[int, dict[int, Path]] = {}
        for in_place in (True, False):  # of equal orders each keeps its own
            for (index, number), (path, identity) in wanted.items():
                if number in held.get(index, {}):
                    continue
                match = path if there.get(path) == identity else None
                if match is None and not in_place:
                    match = next((other for other, own in there.items() if own == identity), None)
                if match is not None:
                    held.setdefault(index, {})[number] = match
                    del there[match]
        return held

    def _job(self, order: Order, held: Mapping[int, Path]) -> list[Job]:
        """What is to be drawn of an order of which some pictures are held."""
        request = order.request
        seed = request.seed
        if seed is None:  # the one that its other pictures were drawn with
            first = next(
                (facts["order"]["seed"] - n for n, path in held.items() if (facts := drawn.facts_of(path))), None
            )
            seed = secrets.randbelow(1 << 32) if first is None else first
        if not held:
            return [self._made(order, replace(request, seed=seed), 0)]
        missing = (n for n in range(request.num_images) if n not in held)
        return [self._made(order, replace(request, seed=seed + n, num_images=1), n) for n in missing]

    def _made(self, order: Order, request: Request, first: int) -> Job:
        identities = [self.identity.of(order, first + n) for n in range(request.num_images)]
        return Job(order, request, first, identities, self.identity.versions(order))

    def _keep(self, index: int, number: int, image: Any) -> None:
        job = self.jobs[index]
        order, request = job.order, job.request
        said = {name: value for name, value in order.said.items() if name != "num_images"}
        facts = {
            "identity": job.identities[number],
            "order": {"guidance_scale": request.guidance_scale, **said, "seed": (request.seed or 0) + number},
            "concepts": job.versions.concepts,
            **({"loras": job.versions.loras} if job.versions.loras else {}),
            "settings": {
                **self.identity.settings,
                "scheduler": type(self._pipe.scheduler).__name__,
                "width": image.width,
                "height": image.height,
            },
        }
        path = self._path(order, job.first + number)
        drawn.set_aside(path)
        drawn.write(path, image, str(request.prompt), facts)
        self.paths.append(path)
        print(path, flush=True)

    def _path(self, order: Order, number: int) -> Path:
        several = order.request.num_images > 1
        return self.output / (f"{order.index:03d}-{number}.png" if several else f"{order.index:03d}.png")

    def _of_the_file(self, error: RequestError) -> RequestError:
        """An error of a request by the place that the request has in the file."""
        job = self.jobs[error.index]
        return RequestError(job.order.index, job.request, error.reason)

    def _show(self, images: Sequence[Any], maps: AttentionMaps) -> None:
        flat = [image for one in images for image in (one if isinstance(one, list) else [one])]
        pages = range(0, len(flat), _PAGE)
        for page, first in enumerate(pages):
            path = self.output / ("attention.png" if len(pages) == 1 else f"attention-{page:02d}.png")
            sheet = visualize.grid(flat[first : first + _PAGE], maps.images[first : first + _PAGE])
            drawn.set_aside(path)
            drawn.write(path, sheet, "where words were attended to", {})
            print(f"{path}: of the pictures that were drawn now only" if self.kept else path)
