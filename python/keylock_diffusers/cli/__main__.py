"""Runs the command line: ``python -m keylock_diffusers.cli``."""

from keylock_diffusers.cli import main

main()
