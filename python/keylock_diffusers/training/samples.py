"""Pictures of what a concept has learned so far, beside its super-class's."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from keylock_diffusers.checks import reason_of, whole
from keylock_diffusers.concepts import Concept
from keylock_diffusers.files import write_atomically
from keylock_diffusers.generation.generate import generate
from keylock_diffusers.generation.sweep import labelled_grid
from keylock_diffusers.requests import Request
from keylock_diffusers.training.config import DEFAULT_CAPTIONS, ConceptTrainingError, Subject

logger = logging.getLogger(__name__)


class Samples:
    """Draws a strip of pictures while a subject is learned: `train_concepts`'s ``on_step``.

    A row per seed: the super-class first, then the concept every so many steps, all from the same noise and in the
    words of the subject's first caption. Training goes on whatever becomes of them, and learns the same.

    Args:
        pipe: the pipeline that is trained on.
        subject: the subject; of several, `place` says which of them it is.
        path: the picture to write, anew whenever there is one more column.
        every: steps between two columns.
        place: of the subject among those that are trained.
        seeds: of the rows.
        num_inference_steps: of every picture.
    """

    def __init__(
        self,
        pipe: Any,
        subject: Subject,
        path: Path,
        every: int,
        *,
        place: int = 0,
        seeds: Sequence[int] = (0, 1, 2),
        num_inference_steps: int = 25,
    ) -> None:
        self.pipe, self.subject, self.path = pipe, subject, path
        self.every, self.place = whole(every, "Samples: every", 1), whole(place, "Samples: place", 0)
        self.seeds, self.num_inference_steps = seeds, num_inference_steps
        self._columns: list[tuple[str, list[Image.Image]]] = []

    def __call__(self, step: int, concepts: Callable[[], list[Concept | ConceptTrainingError]]) -> None:
        if step % self.every:
            return
        try:
            concept = concepts()[self.place]
            if isinstance(concept, Concept):
                self._draw(step, concept)
        except Exception as error:
            logger.warning("samples: step %d has none: %s", step, reason_of(error))

    def _draw(self, step: int, concept: Concept) -> None:
        named = self.subject.placeholder
        words = self.subject.captions[0] if self.subject.captions else DEFAULT_CAPTIONS[0].format(named)
        plain = re.sub(re.escape(named), self.subject.super_class, words, flags=re.IGNORECASE)
        orders = [] if self._columns else [Request(plain, seed=seed) for seed in self.seeds]
        orders += [Request(words, concepts=[concept], seed=seed) for seed in self.seeds]
        drawn = generate(
            self.pipe,
            orders,
            output_type="pil",
            max_batch=len(self.seeds),
            num_inference_steps=self.num_inference_steps,
        )
        if not self._columns:
            self._columns.append((self.subject.super_class, drawn[: len(self.seeds)]))
        self._columns.append((f"step {step}", drawn[-len(self.seeds) :]))
        stored = io.BytesIO()
        heads, columns = zip(*self._columns, strict=True)
        sides = [f"seed {seed}" for seed in self.seeds]
        labelled_grid(words, heads, sides, list(zip(*columns, strict=True))).save(stored, "PNG")
        write_atomically(self.path, stored.getvalue())
