"""Run rows one after the other: each in a directory of its own, its result kept as soon as it is there."""

import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos import board, commands
from chaos.record import Bench, Result, Row, Size


def run_row(row: Row, size: Size, tell: Callable[[str], None] = lambda line: None) -> Result:
    """Run one row. One that breaks down itself is a row that is not survived, with the reason in its notes."""
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{row.key}-"))
    os.environ[commands.PICTURES] = "none" if size == "ci" else ""
    try:
        return row.run(Bench(size=size, folder=folder, tell=tell))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = f"FAILED the row itself: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Result(tried=1, survived=0, notes=(" ".join(line.split())[:400],))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    rows: Sequence[Row], size: Size, kept: Path, say: Callable[[str], None], tell: Callable[[str, str], None]
) -> dict[str, board.Entry]:
    """Run rows and keep each result in ``kept`` at once, so that an interrupted run loses one row at most.

    Args:
        rows: What to run.
        size: How much of it.
        kept: The JSON file that results are merged into.
        say: Shows a line that stays.
        tell: Shows how far a row (its key, then what it says) has come.
    """
    for row in rows:
        begun = time.monotonic()
        result = run_row(row, size, lambda line, key=row.key: tell(key, line))  # type: ignore[misc]
        done = board.entry(size, result, time.monotonic() - begun)
        entries = board.read(kept)  # again: another part may have been run meanwhile
        entries[f"{row.key} {size}"] = done
        board.write(kept, entries)
        mark = "ok    " if done.green else "FAILED"
        say(f"{mark} {row.key:<16} {result.survived:>6,} of {result.tried:>6,}  {done.seconds:>7.1f} s  {row.fault}")
        for note in result.notes:
            say(f"         {note}")
    return board.read(kept)
