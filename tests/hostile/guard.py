"""What a case may not do while it runs: reach the network, start a program, open files of others, hang, eat memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keylock_diffusers
import keylock_kernels

# Where Python and the library read from themselves, at any time.
_OWN = tuple(
    os.path.realpath(place)
    for place in (
        *(sys.prefix, sys.base_prefix, *keylock_diffusers.__path__, *keylock_kernels.__path__, *filter(None, sys.path)),
        *(Path(__file__).parents[1], "/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/mime.types"),
    )
)
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system", "os.exec",
              "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class", "urllib.Request",
              "webbrowser.open")  # fmt: skip
_FILES = ("open", "os.remove", "os.rename", "os.mkdir", "os.link", "os.rmdir")
tempfile.gettempdir()  # which tries places out when it is first asked for
_watched: list[tuple[tuple[str, ...], list[str]]] = []
_hooked = False


class Hang(BaseException):
    """A case took longer than it may. Nothing that catches an Exception may swallow it."""


@contextmanager
def watched(*allowed: Path) -> Iterator[list[str]]:
    """While it lasts, what leaves the allowed folders is noted, in words; Python's audit events tell of it."""
    global _hooked
    if not _hooked:  # a hook cannot be taken away again
        sys.addaudithook(_hear)
        _hooked = True
    escapes: list[str] = []
    _watched.append((tuple(os.path.realpath(place) for place in allowed) + _OWN, escapes))
    try:
        yield escapes
    finally:
        _watched.pop()


@contextmanager
def bounded(seconds: float, more_bytes: int) -> Iterator[None]:
    """While it lasts, the process may take no more than so much address space beyond what it has, and so long.

    Raises:
        Hang: it took longer.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    alarm = signal.signal(signal.SIGALRM, _raise)
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, alarm)


def _raise(*_: Any) -> None:
    raise Hang


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    allowed, escapes = _watched[-1]
    if event in _FORBIDDEN:
        escapes.append(f"{event} {arguments[:2]!r:.120}")
    elif event in _FILES and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.path.abspath(os.fsdecode(arguments[0])))
        if not any(path == place or path.startswith(place + os.sep) for place in allowed):
            escapes.append(f"{event} {path:.120}")
