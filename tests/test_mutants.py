"""The mutation check itself: its table fits the source, and it tells a mutant that is noticed from one that is not."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from chaos.mutants import MUTANTS, apply, misplaced

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "resnetlab"


def test_the_table_fits_the_source() -> None:
    assert misplaced(SOURCE) == [], (
        "a line that a mutant breaks was changed: change its row in tests/chaos/mutants.py too"
    )
    assert len(MUTANTS) >= 30
    assert max(Counter(mutant.what for mutant in MUTANTS).values()) == 1
    for mutant in MUTANTS:
        assert "\n" not in mutant.fragment
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text() if name else True, test


def test_a_fragment_that_is_gone_is_refused(tmp_path: Path) -> None:
    mutant = MUTANTS[0]
    (tmp_path / mutant.file).write_text("nothing of it")
    with pytest.raises(ValueError, match="is there 0 times"):
        apply(mutant, tmp_path)
    (tmp_path / mutant.file).write_text(f"{mutant.fragment}\n{mutant.fragment}\n")
    with pytest.raises(ValueError, match="is there 2 times"):
        apply(mutant, tmp_path)


@pytest.mark.slow
def test_a_mutant_that_no_test_notices_survives_and_says_so(tmp_path: Path) -> None:
    for name in ("src", "tests", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_sources.py").write_text(
        "def test_hold_out_is_stratified_and_decided_by_the_seed() -> None:\n    assert True\n"
    )
    command = [sys.executable, str(tmp_path / "scripts" / "mutate"), "the same split for every seed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "SURVIVED sources/splits.py" in done.stdout
    assert "0 of 1 mutants killed" in done.stdout
