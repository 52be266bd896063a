"""Thumbnails: images small enough that a page with hundreds of them stays small."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnetlab import analysis
from resnetlab.bundle import Bundle
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import Heatmap, Predictions
from resnetlab.report.heatmap import overlay
from resnetlab.report.records import Explanation, Picture
from resnetlab.runtime import Runtime
from resnetlab.sources.dataset import Split
from resnetlab.sources.images import BrokenImage

SIDE, LARGE = 96, 160
"""Pixels of a thumbnail's longer side, and of an explained image's."""
QUALITY, LOSSLESS = 74, 16
"""Of WebP; and the side, in pixels, up to which nothing is lost, as it costs nothing there."""
BYTES = 1_200_000
"""Of all the thumbnails of mistakes and of the confusion matrix together."""
GALLERY, RIGHT, SHEET, EXPLAINED = 24, 6, 60, 12
"""Images of a gallery; rightly called ones of each class; images of the contact sheet; images that are explained."""


def pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return (H, W, C) pixels as Pillow's image, RGB or grey."""
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]))


def thumbnail(pixels: NDArray[np.uint8], side: int = SIDE) -> Picture:
    """Shrink (H, W, C) pixels to ``side`` where they are larger, and encode them."""
    picture = pillow(pixels)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, lossless=max(picture.size) <= LOSSLESS, method=4)
    return Picture(data=file.getvalue(), width=picture.width, height=picture.height)


def thumbnails(split: Split, predictions: Predictions, more: Sequence[int]) -> dict[int, Picture]:
    """Make the thumbnails that the page needs, most important first, until they are enough bytes.

    Args:
        split: The images, in the order of the predictions.
        predictions: What the network says of them.
        more: Further positions to include.
    """
    labels, called = analysis.truth(predictions), analysis.called(predictions)
    wrong = analysis.mistakes(predictions).tolist()
    right: list[int] = []
    for c in range(len(predictions.classes)):
        right += np.flatnonzero((labels == c) & (called == c))[:RIGHT].tolist()
    unsure = analysis.least_certain(predictions)[:GALLERY].tolist()
    order = dict.fromkeys([*wrong[:GALLERY], *unsure, *more[:GALLERY], *wrong, *right])
    rows = _rows(split, predictions)
    made: dict[int, Picture] = {}
    spent = 0
    for i in order:
        made[i] = thumbnail(split.images.read(rows[i], (SIDE, SIDE)))
        spent += len(made[i].data)
        if spent > BYTES:
            break
    return made


def _rows(split: Split, predictions: Predictions) -> Sequence[int]:
    """Return where each predicted image lies in its split: those that cannot be read were left out."""
    if len(split) == len(predictions.names):
        return range(len(split))
    place = {split.images.name(i): i for i in range(len(split))}
    return [place[name] for name in predictions.names]


def sheet(train: Split, classes: Sequence[str]) -> tuple[tuple[int, Picture], ...]:
    """Take the first images of each class that the network knows, as many of each as fit on the sheet."""
    each = max(1, SHEET // max(len(classes), 1))
    place = {name: i for i, name in enumerate(classes)}
    shown = []
    for c, name in enumerate(train.classes):
        for row in np.flatnonzero(train.labels == c)[: each if name in place else 0].tolist():
            try:
                shown.append((place[name], thumbnail(train.images.read(row, (SIDE, SIDE)))))
            except BrokenImage:
                continue
    return tuple(shown[:SHEET])


def explain(
    bundle: Bundle, split: Split | None, predictions: Predictions | None, runtime: Runtime
) -> tuple[tuple[Explanation, ...], str]:
    """Explain some mistakes and some right answers; a sentence says why there are none."""
    if split is None or predictions is None:
        return (), ""
    from resnetlab import explain as methods

    wrong = analysis.mistakes(predictions)[: EXPLAINED // 2].tolist()
    right = np.flatnonzero(analysis.called(predictions) == analysis.truth(predictions))
    places = np.linspace(0, len(right) - 1, min(EXPLAINED - len(wrong), len(right))).astype(int)
    chosen, rows = [*wrong, *right[np.unique(places)].tolist()], _rows(split, predictions)
    method = "grad-cam" if methods.stages(bundle.model) else "integrated-gradients"  # a linear model has no maps
    images, names = [split.images[rows[i]] for i in chosen], [predictions.names[i] for i in chosen]
    try:
        maps = methods.explain(bundle, images, names, runtime, method=method)
    except ResNetLabError as error:
        return (), f"There are none: {error}"
    return tuple(_explanation(i, heatmap) for i, heatmap in zip(chosen, maps, strict=True)), ""


def _explanation(index: int, heatmap: Heatmap) -> Explanation:
    return Explanation(
        index=index,
        image=thumbnail(heatmap.pixels, LARGE),
        overlay=thumbnail(overlay(heatmap), LARGE),
        method=heatmap.method,
        stage=heatmap.stage or "",
    )
