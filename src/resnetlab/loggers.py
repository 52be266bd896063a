"""Trackers that a run can also report to, beside its own files. To add one: a function and a row in `LOGGERS`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resnetlab.config import Recipe, flat
from resnetlab.errors import ResNetLabError, unknown
from resnetlab.metrics import EpochRecord, TimingRecord

Report = Callable[[EpochRecord, TimingRecord], None]


def tensorboard(path: Path, recipe: Recipe) -> Report:
    """Write TensorBoard events into the run directory: ``tensorboard --logdir RUN``."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path / "tensorboard"))
    writer.add_text("recipe", f"```\n{recipe.model_dump_json(indent=2)}\n```")

    def report(record: EpochRecord, timing: TimingRecord) -> None:
        for name, value in _values(record, timing).items():
            writer.add_scalar(name, value, record.step)
        writer.flush()

    return report


def mlflow(path: Path, recipe: Recipe) -> Report:
    """Report to MLflow, where MLFLOW_TRACKING_URI says; without it, to ``mlflow.db`` in the run directory.

    A run that is resumed goes on in the MLflow run that it began, and MLflow's own notion of an active run is left
    alone: several runs of one process do not meet.
    """
    import os
    import time
    from importlib.util import find_spec

    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    local = f"sqlite:///{path.absolute() / 'mlflow.db'}"
    place = os.environ.get("MLFLOW_TRACKING_URI", local)
    if place == local and find_spec("sqlalchemy") is None:
        raise ResNetLabError(
            "mlflow-skinny has no store of its own. Set MLFLOW_TRACKING_URI, or: pip install mlflow (or sqlalchemy "
            "and alembic)."
        )
    client = MlflowClient(tracking_uri=place, registry_uri=place)
    run = _mlflow_run(client, path)
    client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in flat(recipe).items()])

    def report(record: EpochRecord, timing: TimingRecord) -> None:
        now = int(1000 * time.time())
        found = _values(record, timing).items()
        client.log_batch(run, metrics=[Metric(name, value, now, record.step) for name, value in found])
        if record.epoch == recipe.epochs:
            client.set_terminated(run)

    return report


def _mlflow_run(client: Any, path: Path) -> str:
    """Return the identity of the MLflow run that a run directory began, or of a new one."""
    import os

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    mine = str(path.absolute())
    begun = [run for run in client.search_runs([experiment]) if run.data.tags.get("resnetlab.run") == mine]
    if begun:
        client.update_run(begun[0].info.run_id, status="RUNNING")
        return str(begun[0].info.run_id)
    return str(client.create_run(experiment, run_name=path.name, tags={"resnetlab.run": mine}).info.run_id)


def wandb(path: Path, recipe: Recipe) -> Report:
    """Report to Weights & Biases, with the account that is set up on this machine."""
    import wandb

    run = wandb.init(dir=str(path), name=path.name, config=recipe.model_dump())

    def report(record: EpochRecord, timing: TimingRecord) -> None:
        run.log(_values(record, timing), step=record.step)
        if record.epoch == recipe.epochs:
            run.finish()

    return report


LOGGERS: dict[str, Callable[[Path, Recipe], Report]] = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}


def check(name: str) -> None:
    """Make sure that a tracker exists and its package is installed.

    Raises:
        UsageError: There is no such tracker.
        ResNetLabError: Its package is missing.
    """
    from importlib.util import find_spec

    if name not in LOGGERS:
        raise unknown("logger", name, LOGGERS)
    if find_spec(name) is None:
        raise ResNetLabError(f'--logger {name} needs the package {name}: pip install "resnetlab[{name}]"')


def start(name: str, path: Path, recipe: Recipe) -> Report:
    """Start a tracker for a run.

    Raises:
        ResNetLabError: It cannot start, for example because nobody is logged in.
    """
    try:
        return LOGGERS[name](path, recipe)
    except Exception as error:  # a stranger's code, that talks to a network
        raise ResNetLabError(f"--logger {name} could not start: {error}") from error


def _values(record: EpochRecord, timing: TimingRecord) -> dict[str, Any]:
    both = asdict(record) | asdict(timing)
    return {k: float(v) for k, v in both.items() if v is not None and k not in ("epoch", "step")}
