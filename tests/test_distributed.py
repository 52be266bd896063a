"""Several processes compute what one computes: the same gradients, every image scored once."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnetlab
from resnetlab import runtime, session
from resnetlab.config import ModelConfig, Recipe
from resnetlab.console import Quiet
from resnetlab.errors import UsageError
from resnetlab.sources.dataset import Dataset

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


@pytest.mark.parametrize(("processes", "status"), [("1", 9), ("2", 0)])
def test_one_of_several_processes_ends_before_the_shutdown_of_python(processes: str, status: int) -> None:
    """Gloo's threads abort that shutdown now and then; here something does so for certain."""
    code = "import atexit, os; atexit.register(os._exit, 9); from resnetlab.cli import main; main(['--version'])"
    environment = {**os.environ, "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status
    assert done.stdout.strip() == resnetlab.__version__ or processes == "1"


def test_an_environment_that_does_not_say_where_the_others_are_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers and container images leave such variables set."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2.*MASTER_ADDR.*unset WORLD_SIZE"):
        runtime.setup("cpu", "fp32")


def test_a_batch_too_small_for_the_processes_is_refused(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    here = runtime.Runtime(device=cpu, precision=runtime.Precision("fp32", cpu), world_size=4)
    monkeypatch.setattr(runtime, "setup", lambda *_, **__: here)
    chosen = Recipe(name="x", model=ModelConfig(name="linear"), epochs=1, batch_size=7)
    with pytest.raises(UsageError, match="batch_size=7 is too small for 4 processes"):
        session.resolve("tiny", tiny, chosen, Quiet())
