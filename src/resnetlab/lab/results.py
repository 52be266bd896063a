"""Reading the finished runs of an experiment: error rates over iterations, and their spread over the seeds."""

from collections.abc import Sequence
from pathlib import Path

from resnetlab import rundir
from resnetlab.config import ModelConfig, parse
from resnetlab.errors import ResNetLabError
from resnetlab.lab.records import Arm, ArmResult, Plan, Run, Trace
from resnetlab.lab.runner import RUNS
from resnetlab.seeds import spread


def collect(arms: Sequence[Arm], plan: Plan, path: Path) -> tuple[ArmResult, ...]:
    """Read what every arm measured; arms of which nothing is finished have no traces.

    Raises:
        ResNetLabError: A run's files are damaged.
    """
    planned = {run.arm for run in plan.runs}
    return tuple(_arm(arm, plan, path) for arm in arms if arm.name in planned)


def _arm(arm: Arm, plan: Plan, path: Path) -> ArmResult:
    from resnetlab import models

    runs = [run for run in plan.runs if run.arm == arm.name and rundir.is_finished(path / RUNS / run.label)]
    traces = tuple(_trace(run, path / RUNS / run.label) for run in runs)
    parameters = macs = 0
    if runs:
        config = rundir.read_json(path / RUNS / runs[0].label / rundir.CONFIG)
        network = parse(ModelConfig, _json(config["recipe"]["model"]), f"{runs[0].label}/{rundir.CONFIG}")
        cost = models.cost(network, int(config["preprocess"]["size"]))
        parameters, macs = cost.parameters, cost.macs
    tests = [t.test for t in traces if t.test is not None]
    return ArmResult(
        arm=arm,
        traces=traces,
        parameters=parameters,
        macs=macs,
        training=spread([t.training[-1] for t in traces], 1.0) if traces else None,
        test=spread(tests, 1.0) if tests else None,
    )


def _trace(run: Run, path: Path) -> Trace:
    data = rundir.read_run(path)
    if not data.epochs:
        raise ResNetLabError(f"{path} is finished, but has no {rundir.METRICS}. Remove it, and it is trained again.")
    return Trace(
        seed=run.seed,
        label=run.label,
        iterations=tuple(r.step for r in data.epochs),
        training=tuple(1 - r.train_top1 for r in data.epochs),
        held_out=tuple(None if r.val_top1 is None else 1 - r.val_top1 for r in data.epochs),
        test=None if data.score is None else 1 - data.score.top1,
        n=0 if data.score is None else data.score.n,
        seconds=sum(t.train_seconds + t.val_seconds for t in data.timing),
        images_per_second=sum(t.images_per_second for t in data.timing) / max(1, len(data.timing)),
    )


def _json(value: object) -> str:
    import json

    return json.dumps(value)
