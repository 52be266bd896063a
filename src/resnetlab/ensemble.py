"""Several trained networks as one: means of their answers, or the mean of their weights.

The result is an ordinary bundle. To add a way: a function and a row in `RULES`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnetlab import models, runtime
from resnetlab.bundle import Bundle
from resnetlab.errors import ResNetLabError, UsageError, unknown
from resnetlab.metrics import Predictions
from resnetlab.models import Combine, Member

LEAST = 1e-6
"""A fitted weight below this is 0."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a rule may ask for beyond the networks; nothing is read before it asks."""

    val: Callable[[], Sequence[Predictions]]
    """Returns each network's predictions of one validation split that none was trained on, each over its own
    classes."""
    batches: Callable[[], Iterable[Tensor]]
    """Returns one pass over the training images as the first network read them: (B, C, S, S), augmented."""


Rule = Callable[[Sequence[Bundle], Material], Bundle]


def probabilities(bundles: Sequence[Bundle], material: Material) -> Bundle:
    """Average the probabilities, all networks alike."""
    return _join(bundles, "probabilities", [1 / len(bundles)] * len(bundles))


def logits(bundles: Sequence[Bundle], material: Material) -> Bundle:
    """Average the logits, all networks alike: a confident network counts for more than in the mean probability."""
    return _join(bundles, "logits", [1 / len(bundles)] * len(bundles))


def weighted(bundles: Sequence[Bundle], material: Material) -> Bundle:
    """Average the probabilities with the weights that make the validation loss smallest."""
    predictions = material.val()
    labels = predictions[0].labels
    assert labels is not None
    first = bundles[0].card.classes
    aligned = [p.probabilities()[:, [p.classes.index(name) for name in first]] for p in predictions]
    return _join(bundles, "probabilities", fit_weights(np.stack(aligned), labels))


def soup(bundles: Sequence[Bundle], material: Material) -> Bundle:
    """Average the weights: one network, no slower than each (Wortsman et al. 2022, uniform soup).

    The statistics of batch norm belong to no mean of weights; they are measured anew on one pass over the training
    images. It helps where the networks started from the same trained weights; those trained apart, from different
    seeds, lie in different valleys, and their mean on the ridge between.
    """
    first = bundles[0]
    model = models.build(first.card.model)
    states = [bundle.model.state_dict() for bundle in bundles]
    models.load_state(model, {name: _mean([state[name] for state in states]) for name in states[0]}, "the soup")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        torch.optim.swa_utils.update_bn((images.cpu() for images in material.batches()), model)
    card = first.card.model_copy(update=_told(bundles))
    return Bundle(model=model.eval(), card=card, path=Path())


RULES: dict[str, Rule] = {"probabilities": probabilities, "logits": logits, "weighted": weighted, "soup": soup}
"""Every way of making one of several, by its name."""


def combine(bundles: Sequence[Bundle], how: str, material: Material) -> Bundle:
    """Make one of several trained networks. Its classes, data and preprocessing are the first's.

    The members of an ensemble may differ in architecture, in mean and standard deviation of the preprocessing, and in
    the order of their classes; those of a soup only in their weights.

    Returns:
        A bundle without a file yet, and without scores.

    Raises:
        UsageError, ResNetLabError: As `check`; or the rule needs data that is not there.
    """
    check(bundles, how)
    return RULES[how](bundles, material)


def check(bundles: Sequence[Bundle], how: str) -> None:
    """Make sure that networks can be combined so, before any data is read.

    Raises:
        UsageError: There is no such rule, or there are fewer than two networks.
        ResNetLabError: The networks do not go together; the message names the difference.
    """
    if how not in RULES:
        raise unknown("way to combine", how, RULES)
    if len(bundles) < 2:
        raise UsageError("An ensemble takes at least two runs.")
    for bundle in bundles:
        _check(bundles[0], bundle, alike=how == "soup")


def fit_weights(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> list[float]:
    """Return the weights, at least 0 and adding up to 1, whose mean of probabilities has the smallest cross-entropy.

    The problem is convex, so there is one smallest value.

    Args:
        probabilities: (members, N, classes).
        labels: (N,).
    """
    from scipy.optimize import minimize

    true = np.maximum(probabilities[:, np.arange(len(labels)), labels].astype(np.float64), 1e-12)  # (members, N)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        mixed = weights @ true
        return float(-np.log(mixed).mean()), -(true / mixed).mean(axis=1)

    count = len(true)
    found = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-10, "maxiter": 1000},
    )
    weights = np.where(found.x < LEAST, 0.0, found.x)
    return [float(w) for w in weights / weights.sum()]


def _join(bundles: Sequence[Bundle], rule: Combine, weights: Sequence[float]) -> Bundle:
    """Put networks side by side."""
    card = bundles[0].card
    members = tuple(
        Member(
            model=bundle.card.model,
            mean=bundle.card.preprocess.mean,
            std=bundle.card.preprocess.std,
            weight=weight,
            order=_order(card.classes, bundle.card.classes),
            source=str(bundle.path),
        )
        for bundle, weight in zip(bundles, weights, strict=True)
    )
    own = card.preprocess
    model = models.Ensemble([bundle.model for bundle in bundles], members, rule, mean=own.mean, std=own.std)
    card = card.model_copy(update={**_told(bundles), "members": members, "combine": rule})
    return Bundle(model=model.eval(), card=card, path=Path())


def _told(bundles: Sequence[Bundle]) -> dict[str, object]:
    """Return what a joint card says differently from the first one's."""
    data = {**bundles[0].card.data, "runs": [str(bundle.path) for bundle in bundles]}
    return {"metrics": {}, "epoch": 0, "data": data, "versions": runtime.versions()}


def _order(classes: tuple[str, ...], own: tuple[str, ...]) -> tuple[int, ...]:
    return () if own == classes else tuple(own.index(name) for name in classes)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of floating-point tensors, in their type; of counters, the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _check(first: Bundle, other: Bundle, *, alike: bool) -> None:
    """Refuse a network that does not go with the first one, and say why."""
    if other.card.members:
        raise ResNetLabError(f"{other.path} is an ensemble itself. Name the runs that it was made of instead.")
    apart = sorted(set(first.card.classes) ^ set(other.card.classes))
    if apart:
        raise ResNetLabError(
            f"{first.path} and {other.path} know different classes; only one of them knows: {', '.join(apart[:10])}."
        )
    ours, theirs = first.card.preprocess.model_dump(), other.card.preprocess.model_dump()
    if alike:
        ours |= {**first.card.model.model_dump(), "classes": ", ".join(first.card.classes[:10])}
        theirs |= {**other.card.model.model_dump(), "classes": ", ".join(other.card.classes[:10])}
    differ = [key for key in ours if ours[key] != theirs[key] and (alike or key not in ("mean", "std"))]
    if differ:
        what = "Weights can be averaged of one network alone" if alike else "The members read the same images"
        raise ResNetLabError(
            f"{what}, but these runs differ: "
            + "; ".join(f"{key} is {ours[key]} in {first.path} and {theirs[key]} in {other.path}" for key in differ)
            + "."
        )
