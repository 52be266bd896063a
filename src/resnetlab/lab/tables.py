"""Everything that was measured, as CSV for other programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from resnetlab.files import write_atomic
from resnetlab.lab import words
from resnetlab.lab.records import Outcome


def write(outcome: Outcome, path: Path) -> list[Path]:
    """Write ``curves.csv`` and ``runs.csv`` where there were runs, and every table that was measured beside them."""
    found = []
    if any(one.traces for one in outcome.arms):
        rows = [
            (one.arm.name, t.seed, step, train, held)
            for one in outcome.arms
            for t in one.traces
            for step, train, held in zip(t.iterations, t.training, t.held_out, strict=True)
        ]
        columns = ("network", "seed", "iteration", "training error", "held-back error")
        found.append(_table(path / "curves.csv", columns, rows))
        sheet = words.runs(outcome)
        found.append(_table(path / "runs.csv", sheet.columns, sheet.rows))
    found += [_table(path / f"{sheet.name}.csv", sheet.columns, sheet.rows) for sheet in outcome.finding.sheets]
    return found


def _table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    write_atomic(path, text.getvalue())
    return path
