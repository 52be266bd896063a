"""What predictions say beyond a score: calibration, mistakes, confused pairs, two networks on the same images.

Pure functions over the records of `metrics`; numpy and scipy only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resnetlab.errors import ResNetLabError
from resnetlab.metrics import Floats, Ints, Predictions, cross_entropy

BINS = 15
"""Of confidence, of equal width, as in `metrics.calibration_error` (Guo et al. 2017)."""
COLDEST, HOTTEST = 0.05, 20.0
"""Temperatures that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The images whose confidence lies in one interval."""

    low: float
    high: float
    n: int
    confidence: float
    """Mean probability of the class that was called; 0 without images."""
    accuracy: float
    """Share that was called rightly; 0 without images."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two classes of which one is called the other."""

    true: int
    predicted: int
    n: int
    """Images of ``true`` called ``predicted``."""
    share: float
    """Of the images of ``true``."""


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two networks on the same images. Only the images that one gets right and the other wrong tell them apart."""

    n: int
    both: int
    """Images that both get right."""
    only_first: int
    only_second: int
    p: float
    """Two-sided exact probability of a split at least this uneven if both were equally good (McNemar 1947)."""


def truth(predictions: Predictions) -> Ints:
    """Return the labels of labelled predictions: (N,).

    Raises:
        ValueError: There are none.
    """
    if predictions.labels is None:
        raise ValueError("these predictions have no labels")
    return predictions.labels


def called(predictions: Predictions) -> Ints:
    """Return the most probable class of each image: (N,)."""
    return predictions.places(1)[:, 0]


def mistakes(predictions: Predictions) -> Ints:
    """Return the images that are called wrongly, highest loss first: their positions."""
    labels = truth(predictions)
    wrong = np.flatnonzero(called(predictions) != labels)
    losses = cross_entropy(predictions.logits[wrong], labels[wrong]) if len(wrong) else np.zeros(0)
    return wrong[np.argsort(-losses, kind="stable")].astype(np.int64)


def least_certain(predictions: Predictions) -> Ints:
    """Return all images by the lead of the best class over the second, smallest first: their positions."""
    if predictions.logits.shape[1] < 2:
        return np.zeros(0, np.int64)
    probabilities = np.sort(predictions.probabilities(), axis=1)
    return np.argsort(probabilities[:, -1] - probabilities[:, -2], kind="stable").astype(np.int64)


def confused_pairs(confusion: Ints) -> list[Pair]:
    """Return every pair of classes with a confusion, the most frequent first, then the larger share."""
    totals = confusion.sum(axis=1)
    rows, columns = np.nonzero(confusion * (1 - np.eye(len(confusion), dtype=np.int64)))
    pairs = [
        Pair(true=int(r), predicted=int(c), n=int(confusion[r, c]), share=float(confusion[r, c] / totals[r]))
        for r, c in zip(rows, columns, strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.n, -pair.share))


def reliability(predictions: Predictions, bins: int = BINS) -> tuple[Bin, ...]:
    """Sort images into bins by confidence, and compare it with how often they are right."""
    confidence = predictions.probabilities().max(axis=1).astype(np.float64)
    correct = called(predictions) == truth(predictions)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    n = np.bincount(place, minlength=bins)
    means = np.bincount(place, weights=confidence, minlength=bins) / np.maximum(n, 1)
    right = np.bincount(place, weights=correct, minlength=bins) / np.maximum(n, 1)
    return tuple(
        Bin(low=i / bins, high=(i + 1) / bins, n=int(n[i]), confidence=float(means[i]), accuracy=float(right[i]))
        for i in range(bins)
    )


def fit_temperature(predictions: Predictions) -> float:
    """Return the T for which softmax(logits / T) has the lowest cross-entropy (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T, so the one minimum is found on a line. Above 1 the network was too sure of itself.
    """
    from scipy.optimize import minimize_scalar

    labels = truth(predictions)

    def loss(inverse: float) -> float:
        return float(cross_entropy((predictions.logits.astype(np.float64) * inverse).astype(np.float32), labels).mean())

    found = minimize_scalar(loss, bounds=(1 / HOTTEST, 1 / COLDEST), method="bounded", options={"xatol": 1e-5})
    return float(1 / found.x)


def at_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Return the predictions with their logits divided by T. What is called stays the same."""
    return Predictions(
        logits=(predictions.logits / np.float32(temperature)).astype(np.float32),
        classes=predictions.classes,
        names=predictions.names,
        labels=predictions.labels,
    )


def mcnemar(first: Predictions, second: Predictions) -> McNemar:
    """Test whether two networks differ on the images that both were shown.

    Raises:
        ResNetLabError: They were not shown the same images with the same labels.
    """
    difference = not_the_same_images(first, second)
    if difference:
        raise ResNetLabError(f"McNemar's test needs the same images for both: {difference}.")
    one, two = (called(p) == truth(p) for p in (first, second))
    only_first, only_second = int((one & ~two).sum()), int((two & ~one).sum())
    return McNemar(
        n=len(one),
        both=int((one & two).sum()),
        only_first=only_first,
        only_second=only_second,
        p=sign_test(only_first, only_second),
    )


def sign_test(first: int, second: int) -> float:
    """Return the two-sided probability of a split of fair coin throws at least as uneven as this one."""
    from scipy.stats import binomtest

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values of several tests, corrected so that together they err no oftener than one (Holm 1979)."""
    order = np.argsort(values, kind="stable")
    corrected = np.asarray(values, dtype=np.float64)[order] * np.arange(len(values), 0, -1)
    result = np.empty(len(values))
    result[order] = np.minimum(np.maximum.accumulate(corrected), 1.0) if len(values) else corrected
    return [float(p) for p in result]


def not_the_same_images(first: Predictions, second: Predictions) -> str:
    """Say in a clause how two sets of labelled images differ; an empty string: they do not."""
    if len(first.names) != len(second.names):
        return f"one was tested on {len(first.names):,} images, the other on {len(second.names):,}"
    if first.names != second.names:
        other = next((a, b) for a, b in zip(first.names, second.names, strict=True) if a != b)
        return f"the images have different names, the first of them {other[0]} and {other[1]}"
    names = [[p.classes[label] for label in truth(p)] for p in (first, second)]
    apart = [i for i, (a, b) in enumerate(zip(*names, strict=True)) if a != b]
    if apart:
        i = apart[0]
        return (
            f"{len(apart):,} images have different labels, the first {first.names[i]}: {names[0][i]} and {names[1][i]}"
        )
    return ""


def difference_hash(thumbnails: Floats) -> Floats:
    """Return the signs of brightness steps from left to right, as 64 values of -1 or 1: (N, 64).

    Args:
        thumbnails: (N, 8, 9), grey.
    """
    signs: NDArray[np.float32] = np.where(thumbnails[:, :, 1:] > thumbnails[:, :, :-1], 1, -1).astype(np.float32)
    return signs.reshape(len(thumbnails), 64)


def near(
    first: tuple[Floats, Floats], second: tuple[Floats, Floats], places: int, greys: float, *, rows: int = 256
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Yield the pairs of images that look alike, some rows of the first ones at a time.

    All pairs are compared, in two matrix products: (64 - a · b) / 2 is the number of signs that differ, and
    a · a - 2 a · b + b · b the squared distance of thumbnails.

    Args:
        first: Difference hashes (A, 64) and thumbnails (A, P), float32.
        second: The same of other images: (B, 64), (B, P).
        places: In how many of 64 places their hashes may differ.
        greys: How far apart their thumbnails may be, root mean square.
        rows: How many of the first at a time; so many times B is what has to fit in memory.

    Yields:
        Positions in the first, in the second, and the thumbnails' distances.
    """
    middle = np.float32(127.5)  # small numbers lose less in the sum of the three products
    theirs = second[1] - middle
    lengths = (theirs**2).sum(axis=1)
    for start in range(0, len(first[0]), rows):
        signs, ours = first[0][start : start + rows], first[1][start : start + rows] - middle
        alike = signs @ second[0].T >= 64 - 2 * places - 0.5
        squares = ours @ theirs.T
        squares *= -2
        squares += lengths
        squares += (ours**2).sum(axis=1)[:, None]
        alike &= squares <= greys**2 * theirs.shape[1]
        i, j = np.nonzero(alike)
        yield i + start, j, np.sqrt(np.maximum(squares[i, j], 0) / theirs.shape[1])
