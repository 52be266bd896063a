"""Scores against scikit-learn, torchmetrics, SciPy and figures worked out by hand."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from resnetlab.metrics import (
    Predictions,
    Scorecard,
    calibration_error,
    class_scores,
    confusion_matrix,
    cross_entropy,
    score,
    top_k,
    wilson_interval,
)


def predictions(logits: object, labels: object, classes: int | None = None) -> Predictions:
    wide = np.asarray(logits, np.float32)
    names = tuple(f"c{i}" for i in range(classes or wide.shape[1]))
    truth = np.asarray(labels, np.int64)
    return Predictions(logits=wide, classes=names, names=tuple(map(str, range(len(wide)))), labels=truth)


@pytest.fixture(params=[2, 3, 10, 101])
def random_predictions(request: pytest.FixtureRequest) -> Predictions:
    classes: int = request.param
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 700)
    return predictions(rng.normal(size=(700, classes)) * 2 + 2 * np.eye(classes)[labels], labels)


def test_scores_agree_with_scikit_learn(random_predictions: Predictions) -> None:
    labels, logits = random_predictions.labels, random_predictions.logits
    assert labels is not None
    got, called, k = score(random_predictions), logits.argmax(axis=1), logits.shape[1]
    every = list(range(k))
    precision, recall, f1, n = sklearn.metrics.precision_recall_fscore_support(
        labels, called, labels=every, zero_division=0
    )
    assert got.n == 700
    assert got.top1 == pytest.approx(sklearn.metrics.accuracy_score(labels, called))
    assert np.array_equal(got.confusion, sklearn.metrics.confusion_matrix(labels, called, labels=every))
    assert [c.precision for c in got.per_class] == pytest.approx(precision)
    assert [c.recall for c in got.per_class] == pytest.approx(recall)
    assert [c.f1 for c in got.per_class] == pytest.approx(f1)
    assert [c.n for c in got.per_class] == n.tolist()
    assert [c.name for c in got.per_class] == list(random_predictions.classes)
    assert got.balanced_accuracy == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, called))
    assert got.macro_f1 == pytest.approx(f1.mean())
    assert got.loss == pytest.approx(sklearn.metrics.log_loss(labels, random_predictions.probabilities(), labels=every))
    if k > 2:  # of two classes, both are among the best two; scikit-learn warns about it
        for best in range(1, k):
            if best < 8:
                expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=best, labels=every)
                assert top_k(random_predictions, best) == pytest.approx(expected)


def test_calibration_and_top5_agree_with_torchmetrics(random_predictions: Predictions) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    labels, k = torch.from_numpy(random_predictions.labels), len(random_predictions.classes)
    probabilities = torch.from_numpy(random_predictions.probabilities())
    expected = multiclass_calibration_error(probabilities, labels, k, n_bins=15, norm="l1")
    assert calibration_error(random_predictions) == pytest.approx(float(expected), abs=1e-6)
    expected = multiclass_accuracy(probabilities, labels, k, average="micro", top_k=min(5, k))
    assert score(random_predictions).top5 == pytest.approx(float(expected))


def test_loss_agrees_with_torch_to_double_precision(random_predictions: Predictions) -> None:
    labels, logits = random_predictions.labels, random_predictions.logits
    assert labels is not None
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(labels), reduction="none"
    )
    assert cross_entropy(logits, labels) == pytest.approx(expected.numpy(), rel=1e-12)


def test_an_example_worked_out_by_hand() -> None:
    """Three of class 0 (two right, one called 1), one of class 1 (called 2), none of class 2."""
    ln2 = math.log(2)
    got = score(predictions([[ln2, 0, 0], [ln2, 0, 0], [0, ln2, 0], [0, 0, ln2]], [0, 0, 0, 1]))
    assert got.confusion.tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert got.top1 == 0.5
    assert got.top5 == 1.0
    assert got.loss == pytest.approx((2 * math.log(2) + 2 * math.log(4)) / 4)  # p = 1/2, 1/2, 1/4, 1/4
    assert [(c.n, c.precision, c.recall, c.f1) for c in got.per_class] == [
        (3, 1.0, pytest.approx(2 / 3), pytest.approx(0.8)),
        (1, 0.0, 0.0, 0.0),
        (0, 0.0, 0.0, 0.0),
    ]
    assert got.balanced_accuracy == pytest.approx(1 / 3)  # of the two classes that have images
    assert got.macro_f1 == pytest.approx(0.4)
    assert got.calibration_error == pytest.approx(0.0, abs=1e-7)  # says 1/2, is right half of the time


def test_an_absent_class_counts_for_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    logits = rng.normal(size=(300, 5)) + 2 * np.eye(5)[labels]
    logits[:, 4] = -100
    four, five = score(predictions(logits[:, :4], labels)), score(predictions(logits, labels))
    assert five.per_class[4].n == 0
    assert (five.balanced_accuracy, five.macro_f1, five.top1) == (four.balanced_accuracy, four.macro_f1, four.top1)


def test_a_class_called_but_absent_lowers_only_the_others() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 300)
    logits = rng.normal(size=(300, 4)) + np.eye(4)[labels]
    f1 = sklearn.metrics.f1_score(labels, logits.argmax(1), labels=[0, 1, 2], average="macro")
    assert score(predictions(logits, labels)).macro_f1 == pytest.approx(f1)


def test_ties_go_to_the_first_class_everywhere() -> None:
    tied = predictions(np.zeros((4, 6)), [0, 1, 4, 5])
    assert tied.places(3).tolist() == [[0, 1, 2]] * 4
    got = score(tied)
    assert (got.top1, got.top5) == (0.25, 0.75)
    assert got.confusion[:, 0].tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("right", [True, False])
def test_one_image(right: bool) -> None:
    got = score(predictions([[3.0, -1.0]], [0 if right else 1]))
    assert (got.n, got.top1, got.balanced_accuracy) == (1, float(right), float(right))
    low, high = got.top1_interval
    assert (low, high) == pytest.approx((0.2065, 1) if right else (0, 0.7935), abs=1e-4)


def test_huge_logits_stay_finite() -> None:
    got = predictions([[1e30, -1e30], [-1e38, 1e38], [88.0, 90.0]], [0, 0, 1])
    assert np.isfinite(got.probabilities()).all()
    assert got.probabilities().sum(axis=1) == pytest.approx(1)
    result = score(got)
    assert result.top1 == pytest.approx(2 / 3)
    assert math.isfinite(result.loss)
    assert result.loss > 1e37


def test_probabilities_are_the_softmax(random_predictions: Predictions) -> None:
    expected = torch.from_numpy(random_predictions.logits).softmax(dim=1).numpy()
    assert random_predictions.probabilities() == pytest.approx(expected, abs=1e-6)
    assert random_predictions.probabilities().dtype == np.float32


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (0, 10), (10, 10), (3, 4), (45, 50), (356, 359), (8278, 10_000)])
def test_interval_is_wilsons(correct: int, n: int) -> None:
    expected = scipy.stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(correct, n)[0] <= correct / n <= wilson_interval(correct, n)[1]


@pytest.mark.parametrize("n", [5, 20, 100])
def test_interval_holds_the_true_accuracy_as_often_as_it_says(n: int) -> None:
    """Exactly, over all counts; on average over all accuracies, the perfect among them."""
    intervals = np.array([wilson_interval(k, n) for k in range(n + 1)])
    accuracies = np.linspace(0.005, 0.995, 199)
    chance = scipy.stats.binom.pmf(np.arange(n + 1)[:, None], n, accuracies)
    inside = (intervals[:, :1] <= accuracies) & (accuracies <= intervals[:, 1:])
    covered = (chance * inside).sum(axis=0)
    assert covered.mean() == pytest.approx(0.95, abs=0.012)
    assert covered.min() > 0.83


def test_interval_narrows_with_n_and_has_a_width_where_all_are_right() -> None:
    wide, narrow = wilson_interval(90, 100), wilson_interval(9000, 10_000)
    assert wide[0] < narrow[0] < 0.9 < narrow[1] < wide[1]
    # the normal approximation at n = 10,000: 0.9 ± 1.96 sqrt(0.9 · 0.1 / 10,000)
    assert narrow == pytest.approx((0.9 - 0.00588, 0.9 + 0.00588), abs=2e-4)
    low, high = wilson_interval(359, 359)
    assert 0.98 < low < 0.99 and high == 1
    assert wilson_interval(0, 359) == pytest.approx((0, 1 - low))


def test_the_most_probable_classes_have_names_and_probabilities() -> None:
    found = predictions([[1.0, 3.0, 2.0], [0.0, 0.0, 9.0]], [1, 2]).top(2)
    assert [[name for name, _ in row] for row in found] == [["c1", "c2"], ["c2", "c0"]]
    assert found[0][0][1] == pytest.approx(0.6652, abs=1e-4)
    assert all(isinstance(probability, float) for row in found for _, probability in row)


def test_calibration_sees_overconfidence() -> None:
    sure_but_half_wrong = predictions([[20.0, 0.0]] * 10, [0, 1] * 5)
    assert calibration_error(sure_but_half_wrong) == pytest.approx(0.5, abs=1e-6)


def test_full_confidence_counts_with_what_is_almost_as_sure() -> None:
    sure_and_wrong, nearly_sure_and_right = [200.0, 0.0], [math.log(19), 0.0]  # 1 and 0.95
    both = predictions([sure_and_wrong, nearly_sure_and_right], [1, 0])
    assert calibration_error(both) == pytest.approx((1 - 0.05) / 2, abs=1e-6)


def test_unlabelled_or_no_images_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="labelled"):
        score(Predictions(logits=np.zeros((1, 2), np.float32), classes=("a", "b"), names=("x",)))
    with pytest.raises(ValueError, match="labelled"):
        score(predictions(np.zeros((0, 2)), []))


def test_classes_and_confusion_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        class_scores(confusion_matrix(np.array([0]), np.array([1]), 2), ["a"])


def test_score_becomes_json_of_plain_numbers() -> None:
    got = json.loads(json.dumps(score(predictions([[1.0, 0.0], [0.0, 1.0]], [0, 0])).to_dict(), allow_nan=False))
    assert got["confusion"] == [[1, 1], [0, 0]]
    assert got["per_class"][0] == {"name": "c0", "n": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert len(got["top1_interval"]) == 2


def test_a_score_survives_json(random_predictions: Predictions) -> None:
    before = score(random_predictions)
    after = Scorecard.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after == before
    assert np.array_equal(after.confusion, before.confusion)


def test_scores_can_be_compared() -> None:
    a, b = (predictions([[1.0, 0.0], [0.0, 1.0]], [0, label]) for label in (0, 1))
    assert score(a) == score(a)
    assert score(a) != score(b)
