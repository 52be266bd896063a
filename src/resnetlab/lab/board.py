"""What a person sees while an experiment runs: a bar for each run at work on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from resnetlab.console import duration
from resnetlab.lab.runner import State


class Silent:
    """Shows nothing."""

    def line(self, text: str) -> None:
        """Show nothing."""

    def show(self, states: Sequence[State], left: float | None) -> None:
        """Show nothing."""


class Bars:
    """Bars under lines that stay; without a terminal only the lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def line(self, text: str) -> None:
        """Show a line that stays."""
        self.console.print(text, markup=False)

    def show(self, states: Sequence[State], left: float | None) -> None:
        """Show a bar for each run at work; the first also says how long all of it will take still."""
        if not self.console.is_terminal:
            return
        names = [state.run.label for state in states]
        for name in [name for name in self.tasks if name not in names]:
            self.progress.remove_task(self.tasks.pop(name))
        for index, state in enumerate(states):
            label = state.run.label
            if label not in self.tasks:
                self.tasks[label] = self.progress.add_task(label, total=1.0, state="")
            error = f"  training error {state.error:.1%}" if state.error is not None else ""
            whole = f"  all: {duration(left)} left" if index == 0 and left is not None else ""
            self.progress.update(self.tasks[label], completed=state.done, state=f"{state.doing}{error}{whole}")
