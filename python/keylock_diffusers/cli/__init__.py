"""The command ``keylock``: demo, train, generate, bank and env; a file each."""

from __future__ import annotations

import logging
import sys

import typer

from keylock_diffusers.cli import bank, demo, generate, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Personalised text-to-image diffusion for many users in one batch.",
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(generate.generate)
app.add_typer(bank.app, name="bank")


def main() -> None:
    """Runs the command; bad input ends it with one line on standard error and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"keylock: {message}", file=sys.stderr)
        sys.exit(1)


@app.command()
def env() -> None:
    """Print what is installed, what was built and which backends run here."""
    from keylock_kernels.__main__ import report

    print(report())
