"""Several processes compute what one computes: the same gradients, every image scored once."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import resnetlab
from resnetlab import checkpoint, divergence, runtime, session
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


def both(*command: str) -> list[subprocess.Popen[str]]:
    """Start Python twice, as a run of two processes that no torchrun looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **group, "RANK": rank},
        )
        for rank in ("0", "1")
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """Wait for the processes; return what each has printed and said."""
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    return found


@pytest.mark.slow
def test_when_one_process_is_asked_to_stop_all_is_saved_before_it_ends(tmp_path: Path) -> None:
    """torchrun ends the others as soon as one of its processes has ended."""
    path = tmp_path / "run"
    words = ("--model", "resnet20", "epochs=500", "data.limit=300", "data.limit_test=20", "--out", str(path))
    first, second = both("-m", "resnetlab", "train", *words)
    for _ in range(600):
        if (path / "metrics.csv").is_file() or first.poll() is not None:
            break
        time.sleep(0.1)
    for _ in range(2):  # as torchrun does whose processes were signalled with it
        second.send_signal(signal.SIGTERM)
    _, said = second.communicate(timeout=60)
    newest = checkpoint.load_newest(path / "checkpoint", print)
    assert newest is not None and f"step {newest.step}; all is saved" in said, said
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (143, 143)


@pytest.mark.slow
def test_processes_that_would_choose_different_precisions_take_the_weakest() -> None:
    code = (
        "import os; from resnetlab import runtime\n"
        "runtime.choose_precision = lambda *_: ('bf16', 'fp32')[int(os.environ['RANK'])]\n"
        "print(runtime.setup('cpu').precision.name, flush=True); runtime.leave_group(); os._exit(0)"
    )
    assert [out for out, _ in ended(both("-c", code))] == ["fp32\n", "fp32\n"]


@pytest.mark.slow
def test_the_process_whose_share_of_the_batch_is_bad_finds_out_and_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = f"""
import os
import resnetlab
from resnetlab import training
sound, calls = training.objective_sum, []
def objective_sum(logits, batch, smoothing):
    calls.append(batch)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        print(batch.labels.tolist(), flush=True)
        return sound(logits, batch, smoothing) * float("inf")
    return sound(logits, batch, smoothing)
training.objective_sum = objective_sum
try:
    resnetlab.train("digits", model="linear", out={str(path)!r}, debug_batch=True)
except resnetlab.ResNetLabError as error:
    print(error, flush=True)
os._exit(0)  # Gloo's threads abort Python's shutdown now and then
"""
    (said, _), (out, _) = ended(both("-c", code))
    labels, same = out.split("\n", 1)
    assert said.endswith(same) and "epoch 1, step 3" in same and "resnetlab replay" in same
    assert "Nothing had been saved before." in same
    found, tensors = divergence.read(path)
    assert tensors["labels"].tolist() == json.loads(labels)
    assert found.images[0] in same and same.strip() in (path / "log.txt").read_text()


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


def test_of_several_processes_one_speaks() -> None:
    code = "from resnetlab.cli import main; main(['models'])"
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == ""


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
