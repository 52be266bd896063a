"""Several processes compute what one computes: the same gradients, every image scored once."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = ("--model", "linear", "epochs=2", "batch_size=50", "optim.average=0", "data.skip_easy=0.3", "precision=fp32")
"""Without batch norm, in fp32: exact in any split. Images are left out in the second epoch."""


def train(path: Path, processes: int) -> list[dict[str, str]]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, "resnetlab", "train", "--out", str(path), *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader((path / "metrics.csv").read_text().splitlines()))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        for key in ("train_loss", "train_top1", "val_loss", "val_top1"):
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), key
    scores = [json.loads((tmp_path / run / "scores.json").read_text()) for run in ("one", "two")]
    assert scores[0]["test"]["n"] == scores[1]["test"]["n"] == 359
    assert scores[0]["test"]["confusion"] == scores[1]["test"]["confusion"]
