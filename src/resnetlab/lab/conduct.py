"""An experiment from beginning to end: plan it, train what is missing, measure, write the report."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote

from resnetlab import files, loader, rundir, runtime, sources
from resnetlab.config import early_flag, early_number, parse
from resnetlab.console import duration
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.lab import budget, complexity, page, picture, results, speed, tables
from resnetlab.lab.experiments import experiment
from resnetlab.lab.records import Experiment, Facts, Failure, Finding, Outcome, Plan, Request, Run
from resnetlab.lab.runner import RUNS, Board, Runner
from resnetlab.threads import cores

PLAN, PAGE, PICTURE, OUTCOME = "lab.json", "report.html", "figure.png", "outcome.json"
DEFAULT_DATA, BUDGET, SEEDS = "digits", "30m", 2
MEMORY_EACH = 1.2e9
"""Bytes that a run takes besides its network, at least: the interpreter, PyTorch, the images."""


def conduct(
    name: str,
    data: str | Path | None = None,
    *,
    budget: str | None = None,
    out: str | Path | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    settings: Sequence[str] = (),
    runs: str | Path | None = None,
    board: Board,
) -> Outcome:
    """Run an experiment in a directory, or go on with it.

    Args:
        name: A row of `experiments.EXPERIMENTS`.
        data: As `train` takes it; None: the packaged digits.
        budget: ``30m``, ``2h``, or ``full``; None: ``30m``.
        out: The directory; None: ``lab/NAME``. The same request there goes on; finished runs are never repeated.
        seeds: How often each network is trained; None: twice.
        jobs: Runs at a time; None: as many as there is room for.
        settings: ``key=value`` of every run.
        runs: For ``responses``: the directory of an earlier experiment whose trained networks are looked at.
        board: Where it is shown.

    Raises:
        UsageError: A name, a setting or the budget is wrong.
        ResNetLabError: The directory holds something else, or is in use; the data cannot be used.
        Interrupted: It was stopped, and is saved.
    """
    chosen = experiment(name)
    path = Path(out) if out is not None else Path("lab") / name
    source = sources.settled(str(data)) if data is not None else DEFAULT_DATA
    for place in (path, source):
        rundir.check_name(place)
    trained = _source(chosen, runs, path, source if data is not None else None, settings, budget, seeds)
    source = _asked(Path(trained)).data if trained else source
    time, count = BUDGET if budget is None else budget, SEEDS if seeds is None else seeds
    request = _request(chosen, source, time, count, settings, trained)
    with _held(path):
        plan = _plan(chosen, request, path, board, jobs)
        failures: list[Failure] = []
        if plan.runs and request.source is None:
            runner = Runner(
                plan=plan,
                path=path,
                recipe=chosen.recipe,
                board=board,
                jobs=jobs or plan.jobs,
                threads=max(1, cores() // (jobs or plan.jobs)),
                command=_command(request, path),
                devices=_gpus(),
            )
            failures = runner.go()
        outcome = _outcome(chosen, plan, path, failures, board)
        _write(outcome, path)
    return outcome


def _request(
    chosen: Experiment, data: str, time: str, seeds: int, settings: Sequence[str], source: str | None
) -> Request:
    budget.seconds_of(time)
    if not 1 <= seeds <= 100:
        raise UsageError(f"--seeds takes a number of seeds from 1 to 100, not {seeds}.")
    if not chosen.arms:
        return Request(experiment=chosen.name, data="", budget="full", seeds=1)
    if source is not None:  # what they were trained with is theirs
        theirs = _asked(Path(source))
        return theirs.model_copy(update={"experiment": chosen.name, "source": source})
    return Request(experiment=chosen.name, data=data, budget=time, seeds=seeds, settings=tuple(settings))


def _source(
    chosen: Experiment,
    runs: str | Path | None,
    path: Path,
    data: str | None,
    settings: Sequence[str] = (),
    time: str | None = None,
    seeds: int | None = None,
) -> str | None:
    """Return whose networks are looked at: those named, or those of ``degradation`` beside this experiment.

    None: its own. ``data`` is what they are to be trained on, where the user says so; ``settings``, ``time`` and
    ``seeds`` are how.
    """
    if chosen.measure != "responses":
        if runs is not None:
            raise UsageError(f"--runs goes with responses; {chosen.name} trains its own networks.")
        return None
    if runs is not None:
        if not (Path(runs) / PLAN).is_file():
            raise UsageError(f"{runs} is not the directory of an experiment: there is no {PLAN} in it.")
        if data not in (None, other := _asked(Path(runs)).data):
            raise UsageError(f"The networks of {runs} were trained on {other}; leave out {data}.")
        options = [f"{key} {value}" for key, value in (("--budget", time), ("--seeds", seeds)) if value is not None]
        if how := [*settings, *options]:
            raise UsageError(f"The networks of {runs} are trained already; leave out {' '.join(how)}.")
        return os.path.abspath(runs)
    beside = path.parent / "degradation"
    if (beside / PLAN).is_file() and not settings and not (path / RUNS).is_dir():
        with contextlib.suppress(ResNetLabError):  # it is damaged, as that experiment will say
            theirs = _asked(beside)
            if data in (None, theirs.data) and time in (None, theirs.budget) and seeds in (None, theirs.seeds):
                return os.path.abspath(beside)
    return None


def _asked(path: Path) -> Request:
    """Return what an earlier experiment was asked for: the data, the budget, the seeds and the settings."""
    return parse(Plan, (path / PLAN).read_bytes(), str(path)).request


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Make the directory and hold it for this process; one in which nothing came about is taken away again."""
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    known = (PLAN, "costs.json", rundir.LOCK)
    if not any((path / name).is_file() for name in known) and any(path.iterdir()):
        raise ResNetLabError(f"{path} is not empty, and holds no experiment. Give another --out.")
    try:
        with _explained(path), rundir.locked(path):
            yield
    finally:
        if new:
            rundir.discard(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say that it is an experiment that is running there already."""
    try:
        yield
    except ResNetLabError as error:
        if str(error).startswith("Another process is training in"):
            raise ResNetLabError(f"Another experiment is running in {path}. Give another --out.") from error
        raise


def _plan(chosen: Experiment, request: Request, path: Path, board: Board, jobs: int | None) -> Plan:
    """Read the plan that was made before, or make one and write it down."""
    kept = path / PLAN
    if kept.is_file():
        plan = parse(Plan, kept.read_bytes(), str(kept))
        before, now = plan.request.model_dump(), request.model_dump()
        if differ := [key for key in now if before[key] != now[key]]:
            raise ResNetLabError(
                f"{path} holds another experiment ("
                + "; ".join(f"{key} was {_short(before[key])}, now {_short(now[key])}" for key in differ)
                + "). Give another --out."
            )
        return plan
    plan = _made(chosen, request, board, jobs)
    rundir.write_json(kept, plan.model_dump(mode="json"))
    for word in plan.words:
        board.line(f"cut    {word}")
    if plan.seconds:
        board.line(
            f"plan   {len(plan.runs)} runs, {plan.jobs} at a time: about {duration(plan.seconds)} "
            f"({path / PLAN} lists them)"
        )
    return plan


def _made(chosen: Experiment, request: Request, board: Board, jobs: int | None) -> Plan:
    if not chosen.arms:
        return Plan(request=request)
    if request.source is not None:
        other = parse(Plan, (Path(request.source) / PLAN).read_bytes(), request.source)
        return other.model_copy(update={"request": request, "seconds": 0.0})
    if request.data == DEFAULT_DATA:
        board.line("data   the 1,797 digits that come along. The paper's data is cifar10: name it as DATA.")
    facts = _facts(request)
    at_once = jobs or max(1, min(cores(), len(_gpus()) or cores(), len(chosen.arms) * request.seeds, _room()))
    board.line(f"budget {request.budget}: measuring how fast the networks train here, {at_once} at a time")

    def measure(runs: Sequence[Run]) -> list[budget.Speed]:
        threads = max(1, cores() // at_once)
        found = speed.measure(runs, facts, chosen.recipe, at_once, threads, _gpus())
        rates = [_batch(run.settings) / one.seconds for run, one in zip(runs, found, strict=True)]
        told = ", ".join(f"{run.arm} {rate:,.0f}" for run, rate in zip(runs, rates, strict=True))
        size = next((s.partition("=")[2] for s in runs[0].settings if s.startswith("data.size=")), "")
        board.line(f"speed  at {size} px, images/s: {told}")
        return found

    return budget.plan(chosen, request, facts, measure, at_once)


def _facts(request: Request) -> Facts:
    dataset = sources.load(
        request.data,
        skip_broken=early_flag(request.settings, "data.skip_broken"),
        split_seed=early_number(request.settings, "data.split_seed") or 0,
    )
    height, width = loader.typical_shape(dataset.train)
    size = min(height, width)
    return Facts(
        name=dataset.name,
        train=len(dataset.train),
        test=len(dataset.test) if dataset.test else 0,
        val=len(dataset.val) if dataset.val else 0,
        size=size if size <= 64 else 224,
        classes=len(dataset.train.classes),
        channels=dataset.channels,
        mirrors=dataset.mirrors,
    )


def _outcome(chosen: Experiment, plan: Plan, path: Path, failures: Sequence[Failure], board: Board) -> Outcome:
    """Read what there is, and measure what is to be measured."""
    source = Path(plan.request.source) if plan.request.source else path
    arms = results.collect(chosen.arms, plan, source) if plan.runs else ()
    finding = Finding()
    if chosen.measure == "complexity":
        finding = complexity.measure(path, board.line, threads=cores())
    elif chosen.measure == "responses":
        from resnetlab.lab import responses

        finding = responses.measure(plan, source)
    judged = tuple(chosen.judge({one.arm.name: one for one in arms})) if chosen.judge else ()
    failed = {f.label for f in failures}
    missing = [r.label for r in plan.runs if not rundir.is_finished(source / RUNS / r.label) and r.label not in failed]
    return Outcome(
        experiment=chosen,
        plan=plan,
        path=str(path),
        command=_command(plan.request, path),
        machine=runtime.machine(),
        arms=arms,
        verdicts=(*judged, *finding.verdicts),
        finding=finding,
        failures=tuple(failures),
        missing=tuple(missing),
        seconds=sum(t.seconds for one in arms for t in one.traces),
    )


def _write(outcome: Outcome, path: Path) -> None:
    tables.write(outcome, path)
    picture.write(outcome, path / PICTURE)
    rundir.write_json(path / OUTCOME, outcome.to_dict())
    page.write(outcome, path / PAGE)


def _command(request: Request, path: Path) -> str:
    """Return the command that does it, or goes on with it."""
    words = ["resnetlab", "lab", request.experiment]
    if request.source:
        words += [request.data, "--runs", request.source]
    elif request.data:
        words += [request.data, *request.settings, "--budget", request.budget, "--seeds", str(request.seeds)]
    return " ".join(map(quote, [*words, "--out", str(path)]))


def _room() -> int:
    """Return how many runs the memory has room for."""
    return max(1, int(0.8 * runtime.total_memory() / MEMORY_EACH))


def _gpus() -> list[str]:
    """Return this machine's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return seen.split(",")[:count] if seen else [str(i) for i in range(count)]


def _batch(settings: Sequence[str]) -> int:
    return int([s.partition("=")[2] for s in settings if s.startswith("batch_size=")][-1])


def _short(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
