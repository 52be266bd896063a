"""The laboratory at work on the digits: children, kills, failures, and the report of what came of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnetlab import api, lab, rundir, sources
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.lab import complexity, experiments, judges
from resnetlab.lab import conduct as conducting
from resnetlab.lab.board import Silent
from resnetlab.lab.conduct import conduct
from resnetlab.lab.records import Arm, Experiment, Outcome
from resnetlab.lab.responses import deviations
from resnetlab.runtime import setup
from resnetlab.session import Interrupted

pytestmark = pytest.mark.slow
SMALL = ("epochs=2", "batch_size=32", "data.limit=100", "data.limit_test=40")


def tiny() -> Experiment:
    """Two networks, one of which fails where a test asks for it."""
    rate = os.environ.get("TINY_RATE", "0.1")
    return Experiment(
        name="tiny",
        title="A tiny experiment",
        claim="A linear softmax is worse than a small network.",
        place="the tests",
        caution="It is tiny.",
        arms=(
            Arm(name="linear", model="linear", narrows=False),
            Arm(name="deep", model="resnet20", settings=(f"optim.lr={rate}",)),
        ),
        judge=lambda results: [judges.above(results, "linear", "deep", "training")],
        settings=("optim.lr=0.01",),
    )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", tiny)


def go(out: Path, **options: Any) -> Outcome:
    return conduct("tiny", out=out, seeds=1, jobs=2, settings=SMALL, board=Silent(), **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The tiny experiment, finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(experiments.EXPERIMENTS, "tiny", tiny)
        return go(tmp_path_factory.mktemp("lab") / "tiny")


def test_an_experiment_leaves_complete_runs_and_one_report(done: Outcome) -> None:
    path = Path(done.path)
    there = {p.name for p in path.iterdir()}
    assert there >= {"lab.json", "outcome.json", "report.html", "figure.png", "curves.csv", "runs.csv", "runs"}
    assert {p.name for p in (path / "runs").iterdir()} == {"linear-seed0", "deep-seed0"}
    assert [len(one.traces) for one in done.arms] == [1, 1] and not done.failures and not done.missing
    assert [one.traces[0].iterations for one in done.arms] == [(3, 6), (3, 6)]
    assert all(one.parameters and one.macs for one in done.arms)
    recorded = json.loads((path / "runs" / "deep-seed0" / "scores.json").read_text())["test"]
    assert done.arms[1].traces[0].test == pytest.approx(1 - recorded["top1"])
    assert recorded["n"] == done.arms[1].traces[0].n == 40


def test_finished_runs_are_never_repeated_and_give_the_same_report(done: Outcome) -> None:
    path = Path(done.path)
    weights = path / "runs" / "deep-seed0" / "model.safetensors"
    before, page = weights.stat().st_mtime_ns, (path / "report.html").read_text()
    again = go(path)
    assert weights.stat().st_mtime_ns == before
    assert again.to_dict() == done.to_dict()
    assert (path / "report.html").read_text() == page


def test_the_same_seed_gives_the_same_figures(done: Outcome, tmp_path: Path) -> None:
    again = go(tmp_path / "again")
    for name in ("curves.csv",):
        assert (tmp_path / "again" / name).read_text() == (Path(done.path) / name).read_text()
    assert [v.why for v in again.verdicts] == [v.why for v in done.verdicts]


def test_another_request_does_not_mix_with_the_runs_of_the_first(done: Outcome) -> None:
    with pytest.raises(ResNetLabError, match="seeds was 1, now 2"):
        conduct("tiny", out=done.path, seeds=2, settings=SMALL, board=Silent())


def test_a_run_that_fails_is_reported_and_the_others_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_RATE", "1e30")
    found = go(tmp_path / "broken")
    assert [f.label for f in found.failures] == ["deep-seed0"]
    assert "The loss became" in found.failures[0].reason
    assert [len(one.traces) for one in found.arms] == [1, 0]
    assert "deep-seed0 failed: The loss became" in (tmp_path / "broken" / "report.html").read_text()
    assert found.verdicts[0].held is None


def test_the_lab_stops_when_asked_and_goes_on_exactly_there(
    done: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopSoon(Silent):
        def show(self, states: Any, left: float | None) -> None:
            if any(state.done > 0 for state in states):
                os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=r"Stopped: . of 2 runs are finished.*resnetlab lab tiny"):
        conduct("tiny", out=path, seeds=1, jobs=1, settings=SMALL, board=StopSoon())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    go(path)
    for name in ("curves.csv",):
        assert (path / name).read_text() == (Path(done.path) / name).read_text()


def test_when_the_lab_is_killed_its_runs_save_themselves_and_the_next_lab_goes_on(tmp_path: Path) -> None:
    words = ["lab", "degradation", "digits", "epochs=40", "data.limit=100", "data.limit_test=20", "--seeds", "1"]
    command = [sys.executable, "-m", "resnetlab", *words, "--jobs", "1", "--out", str(tmp_path / "lab")]
    run = tmp_path / "lab" / "runs" / "plain-20-seed0"
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait(lambda: (run / "metrics.csv").is_file())
    killed.kill()
    killed.wait()
    wait(lambda: unlocked(run))
    assert "Stopped in epoch" in (run / "log.txt").read_text()
    going_on = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait(lambda: "Going on after step" in (run / "log.txt").read_text())
    going_on.send_signal(signal.SIGINT)
    out, err = going_on.communicate(timeout=120)
    assert going_on.returncode == 130, err
    assert "Go on with: resnetlab lab degradation" in err and "start  plain-20-seed0, going on at" in out
    assert unlocked(run)


def unlocked(run: Path) -> bool:
    """Whether no process holds a run."""
    try:
        with rundir.locked(run):
            return True
    except ResNetLabError:
        return False


def wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.05)


def test_responses_are_those_of_the_batch_norms_of_the_layers(done: Outcome) -> None:
    run = api.load(Path(done.path) / "runs" / "deep-seed0")
    split = run.split()
    found = deviations(run.bundle, split, setup(precision="fp32"))
    assert len(found) == 19  # 6n + 1 layers of 3×3; shortcuts are option A, so there are no others
    assert all(0 < value < 20 for value in found)
    norm = run.bundle.model.get_submodule("bn1")
    seen = []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    run.evaluate()
    hook.remove()
    import torch

    assert found[0] == pytest.approx(float(torch.cat(seen).double().std(correction=0)), rel=1e-6)


def test_responses_take_the_networks_of_an_earlier_experiment(tmp_path: Path) -> None:
    settings = ("epochs=1", "data.limit=100", "data.limit_test=40")
    lab("degradation", out=tmp_path / "first", seeds=1, jobs=2, settings=settings, quiet=True)
    found = lab("responses", out=tmp_path / "second", runs=tmp_path / "first", quiet=True)
    assert (found.plan.request.seeds, found.plan.request.settings) == (1, settings), "those of the networks"
    assert "--seeds" not in found.command and "--runs" in found.command
    with pytest.raises(UsageError, match="are trained already; leave out epochs=2"):
        lab("responses", out=tmp_path / "third", runs=tmp_path / "first", settings=["epochs=2"], quiet=True)
    with pytest.raises(UsageError, match="are trained already; leave out --budget 2h --seeds 3"):
        lab("responses", out=tmp_path / "third", runs=tmp_path / "first", budget="2h", seeds=3, quiet=True)
    assert not (tmp_path / "second" / "runs").exists()
    assert {row[0]: row[1] for row in found.finding.sheets[0].rows} == {
        "plain-20": 19, "plain-56": 55, "ResNet-20": 19, "ResNet-56": 55,
    }  # fmt: skip
    assert len(found.verdicts) == 4
    shown = (tmp_path / "second" / "report.html").read_text()
    assert "Responses by layer, sorted" in shown and "layer 55" in shown


def test_responses_take_no_networks_that_were_trained_on_other_data(done: Outcome, tmp_path: Path) -> None:
    first = tmp_path / "degradation"
    first.mkdir()
    plan = json.loads((Path(done.path) / "lab.json").read_text())
    trained_on = plan["request"]["data"]
    (first / "lab.json").write_text(json.dumps(plan))
    chosen, beside = experiments.experiment("responses"), tmp_path / "responses"
    assert conducting._source(chosen, None, beside, None) == str(first)
    assert conducting._source(chosen, None, beside, trained_on) == str(first)
    assert conducting._source(chosen, None, beside, "elsewhere") is None
    assert conducting._source(chosen, first, beside, sources.settled("DIGITS")) == str(first)
    with pytest.raises(UsageError, match=f"were trained on {trained_on}; leave out elsewhere"):
        conducting._source(chosen, first, beside, "elsewhere")
    theirs = plan["request"]["budget"]
    assert conducting._source(chosen, None, beside, None, (), theirs, 1) == str(first)
    assert conducting._source(chosen, None, beside, None, (), "1d", 1) is None
    assert conducting._source(chosen, None, beside, None, (), theirs, 3) is None
    (first / "lab.json").write_text("{")
    assert conducting._source(chosen, None, beside, None) is None, "that experiment says itself that it is damaged"


def test_costs_are_counted_twice_and_measured(tmp_path: Path) -> None:
    listed = [complexity.Case(name="ResNet-20 (CIFAR)", model="resnet20", size=32, classes=10, batch=2)]
    told: list[str] = []
    found = complexity.measure(tmp_path, told.append, listed)
    row = dict(zip(found.sheets[0].columns, found.sheets[0].rows[0], strict=True))
    assert (row["parameters"], row["multiply-adds"]) == (269_722, 40_551_040)
    assert float(str(row["train, ms/image"])) > float(str(row["infer, ms/image"])) > 0
    assert found.verdicts[-1].held and len(told) == 1
    assert complexity.measure(tmp_path, told.append, listed) == found and len(told) == 1
    for damaged in ('{"a', '{"x": {"parameters": 1}}', "[]"):
        (tmp_path / "costs.json").write_text(damaged)
        with pytest.raises(ResNetLabError, match=r"costs\.json"):
            complexity.measure(tmp_path, told.append, listed)


@pytest.mark.parametrize(
    ("model", "stride_on", "macs"),
    [("resnet34", "3x3", 3.663761), ("resnet50", "1x1", 3.857973), ("resnet50", "3x3", 4.089184)],
)
def test_both_counters_agree_on_the_networks_of_table_1(model: str, stride_on: str, macs: float) -> None:
    case = complexity.Case(name=model, model=model, size=224, classes=1000, batch=1, stride_on=stride_on)
    found = complexity.cost(case, passes=1)
    assert found.macs == found.checked
    assert round(found.macs / 1e9, 6) == macs
