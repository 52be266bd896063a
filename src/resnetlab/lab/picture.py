"""The picture of an experiment, for a README or a talk: drawn as the paper draws its figures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnetlab.lab import words
from resnetlab.lab.curves import charts
from resnetlab.lab.records import ArmResult, Chart, Outcome, Series
from resnetlab.report import save
from resnetlab.report.text import drawable, wrap

COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#7A5195", "#B8860B", "#C2478D"),
    *("#4A8A8A", "#8C5A44", "#7FA800", "#9A9E9A"),
)
"""The first three after Okabe and Ito (2008); the page's colours of runs, `records.HUES` of them."""
INK, FAINT = "#222222", "#E4E4E0"


def all_charts(outcome: Outcome) -> tuple[Chart, ...]:
    """Return the charts of an experiment's page: errors over iterations, then what else was measured."""
    return (*charts(outcome.arms), *outcome.finding.charts)


def draw(outcome: Outcome) -> Figure | None:
    """Draw errors as in figure 6 (bold: held-back images, dashed: training), or the first other charts; None: nothing.

    The band around a bold line is the range over the seeds.
    """
    panels = list(outcome.finding.charts)
    arms = {one.arm.name: one for one in outcome.arms if one.traces}
    if panels:
        figure, axes = _canvas(outcome, len(panels))
        for chart, one in zip(panels, axes, strict=True):
            _lines(one, chart)
        return figure
    if arms:
        named = outcome.experiment.panels or (("", tuple(arms)),)
        figure, axes = _canvas(outcome, len(named))
        order = list(arms)
        for (title, names), one in zip(named, axes, strict=True):
            _errors(one, title, [arms[n] for n in names if n in arms], order)
        top = max(a.get_ylim()[1] for a in axes)
        for one in axes:
            one.set_ylim(0, min(100, top))
        return figure
    costs = [s for s in outcome.finding.sheets if "multiply-adds" in s.columns]
    if costs:
        figure, axes = _canvas(outcome, len(costs), height=1.7 + 0.27 * max(len(sheet.rows) for sheet in costs))
        for sheet, one in zip(costs, axes, strict=True):
            _costs(one, sheet.title, [dict(zip(sheet.columns, row, strict=True)) for row in sheet.rows])
        return figure
    return None


def write(outcome: Outcome, path: Path) -> Path | None:
    """Write the picture as a PNG; None: there is nothing to draw."""
    figure = draw(outcome)
    if figure is None:
        return None
    save(figure, path)
    return path


def _canvas(outcome: Outcome, count: int, *, height: float = 4.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(7.0, 5.6 * count), height), dpi=150, layout="constrained")
    columns = 100 if count > 1 else 68
    title = wrap(outcome.experiment.title, columns, lines=2)
    said = wrap(words.summary(outcome.verdicts) + _scale(outcome), 1.25 * columns, lines=3)
    figure.suptitle(title, color=INK, fontsize=12.5)
    (said,), families = drawable([said])  # the data's name may be in any script, and is not mathematics
    figure.supxlabel(said, fontsize=8.5, color="#5C6167", fontfamily=families, parse_math=False)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _scale(outcome: Outcome) -> str:
    plan = outcome.plan
    if not (plan.scale and plan.facts):
        return ""
    s, seeds = plan.scale, plan.request.seeds
    return (
        f" {plan.facts.name}, {s.images:,} images at {s.size} px, {s.iterations:,} iterations of {s.batch}, "
        f"{s.width:g} × width, {seeds} {'seeds' if seeds > 1 else 'seed'}."
    )


def _errors(axes: Axes, title: str, arms: Sequence[ArmResult], order: Sequence[str]) -> None:
    """Draw the errors of some networks over the iterations."""
    both = charts(arms)
    if not both:
        return
    training, held = both
    for line, bold in zip(training.series, held.series, strict=True):
        colour = COLOURS[order.index(line.name) % len(COLOURS)]
        axes.plot(*_points(training.x, line), color=colour, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.plot(*_points(held.x, bold), color=colour, linewidth=2.2, label=line.name)
        _band(axes, held.x, bold, colour)
    axes.plot([], [], color=INK, linewidth=2.2, label="held-back images")
    axes.plot([], [], color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="training")
    _dress(axes, title, "iteration", "error (%)")


def _lines(axes: Axes, chart: Chart) -> None:
    for series in chart.series:
        colour = COLOURS[series.colour % len(COLOURS)]
        dash = (0, (4, 2)) if series.name.startswith("plain") else "-"
        axes.plot(*_points(chart.x, series), color=colour, linewidth=1.8, linestyle=dash, label=series.name)
    axes.set_ylim(bottom=0)
    _dress(axes, chart.title, chart.unit, chart.label)


def _points(x: Sequence[int], series: Series) -> tuple[list[int], list[float]]:
    """Return where a line is, without what is missing."""
    kept = [(i, y) for i, y in zip(x, series.y, strict=True) if y is not None]
    return [i for i, _ in kept], [y for _, y in kept]


def _band(axes: Axes, x: Sequence[int], series: Series, colour: str) -> None:
    rows = [(i, lo, hi) for i, lo, hi in zip(x, series.low, series.high, strict=False) if lo is not None]
    if rows:
        across, low, high = zip(*rows, strict=True)
        axes.fill_between(across, low, high, color=colour, alpha=0.18, linewidth=0)


def _costs(axes: Axes, title: str, rows: Sequence[dict[str, object]]) -> None:
    """Draw multiply-adds as bars, with the time of a training step written behind each."""
    names = [str(row["network"]) for row in rows]
    values = [float(str(row["multiply-adds"])) / 1e9 for row in rows]
    marked = ["#0072B2" if "ResNet" in name else "#9A9E9A" for name in names]
    axes.barh(names, values, color=marked, height=0.72)
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        milliseconds = float(str(row["train, ms/image"]))
        told = (
            f" {value:.3g} G, {milliseconds:,.0f} ms"
            if milliseconds >= 10
            else f" {value:.3g} G, {milliseconds:.1f} ms"
        )
        axes.text(value, i, told, va="center", fontsize=7.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.42 * max(values))
    axes.tick_params(labelsize=8)
    _dress(axes, title, "multiply-adds (G); time to train, an image", "", legend=False)


def _dress(axes: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    axes.set_title(title, fontsize=10.5, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8.5)
