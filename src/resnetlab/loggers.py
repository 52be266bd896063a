"""Trackers that a run can also report to, beside its own files. To add one: a function and a row in `LOGGERS`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resnetlab.config import Recipe
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
    """Report to MLflow, where MLFLOW_TRACKING_URI says; without it, to ``mlruns`` in the run directory."""
    import os

    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{path.absolute() / 'mlflow.db'}")
    mlflow.start_run(run_name=path.name)
    mlflow.log_params({k: str(v)[:500] for k, v in recipe.model_dump().items()})
    return lambda record, timing: mlflow.log_metrics(_values(record, timing), step=record.step)


def wandb(path: Path, recipe: Recipe) -> Report:
    """Report to Weights & Biases, with the account that is set up on this machine."""
    import wandb

    run = wandb.init(dir=str(path), name=path.name, config=recipe.model_dump())
    return lambda record, timing: run.log(_values(record, timing), step=record.step)


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
