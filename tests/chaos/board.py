"""The scoreboard: results are kept as JSON, some rows can be run again, the page is made from what is kept."""

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos.record import Result, Row, Size
from resnetlab import __version__
from resnetlab.files import write_atomic
from resnetlab.runtime import cpu_name

COMMAND = "scripts/chaos --size full"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row's last result of one size, and where and when it was had."""

    size: Size
    result: Result
    seconds: float
    date: str
    """Day, UTC."""
    machine: str
    version: str

    @property
    def green(self) -> bool:
        """Whether something was tried and all of it survived."""
        return 0 < self.result.tried == self.result.survived


def entry(size: Size, result: Result, seconds: float) -> Entry:
    """Stamp a result."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    machine = f"{cpu_name()}, Python {platform.python_version()}"
    return Entry(size=size, result=result, seconds=round(seconds, 1), date=day, machine=machine, version=__version__)


def read(path: Path) -> dict[str, Entry]:
    """Return the kept entries by row and size (``R1.memory full``); none where nothing was kept."""
    if not path.is_file():
        return {}
    return {key: _entry(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}


def _entry(value: dict[str, Any]) -> Entry:
    kept = {**value["result"], "notes": tuple(value["result"]["notes"])}
    return Entry(**{**value, "result": Result(**kept)})


def write(path: Path, entries: dict[str, Entry]) -> None:
    """Keep entries; one that is killed meanwhile leaves the old ones."""
    table = {key: asdict(entries[key]) for key in sorted(entries)}
    write_atomic(path, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def chosen(entries: dict[str, Entry], row: Row) -> Entry | None:
    """Return what the page shows of a row: its full size where that was run, else the short one."""
    return entries.get(f"{row.key} full") or entries.get(f"{row.key} ci")


def page(rows: Iterable[Row], entries: dict[str, Entry]) -> str:
    """Return ``docs/reliability.md``."""
    rows = list(rows)
    found = {row.key: e for row in rows if (e := chosen(entries, row))}
    tried, survived = (sum(getattr(e.result, name) for e in found.values()) for name in ("tried", "survived"))
    green = sum(e.green for e in found.values())
    lines = [
        "# Reliability",
        "",
        f"Damage done on purpose, and what was left. `{COMMAND}` does all of it and writes this page; "
        "`--only R1,R4` does a part, and `--size ci` is the short version that the tests run "
        "(`tests/test_chaos.py`). The rows are in `tests/chaos/`.",
        "",
        f"**{green} of {len(rows)} rows are green; {survived:,} of {tried:,} tries survived.** "
        "A row is green when every one of its tries survived.",
        "",
        "| | fault | tried | survived | how it is checked | bar met |",
        "|---|---|--:|--:|---|---|",
        *(_line(row, found.get(row.key)) for row in rows),
        "",
        "## Notes",
        "",
        *(line for row in rows if (e := found.get(row.key)) for line in _notes(row, e)),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row, e: Entry | None) -> str:
    counts = f"{e.result.tried:,} | {e.result.survived:,}" if e else "– | –"
    met = "not run" if e is None else "yes" if e.green else "**no**"
    short = " (short)" if e and e.size == "ci" else ""
    return f"| {row.id} | {_cell(row.fault)} | {counts} | {_cell(row.check)} | {met}{short} |"


def _notes(row: Row, e: Entry) -> list[str]:
    head = f"- **{row.id}, {row.part}** ({e.size}, {e.seconds:,.0f} s, {e.date}, {e.machine})"
    return [head + (": " if e.result.notes else "") + "; ".join(_cell(note) for note in e.result.notes)]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
