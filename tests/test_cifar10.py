"""Real CIFAR-10 (a JPEG copy of it): a few hundred steps reach what they should, neither less nor more."""

import json
from pathlib import Path

import pytest

import resnetlab as rl
from resnetlab.console import Quiet


@pytest.mark.slow
def test_a_few_hundred_steps_of_resnet20_land_between_two_bounds(real_data: Path, tmp_path: Path) -> None:
    data = real_data / "data" / "cifar10"
    settings = ["epochs=1", "batch_size=64", "data.limit=20000", "data.limit_test=5000"]
    run = rl.train(data, model="resnet20", out=tmp_path / "run", settings=settings, display=Quiet())
    scores = json.loads((run.path / "scores.json").read_text())
    assert (scores["val"]["n"], scores["test"]["n"]) == (2_000, 5_000)
    # 282 steps of 64. Far above would mean that something leaked; far below, that something broke.
    assert 0.42 <= scores["test"]["top1"] <= 0.66
    assert abs(scores["test"]["top1"] - scores["val"]["top1"]) < 0.04
    again = rl.load(run.path).evaluate()
    assert again.confusion.tolist() == scores["test"]["confusion"]
