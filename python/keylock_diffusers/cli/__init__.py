"""The command ``keylock``: a file each for its commands."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from keylock_diffusers import __version__
from keylock_diffusers.cli import bank, common, demo, example, generate, lora, schema, sweep, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Personalised text-to-image diffusion for many users in one batch.",
)
app.command()(demo.demo)
app.command()(example.example)
app.command()(train.train)
app.command()(sweep.sweep)
app.command()(generate.generate)
app.command()(schema.schema)
app.add_typer(bank.app, name="bank")
app.add_typer(lora.app, name="lora")


def main() -> None:
    """Runs the command; whatever goes wrong ends it with one line on standard error and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("KEYLOCK_TRACEBACK"):
            raise
        print(f"keylock: {_line(error)}", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"keylock {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    common.quiet()


@app.command()
def env() -> None:
    """Print what is installed, what was built and which backends run here."""
    from keylock_kernels.__main__ import report

    print(report())


def _line(error: Exception) -> str:
    """What went wrong in one line; what no argument explains says what it is, and how to see where."""
    from keylock_diffusers.checks import reason_of

    if isinstance(error, ValueError | OSError | KeyError | TypeError):
        return reason_of(error)
    return f"{type(error).__name__}: {reason_of(error)} (KEYLOCK_TRACEBACK=1 shows where)"
