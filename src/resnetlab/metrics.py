"""What a run measures: frozen records, and pure functions over them. Numpy only; fractions, never percent."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step, for progress displays."""

    epoch: int
    """From 1."""
    step: int
    """Steps done in this epoch."""
    steps: int
    """Steps in an epoch."""
    images: int
    """Training images seen in this epoch."""
    loss: float
    """Mean per image over the epoch so far."""
    top1: float


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One row of ``metrics.csv``. It holds nothing that a second run of the same seed would not give again."""

    epoch: int
    step: int
    """Optimiser steps done since the start of the run."""
    lr: float
    """Learning rate of the epoch's last step."""
    train_loss: float
    """Mean per image, over the epoch, augmented images, weights as they moved."""
    train_top1: float
    val_loss: float | None = None
    val_top1: float | None = None
    val_top5: float | None = None


@dataclass(frozen=True, kw_only=True)
class TimingRecord:
    """One row of ``timing.csv``: what depends on the machine and the day."""

    epoch: int
    train_seconds: float
    val_seconds: float
    images_per_second: float
    """Training images, over the training part of the epoch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a network said of some images, and the truth where it is known."""

    logits: Floats
    """(N, classes)."""
    classes: tuple[str, ...]
    names: tuple[str, ...]
    """(N,), which image each row is."""
    labels: Ints | None = None
    """(N,), positions in ``classes``."""

    def probabilities(self) -> Floats:
        """Return the softmax of the logits: (N, classes), rows sum to 1."""
        shifted = self.logits - self.logits.max(axis=1, keepdims=True)
        exponential = np.exp(shifted)
        result: Floats = exponential / exponential.sum(axis=1, keepdims=True)
        return result

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """Return, for each image, its ``k`` most probable classes with their probabilities, best first."""
        rows = zip(self.places(k), self.probabilities(), strict=True)
        return [[(self.classes[c], float(p[c])) for c in order] for order, p in rows]

    def places(self, k: int) -> Ints:
        """Return the positions in ``classes`` of the ``k`` most probable ones of each image, best first: (N, k)."""
        order: Ints = np.argsort(-self.logits, axis=1, kind="stable")[:, :k]
        return order


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """Where in an image a network saw its evidence for a class."""

    values: Floats
    """(H, W) at the size that the network reads, 0 (none) to 1 (the most in this image); all 0: none anywhere."""
    pixels: NDArray[np.uint8]
    """(H, W, C), the part of the image that the network read."""
    method: str
    stage: str | None
    """The stage whose feature maps were looked at; None: a method that looks at pixels."""
    target: str
    """The class whose evidence this is."""
    probability: float
    """What the network gives that class."""
    name: str
    """Which image."""


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """How one class fared."""

    name: str
    n: int
    """Images of this class."""
    precision: float
    """Of the images called so, the share that are (0 when none was called so)."""
    recall: float
    """Of the images that are so, the share called so (0 when there are none)."""
    f1: float


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """The score of a network on a labelled split."""

    n: int
    top1: float
    top1_interval: tuple[float, float]
    """95 % interval of ``top1``, Wilson's: see `wilson_interval`."""
    top5: float
    """The truth is among the five most probable classes (always so with five classes or fewer)."""
    loss: float
    """Mean cross-entropy per image, in nats."""
    calibration_error: float
    """Expected calibration error, 15 bins of equal width (Guo et al. 2017)."""
    balanced_accuracy: float
    """Mean recall over the classes that have images."""
    macro_f1: float
    per_class: tuple[ClassScore, ...]
    confusion: Ints = field(repr=False, compare=False)
    """(classes, classes), true class by row, predicted class by column."""

    def to_dict(self) -> dict[str, Any]:
        """Return the score as JSON-able values."""
        return asdict(self) | {"confusion": self.confusion.tolist(), "top1_interval": list(self.top1_interval)}

    def brief(self) -> dict[str, Any]:
        """Return the figures alone, without those of each class, JSON-able."""
        keys = ("n", "top1", "top1_interval", "top5", "loss", "calibration_error", "balanced_accuracy", "macro_f1")
        return {k: v for k, v in self.to_dict().items() if k in keys}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scorecard":
        """Read what `to_dict` returned."""
        return cls(
            **values
            | {
                "confusion": np.array(values["confusion"], dtype=np.int64),
                "top1_interval": tuple(values["top1_interval"]),
                "per_class": tuple(ClassScore(**row) for row in values["per_class"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class RunData:
    """All that a report needs to know of a run. Read from its directory; holds no network."""

    name: str
    title: str
    """What was trained on what."""
    classes: tuple[str, ...]
    epochs: tuple[EpochRecord, ...]
    timing: tuple[TimingRecord, ...] = ()
    score: Scorecard | None = None
    score_split: str = "val"
    """The split that ``score`` was measured on."""


def answers(predictions: Predictions, names: Sequence[str], k: int) -> list[dict[str, Any]]:
    """Return, for each image, its ``k`` most probable classes with their probabilities, JSON-able."""
    rows = []
    for name, best in zip(names, predictions.top(k), strict=True):
        top = [{"class": label, "probability": probability} for label, probability in best]
        rows.append({"file": name, **top[0], "top": top})
    return rows


def score(predictions: Predictions) -> Scorecard:
    """Score labelled predictions.

    Raises:
        ValueError: There are no labels, or no images.
    """
    labels, logits = predictions.labels, predictions.logits
    if labels is None or len(labels) == 0:
        raise ValueError("only labelled predictions of at least one image can be scored")
    confusion = confusion_matrix(labels, predictions.places(1)[:, 0], len(predictions.classes))
    per_class = class_scores(confusion, predictions.classes)
    present = [row for row in per_class if row.n]
    correct = int(np.trace(confusion))
    return Scorecard(
        n=len(labels),
        top1=correct / len(labels),
        top1_interval=wilson_interval(correct, len(labels)),
        top5=top_k(predictions, 5),
        loss=float(cross_entropy(logits, labels).mean()),
        calibration_error=calibration_error(predictions),
        balanced_accuracy=float(np.mean([row.recall for row in present])),
        macro_f1=float(np.mean([row.f1 for row in present])),
        per_class=per_class,
        confusion=confusion,
    )


def cross_entropy(logits: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return the cross-entropy of each image, in nats: (N,)."""
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1)
    log_sum = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    result: NDArray[np.float64] = log_sum - wide[np.arange(len(labels)), labels]
    return result


def top_k(predictions: Predictions, k: int) -> float:
    """Return the share of images whose true class is among the ``k`` most probable."""
    assert predictions.labels is not None
    return float((predictions.places(k) == predictions.labels[:, None]).any(axis=1).mean())


def confusion_matrix(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Count images by true class (row) and predicted class (column)."""
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def class_scores(confusion: Ints, classes: Sequence[str]) -> tuple[ClassScore, ...]:
    """Return precision, recall and F1 of each class."""
    hits, called, there = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return tuple(
        ClassScore(
            name=name,
            n=int(n),
            precision=_ratio(hit, say),
            recall=_ratio(hit, n),
            f1=_ratio(2 * hit, say + n),
        )
        for name, hit, say, n in zip(classes, hits, called, there, strict=True)
    )


def calibration_error(predictions: Predictions, bins: int = 15) -> float:
    """Return the expected calibration error: the mean of |accuracy - confidence| over bins, weighted by their size."""
    assert predictions.labels is not None
    probabilities = predictions.probabilities()
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = predictions.places(1)[:, 0] == predictions.labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def wilson_interval(correct: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of an accuracy (Wilson 1927).

    On average over the accuracies that a network may have it holds the true one as often as it says, for few images
    too (Brown, Cai and DasGupta 2001); and it has a width where all or no images are right, which the bootstrap, that
    can only draw what was seen, gives none.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, more = correct / n, z * z / n
    middle = (share + more / 2) / (1 + more)
    half = z / (1 + more) * math.sqrt(share * (1 - share) / n + more / (4 * n))
    return middle - half if correct else 0.0, middle + half if correct < n else 1.0  # exactly, without rounding


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
