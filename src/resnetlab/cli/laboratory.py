"""`lab`: the paper's experiments."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnetlab.cli.output import Json, line, print_json, table
from resnetlab.errors import ResNetLabError, UsageError

if TYPE_CHECKING:
    from resnetlab.lab.records import Outcome


def lab(
    *words: str,
    budget: str | None = None,
    out: Path | None = None,
    seeds: int | None = None,
    jobs: int | None = None,
    runs: Path | None = None,
    json: Json = False,
) -> None:
    """Repeat an experiment of the paper: resnetlab lab NAME [DATA] [--budget 30m|2h|full] [key=value ...]

    Without NAME: the experiments, a line each. What was stopped goes on when the command is given again.

    Parameters
    ----------
    words
        NAME, DATA (by default the packaged digits; the paper's is cifar10), and settings of every run.
    budget
        The time there is, such as 30m or 2h: size, width, data and iterations are cut to fit. full: all 64,000
        iterations of the paper. By default 30m.
    out
        The directory; by default lab/NAME.
    seeds
        How often each network is trained; by default twice.
    jobs
        Runs at a time; by default as many as the machine has room for.
    runs
        For responses: the directory of an earlier experiment, whose trained networks are looked at.
    """
    from resnetlab.lab.experiments import about

    settings = [w for w in words if "=" in w and not Path(w).exists()]
    named = [w for w in words if w not in settings]
    if not named:
        if json:
            print_json([{"name": name, "about": text} for name, text in about()])
            return
        table("experiments: resnetlab lab NAME [DATA]", ("name", "about"), [*about()])
        return
    if len(named) > 2:
        raise UsageError(f"There can be one NAME and one DATA, but these were given: {', '.join(named)}.")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs takes a number of runs from 1 on, not {jobs}.")
    from resnetlab.lab import lab as run

    name, data = named[0], named[1] if len(named) > 1 else None
    outcome = run(
        name, data, budget=budget, out=out, seeds=seeds, jobs=jobs, settings=settings, runs=runs, quiet=bool(json)
    )
    if json:
        print_json(outcome.to_dict())
    else:
        _show(outcome)
    if outcome.failures:
        failed = "; ".join(f"{one.label}: {one.reason}" for one in outcome.failures)
        raise ResNetLabError(f"{len(outcome.failures)} of {len(outcome.plan.runs)} runs failed. {failed}")


def _show(outcome: "Outcome") -> None:
    """Print the figures, then whether the claim held."""
    from resnetlab.lab import words

    sheets = [sheet for sheet in outcome.finding.sheets if sheet.title]
    if any(one.traces for one in outcome.arms):
        sheets.insert(0, words.figures(outcome))
    for sheet in sheets:
        table(sheet.title, sheet.columns, words.written(sheet))
    for verdict in outcome.verdicts:
        line(f"{words.mark(verdict.held):<12} {verdict.claim} {verdict.why}")
    line(f"claim   {words.summary(outcome.verdicts)}")
    line(f"report  {Path(outcome.path) / 'report.html'}: open it in a browser")
