"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn

from resnetlab.errors import visible
from resnetlab.metrics import EpochRecord, StepRecord, TimingRecord


class Display(Protocol):
    """Where a run shows itself."""

    def line(self, text: str) -> None:
        """Show a line that stays."""
        ...

    def reading(self, what: str, done: int, total: int) -> None:
        """Show how far reading or evaluating has come."""
        ...

    def step(self, record: StepRecord, epochs: int, lr: float) -> None:
        """Show a training step."""
        ...


class Quiet:
    """Shows nothing."""

    def line(self, text: str) -> None:
        """Show nothing."""

    def reading(self, what: str, done: int, total: int) -> None:
        """Show nothing."""

    def step(self, record: StepRecord, epochs: int, lr: float) -> None:
        """Show nothing."""


class Notes(Quiet):
    """Shows the lines that stay, on standard error: standard output is a program's."""

    def line(self, text: str) -> None:
        """Show a line that stays."""
        print(f"resnetlab: {visible(text)}", file=sys.stderr)  # noqa: T201


class Live:
    """Bars, with a name and these columns, under lines that stay; without a terminal only the lines."""

    def __init__(self, *columns: ProgressColumn, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def line(self, text: str) -> None:
        """Show a line that stays."""
        self.console.print(visible(text), markup=False, emoji=False)


class Terminal(Live):
    """A bar for what a run does, one thing at a time."""

    def __init__(self, console: Console | None = None) -> None:
        count, state = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[state]}")
        super().__init__(count, state, TimeElapsedColumn(), console=console)
        self.task: TaskID | None = None
        self.label = ""

    def reading(self, what: str, done: int, total: int) -> None:
        """Show how far reading or evaluating has come."""
        self._show(what, done, total, "")

    def step(self, record: StepRecord, epochs: int, lr: float) -> None:
        """Show a training step: epoch, step, images a second, loss, accuracy, time left in the whole run."""
        label = f"epoch {record.epoch}/{epochs}"
        self._show(label, record.step, record.steps, "")
        if self.task is not None:
            speed = self.progress.tasks[0].speed
            images = record.images / record.step
            steps_left = (epochs - record.epoch + 1) * record.steps - record.step
            rate = f"{speed * images:,.0f} images/s  left {duration(steps_left / speed)}  " if speed else ""
            state = f"loss {record.loss:.4f}  accuracy {record.top1:.2%}  lr {lr:.3g}  {rate}"
            self.progress.update(self.task, state=state)

    def _show(self, label: str, done: int, total: int, state: str) -> None:
        if not self.console.is_terminal:
            return
        if self.task is None or label != self.label:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.label = label
            self.task = self.progress.add_task(label, total=total, state=state)
        self.progress.update(self.task, completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self.task)
            self.task = None


def tell(show: Callable[[str], None], text: str) -> None:
    """Show a line from within a signal's handler, which may have interrupted the writing of another.

    To write there would be an error ("reentrant call"); a thread waits until the other line is written.
    """

    def write() -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            show(text)

    threading.Thread(target=write).start()


def duration(seconds: float) -> str:
    """Return a time for people: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def epoch_line(record: EpochRecord, timing: TimingRecord, epochs: int, best: bool) -> str:
    """Return the line of an epoch, with the fields that the tutorial prints: time, losses and accuracies."""
    text = (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  "
        f"time {timing.train_seconds + timing.val_seconds:6.1f} s  "
        f"train loss {record.train_loss:.4f}  train accuracy {record.train_top1:7.2%}"
    )
    if record.val_loss is not None and record.val_top1 is not None:
        text += f"  val loss {record.val_loss:.4f}  val accuracy {record.val_top1:7.2%}"
    return text + f"  {timing.images_per_second:,.0f} images/s" + ("  best" if best else "")
