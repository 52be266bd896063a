"""Trackers, each with its own package where that is installed."""

from pathlib import Path
from typing import Any

import pytest

from resnetlab import api
from resnetlab.console import Quiet

FEW = ("data.limit=200", "data.limit_test=50", "batch_size=100")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where MLflow keeps the runs of these tests: making its tables takes seconds."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'store.db'}"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: str) -> Any:
    """MLflow's client, in a folder of the test's own."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return MlflowClient(store)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_has_every_epoch_of_several_runs_of_a_process(client: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        out = tmp_path / f"run {seed}"
        run = api.train(
            model="linear", settings=(*FEW, "epochs=2"), seed=seed, out=out, logger="mlflow", display=Quiet()
        )
        lines = (run.path / "metrics.csv").read_text().splitlines()
        losses = [float(line.split(",")[lines[0].split(",").index("val_loss")]) for line in lines[1:]]
        (found,) = [r for r in client.search_runs(["0"]) if r.info.run_name == out.name]
        assert found.info.status == "FINISHED"
        assert found.data.params["seed"] == str(seed) and found.data.params["model.name"] == "linear"
        history = client.get_metric_history(found.info.run_id, "val_loss")
        assert [m.value for m in history] == pytest.approx(losses)
        assert [m.step for m in history] == sorted({m.step for m in history})
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_in_the_mlflow_run_that_it_began(client: Any, tmp_path: Path) -> None:
    class Impatient(Quiet):
        """Stops after the first epoch, as Ctrl-C does."""

        def line(self, text: str) -> None:
            if text.startswith("epoch 1/"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.train(
            model="linear",
            settings=(*FEW, "epochs=3"),
            out=tmp_path / "stopped",
            logger="mlflow",
            display=Impatient(),
        )
    api.resume(tmp_path / "stopped", logger="mlflow", display=Quiet())
    (found,) = [r for r in client.search_runs(["0"]) if r.info.run_name == "stopped"]
    assert found.info.status == "FINISHED"
    assert max(m.step for m in client.get_metric_history(found.info.run_id, "train_loss")) == _last_step(
        tmp_path / "stopped"
    )


def _last_step(run: Path) -> int:
    """Return the last step of a run's table."""
    return int((run / "metrics.csv").read_text().splitlines()[-1].split(",")[1])
