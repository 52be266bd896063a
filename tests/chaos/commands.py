"""Runs of `resnetlab` as processes that can be killed: forked from a clean server that has torch loaded already.

A fork takes a tenth of a second where a new interpreter takes several, so that hundreds of kills become affordable.
What the processes do is what the command does: `resnetlab.cli.main` with the same words.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnetlab.rundir import CHECKPOINTS

PRELOADED = ["resnetlab.api", "resnetlab.cli", "torch._dynamo", "sklearn.datasets", "matplotlib.backends.backend_agg"]
RESULTS = ("metrics.csv", "model.safetensors", "scores.json", "splits.json")
"""Files of a finished run that the same run has to the byte, however often it was killed."""
PICTURES = "CHAOS_PICTURES"
"""Environment variable: ``none`` leaves out the drawing of curves.png and confusion.png, half of a short run's time."""
Arm = Callable[[], object]


@dataclass(kw_only=True)
class Command:
    """A command that runs, or has run, in its own process."""

    process: Any
    output: Path

    def wait(self, seconds: float = 120) -> int | None:
        """Wait for the end. Returns the exit status, ``-9`` after SIGKILL, or None when it takes too long."""
        self.process.join(seconds)
        code = self.process.exitcode
        return None if code is None else int(code)

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.is_alive():
                os.kill(self.process.pid, number)

    @property
    def text(self) -> str:
        """What it has printed so far, stdout and stderr together."""
        return self.output.read_text(errors="replace") if self.output.is_file() else ""

    @property
    def end(self) -> str:
        """The last 250 characters it printed, for a note."""
        return " ".join(self.text.split())[-250:]


def start(
    words: Sequence[str | Path],
    output: Path,
    *,
    arm: Arm | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Command:
    """Start ``resnetlab WORDS`` in a process of its own.

    Args:
        words: The command line, without the name.
        output: The file that takes what it prints.
        arm: Called in the process first, to prepare the damage; a function (or partial) of a module.
        environment: Added to the process's.
        folder: Where it runs.
    """
    arguments = ([str(w) for w in words], str(output), arm, _environment(environment), str(folder or output.parent))
    return Command(process=forked(_main, *arguments), output=output)


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {PICTURES: os.environ.get(PICTURES, ""), **(more or {})}


def forked(work: Callable[..., object], *arguments: object) -> Any:
    """Start a function of a module in a process of its own, in which torch and the package are loaded already."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)  # heeded when the server starts, with the first process
    process = server.Process(target=work, args=arguments)
    process.start()
    return process


def run(words: Sequence[str | Path], output: Path, *, seconds: float = 120, **options: Any) -> tuple[int | None, str]:
    """Run a command to its end. Returns its exit status (None: it hung, and was killed) and what it printed."""
    command = start(words, output, **options)
    code = command.wait(seconds)
    if code is None:
        command.send(9)
        command.wait(10)
    return code, command.text


def _main(words: list[str], output: str, arm: Arm | None, environment: dict[str, str], folder: str) -> None:
    from resnetlab.cli import main

    os.environ.update({"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment})
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(handle, descriptor)
    os.close(handle)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115 - the process's
    sys.argv = ["resnetlab", *words]
    import torch

    torch.set_num_threads(1)
    if os.environ.get(PICTURES) == "none":
        from resnetlab import report

        setattr(report, "save", lambda figure, path: None)  # noqa: B010 - before `arm`, for which it is a moment
    if arm is not None:
        arm()
    main(words)


def differences(run: Path, reference: Path, *, weights_only: bool = False) -> str | None:
    """Say in what a finished run differs from the run it must equal: its results, and all that its checkpoint holds.

    Optimiser, averaged weights, counters and sums are in the newest checkpoint; every random stream is a function of
    the seed and these. ``weights_only`` leaves the bundle out, whose description holds the recipe, which may differ;
    its weights are in the checkpoint too.
    """
    pairs = [(run / name, reference / name) for name in RESULTS if not (weights_only and name == "model.safetensors")]
    newest, expected = newest_checkpoint(run), newest_checkpoint(reference)
    if newest is None or expected is None:
        return "there is no checkpoint"
    pairs += [(newest / path.name, path) for path in sorted(expected.iterdir())]
    wrong = [str(a.relative_to(run)) for a, b in pairs if not a.is_file() or a.read_bytes() != b.read_bytes()]
    stray = [str(p.relative_to(run)) for p in run.rglob("*.tmp")]
    return ", ".join([*(f"{name} differs" for name in wrong), *(f"{name} was left" for name in stray)]) or None


def newest_checkpoint(run: Path) -> Path | None:
    """Return the directory of the newest checkpoint by its name."""
    return max(
        (run / CHECKPOINTS).glob("step-*"), key=lambda p: (p.name.split("-")[1], len(p.name), p.name), default=None
    )
