"""``keylock sweep``: what a concept's dials do, as one labelled grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from keylock_diffusers.cli import common
from keylock_diffusers.cli.common import Bank, Device, Dtype, Height, Model, Scheduler, Variant, Width

Values = Annotated[str | None, typer.Option(help="As beta.")]


def sweep(
    prompt: Annotated[str, typer.Argument(help='What to draw, such as "<alice-cat> on blue".')],
    concept: Annotated[list[str], typer.Option(help="The id of a concept of the prompt; once for each.")],
    beta: Annotated[
        str | None,
        typer.Option(help="A value for all pictures, or several to compare, with commas between them: 0.4,0.6,0.8."),
    ] = None,
    tau: Values = None,
    strength: Values = None,
    lock: Annotated[str | None, typer.Option(help="local, global, or both: local,global.")] = None,
    guidance_scale: Values = None,
    bank: Bank = "concepts",
    output: Annotated[Path, typer.Option(help="The picture to write, a PNG.")] = Path("sweep.png"),
    seed: Annotated[int, typer.Option(min=0, help="Of the first row.")] = 0,
    rows: Annotated[int, typer.Option(min=1, max=64, help="Where one option has several values: how many seeds.")] = 1,
    model: Model = "embedded",
    dtype: Dtype = None,
    device: Device = None,
    variant: Variant = None,
    scheduler: Scheduler = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    height: Height = None,
    width: Width = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Pictures per call of the U-Net; default all.")] = None,
) -> None:
    """Draw a prompt at several values of one or two of its dials, in one batch, into a labelled grid."""
    import keylock_diffusers as kd
    from keylock_diffusers.cli import drawn

    given = {"beta": beta, "tau": tau, "strength": strength, "lock": lock, "guidance_scale": guidance_scale}
    dials = {name: _values(name, said) for name, said in given.items() if said is not None}
    over = {name: values for name, values in dials.items() if len(values) > 1}
    if len(over) not in (1, 2):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"one or two of {names} must have several values with commas between them, got {len(over)}")
    if len(over) == 2 and rows != 1:
        raise ValueError(f"--rows must be 1 where two options have several values, got {rows}")
    if output.suffix.lower() != ".png" or output.is_dir():
        raise ValueError(f"--output must be the name of a PNG, got {output}")
    drawn.prepare(output.parent, output.name)
    order = _request(prompt, concept, {name: values[0] for name, values in dials.items()}, seed, rows)
    pipe = kd.install(common.load(model, dtype=dtype, device=device, variant=variant, scheduler=scheduler))
    pipe.set_progress_bar_config(disable=False)
    found = kd.sweep(
        pipe,
        order,
        over,
        bank=kd.ConceptBank(bank),
        num_inference_steps=steps,
        height=height,
        width=width,
        max_batch=max_batch,
    )
    facts = {"sweep": given, "concepts": concept, "seed": seed, "rows": rows, "model": model, "steps": steps}
    drawn.write(output, found.grid, prompt, facts)
    print(output)


def _request(prompt: str, concepts: list[str], first: Mapping[str, Any], seed: int, rows: int) -> Any:
    """The request that is swept; every option has its first value in it."""
    from keylock_diffusers import Request, Use

    of_use = {name: value for name, value in first.items() if name != "guidance_scale"}
    rest = {name: value for name, value in first.items() if name not in of_use}
    return Request(prompt, concepts=[Use(one, **of_use) for one in concepts], seed=seed, num_images=rows, **rest)


def _values(name: str, said: str) -> list[Any]:
    values = [one.strip() for one in said.split(",") if one.strip()]
    wanted = "local, global, or both" if name == "lock" else "numbers"
    try:
        found: list[Any] = values if name == "lock" else [float(value) for value in values]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"--{name.replace('_', '-')} must be {wanted} with commas between them, got {said!r:.80}")
    return found
