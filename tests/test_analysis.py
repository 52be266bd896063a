"""Calibration, mistakes, pairs of runs and like images, each against a figure worked out by hand."""

from math import comb

import numpy as np
import pytest

from resnetlab import analysis
from resnetlab.errors import ResNetLabError
from resnetlab.metrics import Predictions, calibration_error, cross_entropy


def predictions(logits: object, labels: object = None, classes: str = "abc", prefix: str = "image") -> Predictions:
    values = np.asarray(logits, dtype=np.float32)
    return Predictions(
        logits=values,
        classes=tuple(classes),
        names=tuple(f"{prefix} {i}" for i in range(len(values))),
        labels=None if labels is None else np.asarray(labels, dtype=np.int64),
    )


def noisy(n: int, *, sharp: float, seed: int = 0) -> Predictions:
    """Predictions whose true probabilities are those of ``sharp`` = 1; a larger one is too sure of itself."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (n, 3))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (generator.random((n, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=2)
    return predictions(sharp * logits, labels)


def loss(p: Predictions) -> float:
    return float(cross_entropy(p.logits, analysis.truth(p)).mean())


@pytest.mark.parametrize("sharp", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_was_done_to_the_logits_and_lowers_the_loss(sharp: float) -> None:
    fitted, other = noisy(4000, sharp=sharp), noisy(4000, sharp=sharp, seed=1)
    t = analysis.fit_temperature(fitted)
    assert t == pytest.approx(sharp, rel=0.1)
    after = analysis.at_temperature(other, t)
    assert loss(after) <= loss(other) + 1e-3
    assert (analysis.called(after) == analysis.called(other)).all()
    if sharp != 1:
        assert loss(after) < loss(other) - 0.05
        assert calibration_error(after) < calibration_error(other) / 3


def test_the_bins_add_up_to_the_calibration_error() -> None:
    p = noisy(500, sharp=2.0)
    bins = analysis.reliability(p)
    assert len(bins) == 15 and sum(b.n for b in bins) == 500
    gap = sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / 500
    assert gap == pytest.approx(calibration_error(p), abs=1e-6)
    sure = analysis.reliability(predictions([[100, 0, 0]], [0]))
    assert (sure[-1].n, sure[-1].accuracy) == (1, 1.0)  # a confidence of exactly 1 is in the last bin


def test_mistakes_come_by_loss_and_uncertain_answers_by_their_lead() -> None:
    p = predictions([[5, 0, 0], [1, 0, 0], [0, 9, 0], [0.1, 0, 0]], [0, 1, 2, 0])
    assert analysis.mistakes(p).tolist() == [2, 1]
    assert analysis.least_certain(p).tolist() == [3, 1, 0, 2]
    assert analysis.mistakes(predictions([[1, 0, 0]], [0])).tolist() == []
    assert analysis.least_certain(predictions([[1.0]], [0], classes="a")).tolist() == []


def test_confused_pairs_leave_out_the_diagonal() -> None:
    confusion = np.array([[8, 2, 0], [0, 5, 0], [2, 0, 2]])
    found = [(p.true, p.predicted, p.n, p.share) for p in analysis.confused_pairs(confusion)]
    assert found == [(2, 0, 2, 0.5), (0, 1, 2, 0.2)]


def votes(right: list[bool], prefix: str = "image") -> Predictions:
    return predictions([[1, 0, 0] if r else [0, 1, 0] for r in right], [0] * len(right), prefix=prefix)


def test_mcnemars_test_is_the_exact_binomial_one() -> None:
    one = votes([True] * 20 + [True] * 10 + [False] * 2 + [False] * 5)
    two = votes([True] * 20 + [False] * 10 + [True] * 2 + [False] * 5)
    found = analysis.mcnemar(one, two)
    assert (found.n, found.both, found.only_first, found.only_second) == (37, 20, 10, 2)
    by_hand = 2 * sum(comb(12, k) for k in range(3)) / 2**12
    assert found.p == pytest.approx(by_hand) == pytest.approx(0.0385742, abs=1e-6)
    assert analysis.mcnemar(two, one).p == pytest.approx(found.p)
    assert analysis.mcnemar(one, one).p == 1.0
    assert analysis.sign_test(6, 6) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (votes([True] * 2), "3 images, the other on 2"),
        (votes([True] * 3, prefix="photo"), "different names, the first of them image 0 and photo 0"),
        (predictions([[1, 0, 0]] * 3, [0, 0, 2]), "1 images have different labels, the first image 2: a and c"),
    ],
)
def test_mcnemars_test_refuses_other_images(other: Predictions, words: str) -> None:
    with pytest.raises(ResNetLabError, match=words):
        analysis.mcnemar(votes([True] * 3), other)


def test_classes_are_matched_by_name_not_by_position() -> None:
    one = predictions([[1, 0, 0], [0, 1, 0]], [0, 1], classes="abc")
    two = predictions([[0, 0, 1], [0, 1, 0]], [2, 1], classes="cba")
    assert analysis.mcnemar(one, two).both == 2


def test_holms_correction() -> None:
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert analysis.holm([0.6, 0.7]) == [1.0, 1.0]
    assert analysis.holm([]) == []


def test_images_that_look_alike_are_found_whatever_the_chunks() -> None:
    generator = np.random.default_rng(0)
    first = analysis.difference_hash(generator.random((40, 8, 9)).astype(np.float32))
    changed = first[[3, 17, 30, 31]].copy()
    changed[0, :2] *= -1
    changed[1, :7] *= -1
    thumbnails = generator.integers(0, 250, (40, 256)).astype(np.float32)
    others = thumbnails[[3, 17, 30, 31]] + np.array([[0], [0], [5], [9]], dtype=np.float32)
    for rows in (1, 7, 512):
        found = list(analysis.near((first, thumbnails), (changed, others), 6, 7.5, rows=rows))
        one, two, apart = (np.concatenate(part) for part in zip(*found, strict=True))
        assert (one.tolist(), two.tolist()) == ([3, 30], [0, 2])
        assert apart == pytest.approx([0, 5], abs=0.05)
    assert not list(analysis.near((first[:0], thumbnails[:0]), (changed, others), 6, 7.5))
