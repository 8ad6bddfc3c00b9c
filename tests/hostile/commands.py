"""Runs a command as the console script does, in this process, on the tiny pipeline."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import keylock_diffusers.demo.story  # noqa: F401 (matplotlib makes its folder when it is first imported)
from keylock_diffusers import cli, embedded
from keylock_diffusers.cli import common
from tests.hostile.values import LONGEST


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: int
    out: str
    error: str


def run(pipe: Any, place: Path, *arguments: Any) -> Ended:
    """Inside a folder, which is also where caches are."""
    out, error = io.StringIO(), io.StringIO()
    before, code = os.getcwd(), 0
    os.chdir(place)
    try:
        with (
            mock.patch.object(common, "load", lambda *_, **__: pipe),
            mock.patch.object(embedded, "load_adapter", lambda pipe: pipe),
            mock.patch.object(sys, "argv", ["keylock", *map(str, arguments)]),
            mock.patch.dict(os.environ, {"KEYLOCK_CACHE": str(place / "cache"), "COLUMNS": "200"}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
        ):
            cli.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    finally:
        os.chdir(before)
        pipe.set_progress_bar_config(disable=True)
    return Ended(code, out.getvalue(), error.getvalue())


def refusal(ended: Ended, *names: str) -> str:
    """The one line by which a command refused; it names one of `names`.

    Raises:
        AssertionError: it says it otherwise.
    """
    said = [line for line in ended.error.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in said if line.startswith("keylock: ")]
    assert lines and said[-1] == lines[0] and len(lines) == 1, f"no one line at the end: {ended.error[-400:]!r}"
    assert "Traceback" not in ended.error, "a traceback"
    assert len(lines[0]) <= LONGEST, f"a message of {len(lines[0])} characters: {lines[0][:300]!r}"
    assert any(name in lines[0] for name in names), f"names none of {', '.join(names)}: {lines[0]!r}"
    return lines[0]
