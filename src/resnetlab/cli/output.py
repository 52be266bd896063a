"""Writing to standard output: lines, tables, JSON, CSV."""

import io
import math
import sys
from typing import Annotated, Any, BinaryIO

from cyclopts import Parameter

from resnetlab.errors import visible

Json = Annotated[bool, Parameter(negative="", help="Print one JSON document on stdout, and nothing else.")]
"""The flag of every command whose result a program may want."""


def stdin() -> BinaryIO:
    """Return standard input; nothing where the caller has closed it, as some services do."""
    return sys.stdin.buffer if sys.stdin else io.BytesIO()


def line(text: str) -> None:
    """Print a line."""
    print(visible(text))  # noqa: T201


def warn(text: str) -> None:
    """Say something on standard error that does not end the command."""
    print(f"resnetlab: {visible(text)}", file=sys.stderr)  # noqa: T201


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table; numbers stand to the right. Through a pipe it has no control characters.

    Where it does not fit between the edges of a terminal without breaking words, each row becomes a few lines.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title, columns = visible(title), tuple(map(visible, columns))
    rows = [tuple(map(visible, row)) for row in rows]
    drawn = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        figures = number > 0 and all(row[number][:1].isdigit() or row[number] == "-" for row in rows)
        drawn.add_column(Text(column), justify="right" if figures else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(text) for text in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    if console.measure(drawn, options=console.options.update(max_width=10_000)).minimum <= console.width:
        console.print(drawn)
        return
    console.print(Text(f"{title}\n"))
    for row in rows:
        console.print(Text("\n".join(_stacked(columns, row))), soft_wrap=len(columns) > 2)


def _stacked(columns: tuple[str, ...], row: tuple[str, ...]) -> list[str]:
    """Write a row as lines: its name, and each of its values below it with the name of the column."""
    if len(columns) == 2:
        return [f"{row[0]}: {row[1]}"]
    wide = max(len(column) for column in columns[1:])
    return [row[0], *(f"  {column:<{wide}}  {text}" for column, text in zip(columns[1:], row[1:], strict=True) if text)]


def cell(value: object) -> str:
    """Write any value as a table shows it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value) or "none"
    return "-" if value is None else str(value)


def print_json(value: object) -> None:
    """Print one JSON document; numbers that are not finite, which JSON has no word for, as null."""
    import json

    line(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Print predictions as CSV: file, class, probability, then class and probability of each further place."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    places = max((len(r["top"]) for r in rows), default=1)
    writer.writerow(
        ["file", "class", "probability", *(f"{k}_{n}" for n in range(2, places + 1) for k in ("class", "probability"))]
    )
    for r in rows:
        writer.writerow([r["file"], *(value for t in r["top"] for value in (t["class"], t["probability"]))])
