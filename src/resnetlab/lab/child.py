"""One training run of an experiment, in a process of its own: ``python -m resnetlab.lab.child`` with JSON on stdin.

What it is doing goes to stdout, a line of JSON at a time. When nobody reads them any more, because the lab was killed,
the run saves itself and stops: no run is left behind that the next lab would have to wait for.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from resnetlab import api, rundir
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import StepRecord

EVERY = 0.5
"""Seconds between two lines."""


class Telling:
    """A display that writes its progress for the lab to read."""

    def __init__(self) -> None:
        self.told = 0.0

    def line(self, text: str) -> None:
        """Write nothing: the line is in the run's own log."""

    def reading(self, what: str, done: int, total: int) -> None:
        """Tell that the run is alive, while it reads or scores."""
        self._tell({"doing": what})

    def step(self, record: StepRecord, epochs: int, lr: float) -> None:
        """Tell how far the training has come: a share, 0 to 1, and the training error of the epoch so far."""
        done = (record.epoch - 1 + record.step / record.steps) / epochs
        self._tell({"doing": f"epoch {record.epoch}/{epochs}", "done": done, "error": 1 - record.top1})

    def _tell(self, what: dict[str, Any]) -> None:
        if time.monotonic() - self.told < EVERY:
            return
        self.told = time.monotonic()
        try:
            print(json.dumps(what), flush=True)  # noqa: T201 - the lab reads it
        except OSError:
            with contextlib.suppress(OSError):  # so that nothing is flushed into the broken pipe at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """Train the run that stdin describes, or go on with it."""
    order = json.load(sys.stdin)
    path = Path(order["out"])
    try:
        if rundir.is_run(path):
            api.resume(path, display=Telling())
        else:
            _tidy(path)
            api.train(
                order["data"],
                model=order["model"],
                recipe=order["recipe"],
                out=path,
                seed=order["seed"],
                settings=order["settings"],
                display=Telling(),
            )
    except ResNetLabError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the lab reads it
        sys.exit(error.exit_status)


def _tidy(path: Path) -> None:
    """Clear away what a run left that was killed before it had written down what it is."""
    for entry in path.glob(".*"):
        entry.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
