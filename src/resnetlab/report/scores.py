"""The panels of the page that show figures: what was done, the curves, confusions, classes, calibration."""

from collections.abc import Mapping, Sequence

import numpy as np

from resnetlab import analysis
from resnetlab.metrics import Predictions, Scorecard, calibration_error, cross_entropy
from resnetlab.report.html import (
    Html,
    Panel,
    bar,
    details,
    duration,
    esc,
    heading,
    interval,
    join,
    paragraph,
    percent,
    quantity,
    table,
)
from resnetlab.report.records import ReportData
from resnetlab.report.svg import Line, Rule, line_chart, reliability_chart

SPLITS = {"train": "training", "val": "validation", "test": "test"}
NUMBERED, NAMED, DRAWN = 20, 60, 120
"""A confusion matrix of up to so many classes has counts in its cells; of so many, names; of so many, all classes."""
BESIDE = 12
"""A matrix of up to so many classes leaves room for the list of pairs at its side."""
PAIRS = 10
"""Most confused pairs that are listed."""


def summary(data: ReportData) -> Panel:
    """Say in words what was done, how well it went, and how to do it again."""
    parts = [_tiles(data), paragraph(_story(data), "lead")]
    parts += [paragraph(note, "note") for note in data.notes]
    if data.origin.command:
        parts += [heading("Do it again"), Html(f'<pre class="command" tabindex="0">{esc(data.origin.command)}</pre>')]
    facts = [(name, version) for name, version in data.origin.versions.items()]
    settings = [(key, _setting(value)) for key, value in data.origin.settings.items()]
    if settings and not data.origin.members:
        recipe = table(("setting", "value"), settings, label="All settings of the recipe", text=2)
        parts.append(details("The whole recipe, and versions", recipe + _versions(facts)))
    return Panel("Summary", join(parts))


def _tiles(data: ReportData) -> Html:
    score, origin = data.run.score, data.origin
    tiles: list[tuple[str, str, str]] = []
    if score:
        low_high = f"95\N{NO-BREAK SPACE}% interval {interval(score.top1_interval)}"
        tiles.append((f"{SPLITS[data.run.score_split]} accuracy", percent(score.top1), low_high))
        if len(data.run.classes) > 5:
            tiles.append(("top-5 accuracy", percent(score.top5), "truth among the five best"))
        tiles.append(("loss", f"{score.loss:.3f}", "nats per image"))
    if origin.parameters:
        tiles.append(("parameters", quantity(origin.parameters), f"{quantity(origin.macs)} multiply-adds an image"))
    if data.run.timing:
        seconds = sum(t.train_seconds + t.val_seconds for t in data.run.timing)
        rate = np.median([t.images_per_second for t in data.run.timing])
        tiles.append(("training time", duration(seconds), f"{rate:,.0f} images/s"))
    cells = [f"<div><dt>{esc(n)}</dt><dd>{esc(v)}<small>{esc(more)}</small></dd></div>" for n, v, more in tiles]
    return Html(f'<dl class="tiles">{"".join(cells)}</dl>')


def _story(data: ReportData) -> str:
    """Tell the run in a few sentences."""
    o, run, score = data.origin, data.run, data.run.score
    sizes = [f"{n:,} {SPLITS.get(split, split)}" for split, n in o.splits.items() if n]
    images = (
        f" ({' and '.join([', '.join(sizes[:-1]), sizes[-1]] if len(sizes) > 1 else sizes)} images)" if sizes else ""
    )
    task = f"{len(run.classes):,} classes apart" + (f" at {o.size} × {o.size} pixels" if o.size else "")
    if o.members:
        what = "the mean of their weights" if o.combine == "soup" else f"an ensemble ({o.combine})"
        text = f"{len(o.members)} networks, the first a {o.model}, joined as {what}, tell {task} on {o.data}{images}. "
        text += f"Joined of: {', '.join(o.members)}. "
    else:
        depth = f", a network of {o.layers} weighted layers," if o.layers else ""
        text = f"{o.model or run.name}{depth} was trained on {o.data or 'its data'}{images} to tell {task}, "
        text += f"by the recipe “{o.recipe}” with seed {o.seed}. "
    if run.timing:
        seconds = sum(t.train_seconds + t.val_seconds for t in run.timing)
        done = len(run.epochs)
        asked = f" of {o.epochs}" if o.epochs and o.epochs != done else ""
        text += f"{done}{asked} {'epoch' if done == 1 and not asked else 'epochs'} took {duration(seconds)}"
        text += f" on {o.machine}" if o.machine else ""
        text += f" in {o.precision}. " if o.precision else ". "
    if o.epoch and not o.members:
        why = "the best on validation" if o.chosen else "the last one"
        text += f"The weights are those of epoch {o.epoch}, {why}. "
    if score:
        right = round(score.top1 * score.n)
        text += (
            f"They call {right:,} of {score.n:,} {SPLITS[run.score_split]} images rightly: {percent(score.top1)}, "
            f"95\N{NO-BREAK SPACE}% interval {interval(score.top1_interval)}."
        )
        if run.score_split == "val":
            text += " There is no test score"
            text += ": the validation images also chose the epoch, so expect a little less." if o.chosen else "."
    else:
        text += "The run has no final score yet."
    return text


def _versions(facts: Sequence[tuple[str, str]]) -> Html:
    return paragraph("Made with " + ", ".join(f"{name} {version}" for name, version in facts) + ".", "quiet")


def _setting(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def curves(data: ReportData) -> Panel:
    """Draw loss, accuracy, learning rate and speed over the epochs."""
    run, records = data.run, data.run.epochs
    if not records:
        return Panel("Curves", paragraph("No epoch was recorded in this run's directory.", "quiet"))
    x = [r.epoch for r in records]
    rules, bands = [], []
    if run.score:
        name = f"final {SPLITS[run.score_split]}"
        rules = [Rule(name, run.score_split, run.score.loss)]
        low, high = run.score.top1_interval
        bands = [Rule(name, run.score_split, 100 * run.score.top1, (100 * low, 100 * high))]
    accuracy = [
        Line("training", "train", [100 * r.train_top1 for r in records]),
        Line("validation", "val", [None if r.val_top1 is None else 100 * r.val_top1 for r in records]),
    ]
    losses = [
        Line("training", "train", [r.train_loss for r in records]),
        Line("validation", "val", [r.val_loss for r in records]),
    ]
    timing = {t.epoch: t.images_per_second for t in run.timing}
    charts = [
        line_chart("Accuracy over epochs", x, accuracy, lambda v: f"{v:.4g} %", rules=bands, top=100),
        line_chart("Loss (nats per image)", x, losses, lambda v: f"{v:.4g}", rules=rules),
        line_chart("Learning rate, at the end of the epoch", x, [Line("rate", "lr", [r.lr for r in records])],
                   lambda v: f"{v:.3g}"),
        line_chart("Speed (training images a second)", x, [Line("speed", "speed", [timing.get(e) for e in x])],
                   lambda v: f"{v:,.0f}", zero=True),
    ]  # fmt: skip
    caption = (
        "Point at a chart, or move along it with the arrow keys, to read the values. Training values are means over "
        "the epoch, on augmented images, while the weights moved; validation is measured after it."
    )
    return Panel("Curves", join([f'<div class="charts">{"".join(charts)}</div>', _epoch_table(data)]), caption)


def _epoch_table(data: ReportData) -> Html:
    timing = {t.epoch: t for t in data.run.timing}
    rows = [
        (
            str(r.epoch),
            f"{r.train_loss:.4f}",
            percent(r.train_top1, 2),
            "–" if r.val_loss is None else f"{r.val_loss:.4f}",
            "–" if r.val_top1 is None else percent(r.val_top1, 2),
            f"{r.lr:.3g}",
            f"{timing[r.epoch].images_per_second:,.0f}" if r.epoch in timing else "–",
        )
        for r in data.run.epochs
    ]
    names = (
        "epoch",
        "training loss",
        "training accuracy",
        "validation loss",
        "validation accuracy",
        "rate",
        "images/s",
    )
    return details("All epochs as a table", table(names, rows, label="All epochs", text=0))


def confusion(data: ReportData) -> Panel:
    """Show which class is called which; each cell opens its images."""
    score = data.run.score
    if score is None:
        return Panel("Confusion", paragraph("The run has no final score yet.", "quiet"))
    pairs = analysis.confused_pairs(score.confusion)
    kept = _kept(score, pairs)
    left_out = len(data.run.classes) - len(kept)
    caption = "A row holds the images of one class, a column those that were called so. "
    caption += "Choose a cell to see its images; the arrow keys move between cells."
    if left_out:
        caption += f" Only the {len(kept)} classes that are confused most are drawn; {left_out:,} more are not."
    parts = [
        f'<div class="{"beside even" if len(kept) <= BESIDE else ""}"><div>{_matrix(data, score, kept)}</div>',
        f"<div>{heading('Most confused')}{_pairs(data, pairs)}</div></div>",
        '<div id="cell" class="cell-images" aria-live="polite"></div>',
    ]
    return Panel("Confusion", join(parts), caption)


def _kept(score: Scorecard, pairs: Sequence[analysis.Pair]) -> list[int]:
    """Choose the classes to draw: all, or those with the most confusions, in their order."""
    if len(score.confusion) <= DRAWN:
        return list(range(len(score.confusion)))
    classes = list(dict.fromkeys(c for pair in pairs for c in (pair.true, pair.predicted)))
    return sorted(classes[:NAMED]) or list(range(NAMED))


def _matrix(data: ReportData, score: Scorecard, kept: Sequence[int]) -> Html:
    classes, totals = data.run.classes, np.maximum(score.confusion.sum(axis=1), 1)
    size = "big" if len(kept) <= NUMBERED else "small"
    named = len(kept) <= NAMED
    head = "".join(f'<th scope="col"><span>{esc(classes[c])}</span></th>' for c in kept) if named else ""
    rows = []
    for r in kept:
        cells = "".join(_cell(classes, score, r, c, int(totals[r]), size == "big") for c in kept)
        rows.append(f"<tr>{f'<th scope=row><span>{esc(classes[r])}</span></th>' if named else ''}{cells}</tr>")
    label = f"Confusion matrix of {len(kept)} classes: true class by row, called class by column"
    top = f'<thead><tr><td class="corner"><span>true ↓ called →</span></td>{head}</tr></thead>' if named else ""
    return Html(
        f'<div class="scroll whole" tabindex="-1"><table class="confusion {size}" aria-label="{esc(label)}">'
        f"{top}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(classes: Sequence[str], score: Scorecard, r: int, c: int, total: int, numbered: bool) -> str:
    n = int(score.confusion[r, c])
    if n == 0:
        return "<td></td>"
    share = n / total
    strength = share**0.5  # a root, so that rare confusions are seen
    kind = ("hit" if r == c else "miss") + (" strong" if strength > 0.6 else "")
    said = f"{classes[r]} called {classes[c]}: {n:,}"
    return (
        f'<td><button type="button" class="{kind}" style="--s:{strength:.2f}" data-cell="{r},{c}" '
        f'title="{esc(said)}" aria-label="{esc(said)}" tabindex="-1">{n if numbered else ""}</button></td>'
    )


def _pairs(data: ReportData, pairs: Sequence[analysis.Pair]) -> Html:
    if not pairs:
        return paragraph("Nothing was confused.")
    classes = data.run.classes
    rows = [
        (
            classes[p.true],
            classes[p.predicted],
            Html(f'<button type="button" class="link" data-cell="{p.true},{p.predicted}">{p.n:,}</button>'),
            bar(p.share, percent(p.share), "val"),
        )
        for p in pairs[:PAIRS]
    ]
    return table(("these", "called", "images", "of the class"), rows, label="Most confused pairs of classes", text=2)


def classes(data: ReportData) -> Panel:
    """Show precision, recall and F1 of each class."""
    score = data.run.score
    if score is None:
        return Panel("Classes", paragraph("The run has no final score yet.", "quiet"))
    rows = [
        (
            c.name,
            f"{c.n:,}",
            bar(c.precision, percent(c.precision), "train"),
            bar(c.recall, percent(c.recall), "test"),
            f"{c.f1:.3f}",
        )
        for c in sorted(score.per_class, key=lambda c: c.f1)
    ]
    said = (
        f"Weakest first. Precision: of the images called so, the share that are. Recall: of the images that are so, "
        f"the share called so. Balanced accuracy {percent(score.balanced_accuracy)}, macro F1 {score.macro_f1:.3f}."
    )
    names = ("class", "images", "precision", "recall", "F1")
    return Panel("Classes", table(names, rows, label="Precision and recall by class"), said)


def calibration(data: ReportData) -> Panel:
    """Compare how sure the network is with how often it is right, before and after temperature scaling."""
    p = data.predictions
    if p is None or p.labels is None:
        return Panel("Calibration", paragraph("The images could not be predicted again, so there is none.", "quiet"))
    series = [("as it is", "val", analysis.reliability(p))]
    rows = [_calibration_row("as it is", p)]
    fitted = data.validation
    if fitted is not None and len(data.run.classes) > 1:
        t = analysis.fit_temperature(fitted)
        after = analysis.at_temperature(p, t)
        series.append((f"temperature {t:.2f}", "train", analysis.reliability(after)))
        rows.append(_calibration_row(f"temperature {t:.2f}", after))
        said = _temperature(t, calibration_error(p), calibration_error(after), data.run.score_split == "val")
    else:
        said = "There are no validation images to fit a temperature on."
    confidence = float(p.probabilities().max(axis=1).mean())
    accuracy = float((analysis.called(p) == p.labels).mean())
    said = (
        f"On average the network is {percent(confidence)} sure of what it says, and right {percent(accuracy)} of the "
        f"time. {said}"
    )
    values = table(("", "calibration error", "loss", "mean confidence"), rows, label="Calibration before and after")
    words = f"{paragraph(said)}{values}{_bins(series[0][2])}"
    body = f'<div class="beside">{reliability_chart(series)}<div>{words}</div></div>'
    caption = (
        f"A dot holds the {SPLITS[data.run.score_split]} images of one interval of confidence. Below the diagonal the "
        "network is too sure of itself, above it too modest. Calibration error: mean distance from the diagonal."
    )
    return Panel("Calibration", Html(body), caption)


def _calibration_row(name: str, p: Predictions) -> tuple[str, str, str, str]:
    loss = float(cross_entropy(p.logits, analysis.truth(p)).mean())
    confidence = float(p.probabilities().max(axis=1).mean())
    return name, percent(calibration_error(p), 2), f"{loss:.4f}", percent(confidence)


def _temperature(t: float, before: float, after: float, same: bool) -> str:
    direction = "too sure" if t > 1.02 else "too modest" if t < 0.98 else "about right"
    text = (
        f"A temperature of {t:.2f}, fitted on the validation images, says that it is {direction}; dividing the logits "
        f"by it takes the calibration error from {percent(before, 2)} to {percent(after, 2)} and changes no answer."
    )
    return text + (" It is measured on the images it was fitted on, for want of a test split." if same else "")


def _bins(bins: Sequence[analysis.Bin]) -> Html:
    rows = [
        (f"{b.low:.0%} to {b.high:.0%}", f"{b.n:,}", percent(b.confidence), percent(b.accuracy)) for b in bins if b.n
    ]
    return details("The bins as a table", table(("confidence", "images", "mean", "right"), rows, label="Bins"))


def cells(data: ReportData, most: int = 24) -> Mapping[str, list[list[object]]]:
    """Return for each cell of the confusion matrix the images to show, worst first: JSON-able.

    Returns:
        ``"row,column"`` → [name, probability of the called class, address of the thumbnail] each.
    """
    p = data.predictions
    if p is None or p.labels is None:
        return {}
    called, probabilities = analysis.called(p), p.probabilities()
    losses = cross_entropy(p.logits, p.labels)
    found: dict[str, list[list[object]]] = {}
    for i in np.argsort(-losses, kind="stable").tolist():
        picture = data.pictures.get(i)
        key = f"{p.labels[i]},{called[i]}"
        if picture is not None and len(found.setdefault(key, [])) < most:
            size = [picture.width, picture.height]
            found[key].append([p.names[i], round(float(probabilities[i, called[i]]), 4), picture.uri, *size])
    return found
