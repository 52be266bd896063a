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
    green, done = sum(e.green for e in found.values()), sum(e.result.tried > 0 for e in found.values())
    lines = [
        *_HEAD,
        f"**{green} of the {done} rows that were tried are green, {len(rows) - done} had nothing to try or were not "
        f"run; {survived:,} of {tried:,} tries survived.** "
        "A row is green when every one of its tries survived.",
        "",
        "| | fault | tried | survived | how it is checked | green | size |",
        "|---|---|--:|--:|---|---|---|",
        *(_line(row, found.get(row.key)) for row in rows),
        "",
        *_NOT_TRIED,
        "## Notes",
        "",
        "Size, time and day of each result, and what was counted.",
        "",
        *(line for row in rows if (e := found.get(row.key)) for line in _notes(row, e)),
    ]
    return "\n".join(lines) + "\n"


_HEAD = (
    "# Reliability: what was broken on purpose, and what was left",
    "",
    "Each row of the table is a kind of damage. It is done for real: processes are killed, disks filled, bits flipped, "
    "hostile files and requests handed over. Then it is checked what is left. “To the byte” means that the weights, "
    "the whole newest checkpoint (optimiser, averaged weights, counters), metrics.csv, scores.json and splits.json "
    "have the same bytes as those of a run that nothing was done to.",
    "",
    "```",
    "scripts/chaos --list                      # the rows",
    "scripts/chaos --size ci                   # a few tries of each: minutes",
    f"{COMMAND}                 # all tries: hours on two cores",
    "scripts/chaos --size full --only R1,R6",
    "```",
    "",
    "This page is written by that command; a part that is run again replaces its own rows only. Where a row was run at "
    "both sizes, the full one is shown. `tests/test_chaos.py` runs the rows of size ci as tests. What a row does is in "
    "`tests/chaos/`.",
    "",
)
_NOT_TRIED = (
    "## What was not tried, and what is known to fall short",
    "",
    "- Graphics cards: every row ran on the CPU. An exact resume on CUDA (`deterministic=true`) and its running out of "
    "memory have no row.",
    "- Network disks (NFS, SMB), disks that lie about fsync, and a power cut: only local file systems and a tmpfs.",
    "- Processes on several machines: groups are of two or three processes on one machine (gloo).",
    "- Systems other than Linux.",
    "- Restarts by torchrun (`--max-restarts`) with several agents: each counts its own restarts, so the processes of "
    "a new start cannot tell it from the one before as those of a single agent do (R15).",
    "- An address space so small (R13: below 250 MiB more than a process begins with) that nearly all allocations "
    "fail: oneDNN then crashed in one of seven runs (SIGSEGV) before anything could be said. What was saved is whole.",
    "",
)


def _line(row: Row, e: Entry | None) -> str:
    if e is None:
        return f"| {row.id} | {_cell(row.fault)} | – | – | {_cell(row.check)} | not run | |"
    nothing = "nothing to try" if e.result.tried == 0 else None
    met = nothing or ("yes" if e.green else "**no**")
    counts = f"{e.result.tried:,} | {e.result.survived:,}"
    return f"| {row.id} | {_cell(row.fault)} | {counts} | {_cell(row.check)} | {met} | {e.size} |"


def _notes(row: Row, e: Entry) -> list[str]:
    head = f"- **{row.id}, {row.part}** ({e.size}, {e.seconds:,.0f} s, {e.date}, {e.machine})"
    return [head + (": " if e.result.notes else "") + "; ".join(_cell(note) for note in e.result.notes)]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
