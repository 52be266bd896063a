"""The page of an experiment: did the claim hold, by which figures, and what was cut. One file that opens offline."""

from collections.abc import Callable
from pathlib import Path

from resnetlab.files import write_atomic
from resnetlab.lab import words
from resnetlab.lab.picture import all_charts
from resnetlab.lab.records import Chart, Outcome, Sheet
from resnetlab.report.html import Html, Panel, details, duration, esc, heading, join, paragraph, table
from resnetlab.report.page import document
from resnetlab.report.svg import Line, line_chart

COLOURS = {True: "right", False: "wrong", None: "quiet"}


def claim(outcome: Outcome) -> Panel:
    """Say what is claimed and whether it held."""
    e = outcome.experiment
    rows = [
        (Html(f'<span class="{COLOURS[v.held]}"><b>{esc(words.mark(v.held))}</b></span>'), v.claim, v.why)
        for v in outcome.verdicts
    ]
    parts = [paragraph(words.summary(outcome.verdicts), "lead")]
    parts += [table(("here", "claim", "by these figures"), rows, label="Verdicts", text=3)] if rows else []
    if cut := _cut(outcome):
        parts += [heading("What these runs do not allow one to conclude"), paragraph(e.caution), cut]
    else:
        parts += [paragraph(e.caution, "quiet")]
    for failure in outcome.failures:
        parts.append(paragraph(f"{failure.label} failed: {failure.reason}", "note"))
    if outcome.missing:
        parts.append(paragraph(f"Not finished yet: {', '.join(outcome.missing)}.", "note"))
    return Panel("The claim", join(parts), f"{e.claim} ({e.place})")


def _cut(outcome: Outcome) -> Html:
    """List what was cut from the full experiment."""
    items = "".join(f"<li>{esc(word)}</li>" for word in outcome.plan.words)
    return Html(f"<ul>{items}</ul>") if items else Html("")


def curves(outcome: Outcome) -> Panel:
    """Draw everything that is a line."""
    drawn = "".join(_chart(chart) for chart in all_charts(outcome))
    caption = "Point at a chart, or move along it with the arrow keys, to read the values."
    if (seeds := outcome.plan.request.seeds) > 1:
        pictured = outcome.finding.charts or all_charts(outcome)
        ranges = any(series.low for chart in pictured for series in chart.series)
        shown = "; the picture beside this page also shows their range" if ranges else ""
        caption += f" Lines are means over {seeds} seeds{shown}."
    return Panel("Curves", Html(f'<div class="charts">{drawn}</div>'), caption)


def _chart(chart: Chart) -> Html:
    def form(value: float) -> str:
        return f"{value:.4g} %" if chart.form == "percent" else f"{value:.3g}"

    lines = [Line(series.name, f"run{series.colour}", series.y) for series in chart.series]
    title = chart.title if chart.form == "percent" else f"{chart.title} ({chart.label})"
    return line_chart(title, chart.x, lines, form, unit=chart.unit, zero=True)


def figures(outcome: Outcome) -> Panel:
    """Put our error rates beside the paper's, then every run."""
    sheet, runs = words.figures(outcome), words.runs(outcome)
    body = _sheet(sheet) + details("Every run", paragraph(runs.caption, "quiet") + _sheet(runs))
    return Panel(sheet.title, Html(body), sheet.caption)


def measured(outcome: Outcome) -> Panel:
    """Show what was measured beside error rates."""
    parts = []
    for sheet in outcome.finding.sheets:
        if sheet.title:
            parts += [heading(sheet.title), paragraph(sheet.caption, "quiet"), _sheet(sheet)]
    parts += [paragraph(word) for word in outcome.finding.words]
    return Panel("Measured", join(parts))


def _sheet(sheet: Sheet) -> Html:
    return table(sheet.columns, words.written(sheet), label=sheet.title or sheet.name, text=sheet.text)


def again(outcome: Outcome) -> Panel:
    """Say on what it was measured, and how to do it again."""
    plan, scale = outcome.plan, outcome.plan.scale
    facts = [("machine", outcome.machine), *([("budget", plan.request.budget)] if plan.runs else [])]
    if plan.facts and scale:
        facts += [
            ("data", f"{plan.facts.name}: {scale.images:,} training and {scale.test:,} test images"),
            ("image size", f"{scale.size} px"),
            ("iterations", f"{scale.iterations:,} of {scale.batch} images, {scale.epochs:,} epochs"),
        ]
    if outcome.seconds:
        facts.append(("sum of training times", duration(outcome.seconds)))
    if plan.seconds:
        facts.append(("planned, start to end", f"{duration(plan.seconds)} with {plan.jobs} runs at a time"))
    parts = [
        Html(f'<pre class="command" tabindex="0">{esc(outcome.command)}</pre>'),
        table(("", ""), facts, label="How it was measured", text=2),
    ]
    if plan.runs:
        rows = [(run.label, run.model, run.seed, " ".join(run.settings)) for run in plan.runs]
        listed = table(("run", "network", "seed", "settings"), rows, label="The runs as data", text=4)
        parts.append(details("The runs, as data", listed))
    return Panel("Do it again", join(parts), "The same seeds and settings give the same figures on the same machine.")


PANELS: dict[str, Callable[[Outcome], Panel]] = {
    "claim": claim,
    "curves": curves,
    "figures": figures,
    "measured": measured,
    "again": again,
}
"""In the order of the page; those that have nothing to show are left out."""


def render(outcome: Outcome) -> str:
    """Return the page of an experiment."""
    shown = {
        "claim": True,
        "curves": bool(all_charts(outcome)),
        "figures": any(one.traces for one in outcome.arms),
        "measured": any(sheet.title for sheet in outcome.finding.sheets),
        "again": True,
    }
    return document(outcome.experiment.title, {k: panel(outcome) for k, panel in PANELS.items() if shown[k]}, {})


def write(outcome: Outcome, path: Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        ResNetLabError: The disk is full or the directory cannot be written.
    """
    write_atomic(path, render(outcome))
    return path
