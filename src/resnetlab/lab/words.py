"""How the report writes values, and what it says of an experiment as a whole."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnetlab.lab.records import Outcome, Sheet, Verdict
from resnetlab.report.html import duration, quantity

if TYPE_CHECKING:
    from resnetlab.seeds import Spread

GIB, MIB = 1 << 30, 1 << 20


def write(value: object, form: str) -> str:
    """Write a value for people, in one of the forms of `records.Sheet`."""
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if form == "percent":
        return f"{value:.2%}".replace("%", "\N{NO-BREAK SPACE}%")
    if form == "quantity":
        return quantity(value)
    if form == "seconds":
        return duration(value)
    if form == "bytes":
        large = value >= GIB
        size = f"{value / GIB:.2f}" if large else f"{value / MIB:,.0f}"
        return size + ("\N{NO-BREAK SPACE}GiB" if large else "\N{NO-BREAK SPACE}MiB")
    if form:
        digits, _, sign = form.partition(" ")
        return f"{value:,{digits}}" + (f"\N{NO-BREAK SPACE}{sign}" if sign else "")
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def mean(spread: "Spread | None") -> str:
    """Write a mean error with its deviation over the seeds: ``12.3 ± 0.4 %``."""
    if spread is None:
        return "–"
    deviation = f" ± {100 * spread.std:.2f}" if spread.std is not None else ""
    return f"{100 * spread.mean:.2f}{deviation}\N{NO-BREAK SPACE}%"


def interval(spread: "Spread | None") -> str:
    """Write the 95 % interval of the mean."""
    if spread is None or spread.interval is None:
        return "–"
    low, high = spread.interval
    return f"{100 * low:.1f} to {100 * high:.1f}\N{NO-BREAK SPACE}%"


def mark(held: bool | None) -> str:
    """Say in a word how a claim fared."""
    return {True: "held", False: "did not hold", None: "undecided"}[held]


def summary(verdicts: Sequence[Verdict]) -> str:
    """Say in a sentence how the claim fared as a whole."""
    if not verdicts:
        return "Nothing was finished that the claim could be held against."
    held, failed = sum(v.held is True for v in verdicts), sum(v.held is False for v in verdicts)
    total = len(verdicts)
    if held == total:
        return f"The claim held in what was measured here, in {total} of {total} parts."
    undecided = total - held - failed
    words = [f"{held} of {total} parts of the claim held"]
    words += [f"{failed} did not"] if failed else []
    words += [f"{undecided} cannot be decided from these runs"] if undecided else []
    return ", ".join(words) + "."


def written(sheet: Sheet) -> list[tuple[str, ...]]:
    """Return a sheet's rows as people read them."""
    return [
        tuple(write(value, sheet.forms.get(name, "")) for name, value in zip(sheet.columns, row, strict=True))
        for row in sheet.rows
    ]


def figures(outcome: Outcome) -> Sheet:
    """Make the table of error rates, the paper's beside ours."""
    sourced = any(one.arm.source for one in outcome.arms)
    rows = []
    for one in outcome.arms:
        rows.append(
            (
                one.arm.name,
                *([one.arm.source] if sourced else []),
                mean(one.training),
                mean(one.test),
                interval(one.test),
                "–" if one.arm.paper is None else f"{one.arm.paper:.2f}\N{NO-BREAK SPACE}%",
                write(one.parameters or None, "quantity"),
                write(one.macs or None, "quantity"),
                str(len(one.traces)),
                write(sum(t.seconds for t in one.traces) / len(one.traces) if one.traces else None, "seconds"),
            )
        )
    tested = next((t.n for one in outcome.arms for t in one.traces if t.n), 0)
    facts = outcome.plan.facts
    split = "" if facts is None or facts.test else " of its validation split, as the data has no test split"
    return Sheet(
        name="figures",
        title="Error rates",
        columns=(
            "network",
            *(["source"] if sourced else []),
            "training error",
            "test error",
            "95 % interval",
            "in the paper",
            "parameters",
            "multiply-adds",
            "seeds",
            "time a run",
        ),
        rows=tuple(rows),
        caption="Mean and standard deviation over the seeds, the interval by Student’s t. Training error: over the "
        "last epoch, as the weights moved. Test error, also the paper’s: of the last weights"
        + (f", on {tested:,} images{split}" if tested else "")
        + ". The paper trained its networks at full width on all of CIFAR-10 for 64,000 iterations.",
        text=2 if sourced else 1,
    )


def runs(outcome: Outcome) -> Sheet:
    """Make the table of single runs."""
    rows = [
        (t.label, t.seed, t.training[-1], t.held_out[-1], t.test, t.iterations[-1], t.seconds, t.images_per_second)
        for one in outcome.arms
        for t in one.traces
    ]
    percents = dict.fromkeys(("training error", "held-back error", "test error"), "percent")
    return Sheet(
        name="runs",
        title="Every run",
        columns=(
            "run",
            "seed",
            "training error",
            "held-back error",
            "test error",
            "iterations",
            "time",
            "training images/s",
        ),
        rows=tuple(rows),
        caption="Each is a complete run directory below runs/, with its own curves, log and weights.",
        forms={**percents, "time": "seconds", "training images/s": ".0f"},
    )
