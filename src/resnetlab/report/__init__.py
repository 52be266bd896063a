"""Pictures of a run, drawn from frozen records alone: no network, no torch, no state shared between two calls.

To add one: a function of a `RunData` in `panels` and a row in `PLOTS`.
"""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from resnetlab.files import write_atomic
from resnetlab.metrics import RunData
from resnetlab.report.panels import confusion, contact_sheet, curves

__all__ = ["PLOTS", "confusion", "contact_sheet", "curves", "save"]

PLOTS: dict[str, Callable[[RunData], Figure]] = {"curves": curves, "confusion": confusion}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all, at the resolution it was made for.

    Raises:
        ResNetLabError: The disk is full or the directory cannot be written.
    """
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi="figure"))
