"""The page of a comparison: the same file for several runs."""

from collections.abc import Callable
from pathlib import Path

from resnetlab.files import write_atomic
from resnetlab.metrics import EpochRecord
from resnetlab.report.html import Html, Panel, bar, duration, interval, join, paragraph, percent, quantity, table
from resnetlab.report.page import document
from resnetlab.report.records import Compared, Comparison, Duel
from resnetlab.report.scores import SPLITS
from resnetlab.report.svg import Line, line_chart

SURE = 0.05
"""Corrected p-value below which a difference counts as real."""


def scores(data: Comparison) -> Panel:
    """Put the runs' scores and costs beside each other, the best first."""
    rows = [
        (
            one.name,
            one.origin.model,
            bar(one.run.score.top1, percent(one.run.score.top1), f"run{i}"),
            interval(one.run.score.top1_interval),
            f"{one.run.score.loss:.4f}",
            quantity(one.origin.parameters),
            quantity(one.origin.macs),
            f"{len(one.run.epochs):,}" if one.run.epochs else "–",
            duration(one.seconds) if one.seconds else "–",
        )
        for i, one in ranked(data)
        if one.run.score
    ]
    names = ("run", "network", f"{SPLITS[data.split]} accuracy", "95 % interval", "loss", "parameters",
             "multiply-adds", "epochs", "training time")  # fmt: skip
    words = [verdict(data, duel) for duel in data.duels]
    n = len(data.runs[0].predictions.names)
    caption = f"All runs on the same {n:,} {SPLITS[data.split]} images, the best first."
    body = table(names, rows, label="Scores of the runs", text=2) + join([paragraph(word) for word in words[:6]])
    return Panel("Scores", Html(body), caption)


def ranked(data: Comparison) -> list[tuple[int, Compared]]:
    """Return the runs with their positions, the most accurate first."""
    rows = [(i, one) for i, one in enumerate(data.runs)]
    return sorted(rows, key=lambda row: -(row[1].run.score.top1 if row[1].run.score else 0))


def verdict(data: Comparison, duel: Duel) -> str:
    """Say in a sentence what came of a pair."""
    first, second, test = data.runs[duel.first].name, data.runs[duel.second].name, duel.test
    if test.only_first < test.only_second:
        first, second = second, first
    high, low = max(test.only_first, test.only_second), min(test.only_first, test.only_second)
    if high == low:
        return f"{first} and {second} do equally well: each is right on {high:,} images on which the other is wrong."
    real = "is better than" if duel.p < SURE else "is not shown to be better than"
    return (
        f"{first} {real} {second}: it is right on {high:,} images on which the other is wrong, wrong on {low:,} on "
        f"which the other is right ({p_value(duel.p)})."
    )


def p_value(p: float) -> str:
    """Write a p-value for people."""
    text = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def curves(data: Comparison) -> Panel:
    """Lay the runs' curves over each other."""
    longest = max((one.run.epochs for one in data.runs), key=len)
    if not longest:
        return Panel("Curves", paragraph("None of these runs recorded its epochs.", "quiet"))
    x = list(range(1, max(r.epoch for one in data.runs for r in one.run.epochs) + 1))

    def chart(label: str, value: Callable[[EpochRecord], float | None], form: Callable[[float], str]) -> Html:
        lines = []
        for i, one in enumerate(data.runs):
            at = {record.epoch: value(record) for record in one.run.epochs}
            lines.append(Line(one.name, f"run{i}", [at.get(epoch) for epoch in x]))
        return line_chart(label, x, lines, form)

    def times(share: float | None) -> float | None:
        return None if share is None else 100 * share

    charts = [
        chart("Validation accuracy", lambda r: times(r.val_top1), lambda v: f"{v:.4g} %"),
        chart("Training accuracy", lambda r: times(r.train_top1), lambda v: f"{v:.4g} %"),
        chart("Validation loss (nats per image)", lambda r: r.val_loss, lambda v: f"{v:.3g}"),
        chart("Training loss (nats per image)", lambda r: r.train_loss, lambda v: f"{v:.3g}"),
        chart("Learning rate, at the end of the epoch", lambda r: r.lr, lambda v: f"{v:.3g}"),
        _speed(data, x),
    ]
    caption = "Point at a chart, or move along it with the arrow keys, to read the values."
    return Panel("Curves", Html(f'<div class="charts">{"".join(charts)}</div>'), caption)


def _speed(data: Comparison, x: list[int]) -> Html:
    lines = []
    for i, one in enumerate(data.runs):
        at = {timing.epoch: timing.images_per_second for timing in one.run.timing}
        lines.append(Line(one.name, f"run{i}", [at.get(epoch) for epoch in x]))
    return line_chart("Speed (training images a second)", x, lines, lambda v: f"{v:,.0f}", zero=True)


def duels(data: Comparison) -> Panel:
    """Test the runs in pairs."""
    rows = [
        (
            data.runs[duel.first].name,
            data.runs[duel.second].name,
            f"{duel.test.both:,}",
            f"{duel.test.only_first:,}",
            f"{duel.test.only_second:,}",
            f"{duel.test.n - duel.test.both - duel.test.only_first - duel.test.only_second:,}",
            f"{duel.test.p:.2g}",
            f"{duel.p:.2g}",
        )
        for duel in data.duels
    ]
    names = ("first", "second", "both right", "only first", "only second", "both wrong", "p", "p, corrected")
    caption = (
        "McNemar’s exact test: of the images that only one of two runs gets right, how surprising would a split this "
        "uneven be, were both equally good? Corrected by Holm’s method for the number of pairs. It knows one training "
        "of each; another seed can turn a small difference round."
    )
    return Panel("Significance", table(names, rows, label="McNemar's test for each pair of runs", text=2), caption)


def changed(data: Comparison) -> Panel:
    """List the settings in which the runs differ."""
    if not data.changed:
        return Panel("What changed", paragraph("Nothing: the recipes are the same."))
    rows = [(key, *(setting(value) for value in values)) for key, values in data.changed.items()]
    names = ("setting", *(one.name for one in data.runs))
    return Panel("What changed", table(names, rows, label="Settings that differ", text=len(names)))


def setting(value: object) -> str:
    """Write a setting's value."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


PANELS: dict[str, Callable[[Comparison], Panel]] = {
    "scores": scores,
    "curves": curves,
    "significance": duels,
    "changed": changed,
}
"""In the order of the page."""


def render(data: Comparison) -> str:
    """Return the page of a comparison."""
    title = " and ".join(one.name for one in data.runs) if len(data.runs) == 2 else f"{len(data.runs)} runs compared"
    return document(title, {key: panel(data) for key, panel in PANELS.items()}, {})


def write(data: Comparison, path: Path) -> Path:
    """Write the page of a comparison, whole or not at all.

    Raises:
        ResNetLabError: The disk is full or the directory cannot be written.
    """
    write_atomic(path, render(data))
    return path
