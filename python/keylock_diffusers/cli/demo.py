"""``keylock demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import console


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the grids, the report, the concepts and the LoRAs.")] = Path(
        "outputs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per picture.")] = 25,
    training_steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default the demo's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures.")] = 0,
) -> None:
    """Teach three people's cats, and LoRAs, together on the embedded model and draw three mixed batches."""
    from dataclasses import replace

    common.without_loading_bars()
    from keylock_diffusers.cli import drawn
    from keylock_diffusers.demo import loras, story

    drawn.prepare(output)
    concepts, adapters = story.TRAINING, loras.TRAINING
    if training_steps is not None:
        concepts, adapters = replace(concepts, steps=training_steps), replace(adapters, steps=training_steps)
    report = story.run(output, steps=steps, training=concepts, lora_training=adapters, seed=seed)
    _print_report(report)
    for label in report["regions"]["left_out"]:
        print(f"left out of regions.png: {label}; its concepts cannot be combined after so few training steps")
    for name in ("grid.png", "regions.png", "loras.png", "report.json"):
        print(output / name)


def _print_report(report: dict[str, Any]) -> None:
    table = Table("what", "measured", title="One batch, four people", show_lines=False)
    for name, size in report["concepts"].items():
        table.add_row(f"{name}'s concept file", f"{size:,} bytes")
    table.add_row("training the three together", f"{report['training_seconds']} s")
    table.add_row(
        f"drawing {report['pictures_in_batch']} pictures in one batch / one by one",
        f"{report['batch_seconds']} s / {report['one_by_one_seconds']} s",
    )
    table.add_row(
        "largest difference beside other neighbours", f"{report['largest_difference_beside_others']:g} of 255"
    )
    table.add_row("largest difference drawn alone", f"{report['largest_difference_alone']:g} of 255")
    for scene, found in report["coats"].items():
        without = report["coats_without_concepts"][scene]
        table.add_row(f"own coat: {scene}", f"{found} (without the concept {without})")
    for scene, found in report["expressions"].items():
        table.add_row(f"named by the classifier: {scene}", found)
    table.add_row(
        f"{report['regions']['pictures_in_batch']} pictures with concepts, image prompts and regions: largest "
        "difference beside other neighbours",
        f"{report['regions']['largest_difference_beside_others']:g} of 255",
    )
    found = report["loras"]
    for name, size in found["files"].items():
        table.add_row(f"LoRA file {name}", f"{size:,} bytes")
    table.add_row("training these together", f"{found['training_seconds']} s")
    for where, distance in found["style"].items():
        table.add_row(f"from the exact style, {where}", f"{distance:g} of 255")
    table.add_row("two users' LoRAs: own coat in own half", f"{found['coats']} (without {found['coats_without']})")
    table.add_row(
        f"{found['pictures_in_batch']} pictures with LoRAs: largest difference beside other neighbours",
        f"{found['largest_difference_beside_others']:g} of 255",
    )
    console.print(table)
