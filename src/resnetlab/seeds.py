"""The same run from several seeds: each in a directory of its own, then mean, spread and interval over the runs.

Giving the command again goes on with what is unfinished and repeats nothing that is done.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resnetlab import api, rundir
from resnetlab.config import early, early_number
from resnetlab.console import Display, Terminal
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.session import Interrupted

SUMMARY = "seeds.json"
MEASURES = ("top1", "top5", "loss", "calibration_error", "balanced_accuracy", "macro_f1")
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a figure was over several runs."""

    mean: float
    std: float | None
    """Of the runs (divided by n - 1); None for a single run."""
    interval: tuple[float, float] | None
    """95 % interval of the *mean*, from Student's t distribution; None for a single run."""
    values: tuple[float, ...]
    """In the order of the seeds."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Finished runs of one recipe that differ in their seed."""

    path: Path
    runs: dict[int, Path]
    """By seed, in order."""
    summary: dict[str, dict[str, Spread]]
    """By split and measure: ``summary["test"]["top1"].mean``."""


def train_seeds(
    data: str | Path = api.DEFAULT_DATA,
    *,
    count: int,
    out: str | Path | None = None,
    seed: int | None = None,
    model: str | None = None,
    recipe: str = "default",
    settings: Sequence[str] = (),
    display: Display | None = None,
    **options: Any,
) -> Seeds:
    """Train ``count`` runs in ``out/seed-N``, from ``seed`` on upwards, and write ``out/seeds.json``.

    Args:
        data: As `api.train` takes it, and all that follows but ``count``.
        count: How many. An earlier command's runs count; asking for more adds to them.
        out: The directory of all runs; None: a new one below ``runs``.
        seed: The first; None: a setting ``seed=N``, else 0.
        model: A row of `models.ARCHITECTURES`; None: the recipe chooses.
        recipe: A row of `recipes.RECIPES`.
        settings: Overrides as on the command line.
        display: Where the runs are shown; None: the terminal.
        **options: The other arguments of `api.train`: ``logger``, ``watch_test``, ...

    Raises:
        UsageError: ``count`` is below 1, this is one of several processes, or a name or a setting is wrong.
        ResNetLabError: ``out`` holds something else, or a run failed.
    """
    check_count(count)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--seeds runs in one process; start one torchrun a seed instead.")
    first = seed if seed is not None else _first(settings)
    request = {"data": str(data), "model": model, "recipe": recipe, "settings": list(settings), "first_seed": first}
    request |= {key: value for key, value in options.items() if key not in ("logger", "watch_test", "debug_batch")}
    request = json.loads(json.dumps(request))  # as it is read again: a tuple becomes a list
    path = _directory(out, request)
    runs = {n: path / f"seed-{n}" for n in range(first, first + count)}
    shared = {"model": model, "recipe": recipe, "settings": settings, "display": display, **options}
    try:
        for number, run in runs.items():
            _ensure(run, str(data), number, shared)
    except BaseException:
        _clear(path)
        raise
    found = Seeds(path=path, runs=runs, summary=_summary([rundir.read_json(p / rundir.SCORES) for p in runs.values()]))
    rundir.write_json(path / SUMMARY, _document(request, found))
    _show(found, display)
    return found


def check_count(count: int) -> None:
    """Make sure that a number of runs is one.

    Raises:
        UsageError: It is below 1.
    """
    if count < 1:
        raise UsageError(f"--seeds takes a number of runs from 1 on, not {count}.")


def _first(settings: Sequence[str]) -> int:
    """Return the seed that a setting names, else 0."""
    given, number = early(settings, "seed"), early_number(settings, "seed")
    if given is not None and number is None:
        raise UsageError(f"seed={given} is not a seed: a whole number from 0 on.")
    return number or 0


def spread(values: Sequence[float], highest: float = math.inf) -> Spread:
    """Return mean, standard deviation and the t interval of the mean, cut to what can be: 0 to ``highest``."""
    from scipy.stats import t

    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Spread(mean=mean, std=None, interval=None, values=tuple(values))
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
    return Spread(mean=mean, std=std, interval=(max(0.0, mean - half), min(highest, mean + half)), values=tuple(values))


def lines(found: Seeds) -> list[str]:
    """Return what a person reads at the end, a line a split."""
    texts = []
    for split, measures in found.summary.items():
        top1, loss = measures["top1"], measures["loss"]
        if top1.std is None or top1.interval is None or loss.std is None:
            texts.append(f"{split:<5} top-1 {top1.mean:.2%}  loss {loss.mean:.4f}  (one run: no spread)")
            continue
        low, high = top1.interval
        texts.append(
            f"{split:<5} top-1 {top1.mean:.2%} ± {top1.std:.2%} "
            f"(mean and deviation of {len(top1.values)} runs; 95 % interval of the mean {low:.2%} to {high:.2%})"
            f"  loss {loss.mean:.4f} ± {loss.std:.4f}"
        )
    return [*texts, f"saved {found.path / SUMMARY}"]


def _directory(out: str | Path | None, request: dict[str, Any]) -> Path:
    """Make the directory and note in it what was asked for, or check that it is of the same request."""
    if out is not None and (Path(out) / SUMMARY).is_file():
        before = rundir.read_json(Path(out) / SUMMARY)
        asked = before.get("request", {}) if isinstance(before, dict) else {}
        differ = [key for key in request if asked.get(key) != request[key]]
        if differ:
            raise ResNetLabError(
                f"{out} holds the seeds of another command ("
                + "; ".join(f"{key} was {asked.get(key)}, now {request[key]}" for key in differ)
                + "). Give another --out."
            )
        return Path(out)
    name = "-".join([Path(request["data"]).name, *([request["model"]] if request["model"] else []), request["recipe"]])
    path = rundir.create(out, f"{name}-seeds")
    rundir.write_json(path / SUMMARY, {"request": request})
    return path


def _clear(path: Path) -> None:
    """Take the directory away again where no run has begun in it: a name or a setting was wrong."""
    if not any(p.is_dir() for p in path.iterdir()):
        (path / SUMMARY).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.rmdir()


def _ensure(run: Path, data: str, seed: int, shared: dict[str, Any]) -> None:
    """Train a run, go on with it, or leave it alone when it is finished."""
    if rundir.is_finished(run):
        return
    try:
        if rundir.is_run(run):
            kept = {key: shared[key] for key in ("logger", "debug_batch", "display") if key in shared}
            api.resume(run, **kept)
        else:
            api.train(data, out=run, seed=seed, **shared)
    except Interrupted as error:
        number = error.exit_status - 128
        raise Interrupted(f"{error} For all seeds give the same command again.", number) from error


def _summary(scores: Sequence[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    return {
        split: {k: spread([s[split][k] for s in scores], math.inf if k == "loss" else 1.0) for k in MEASURES}
        for split in dict.fromkeys(split for s in scores for split in s)
        if all(split in s for s in scores)
    }


def _document(request: dict[str, Any], found: Seeds) -> dict[str, Any]:
    """Return what ``seeds.json`` holds."""
    return {
        "request": request,
        "command": rundir.typed(),
        "runs": {str(seed): run.name for seed, run in found.runs.items()},
        "level": LEVEL,
        "summary": {split: {k: asdict(v) for k, v in rows.items()} for split, rows in found.summary.items()},
    }


def _show(found: Seeds, display: Display | None) -> None:
    if display is not None:
        for line in lines(found):
            display.line(line)
        return
    with Terminal() as terminal:
        for line in lines(found):
            terminal.line(line)
