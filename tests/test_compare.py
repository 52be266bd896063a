"""Comparing runs: on the same images or not at all, in the terminal, as JSON and as a page."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from resnetlab import analysis, api, report
from resnetlab.cli import main
from resnetlab.console import Quiet
from resnetlab.errors import UsageError
from resnetlab.report import comparison, page
from resnetlab.report.records import Compared, Comparison, Duel
from test_report_html import HOSTILE, Checked, made

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small runs of digits with different rates and lengths."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"slow": ["optim.lr=0.01", "epochs=1"], "fast": ["optim.lr=0.1", "epochs=2"]}
    for name, more in settings.items():
        api.train("digits", out=folder / name, settings=["data.limit=200", *more], display=Quiet())
    return folder / "slow", folder / "fast"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command in this process: exit status, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


def by_hand(count: int = 2) -> Comparison:
    runs = []
    for i in range(count):
        data = made(10, epochs=2 + 3 * i)
        assert data.predictions
        runs.append(Compared(name=f"run{i}", run=data.run, origin=data.origin, predictions=data.predictions))
    test = analysis.McNemar(n=60, both=40, only_first=9, only_second=1, p=analysis.sign_test(9, 1))
    duels = tuple(Duel(first=0, second=i, test=test, p=test.p) for i in range(1, count))
    return Comparison(runs=tuple(runs), split="test", duels=duels, changed={"optim.lr": (0.1, 0.2, 0.3)[:count]})


def test_the_page_of_a_comparison_is_one_whole_file() -> None:
    for count in (2, 3):
        text = comparison.render(by_hand(count))
        found = Checked(text)
        assert [a["id"] for t, a in found.tags if t == "section"] == list(comparison.PANELS)
        assert not [a for _, a in found.tags if str(a.get("src", "")).startswith("http")]
        assert "run0 is better than run1" in found.text and "optim.lr" in found.text
        charts = [json.loads(str(a["data-chart"])) for _, a in found.tags if "data-chart" in a]
        assert all(len(line["text"]) == len(chart["x"]) for chart in charts for line in chart["lines"])
        assert charts[0]["lines"][0]["text"][2:] == [""] * (len(charts[0]["x"]) - 2)  # the shorter run just ends


def test_hostile_run_names_stay_text() -> None:
    data = by_hand()
    named = replace(data, runs=(replace(data.runs[0], name=HOSTILE), data.runs[1]), changed={"x": (HOSTILE, None)})
    text = comparison.render(named)
    assert [t for t, _ in Checked(text).tags].count("script") == 2 and "<script>alert" not in text


def test_compare_prints_the_scores_the_test_and_what_changed(
    command: Command, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    status, out, err = command("compare", *runs, "--out", tmp_path / "both.html")
    assert (status, err) == (0, "")
    for words in ("fast", "slow", "optim.lr", "epochs", "n = 359", "both.html"):
        assert words in out
    Checked((tmp_path / "both.html").read_text())

    status, out, err = command("compare", *runs, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    for row, run in zip(found["runs"], runs, strict=True):
        recorded = json.loads((run / "scores.json").read_text())["test"]
        assert (row["top1"], row["top1_interval"]) == (recorded["top1"], recorded["top1_interval"])
    assert found["changed"]["optim.lr"] == [0.01, 0.1] and set(found["changed"]) == {"optim.lr", "epochs"}
    (duel,) = found["mcnemar"]
    gained = duel["only_second_right"] - duel["only_first_right"]
    assert gained == round(359 * (found["runs"][1]["top1"] - found["runs"][0]["top1"]))
    assert duel["p"] == pytest.approx(analysis.sign_test(duel["only_first_right"], duel["only_second_right"]))


def test_runs_on_other_images_are_refused_clearly(
    command: Command, runs: tuple[Path, Path], photos: Callable[..., Path], tmp_path: Path
) -> None:
    source = photos({"a": 12, "bb": 12})
    other = api.train(source, model="resnet20", out=tmp_path / "other", epochs=1, batch_size=8, display=Quiet())
    status, out, err = command("compare", runs[0], other.path)
    assert status == 1 and out.startswith("slow: ")
    assert re.search("slow and other cannot be compared on their test splits: they know different classes", err)
    reseeded = ["data.limit=200", "epochs=1", "data.split_seed=1"]
    again = api.train("digits", out=tmp_path / "again", settings=reseeded, display=Quiet())
    status, _, err = command("compare", runs[0], again.path)
    assert status == 1 and "the images have different names" in err and "--data" in err


def test_one_run_is_no_comparison(command: Command, runs: tuple[Path, Path]) -> None:
    assert command("compare", runs[0])[0] == 2
    with pytest.raises(UsageError, match="2 to 8 runs"):
        api.compare([runs[0]] * 9)


def test_the_pages_can_be_made_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, resnetlab.report.page, resnetlab.report.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert page.PANELS and report.PLOTS


def test_run_names_with_brackets_head_their_columns(command: Command, runs: tuple[Path, Path], tmp_path: Path) -> None:
    named = [shutil.copytree(run, tmp_path / name) for run, name in zip(runs, ("r[lr=0.1]", "x]"), strict=True)]
    status, out, err = command("compare", *named, "--out", tmp_path / "page.html")
    assert (status, err) == (0, "") and re.search(r"setting +r\[lr=0\.1\] +x\]", out)
    status, _, err = command("compare", *named, "--out", tmp_path)
    assert status == 2 and "is a folder" in err
