"""Whether training worked, as far as a run's own losses can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FEWEST = 40  # steps of which a quarter has a mean
_DOUBT = 2.0  # standard errors


def quarters(losses: Sequence[float]) -> dict[str, list[float]]:
    """The mean loss of each quarter of the steps and its standard error, for `Concept.training`.

    A single step's loss says more of the times that it drew than of what was learned. Too few steps give nothing.
    """
    if len(losses) < _FEWEST:
        return {}
    size = len(losses) // 4
    parts = [losses[n * size : (n + 1) * size] for n in range(3)] + [losses[3 * size :]]
    means = [math.fsum(part) / len(part) for part in parts]
    errors = [
        math.sqrt(math.fsum((loss - mean) ** 2 for loss in part) / (len(part) - 1) / len(part))
        for part, mean in zip(parts, means, strict=True)
    ]
    return {"loss_quarters": [round(mean, 5) for mean in means], "loss_errors": [round(e, 6) for e in errors]}


def advice(training: Mapping[str, Any]) -> str:
    """What the losses of a run suggest, as a sentence or two.

    Args:
        training: a concept's `Concept.training`, or `training_facts` of an adapter.
    """
    if "loss_quarters" not in training:
        return f"Fewer than {_FEWEST} steps say nothing of how it goes."
    (first, _, third, last), (e1, _, e3, e4) = training["loss_quarters"], training["loss_errors"]
    course = f"from {first:.4g} in the first quarter of the steps to {last:.4g} in the last"
    if last - first > _DOUBT * math.hypot(e1, e4):
        return f"The loss rose {course}: train anew at half the learning rates."
    if first - last <= _DOUBT * math.hypot(e1, e4):
        return (
            f"The loss did not fall measurably, {course}: if samples show no more than the super-class, train for "
            "more steps or at larger rates; if they show the subject, all is well."
        )
    if third - last > _DOUBT * math.hypot(e3, e4):
        return f"The loss fell {course}, and is still falling: more steps may bring more."
    if last < first / 2:
        return (
            f"The loss fell {course}, so far that the {training.get('pictures', '')} pictures may be known by heart: "
            "if samples no longer follow the prompt, train for fewer steps."
        )
    return f"The loss fell {course}, and falls no more. Whether prompts are still followed only samples show."
