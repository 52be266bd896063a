"""Lines that are shown while others are being written."""

import io
import signal
import threading
from types import FrameType
from typing import Any

import pytest
from rich.console import Console

from resnetlab.console import Terminal, tell


class _Interrupted(io.RawIOBase):
    """A stream during whose first write a signal comes."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.written:
            signal.raise_signal(signal.SIGTERM)
        self.written += bytes(data)
        return len(data)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
def test_a_signal_that_comes_while_a_line_is_written_is_told_after_it() -> None:
    raw = _Interrupted()
    stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
    terminal = Terminal(Console(file=stream, force_terminal=False))

    def stop(number: int, frame: FrameType | None) -> None:
        tell(terminal.line, "stopping")

    before = signal.signal(signal.SIGTERM, stop)
    others = set(threading.enumerate())
    try:
        terminal.line("a line")
        stream.flush()
    finally:
        signal.signal(signal.SIGTERM, before)
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
    stream.flush()
    assert raw.written == b"a line\nstopping\n"


def test_nobody_reads_what_is_told() -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError

    failed: list[threading.ExceptHookArgs] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failed.append)
        others = set(threading.enumerate())
        tell(gone, "stopping")
        for thread in set(threading.enumerate()) - others:
            thread.join(10)
    assert failed == []


def test_a_line_is_shown_as_it_is() -> None:
    """A path may look like the name of an emoji, and a command with it is there to be pasted."""
    stream = io.StringIO()
    Terminal(Console(file=stream, force_terminal=False, width=200)).line("--resume runs/a:x:b [bold] :cat: \x1b[2J")
    assert stream.getvalue() == "--resume runs/a:x:b [bold] :cat: \\x1b[2J\n"
