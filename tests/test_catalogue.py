"""The table of networks comes from the cache while the networks are the same, and is counted anew when they are not."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

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


def test_what_comes_before_the_first_step_imports_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    pq.write_table(pa.table({"image": [png.getvalue()] * 20, "label": [0, 1] * 10}), tmp_path / "images.parquet")
    code = f"""
import sys
from resnetlab import config, models, sources
sources.load({str(tmp_path / "images.parquet")!r})
for name in ("fast-medium", "mirror-medium", "resnet50", "resnet20"):
    models.cost(models.resolve(config.ModelConfig(name=name)), 64)
print([name for name in ("pandas", "sympy") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
