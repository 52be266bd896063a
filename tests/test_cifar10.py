"""Real CIFAR-10 (a JPEG copy of it): a few hundred steps reach what they should, neither less nor more."""

import json
from pathlib import Path

import pytest

import resnetlab as rl
from resnetlab.console import Quiet


@pytest.mark.slow
def test_one_epoch_of_resnet20_lands_between_two_bounds(real_data: Path, tmp_path: Path) -> None:
    data = real_data / "data" / "cifar10"
    run = rl.train(data, model="resnet20", out=tmp_path / "run", epochs=1, display=Quiet())
    scores = json.loads((run.path / "scores.json").read_text())
    assert (scores["val"]["n"], scores["test"]["n"]) == (5_000, 10_000)
    # 352 steps of 128. Far above would mean that something leaked; far below, that something broke.
    assert 0.42 <= scores["test"]["top1"] <= 0.66
    assert abs(scores["test"]["top1"] - scores["val"]["top1"]) < 0.04
    again = rl.load(run.path).evaluate()
    assert again.confusion.tolist() == scores["test"]["confusion"]
