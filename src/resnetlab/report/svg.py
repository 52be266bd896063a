"""Charts as inline SVG: axes, lines, and the values that the page's script shows under the pointer."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resnetlab.analysis import Bin
from resnetlab.report.html import Html, esc, join

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 36
"""In the units of the drawing; a page scales it to the room there is."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One quantity over the epochs."""

    name: str
    kind: str
    """A CSS class, which has the colour."""
    values: Sequence[float | None]
    """One an x; None or not finite: nothing is drawn there."""


@dataclass(frozen=True)
class Rule:
    """A level, with the interval that it is known to, across the whole chart."""

    name: str
    kind: str
    value: float
    interval: tuple[float, float] | None = None


def line_chart(
    label: str,
    x: Sequence[int],
    lines: Sequence[Line],
    form: Format,
    *,
    rules: Sequence[Rule] = (),
    top: float = 0.0,
    zero: bool = False,
    unit: str = "epoch",
) -> Html:
    """Draw lines over epochs. The values are read with the pointer, with the arrow keys, or from the legend.

    Args:
        label: What is shown, above the chart and for who cannot see it.
        x: Epochs.
        lines: At most a dozen can be told apart.
        form: Writes a value, for the axis and the pointer.
        rules: Levels such as a final score.
        top: The axis does not go beyond; 0: as the values need.
        zero: The axis begins at 0.
        unit: What ``x`` counts.
    """
    lines = [line for line in lines if any(_drawable(v) for v in line.values)]
    values = [v for line in lines for v in line.values if v is not None and math.isfinite(v)]
    values += [v for rule in rules for v in (rule.value, *(rule.interval or ())) if math.isfinite(v)]
    if not values or not x:
        return Html(f'<p class="quiet">{esc(label)}: nothing was recorded.</p>')
    levels = ticks(min([0.0, *values] if zero else values), max(values))
    low, high = levels[0], min(levels[-1], top) if top and levels[-1] > top >= max(values) else levels[-1]
    across = _scale(min(x), max(x), LEFT, WIDTH - RIGHT)
    up = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes([v for v in levels if v <= high + 1e-12], _epoch_ticks(x), across, up, form, unit)]
    parts += [_rule(rule, up) for rule in rules if math.isfinite(rule.value)]
    parts += [_line(line, x, across, up) for line in lines]
    hover = {
        "x": [f"{unit} {e}" for e in x],
        "px": [round(across(e), 1) for e in x],
        "lines": [
            {
                "name": line.name,
                "kind": line.kind,
                "text": [form(v) if v is not None and math.isfinite(v) else "" for v in line.values],
                "py": [round(up(v), 1) if v is not None and math.isfinite(v) else None for v in line.values],
            }
            for line in lines
        ],
    }
    said = "; ".join(f"{line.name} ends at {form(_last(line.values))}" for line in lines)
    drawing = _drawing(join(parts), f"{label}. {said}. Arrow keys read the values.", WIDTH, HEIGHT, hover)
    return Html(
        f'<figure class="chart"><figcaption>{esc(label)}{_legend(lines, rules, form)}</figcaption>{drawing}</figure>'
    )


def reliability_chart(series: Sequence[tuple[str, str, Sequence[Bin]]]) -> Html:
    """Draw accuracy over confidence, a dot a bin, as large as the bin's share of the images.

    Args:
        series: (name, kind, bins) each.
    """
    size, margin = 340, 44
    across, up = _scale(0, 1, margin, size - 12), _scale(0, 1, size - margin, 12)
    levels = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts: list[str] = [_grid(levels, levels, across, up, lambda v: f"{v:.0%}", (margin, size - 12, 12, size - margin))]
    parts.append(f'<line class="ideal" x1="{across(0)}" y1="{up(0)}" x2="{across(1)}" y2="{up(1)}"/>')
    for name, kind, bins in series:
        total = max(sum(b.n for b in bins), 1)
        filled = [b for b in bins if b.n]
        path = " ".join(f"{across(b.confidence):.1f},{up(b.accuracy):.1f}" for b in filled)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for b in filled:
            told = f"{name}: {b.n:,} images called with {b.confidence:.1%} on average, {b.accuracy:.1%} of them right"
            parts.append(
                f'<circle class="dot {kind}" cx="{across(b.confidence):.1f}" cy="{up(b.accuracy):.1f}" '
                f'r="{3 + 9 * math.sqrt(b.n / total):.1f}"><title>{esc(told)}</title></circle>'
            )
    middle = (margin + size - 12) / 2
    parts.append(f'<text x="{middle}" y="{size - 8}" text-anchor="middle">confidence</text>')
    keys = join([f'<span class="key {kind}">{esc(name)}</span>' for name, kind, _ in series])
    label = "Reliability diagram: accuracy over confidence; on the diagonal both agree"
    return Html(
        '<figure class="chart square"><figcaption>Accuracy over confidence'
        f'<span class="keys">{keys}</span></figcaption>'
        f"{_drawing(join(parts), label, size, size)}</figure>"
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round levels from at or below ``low`` to at or above ``high``, at most about ``most`` steps."""
    if high - low < 1e-12 * max(abs(high), 1):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _epoch_ticks(x: Sequence[int]) -> list[float]:
    """Return whole epochs to label, the first and last among them where there is room."""
    first, last = min(x), max(x)
    if last - first <= 10:
        return [float(e) for e in range(first, last + 1)]
    return [t for t in ticks(first, last, 7) if first <= t <= last and t == int(t)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Map [low, high] to [start, end]; a single value goes to the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(levels: Sequence[float], epochs: Sequence[float], across: Format | Callable[[float], float],
          up: Callable[[float], float], form: Format, unit: str) -> Html:  # fmt: skip
    grid = _grid(epochs, levels, across, up, form, (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM), upright=False)  # type: ignore[arg-type]
    label = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{unit}</text>'
    return Html(grid + label)


def _grid(
    columns: Sequence[float],
    levels: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    form: Format,
    frame: tuple[float, float, float, float],
    *,
    upright: bool = True,
) -> Html:
    """Draw grid lines with their values; ``frame`` is left, right, top, bottom."""
    left, right, top, bottom = frame
    parts = []
    for value in levels:
        y = up(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{esc(form(value))}</text>')
    for value in columns:
        x = across(value)
        if upright:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        text = form(value) if upright else f"{value:.0f}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{esc(text)}</text>')
    return join(parts)


def _line(line: Line, x: Sequence[int], across: Callable[[float], float], up: Callable[[float], float]) -> Html:
    """Draw a line, broken where values are missing, and its points where they are few."""
    runs: list[list[str]] = [[]]
    for epoch, value in zip(x, line.values, strict=True):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append(f"{across(epoch):.1f},{up(value):.1f}")
    parts = [f'<polyline class="line {line.kind}" points="{" ".join(run)}"/>' for run in runs if len(run) > 1]
    dots = [point for run in runs if len(x) <= 40 or len(run) == 1 for point in run]
    parts += ['<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>'.format(line.kind, *dot.split(",")) for dot in dots]
    return join(parts)


def _rule(rule: Rule, up: Callable[[float], float]) -> Html:
    y, band = up(rule.value), ""
    if rule.interval:
        upper, lower = up(rule.interval[1]), up(rule.interval[0])
        band = (
            f'<rect class="band {rule.kind}" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{upper:.1f}" '
            f'height="{max(lower - upper, 0):.1f}"/>'
        )
    return Html(f'{band}<line class="rule {rule.kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')


def _legend(lines: Sequence[Line], rules: Sequence[Rule], form: Format) -> Html:
    """Name each line with its last value."""
    keys = [f'<span class="key {k.kind}">{esc(k.name)} <b>{esc(form(_last(k.values)))}</b></span>' for k in lines]
    keys += [
        f'<span class="key dashed {k.kind}">{esc(k.name)} <b>{esc(form(k.value))}</b></span>'
        for k in rules
        if math.isfinite(k.value)
    ]
    return Html(f'<span class="keys">{"".join(keys)}</span>')


def _drawing(content: str, label: str, width: int, height: int, hover: dict[str, object] | None = None) -> Html:
    data = f' tabindex="0" data-chart="{esc(json.dumps(hover, ensure_ascii=False))}"' if hover else ""
    return Html(
        f'<div class="plot"{data} role="img" aria-label="{esc(label)}"><svg viewBox="0 0 {width} {height}" '
        f'aria-hidden="true" focusable="false">{content}</svg></div>'
    )


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _last(values: Sequence[float | None]) -> float:
    return next(v for v in reversed(values) if v is not None and math.isfinite(v))
