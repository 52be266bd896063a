"""The command line: parse, call one function of `api`, show what it returned. Heavy imports wait for their command.

To add a command: a function, in the module of its group, and its row in `COMMANDS`.
"""

import contextlib
import io
import logging
import os
import sys
from typing import NoReturn

from cyclopts import App

from resnetlab import __version__, threads
from resnetlab.cli import about, debugging, laboratory, runs, scoring, serving, speed, training
from resnetlab.cli.guard import guarded

COMMANDS = (
    training.train,
    scoring.evaluate,
    scoring.predict,
    runs.explain,
    runs.report,
    runs.compare,
    runs.ensemble,
    serving.serve,
    laboratory.lab,
    about.models,
    about.recipes,
    about.data,
    about.doctor,
    speed.bench,
    debugging.replay,
)
"""Every command, by the name of its function; the docstring is its help."""

app = App(
    name="resnetlab",
    help="Train, evaluate and use residual networks on CIFAR-10 or on your own images. "
    "With --debug a command shows the traceback of its failure.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `guard` gives each signal its status
)
for _command in COMMANDS:
    app.command(_command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a failure that is explained, 2 wrong usage, 130 interrupted."""
    threads.choose_waiting()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class or a file may be named in any script
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - of several processes one speaks
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = _stdin_last([w for w in words if w != "--debug"])
    try:
        status = guarded(lambda: app(words, exit_on_error=False, print_error=False), debug)
    except SystemExit as end:  # cyclopts ends so what it has done itself
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    _exit(status)


def _exit(status: int) -> NoReturn:
    """End this process; one of several without Python's own shutdown.

    Threads of gloo's outlive the group (`DistributedDataParallel` keeps it) and may free their last tensor while
    Python shuts down, which aborts a run that has done all its work: 5 of 70 on two cores
    (compare PyTorch issue 190489).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it is closed for that reason
            stream.flush()
    os._exit(status)


def _stdin_last(words: list[str]) -> list[str]:
    """Move a lone ``-`` to the end, behind ``--``: anywhere else it is taken for an option without a name."""
    if "-" not in words or "--" in words:
        return words
    return [*(w for w in words if w != "-"), "--", "-"]
