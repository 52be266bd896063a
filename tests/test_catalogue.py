"""The table of networks comes from the cache while the networks are the same, and is counted anew when they are not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnetlab import catalogue
from resnetlab.catalogue import Description

ROW = Description("net", "cifar", "basic", 32, 10, 1, 2, 3)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "resnetlab" / "models.json"


@pytest.fixture
def count() -> Callable[[], list[Description]]:
    def once() -> list[Description]:
        calls.append(1)
        assert len(calls) == 1, "counted twice"
        return [ROW]

    calls: list[int] = []
    return once


def test_counts_once(count: Callable[[], list[Description]]) -> None:
    assert catalogue.rows(count) == catalogue.rows(count) == [ROW]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": "of another version", "rows": []}'])
def test_counts_anew_where_the_kept_table_is_damaged_or_of_other_networks(
    kept: Path, content: str, count: Callable[[], list[Description]]
) -> None:
    kept.parent.mkdir()
    kept.write_text(content)
    assert catalogue.rows(count) == [ROW]
    assert len(json.loads(kept.read_text())["rows"]) == 1


def test_a_cache_that_cannot_be_written_only_costs_time(kept: Path, count: Callable[[], list[Description]]) -> None:
    kept.parent.write_text("in the way")
    assert catalogue.rows(count) == [ROW]


def test_neither_help_nor_a_kept_table_imports_torch(count: Callable[[], list[Description]]) -> None:
    catalogue.rows(count)
    for words in (["--help"], ["models"], ["recipes"]):
        code = f"import sys; from resnetlab.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
        code += "print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "False", words


def test_a_training_run_starts_without_matplotlib() -> None:
    code = "import sys, resnetlab.api; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
