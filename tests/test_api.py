"""The verbs in Python: they take nothing over from whoever calls them, and leave nothing behind."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnetlab import api
from resnetlab.console import Quiet
from resnetlab.errors import ResNetLabError


@contextlib.contextmanager
def default(set_it: Callable[[Any], object], wanted: object, before: object) -> Iterator[None]:
    """Let the caller of the package have chosen something for the whole process."""
    set_it(wanted)
    try:
        yield
    finally:
        set_it(before)


CALLERS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "another device": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def as_it_comes(tmp_path_factory: pytest.TempPathFactory) -> tuple[api.Run, float]:
    """A run made in a process where nothing was set, and its score."""
    run = trained(tmp_path_factory.mktemp("run") / "plain")
    return run, run.evaluate().loss


def trained(path: Path) -> api.Run:
    settings = ["epochs=1", "data.limit=200", "data.limit_test=50", "precision=fp32", "model.dropout=0.2"]
    return api.train("digits", model="resnet20", out=path, settings=settings, display=Quiet())


@pytest.mark.parametrize("caller", CALLERS)
def test_what_the_caller_has_set_changes_no_bit_and_stays_as_it_was(
    as_it_comes: tuple[api.Run, float], tmp_path: Path, caller: str
) -> None:
    def states() -> tuple[object, ...]:
        tensors = torch.get_default_dtype(), torch.get_default_device(), torch.get_rng_state().numpy().tobytes()
        switches = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        return *tensors, *switches, torch.backends.cudnn.benchmark

    plain, loss = as_it_comes
    with CALLERS[caller]():
        before = states()
        run = trained(tmp_path / "run")
        assert api.load(run.path).evaluate().loss == loss
        run.predict(np.zeros((8, 8, 1), np.uint8))
        run.explain(np.zeros((8, 8, 1), np.uint8), method="eigen-cam")
        assert states() == before
    for name, tensor in plain.bundle.model.state_dict().items():
        assert torch.equal(run.bundle.model.state_dict()[name], tensor), name


def test_one_process_trains_one_network_at_a_time(tmp_path: Path) -> None:
    with api.TRAINING, pytest.raises(ResNetLabError, match="training another network already"):
        trained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_stays_the_same_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = api.train("digits", model="linear", settings=["epochs=1", "data.limit=100"], display=Quiet())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run.bundle.path.parent == run.path == tmp_path / "runs" / "digits-linear-default"
