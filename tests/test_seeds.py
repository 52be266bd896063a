"""Several seeds: each run by itself, mean and spread over them, and nothing done twice."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import resnetlab as rl
from resnetlab import seeds, session
from resnetlab.console import Quiet
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.session import Interrupted

FAST = ["epochs=1", "batch_size=128"]


def test_spread_is_student_s() -> None:
    found = seeds.spread([0.90, 0.92, 0.94, 0.95])
    assert found.mean == pytest.approx(0.9275)
    assert found.std == pytest.approx(np.std([0.90, 0.92, 0.94, 0.95], ddof=1))
    assert found.interval is not None and found.std is not None
    half = 3.18245 * found.std / 2  # t of 3 degrees of freedom
    assert found.interval[1] - found.mean == pytest.approx(half, rel=1e-5)
    one = seeds.spread([0.5])
    assert (one.mean, one.std, one.interval) == (0.5, None, None)
    assert seeds.spread([0.2, 0.9], 1.0).interval == (0.0, 1.0)
    high = seeds.spread([0.2, 0.9]).interval
    assert high is not None and high[1] > 1


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    found = [seeds.spread([float(v) for v in generator.normal(5, 1, 4)]).interval for _ in range(2000)]
    inside = np.mean([low <= 5 <= high for low, high in filter(None, found)])
    assert 0.93 < inside < 0.97


def test_each_seed_is_the_run_that_it_would_be_alone_and_none_is_repeated(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "three"
    status, text, err = command("train", "--seeds", "2", "--out", out, "--seed", "4", *FAST)
    assert (status, err) == (0, "")
    assert "mean and deviation of 2 runs" in text and "95 % interval of the mean" in text
    assert sorted(p.name for p in out.iterdir()) == ["seed-4", "seed-5", "seeds.json"]
    alone = rl.train("digits", out=tmp_path / "alone", seed=5, settings=FAST, display=Quiet())
    weights = (out / "seed-5" / "model.safetensors").read_bytes()
    assert weights == (alone.path / "model.safetensors").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent != out}
    status, text, _ = command("train", "--seeds", "3", "--out", out, "--seed", "4", *FAST)
    assert status == 0 and "mean and deviation of 3 runs" in text
    assert {p: p.stat().st_mtime_ns for p in before} == before
    document = json.loads((out / "seeds.json").read_text())
    assert document["runs"] == {"4": "seed-4", "5": "seed-5", "6": "seed-6"}
    scores = [json.loads((out / f"seed-{n}" / "scores.json").read_text())["test"]["top1"] for n in (4, 5, 6)]
    top1 = document["summary"]["test"]["top1"]
    assert top1["values"] == scores and top1["mean"] == pytest.approx(np.mean(scores))
    assert top1["std"] == pytest.approx(np.std(scores, ddof=1))
    status, _, err = command("train", "--seeds", "3", "--out", out, "--seed", "4", "epochs=2", "batch_size=128")
    assert status == 1 and "settings was" in err and "Give another --out" in err


def test_what_was_interrupted_is_gone_on_with(tmp_path: Path) -> None:
    class Stop(Quiet):
        def step(self, record: Any, epochs: int, lr: float) -> None:
            if record.epoch == 2:
                os.kill(os.getpid(), 15)

    options: dict[str, Any] = {"count": 2, "out": tmp_path / "two", "settings": ["epochs=2", "batch_size=128"]}
    with pytest.raises(Interrupted, match="give the same command again") as stopped:
        seeds.train_seeds("digits", display=Stop(), **options)
    assert stopped.value.exit_status == 128 + 15
    found = seeds.train_seeds("digits", display=Quiet(), **options)
    alone = rl.train("digits", out=tmp_path / "alone", settings=options["settings"], display=Quiet())
    assert (found.runs[0] / "metrics.csv").read_bytes() == (alone.path / "metrics.csv").read_bytes()
    assert list(found.runs) == [0, 1] and math.isfinite(found.summary["test"]["loss"].mean)


@pytest.mark.parametrize("finished", [False, True])
def test_a_stop_while_a_run_is_scored_begins_no_other(tmp_path: Path, finished: bool) -> None:
    class Stop(Quiet):
        def line(self, text: str) -> None:
            if text.startswith("test " if finished else "epoch"):
                os.kill(os.getpid(), 15)

    options: dict[str, Any] = {"count": 2, "out": tmp_path / "two", "settings": FAST}
    with pytest.raises(Interrupted, match="when the run was finished" if finished else "give the same command again"):
        seeds.train_seeds("digits", display=Stop(), **options)
    assert (tmp_path / "two" / "seed-0" / "scores.json").exists() == finished
    assert not (tmp_path / "two" / "seed-1").exists()
    assert list(seeds.train_seeds("digits", display=Quiet(), **options).runs) == [0, 1]


def test_a_run_that_was_made_but_not_begun_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"count": 1, "out": tmp_path / "one", "settings": FAST, "display": Quiet()}
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "run", lambda self: (_ for _ in ()).throw(ResNetLabError("cut off")))
        with pytest.raises(ResNetLabError, match="cut off"):
            seeds.train_seeds("digits", **options)
    found = seeds.train_seeds("digits", **options)
    assert found.summary["test"]["top1"].interval is None
    assert "one run" in seeds.lines(found)[0]


def test_mistakes_leave_nothing_behind(command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for words, text in [
        (["--seeds", "0"], "from 1 on"),
        (["--seeds", "2", "epoch=1"], 'Did you mean "epochs"'),
        (["--seeds", "2", "--model", "resnet19"], 'Did you mean "resnet18"'),
        (["--seeds", "2", "--resume", "x"], "--resume goes on"),
        (["--seeds", "2", "seed=abc"], "seed=abc is not a seed"),
        (["--seeds", "2", "seed=-1"], "seed=-1 is not a seed"),
    ]:
        status, out, err = command("train", "--out", "x", *words)
        assert (status, out) == (2, ""), err
        assert text in err
        assert not (tmp_path / "x").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one torchrun a seed"):
        seeds.train_seeds("digits", count=2)


def test_the_first_seed_may_be_a_setting(tmp_path: Path) -> None:
    found = seeds.train_seeds("digits", count=1, out=tmp_path / "x", settings=[*FAST, "seed=7"], display=Quiet())
    assert list(found.runs) == [7]
    assert json.loads((found.runs[7] / "config.json").read_text())["recipe"]["seed"] == 7


def test_a_tuple_is_the_same_setting_when_it_is_given_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"count": 1, "out": tmp_path / "one", "settings": FAST, "display": Quiet()}
    options["data.augment"] = ("crop:1", "flip")
    found = seeds.train_seeds("digits", **options)
    assert seeds.train_seeds("digits", **options) == found


def test_gradients_can_be_watched_when_a_seed_is_gone_on_with(command: Any, tmp_path: Path) -> None:
    words = ("train", "--seeds", "1", "--out", tmp_path / "one", *FAST)
    assert command(*words)[0] == 0
    assert command(*words, "--debug-batch")[0] == 0
