"""Damage done inside a process: each function here prepares one fault, and is the ``arm`` of `commands.start`.

Torch and the package are imported already when these run; every change is of this process alone.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

import resnetlab.session
from resnetlab import bundle, checkpoint, report, rundir, training

POINTS: dict[str, tuple[Any, str]] = {
    "step": (training, "_step"),
    "evaluation": (training, "predict_store"),
    "checkpoint": (checkpoint, "_write"),
    "sync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "bundle": (bundle, "save"),
    "table": (rundir, "write_rows"),
    "final save": (resnetlab.session.Session, "_finish"),
    "drawing": (report, "save"),
}
"""Moments of a run: where in the code they are. `at` does something at one of them."""


def at(point: str, call: int, what: Callable[[], object]) -> None:
    """Do ``what`` when ``point`` is reached for the ``call``-th time, counted from 0."""
    owner, name = POINTS[point]
    real, left = getattr(owner, name), [call]

    def reached(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            what()
        return real(*args, **kwargs)

    setattr(owner, name, reached)


def signal_at(point: str, call: int, delay: float, number: int, times: int = 1, apart: float = 0.0) -> None:
    """Send this process a signal, ``delay`` s after a moment of the run begins; ``times`` over, ``apart`` s between."""

    def send() -> None:
        for again in range(times):
            time.sleep(apart if again else delay)
            os.kill(os.getpid(), number)

    if delay == 0.0 and times == 1:
        at(point, call, lambda: os.kill(os.getpid(), number))
    else:
        at(point, call, lambda: threading.Thread(target=send, daemon=True).start())


def kill_at(point: str, call: int, delay: float) -> None:
    """SIGKILL this process, ``delay`` seconds after a moment of the run begins."""
    signal_at(point, call, delay, int(signal.SIGKILL))


class Disk:
    """Counts the bytes that are written and fails from one of them on, as a full or broken disk does."""

    def __init__(self, bytes_left: int, number: int) -> None:
        self.left = bytes_left
        self.number = number

    def take(self, size: int) -> int:
        """Return how many of ``size`` bytes still get to the disk."""
        taken = max(0, min(size, self.left))
        self.left -= size
        return taken

    def fail(self) -> None:
        """Raise the disk's error."""
        raise OSError(self.number, os.strerror(self.number))


def failing_disk(bytes_left: int, number: int = errno.ENOSPC) -> None:
    """Let the disk fail after ``bytes_left`` more bytes; what got through stays in the file, cut short."""
    disk = Disk(bytes_left, number)
    save, write_bytes = safetensors.torch.save_file, Path.write_bytes

    def short(path: Path, content: bytes) -> int:
        taken = disk.take(len(content))
        write_bytes(path, content[:taken])
        if taken < len(content):
            disk.fail()
        return taken

    def save_file(tensors: dict[str, Any], filename: Path) -> None:
        save(tensors, filename)
        short(filename, filename.read_bytes())

    setattr(checkpoint, "save_file", save_file)  # noqa: B010 - a module's names are not assigned to
    setattr(Path, "write_bytes", short)  # noqa: B010
    setattr(Path, "write_text", lambda path, text, *_, **__: short(path, text.encode()))  # noqa: B010


def failing_sync(call: int, number: int = errno.EIO) -> None:
    """Let the ``call``-th fsync fail."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    at("sync", call, fail)
