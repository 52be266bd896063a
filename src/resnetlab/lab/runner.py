"""Training the runs of an experiment as child processes, several at a time, each in its own directory.

What is finished is never repeated, what was begun goes on exactly where it was, and a run that fails leaves the others
alone.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from resnetlab import rundir, stopping
from resnetlab.console import tell
from resnetlab.lab.records import Failure, Plan, Run
from resnetlab.lab.speed import environment
from resnetlab.session import Interrupted

RUNS = "runs"
PATIENCE = 120.0
"""Seconds that runs have to save themselves after they were asked to stop."""


class Board(Protocol):
    """Where it is shown how the runs are doing."""

    def line(self, text: str) -> None:
        """Show a line that stays."""
        ...

    def show(self, states: Sequence["State"], left: float | None) -> None:
        """Show the runs at work, and the seconds that are left for all, if that can be said."""
        ...


@dataclass(kw_only=True)
class State:
    """A run on its way."""

    run: Run
    done: float = 0.0
    """0 to 1."""
    doing: str = "starting"
    error: float | None = None
    """Training error of the epoch so far."""
    process: "subprocess.Popen[str] | None" = None
    device: str = ""
    """The GPU that it has, where they are shared out."""
    listener: threading.Thread | None = None
    stderr: IO[str] | None = None
    begun: float = 0.0
    from_done: float = 0.0
    """What was done already when this process began."""
    ended: str = ""
    """``done`` or ``failed``; empty: not yet."""


@dataclass(kw_only=True)
class Runner:
    """Runs a plan in a directory."""

    plan: Plan
    path: Path
    recipe: str
    board: Board
    jobs: int
    threads: int
    """Of each run."""
    command: str
    """That goes on with it."""
    devices: Sequence[str] = ()
    """GPUs to share out, as CUDA_VISIBLE_DEVICES names them; empty: runs choose for themselves."""
    stop: int = 0
    states: list[State] = field(default_factory=list)

    def go(self) -> list[Failure]:
        """Train all that is not finished.

        Returns:
            The runs that failed.

        Raises:
            Interrupted: A signal came; every run is saved and the same command goes on.
        """
        self.states = [State(run=run) for run in self.plan.runs]
        for state in self.states:
            if rundir.is_finished(self.directory(state.run)):
                state.done, state.from_done, state.ended = 1.0, 1.0, "done"
        waiting = [s for s in self.states if not s.ended]
        if waiting and len(waiting) < len(self.states):
            self.board.line(f"{len(self.states) - len(waiting)} of {len(self.states)} runs are finished already.")
        failures: list[Failure] = []
        with self._signals():
            begun = time.monotonic()
            while waiting or self._at_work():
                while waiting and len(self._at_work()) < self.jobs and not self.stop:
                    self._start(waiting.pop(0))
                for state in self._at_work():
                    failures += self._look(state)
                if self.stop:
                    raise self._stopped()
                self.board.show(self._at_work(), self._left(begun))
                time.sleep(0.1)
        return failures

    def directory(self, run: Run) -> Path:
        """Return where a run lies."""
        return self.path / RUNS / run.label

    def _at_work(self) -> list[State]:
        return [s for s in self.states if s.process is not None and not s.ended]

    def _start(self, state: State) -> None:
        run, directory = state.run, self.directory(state.run)
        directory.parent.mkdir(exist_ok=True)
        order = {
            "data": self.plan.request.data,
            "recipe": self.recipe,
            "out": str(directory),
            **run.model_dump(include={"model", "seed", "settings"}),
        }
        extra = {}
        if self.devices:
            taken = [other.device for other in self._at_work()]
            extra["CUDA_VISIBLE_DEVICES"] = state.device = min(self.devices, key=taken.count)
        state.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed at the end
        state.process = subprocess.Popen(
            [sys.executable, "-m", "resnetlab.lab.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=state.stderr,
            text=True,
            env=environment(self.threads) | extra,
            start_new_session=True,  # Ctrl-C reaches the lab alone, which then asks its runs to stop
        )
        assert state.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            state.process.stdin.write(json.dumps(order))
            state.process.stdin.close()
        state.begun = time.monotonic()
        state.done = state.from_done = _share_done(directory, run)
        state.listener = threading.Thread(target=_listen, args=(state,), daemon=True)
        state.listener.start()
        going_on = f", going on at {state.done:.0%}" if state.done else ""
        self.board.line(f"start  {run.label}{going_on}")

    def _look(self, state: State) -> list[Failure]:
        """Note the end of a run, if it has ended."""
        assert state.process is not None
        status = state.process.poll()
        if status is None:
            return []
        took = time.monotonic() - state.begun
        directory = self.directory(state.run)
        if (status == 0 or self.stop) and rundir.is_finished(directory):
            state.ended, state.done = "done", 1.0
            score = rundir.read_json(directory / rundir.SCORES)
            split = "test" if "test" in score else "val"
            self.board.line(f"done   {state.run.label}: {split} error {1 - score[split]['top1']:.2%}, {took:,.0f} s")
            return []
        if self.stop:
            state.ended = "stopped"
            return []
        state.ended, reason = "failed", _reason(state, status)
        self.board.line(f"FAILED {state.run.label}: {reason}")
        return [Failure(label=state.run.label, reason=reason)]

    def _left(self, begun: float) -> float | None:
        """Return the seconds that are left: what is undone, at the pace so far."""
        weights = [s.run.seconds or 1.0 for s in self.states]
        done = sum(w * (s.done - s.from_done) for w, s in zip(weights, self.states, strict=True))
        undone = sum(w * (1 - s.done) for w, s in zip(weights, self.states, strict=True) if s.ended != "failed")
        passed = time.monotonic() - begun
        return undone * passed / done if done > 0.01 * sum(weights) and passed > 5 else None

    def _stopped(self) -> Interrupted:
        """Ask every run to save itself, wait for it, and say how to go on."""
        for state in self._at_work():
            assert state.process is not None
            state.process.terminate()
        until = time.monotonic() + PATIENCE
        try:
            while self._at_work() and time.monotonic() < until:
                for state in self._at_work():
                    self._look(state)
                time.sleep(0.05)
        finally:
            self._kill()
        finished = sum(s.ended == "done" for s in self.states)
        message = f"Stopped: {finished} of {len(self.states)} runs are finished, the others are saved. Go on with: "
        return Interrupted(message + self.command, min(self.stop, 64))

    def _kill(self) -> None:
        for state in self._at_work():
            assert state.process is not None
            state.process.kill()
            state.process.wait()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note a request to stop. No run outlives this block."""

        def note(number: int) -> None:
            self.stop = number
            tell(self.board.line, "Stopping: the runs save themselves; once more stops at once.")

        with stopping.noted(note):
            try:
                yield
            finally:
                self._kill()
                for state in self.states:
                    if state.listener is not None:
                        state.listener.join()
                    if state.stderr is not None:
                        state.stderr.close()


def _share_done(path: Path, run: Run) -> float:
    """Return about how much of a run was done before, by its table of epochs."""
    table = path / rundir.METRICS
    if not table.is_file():
        return 0.0
    total = [s.partition("=")[2] for s in run.settings if s.startswith("epochs=")]
    epochs = max(0, len(table.read_text(encoding="utf-8").splitlines()) - 1)
    return min(1.0, epochs / int(total[-1])) if total else 0.0


def _listen(state: State) -> None:
    """Read what a run tells, until it ends."""
    assert state.process is not None and state.process.stdout is not None
    with state.process.stdout as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                state.doing = str(told.get("doing", state.doing))
                state.done = max(state.done, float(told.get("done", 0)))
                state.error = told.get("error", state.error)


def _reason(state: State, status: int) -> str:
    """Say why a run ended: its own last words, or the signal that ended it."""
    assert state.stderr is not None
    state.stderr.seek(0)
    words = state.stderr.read().strip()
    if words:
        return words.rpartition("\n")[2][:600]
    if status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
            return f"it was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"it ended with status {status} and without a word"
