"""The panels of the page that show images, the network and the data."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resnetlab import analysis
from resnetlab.metrics import Predictions, cross_entropy
from resnetlab.report.html import (
    Html,
    Panel,
    apart,
    bar,
    esc,
    figure,
    heading,
    image,
    join,
    paragraph,
    percent,
    table,
)
from resnetlab.report.records import Copy, ReportData
from resnetlab.report.scores import SPLITS

SHOWN = 24
"""Images of a gallery."""
GONE = "The images could not be read, so there are none to show."


def mistakes(data: ReportData) -> Panel:
    """Show the worst mistakes, the least certain answers, and labels that are perhaps wrong."""
    p = data.predictions
    if p is None or p.labels is None:
        return Panel("Mistakes", paragraph(GONE, "quiet"))
    wrong = analysis.mistakes(p)
    said = f"{len(wrong):,} of {len(p.labels):,} {SPLITS[data.run.score_split]} images are called wrongly; "
    said += "the CSV file beside this page lists them all." if len(wrong) else "there is no mistake to show."
    parts = [heading("Worst mistakes"), paragraph("The highest loss: sure of itself, and wrong.", "quiet")]
    parts += [_gallery(data, p, wrong[:SHOWN]) if len(wrong) else paragraph("None.")]
    unsure = analysis.least_certain(p)[:SHOWN]
    parts += [heading("Least certain"), paragraph("The smallest lead of the best class over the second.", "quiet")]
    parts += [_gallery(data, p, unsure, second=True) if len(unsure) else paragraph("There is only one class.")]
    parts += [heading("Labels that are perhaps wrong"), _suspects(data, p)]
    return Panel("Mistakes", join(parts), said)


def _suspects(data: ReportData, p: Predictions) -> Html:
    note = paragraph(data.suspects_note, "quiet") if data.suspects_note else ""
    if not data.suspects:
        return Html(note)
    chosen = np.array([s.index for s in data.suspects[:SHOWN]], dtype=np.int64)
    return Html(note + _gallery(data, p, chosen))


def _gallery(data: ReportData, p: Predictions, chosen: NDArray[np.int64], *, second: bool = False) -> Html:
    """Show images with what they are and what they were called; ``second``: also the second best class."""
    labels, classes = analysis.truth(p), p.classes
    top, probabilities = p.places(2), p.probabilities()
    losses = cross_entropy(p.logits, labels)
    parts = []
    for i in chosen.tolist():
        first = top[i, 0]
        true, said = classes[labels[i]], classes[first]
        right = labels[i] == first
        kind = "right" if right else "wrong"
        answer = f'<b class="{kind}">{apart(said)} {percent(float(probabilities[i, first]), 0)}</b>'
        if second:
            other = top[i, 1]
            answer += f"<br>{apart(classes[other])} {percent(float(probabilities[i, other]), 0)}"
        caption = f"{apart(true)} → {answer}" if not second else f"is {apart(true)}<br>{answer}"
        caption += f"<small>loss {losses[i]:.2f}</small>{_file(p.names[i])}"
        alt = f"{p.names[i]}: {true}, called {said}"
        parts.append(figure(_picture(data, i, alt), caption))
    return Html(f'<div class="gallery">{"".join(parts)}</div>')


def _picture(data: ReportData, index: int, alt: str) -> str:
    picture = data.pictures.get(index)
    return image(picture, alt) if picture else '<span class="thumb none">no thumbnail</span>'


def _file(name: str) -> str:
    """Show a file's name, cut from the left by the style sheet where it is long: its end tells more."""
    return f'<small class="file" title="{esc(name)}"><bdi>{esc(name)}</bdi></small>'


def explanations(data: ReportData) -> Panel:
    """Show where the network saw its evidence."""
    p = data.predictions
    caption = "Warm: where the evidence for the called class lay. It tells where the network looked, not why."
    if not data.explanations or p is None or p.labels is None:
        return Panel("Explanations", paragraph(data.explanations_note or GONE, "quiet"), "")
    parts = []
    for e in data.explanations:
        said, true = p.classes[analysis.called(p)[e.index]], p.classes[p.labels[e.index]]
        kind = "right" if said == true else "wrong"
        alt = f"{p.names[e.index]}: {true}, called {said}"
        both = image(e.image, alt, large=True) + image(e.overlay, f"{e.method} for {said}, laid over it", large=True)
        words = f'{apart(true)} → <b class="{kind}">{apart(said)}</b>{_file(p.names[e.index])}'
        parts.append(figure(f'<span class="two">{both}</span>', words))
    first = data.explanations[0]
    where = f" {first.method}" + (f" at {first.stage}" if first.stage else "") + ", for the class that was called."
    note = paragraph(data.explanations_note, "quiet") if data.explanations_note else ""
    return Panel("Explanations", Html(f'{note}<div class="gallery wide">{"".join(parts)}</div>'), caption + where)


def network(data: ReportData) -> Panel:
    """Show the network's parts: shapes, parameters, multiply-adds, share of the time."""
    if not data.stages:
        return Panel("Network", paragraph("The network could not be measured.", "quiet"))
    parameters, macs = sum(s.parameters for s in data.stages), sum(s.macs for s in data.stages)
    rows: list[Sequence[object]] = [
        (
            s.name,
            s.kind,
            " × ".join(map(str, s.shape)) or "–",
            f"{s.parameters:,}",
            bar(s.macs / max(macs, 1), f"{s.macs / 1e6:,.2f} M", "train"),
            bar(s.share, percent(s.share), "val"),
        )
        for s in data.stages
    ]
    total = Html("<b>in all</b>")
    rows.append((total, "", "", f"{parameters:,}", f"{macs / 1e6:,.2f} M", percent(sum(s.share for s in data.stages))))
    names = ("part", "kind", "output (C × H × W)", "parameters", "multiply-adds", "time")
    size = data.origin.size
    caption = (
        f"For one image of {size} × {size} pixels. Time: the share of a forward pass, measured where "
        "this page was made."
    )
    return Panel("Network", table(names, rows, label="Parts of the network", text=2), caption)


def dataset(data: ReportData) -> Panel:
    """Show the balance of the classes, a contact sheet, and doubled images."""
    parts = []
    if data.balance:
        largest = {split: max(max(counts, default=0), 1) for split, counts in data.balance.items()}
        rows = [
            (name, *(bar(counts[i] / largest[s], f"{counts[i]:,}", s) for s, counts in data.balance.items()))
            for i, name in enumerate(data.run.classes)
        ]
        names = ("class", *(SPLITS.get(s, s) for s in data.balance))
        parts += [heading("Images by class"), table(names, rows, label="Images by class and split")]
    if data.sheet:
        pictures = [
            figure(image(picture, f"training image of {data.run.classes[c]}"), f"{esc(data.run.classes[c])}")
            for c, picture in data.sheet
        ]
        parts += [heading("Training images"), Html(f'<div class="gallery sheet">{"".join(pictures)}</div>')]
    parts += [heading("Doubled images"), _copies(data)]
    return Panel("Data", join(parts))


def _copies(data: ReportData) -> Html:
    found = data.copies
    if found is None:
        return paragraph(GONE, "quiet")
    looked = ", ".join(f"{n:,} {SPLITS.get(split, split)}" for split, n in found.compared.items())
    text = f"Compared: {looked} images. "
    if found.exact + found.similar == 0:
        text += "No training image is found again, or nearly so, among the others."
    else:
        text += (
            f"{found.exact:,} pairs of a training and another image are the same pixel for pixel, {found.similar:,} "
            "more look alike: a score on such images says less about new ones."
        )
    if found.left_out:
        text += f" {found.left_out:,} images were not compared, to bound the work."
    pairs = [_pair(copy) for copy in found.shown]
    return Html(paragraph(text) + (f'<div class="gallery wide">{"".join(pairs)}</div>' if pairs else ""))


def _pair(copy: Copy) -> Html:
    kind = "the same" if copy.exact else f"{copy.difference:.1f} grey levels apart"
    odd = "" if copy.first_class == copy.second_class else '<b class="wrong">different labels</b> '
    first = image(copy.first_picture, f"{copy.first}: {copy.first_class}")
    second = image(copy.second_picture, f"{copy.second}: {copy.second_class}")
    classes = f"{apart(copy.first_class)} / {apart(copy.second_class)}"
    words = f"{classes}<br>{odd}{esc(kind)}{_file(copy.first)}{_file(copy.second)}"
    return figure(f'<span class="two">{first}{second}</span>', words)
