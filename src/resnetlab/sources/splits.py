"""Stratified draws: some of the images of every class, decided by the seed alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resnetlab.errors import ResNetLabError

Indices = NDArray[np.int64]


class TooFew(ResNetLabError):
    """A class has too few images to hold any out."""


def hold_out(
    labels: NDArray[np.int64], share: float, seed: int, classes: Sequence[str] = (), *, instead: str = ""
) -> tuple[Indices, Indices]:
    """Divide the images in two, each class in the same proportion.

    Every class gives the nearest whole number to its share, but at least one image, and keeps at least one. Each
    class is drawn by its own generator, so that a change in one class leaves the others' draws alone.

    Args:
        labels: (N,), the class of each image.
        share: How much to hold out, 0 to 1 (exclusive). 0 holds nothing out.
        seed: Decides which.
        classes: The names, for the error.
        instead: What else can be done about it, for the error.

    Returns:
        Positions kept and positions held out, each in ascending order.

    Raises:
        TooFew: A class has one image only; it is named.
    """
    if share == 0:
        return np.arange(len(labels)), np.arange(0)
    held = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < 2:
            name = classes[label] if classes else str(label)
            raise TooFew(
                f'Class "{name}" has 1 image left, so none can be held out for validation or testing. Add images to '
                "it (3 are the least: one each to train, validate and test), or bring your own val/ and test/ folders"
                f"{instead}."
            )
        mine = np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
        held.append(mine[: min(max(round(share * int(count)), 1), int(count) - 1)])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def subset(labels: NDArray[np.int64], limit: int, seed: int) -> Indices:
    """Draw ``limit`` images, as many from each class as from any other while they last.

    Args:
        labels: (N,), the class of each image.
        limit: How many; all of them when there are no more.
        seed: Decides which.

    Returns:
        Positions in ascending order.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # an image's place among those of its class
    for label in np.unique(labels):
        mine = shuffled[labels[shuffled] == label]
        turn[mine] = np.arange(len(mine))
    order = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return np.sort(order[:limit])
