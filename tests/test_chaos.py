"""The short version of the scoreboard: every fault of the catalogue is done once, or a few times, and survived."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from chaos import board, runner
from chaos.record import Bench, Result, Row, Tally
from chaos.rows import choose, rows

ROOT = Path(__file__).resolve().parent.parent


def row(run: object = None, **changes: str) -> Row:
    words = {"id": "R1", "part": "a", "fault": "a | b", "check": "nothing < left", **changes}
    return Row(run=run or (lambda bench: Result(tried=1, survived=1)), **words)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")
@pytest.mark.parametrize("chosen", [row for row in rows() if row.short], ids=lambda chosen: chosen.key)
def test_a_fault_is_survived(chosen: Row) -> None:
    result = runner.run_row(chosen, "ci")
    if result.tried == 0:
        pytest.skip("; ".join(result.notes))
    assert result.survived == result.tried, "\n".join(result.notes)


def test_the_catalogue_is_covered() -> None:
    ids = {row.id for row in rows()}
    assert {f"R{n}" for n in (1, 2, 3, 4, 5, 6, 12, 13, 14, 15, 16)} | {"N1", "N2"} <= ids
    assert [row.key for row in choose("R4")] == [row.key for row in rows() if row.id == "R4"]
    with pytest.raises(ValueError, match=r"no row R99\. There are: R1\."):
        choose("R99")


def test_results_are_kept_at_once_and_a_part_is_merged(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    said: list[str] = []

    def counted(bench: Bench) -> Result:
        tally = Tally(bench, of=3)
        for what, wrong in (("one", None), ("two", "it broke"), ("three", None)):
            tally.add(what, wrong)
        return tally.result("a note")

    def broken(bench: Bench) -> Result:
        (bench.folder / "left behind").mkdir()
        raise OSError("no such thing")

    table = [row(counted), row(broken, part="b"), row(id="N1")]
    runner.run(table[:2], "ci", kept, said.append, lambda key, line: None)
    runner.run(table[2:], "full", kept, said.append, lambda key, line: None)
    entries = board.read(kept)
    assert list(entries) == ["N1.a full", "R1.a ci", "R1.b ci"]
    assert entries["R1.a ci"].result == Result(tried=3, survived=2, notes=("a note", "FAILED two: it broke"))
    assert "OSError: no such thing (test_chaos.py:" in entries["R1.b ci"].result.notes[0]
    assert [e.green for e in entries.values()] == [True, False, False]
    page = board.page(table, entries)
    assert (
        "**1 of the 3 rows that were tried are green, 0 had nothing to try or were not run; 3 of 5 tries survived.**"
        in page
    )
    assert r"| R1 | a \| b | 3 | 2 | nothing &lt; left | **no** | ci |" in page
    assert "| N1 | a \\| b | 1 | 1 | nothing &lt; left | yes | full |" in page


def test_an_interrupted_row_leaves_those_before(tmp_path: Path) -> None:
    def interrupted(bench: Bench) -> Result:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run([row(), row(interrupted, part="b")], "ci", tmp_path / "kept.json", print, lambda key, line: None)
    assert list(board.read(tmp_path / "kept.json")) == ["R1.a ci"]


def test_the_command_lists_and_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(ROOT / "scripts" / "chaos"))["main"]
    monkeypatch.setattr(sys, "argv", ["chaos", "--list", "--only", "R6"])
    assert command() == 0
    assert re.search(r"^R6\.checkpoint +A bit flipped", capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["chaos", "--only", "R99"])
    with pytest.raises(SystemExit) as done:
        command()
    assert done.value.code == 2 and "There is no row R99" in capsys.readouterr().err
