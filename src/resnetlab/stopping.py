"""A request to stop, by Ctrl-C or by the system: noted first, and heeded where the work is whole."""

import contextlib
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from types import FrameType

TOGETHER = 1.0
"""Seconds within which signals are one request: torchrun, `timeout` and schedulers send the same one twice."""


class StoppedAtOnce(KeyboardInterrupt):
    """The second request: nothing more is saved."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_status = 128 + number


@contextlib.contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """Call ``note`` with the number of the first Ctrl-C, SIGTERM or SIGHUP; another, a second later, stops at once.

    Signals are left alone outside the main thread, and where a program that Python is a part of handles them itself.

    Raises:
        StoppedAtOnce: In the main thread, wherever it is.
    """
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if number == getattr(signal, "SIGHUP", None):
            _let_go_of_terminal()
        now = time.monotonic()
        if first is None:
            first = now
            note(number)
        elif now - first > TOGETHER:
            raise StoppedAtOnce(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        before = {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_go_of_terminal() -> None:
    """Print into nothing from now on where the terminal has hung up: every write to it would be an error."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, descriptor)
                os.close(nothing)
