"""What a person sees while an experiment runs: a bar for each run at work on a terminal, plain lines elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import TaskID, TextColumn

from resnetlab.console import Live, duration
from resnetlab.lab.runner import State


class Silent:
    """Shows nothing."""

    def line(self, text: str) -> None:
        """Show nothing."""

    def show(self, states: Sequence[State], left: float | None) -> None:
        """Show nothing."""


class Bars(Live):
    """A bar for each run at work."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[state]}"), console=console)
        self.tasks: dict[str, TaskID] = {}

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
