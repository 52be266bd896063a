"""One function a picture. Each takes what was measured, computes nothing new, and returns a matplotlib figure."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from resnetlab.metrics import RunData, Scorecard
from resnetlab.report.text import columns_of, drawable, shorten, wrap

TRAIN, VAL, TEST, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#222222", "#DDDDDD"
"""Blue, vermilion and green of Okabe and Ito (2008), which colour-blind readers can tell apart, and two greys."""

SPLITS = {"train": ("training", TRAIN), "val": ("validation", VAL), "test": ("test", TEST)}
"""What a split is called in a picture, and its colour in all of them."""

CELL = 0.55
"""Inches of a confusion matrix's cell that has a number in it."""

MOST_NUMBERED, MOST_NAMED = 20, 120
"""A confusion matrix of up to so many classes has numbers in its cells; of up to so many, class names at its sides."""


def curves(run: RunData) -> Figure:
    """Draw loss and top-1 accuracy over the epochs, with the final score as a line and its 95 % interval as a band."""
    (title, *_), families = drawable([run.title])
    figure = Figure(figsize=(11, 4.8), dpi=150, layout=_margins())
    figure.suptitle(wrap(title, 100, lines=2), fontfamily=families, parse_math=False, color=INK)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [record.epoch for record in run.epochs]
    _curve(loss, epochs, "train", [r.train_loss for r in run.epochs], "{:.3f}")
    _curve(loss, epochs, "val", [r.val_loss for r in run.epochs], "{:.3f}")
    _curve(accuracy, epochs, "train", [_percent(r.train_top1) for r in run.epochs], "{:.1f} %")
    _curve(accuracy, epochs, "val", [_percent(r.val_top1) for r in run.epochs], "{:.1f} %")
    if run.score is not None:
        _final(loss, run.score_split, run.score.loss, "{:.3f}")
        low, high = run.score.top1_interval
        accuracy.axhspan(100 * low, 100 * high, color=SPLITS[run.score_split][1], alpha=0.15, linewidth=0)
        _final(accuracy, run.score_split, 100 * run.score.top1, "{:.1f} %")
    _dress(loss, epochs, "loss (nats per image)")
    _dress(accuracy, epochs, "top-1 accuracy (%)")
    bottom, top = accuracy.get_ylim()
    accuracy.set_ylim(max(bottom, -1.5), min(top, 101.5))
    return figure


def _curve(axes: Axes, epochs: Sequence[int], split: str, values: Sequence[float | None], form: str) -> None:
    """Draw one split's values, without those that are missing or not finite; the legend gives the last of them."""
    points = [(e, v) for e, v in zip(epochs, values, strict=True) if v is not None and math.isfinite(v)]
    if not points:
        return
    x, y = zip(*points, strict=True)
    name, color = SPLITS[split]
    label = f"{name} {form.format(y[-1])}"
    axes.plot(x, y, color=color, label=label, marker="o" if len(epochs) <= 30 else "", markersize=4, linewidth=1.6)


def _final(axes: Axes, split: str, value: float, form: str) -> None:
    """Draw the score of the weights that were kept, as a dashed line."""
    if not math.isfinite(value):
        return
    name, color = SPLITS[split]
    label = f"final {name} {form.format(value)}"
    axes.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.2, label=label)


def _dress(axes: Axes, epochs: Sequence[int], label: str) -> None:
    """Give a panel its axes, grid and legend. The legend stands above the data, where it can cover nothing."""
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    if epochs:
        room = max(0.5, 0.02 * (epochs[-1] - epochs[0]))
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + room)
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.7, "no epoch was recorded", transform=axes.transAxes, ha="center", va="bottom", color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, columnspacing=1,
                    handlelength=1.8, borderaxespad=0.3)  # fmt: skip


def _margins() -> ConstrainedLayoutEngine:
    """Return the layout that places everything by its true size, a tenth of an inch from the edges."""
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.02)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def confusion(run: RunData) -> Figure:
    """Draw how often each class (row) was called what (column): the colour is the share of the row, on a root scale.

    Raises:
        ValueError: The run has no score.
    """
    if run.score is None:
        raise ValueError(f"{run.name} has no score to draw")
    counts = run.score.confusion
    k, totals = len(counts), counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(totals == 0, counts.shape), counts / np.maximum(totals, 1))
    side = max(3.2, CELL * k) if k <= MOST_NUMBERED else 9.5
    figure = Figure(dpi=150, layout=_margins())
    axes = figure.subplots()
    colors = colormaps["Blues"].with_extremes(bad="#EEEEEE")
    picture = axes.imshow(shares, cmap=colors, norm=PowerNorm(0.5, 0, 1), interpolation="nearest" if k < 1200 else None)
    percent = FuncFormatter(lambda share, _: f"{100 * share:g} %")
    bar = figure.colorbar(picture, ax=axes, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], format=percent, shrink=0.8, aspect=30)
    bar.set_label("share of the true class's images")
    bar.outline.set_visible(False)
    if k <= MOST_NUMBERED:
        _numbers(axes, counts, shares)
    left, below = _class_axes(axes, run.classes, side / k)
    width = max(6.5, left + side + 1.5)
    figure.set_size_inches(width, below + side + 0.9)
    (title, *_), families = drawable([run.title])
    text = f"{wrap(title, int(9 * width), lines=2)}\n{_result(run.score, run.score_split)}"
    figure.suptitle(text, fontfamily=families, parse_math=False, color=INK, fontsize=11)
    return figure


def _result(score: Scorecard, split: str) -> str:
    """Say in a line what the matrix was counted on and how good it is."""
    low, high = score.top1_interval
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    return f"{SPLITS[split][0]}, n = {score.n:,}, top-1 {100 * score.top1:.1f} % ({interval})"


def _numbers(axes: Axes, counts: NDArray[np.int64], shares: np.ma.MaskedArray[tuple[int, int]]) -> None:
    """Write each cell's count into it, small enough for the longest to fit."""
    size = min(10.0, 72 * CELL * 0.85 / (0.64 * len(str(counts.max()))))  # a digit is 0.64 em wide
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        color = "#BBBBBB" if count == 0 else "white" if share > 0.35 else INK
        label = axes.text(column, row, f"{count}", ha="center", va="center", fontsize=size, color=color)
        label.set_in_layout(False)  # it cannot leave its cell; to measure hundreds of them takes a second


def _class_axes(axes: Axes, classes: Sequence[str], cell: float) -> tuple[float, float]:
    """Label both sides: by name while names fit (``cell`` inches each), by number beyond.

    Returns:
        About how many inches the labels take to the left and below.
    """
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.spines[:].set_visible(False)
    k = len(classes)
    if k > MOST_NAMED:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        return 0.8, 0.6
    names, families = drawable(classes)
    names = [shorten(name, 24 if k <= MOST_NUMBERED else 18) for name in names]
    size = max(4.0, min(10.0, 72 * cell * 0.8))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(range(k)))
        axis.set_ticklabels(names, fontsize=size, fontfamily=families, parse_math=False)
        axis.set_tick_params(length=2 if k <= MOST_NUMBERED else 0, pad=2)
    longest = max(map(columns_of, names)) * 0.6 * size / 72
    if k > MOST_NUMBERED:
        axes.tick_params(axis="x", labelrotation=90)
    elif longest > 0.9 * cell:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", va="top", rotation_mode="anchor")
    else:
        return longest + 0.4, 0.5
    return longest + 0.4, longest * (1 if k > MOST_NUMBERED else 0.75) + 0.4


TILE, GAP, CAPTION_POINTS = 128, 12, 8.0
"""Pixels of a contact sheet's picture and of the space between two, and the size of its captions."""


def contact_sheet(
    images: Sequence[NDArray[np.uint8]], captions: Sequence[str], title: str, *, columns: int = 10
) -> Figure:
    """Lay images out in rows with a caption under each.

    Args:
        images: (H, W, C) or (H, W), of any sizes. Small ones are enlarged by a whole factor, each pixel a square;
            photographs are shrunk.
        captions: One an image; what does not fit on two lines is cut.
        title: Above the sheet.
        columns: Images in a row, at most.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    names = list(dict.fromkeys(captions))  # each once, so that what cannot be drawn is numbered by name
    texts, families = drawable([*names, title])
    shown = dict(zip(names, texts, strict=False))
    texts = [texts[-1], *(shown[caption] for caption in captions)]
    across = max(1, min(columns, len(images)))
    down = math.ceil(len(images) / across)
    lines = [wrap(text, 20, lines=2) for text in texts[1:]]
    line_height = 14
    row_height = TILE + 6 + line_height * max((text.count("\n") + 1 for text in lines), default=1) + GAP
    width = max(420, GAP + across * (TILE + GAP))
    heading = wrap(texts[0], width // 9, lines=2)
    head = 16 + 20 * (heading.count("\n") + 1)
    canvas = np.full((head + max(1, down) * row_height, width, 3), 255, np.uint8)
    dpi = 100
    figure = Figure(figsize=(width / dpi, len(canvas) / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.text(GAP, 8, heading, fontsize=11, va="top", fontfamily=families, parse_math=False, color=INK)
    for position, (image, text) in enumerate(zip(images, lines, strict=True)):
        x = GAP + position % across * (TILE + GAP)
        y = head + position // across * row_height
        tile = _tile(image)
        top, left = y + (TILE - tile.shape[0]) // 2, x + (TILE - tile.shape[1]) // 2
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
        axes.text(x + TILE / 2, y + TILE + 6, text, fontsize=CAPTION_POINTS, ha="center", va="top", linespacing=1.15,
                  fontfamily=families, parse_math=False, color=INK)  # fmt: skip
    axes.imshow(canvas, extent=(0, width, len(canvas), 0), interpolation="nearest", aspect="auto")
    return figure


def _tile(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bring an image to at most ``TILE`` pixels a side: (h, w, 3)."""
    pixels = np.atleast_3d(image)
    picture = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[:, :, :1].repeat(3, 2)))
    largest = max(picture.size)
    if largest > TILE:
        scale = TILE / largest
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    factor = TILE // largest
    return np.asarray(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST))
